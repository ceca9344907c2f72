//! What one source file says about modules: those it declares, the names it defines or imports, and
//! the paths it uses.
//!
//! It is read as tokens, not as a syntax tree: a path is a path wherever it stands, inside a
//! macro's arguments too. Items under `#[cfg(test)]` are left out, and attributes and visibilities
//! (`pub(in crate::x)`) are no uses.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr as _,
};

use anyhow::anyhow;
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// A path as it is written: `crate`, `self` and `super` are segments like others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PathUse {
    pub(super) segments: Vec<String>,
    pub(super) line: usize,
    /// Whether a `pub use` passes it on.
    pub(super) is_export: bool,
}

/// What a module's body says. A file has one, and so has each inline module in it.
#[derive(Debug, Default)]
pub(super) struct Body {
    /// Modules in files of their own, each with the files that a `#[path]` gives it; those of
    /// `cfg_attr` are alternatives.
    pub(super) files: Vec<(String, Vec<String>)>,
    pub(super) inline: Vec<(String, Body)>,
    /// Names that a `use` brings into scope.
    pub(super) aliases: BTreeMap<String, Vec<String>>,
    /// What a `use path::*` takes its names from.
    pub(super) globs: Vec<Vec<String>>,
    /// Items of the module itself.
    pub(super) items: BTreeSet<String>,
    pub(super) uses: Vec<PathUse>,
    /// Lines that say `unsafe`.
    pub(super) unsafe_lines: Vec<usize>,
}

/// Reads a file.
///
/// # Errors
/// When it is no Rust.
pub(super) fn read(text: &str) -> anyhow::Result<Body> {
    let stream = TokenStream::from_str(text).map_err(|error| {
        let line = error.span().start().line;
        anyhow!("line {line}: {error}")
    })?;
    let mut body = Body::default();
    scan(stream, &mut body, true);
    Ok(body)
}

/// Whether a token is this punctuation.
fn is(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

fn word(token: Option<&TokenTree>) -> Option<String> {
    match token {
        Some(TokenTree::Ident(ident)) => Some(ident.to_string()),
        _ => None,
    }
}

fn group(token: Option<&TokenTree>, delimiter: Delimiter) -> Option<&Group> {
    match token {
        Some(TokenTree::Group(group)) if group.delimiter() == delimiter => Some(group),
        _ => None,
    }
}

fn is_separator(tokens: &[TokenTree], at: usize) -> bool {
    is(tokens.get(at), ':') && is(tokens.get(at + 1), ':')
}

/// Reads tokens into `body`. `is_module`: they are a module's own, not those of a function or an
/// expression.
fn scan(stream: TokenStream, body: &mut Body, is_module: bool) {
    let tokens: Vec<TokenTree> = stream.into_iter().collect();
    let mut at = 0;
    let mut paths = Vec::new();
    while at < tokens.len() {
        if is(tokens.get(at), '#') {
            let inner = usize::from(is(tokens.get(at + 1), '!'));
            if let Some(attribute) = group(tokens.get(at + 1 + inner), Delimiter::Bracket) {
                at += 2 + inner;
                match (is_for_tests(attribute), inner) {
                    (true, 0) => {
                        at = end_of_item(&tokens, at);
                        paths.clear();
                    }
                    // `#![cfg(test)]` is about all that follows.
                    (true, _) => return,
                    (false, _) => paths.extend(path_of(attribute.stream())),
                }
                continue;
            }
        }
        at = match word(tokens.get(at)).as_deref() {
            Some("pub") => at + 1 + usize::from(is_scope(tokens.get(at + 1))),
            Some("use") => import(&tokens, at, body),
            Some("mod") => declare(&tokens, at, body, std::mem::take(&mut paths)),
            Some("unsafe") => {
                body.unsafe_lines.push(tokens[at].span().start().line);
                at + 1
            }
            Some(keyword) => {
                if is_module {
                    body.items.extend(defined(keyword, &tokens, at));
                }
                mention(&tokens, at, body)
            }
            None => {
                if let TokenTree::Group(inside) = &tokens[at] {
                    scan(inside.stream(), body, false);
                }
                at + 1
            }
        };
    }
}

/// The brackets behind `pub` in `pub(crate)` and `pub(in crate::x)`.
fn is_scope(token: Option<&TokenTree>) -> bool {
    let inside = group(token, Delimiter::Parenthesis);
    let first = inside.and_then(|inside| word(inside.stream().into_iter().next().as_ref()));
    first.is_some_and(|word| ["crate", "super", "self", "in"].contains(&word.as_str()))
}

/// Whether an attribute is `cfg(test)` or `cfg(all(test, ..))`.
fn is_for_tests(attribute: &Group) -> bool {
    let tokens: Vec<TokenTree> = attribute.stream().into_iter().collect();
    let Some(condition) = group(tokens.get(1), Delimiter::Parenthesis) else {
        return false;
    };
    word(tokens.first()).as_deref() == Some("cfg") && demands_test(condition)
}

fn demands_test(condition: &Group) -> bool {
    let tokens: Vec<TokenTree> = condition.stream().into_iter().collect();
    (0..tokens.len()).any(|at| match word(tokens.get(at)).as_deref() {
        Some("test") => true,
        Some("all") => group(tokens.get(at + 1), Delimiter::Parenthesis).is_some_and(demands_test),
        _ => false,
    })
}

/// The file in `path = "file"`, or in `cfg_attr(condition, path = "file")`.
fn path_of(attribute: TokenStream) -> Option<String> {
    let tokens: Vec<TokenTree> = attribute.into_iter().collect();
    if word(tokens.first()).as_deref() == Some("cfg_attr") {
        let inside = group(tokens.get(1), Delimiter::Parenthesis)?.stream();
        let inside: Vec<TokenTree> = inside.into_iter().collect();
        let mut parts = inside.split(|token| is(Some(token), ','));
        return parts.find_map(|part| path_of(part.iter().cloned().collect()));
    }
    match tokens.as_slice() {
        [name, equals, TokenTree::Literal(file)]
            if word(Some(name)).as_deref() == Some("path") && is(Some(equals), '=') =>
        {
            Some(file.to_string().trim_matches('"').to_owned())
        }
        _ => None,
    }
}

/// The place behind an item, a field or a statement that begins at `at`.
fn end_of_item(tokens: &[TokenTree], mut at: usize) -> usize {
    let mut is_item = false;
    let mut has_value = false;
    while let Some(token) = tokens.get(at) {
        if is(Some(token), '#') && group(tokens.get(at + 1), Delimiter::Bracket).is_some() {
            at += 2;
            continue;
        }
        match word(Some(token)).as_deref() {
            Some("use" | "let" | "const" | "static" | "type") => {
                (is_item, has_value) = (true, true)
            }
            // `const fn` has a body.
            Some("fn") => (is_item, has_value) = (true, false),
            Some("mod" | "struct" | "enum" | "trait" | "impl" | "union" | "macro_rules") => {
                is_item = true;
            }
            _ => {}
        }
        at += 1;
        let is_body = group(Some(token), Delimiter::Brace).is_some() && !has_value;
        if is_body || is(Some(token), ';') || (is(Some(token), ',') && !is_item) {
            break;
        }
    }
    at
}

/// The name that an item's keyword defines.
fn defined(keyword: &str, tokens: &[TokenTree], at: usize) -> Option<String> {
    let next = word(tokens.get(at + 1));
    match keyword {
        "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union" => next,
        "macro_rules" => word(tokens.get(at + 2)),
        _ => None,
    }
}

/// `mod name;` or `mod name { .. }`; anything else that begins so is left alone.
fn declare(tokens: &[TokenTree], at: usize, body: &mut Body, paths: Vec<String>) -> usize {
    let Some(name) = word(tokens.get(at + 1)) else {
        return at + 1;
    };
    if let Some(inside) = group(tokens.get(at + 2), Delimiter::Brace) {
        let mut inner = Body::default();
        scan(inside.stream(), &mut inner, true);
        body.unsafe_lines.append(&mut inner.unsafe_lines);
        body.inline.push((name, inner));
        return at + 3;
    }
    if is(tokens.get(at + 2), ';') {
        body.files.push((name, paths));
    }
    at + 2
}

/// A `use` up to its semicolon.
fn import(tokens: &[TokenTree], at: usize, body: &mut Body) -> usize {
    let before = at.checked_sub(1).and_then(|before| tokens.get(before));
    let is_export = word(before).as_deref() == Some("pub") || is_scope(before);
    let end = (at..tokens.len()).find(|&end| is(tokens.get(end), ';'));
    let end = end.unwrap_or(tokens.len());
    // `impl Trait + use<'a>` is no import.
    if !is(tokens.get(at + 1), '<') {
        tree(&tokens[at + 1..end], &[], is_export, body);
        return end + 1;
    }
    at + 1
}

/// One tree of a `use`, below `prefix`.
fn tree(tokens: &[TokenTree], prefix: &[String], is_export: bool, body: &mut Body) {
    let mut segments = prefix.to_vec();
    // `::name` is another crate's.
    let mut at = if is_separator(tokens, 0) { 2 } else { 0 };
    let line = tokens.first().map_or(0, |token| token.span().start().line);
    while at < tokens.len() {
        if let Some(inside) = group(tokens.get(at), Delimiter::Brace) {
            let inside: Vec<TokenTree> = inside.stream().into_iter().collect();
            for part in inside.split(|token| is(Some(token), ',')) {
                if !part.is_empty() {
                    tree(part, &segments, is_export, body);
                }
            }
            return;
        }
        if is(tokens.get(at), '*') {
            body.globs.push(segments.clone());
            break;
        }
        let Some(name) = word(tokens.get(at)) else {
            return;
        };
        if name == "as" {
            break;
        }
        // `{self}` means what stands before the braces.
        if name != "self" || segments.is_empty() {
            segments.push(name);
        }
        at += 1 + if is_separator(tokens, at + 1) { 2 } else { 0 };
    }
    let renamed = (word(tokens.get(at)).as_deref() == Some("as")).then(|| word(tokens.get(at + 1)));
    let name = renamed.flatten().or_else(|| segments.last().cloned());
    if let Some(name) = name.filter(|_| !is(tokens.get(at), '*')) {
        body.aliases.insert(name, segments.clone());
    }
    body.uses.push(PathUse {
        segments,
        line,
        is_export,
    });
}

/// A path in other code that begins at the word at `at`.
fn mention(tokens: &[TokenTree], at: usize, body: &mut Body) -> usize {
    // What stands behind `::` or `.` begins no path.
    let follows = at >= 2 && is_separator(tokens, at - 2) || at >= 1 && is(tokens.get(at - 1), '.');
    let mut segments = Vec::from_iter(word(tokens.get(at)));
    let mut end = at + 1;
    while is_separator(tokens, end)
        && let Some(next) = word(tokens.get(end + 2))
    {
        segments.push(next);
        end += 3;
    }
    if segments.len() > 1 && !follows {
        body.uses.push(PathUse {
            segments,
            line: tokens[at].span().start().line,
            is_export: false,
        });
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        let body = read(text).unwrap();
        body.uses.iter().map(|it| it.segments.join("::")).collect()
    }

    #[test]
    fn imports_are_taken_apart() {
        let body = read(
            "use crate::{a::{self, B as C}, d};\npub(crate) use super::e::*;\nuse ::std::fmt;\n",
        )
        .unwrap();
        let uses: Vec<_> = body.uses.iter().map(|it| it.segments.join("::")).collect();
        assert_eq!(
            uses,
            [
                "crate::a",
                "crate::a::B",
                "crate::d",
                "super::e",
                "std::fmt"
            ]
        );
        let aliases: Vec<&str> = body.aliases.keys().map(String::as_str).collect();
        assert_eq!(aliases, ["C", "a", "d", "fmt"]);
        assert_eq!(body.globs, [["super", "e"]]);
        assert!(body.uses[3].is_export && !body.uses[0].is_export);
        assert_eq!(body.uses[3].line, 2);
    }

    #[test]
    fn paths_count_wherever_they_stand() {
        let text = "pub(in crate::no) fn f(x: &crate::a::B) -> Vec<super::c::D> {\n\
                    info!(v = crate::e::f(), \"crate::no::g\"); x.y::<crate::h::I>(); }\n\
                    /// crate::no::j\n#[derive(crate::no::K)] struct L;\n";
        let expected = ["crate::a::B", "super::c::D", "crate::e::f", "crate::h::I"];
        assert_eq!(paths(text), expected);
    }

    #[test]
    fn what_is_for_tests_alone_does_not_count() {
        assert!(paths("//! x\n#![cfg(test)]\nuse crate::no;\n").is_empty());
        let text = "#[cfg(test)]\nmod tests { use crate::no; }\n\
                    #[cfg(all(test, not(any(feature = \"x\"))))]\nmod more;\n\
                    #[cfg(test)]\nuse crate::{no, never};\n\
                    #[cfg(test)]\nconst fn f<A, B>() -> A { crate::no::x() }\n\
                    struct S { #[cfg(test)] a: crate::no::A, b: crate::b::B }\n\
                    #[cfg(not(test))]\nuse crate::c::C;\n\
                    #[cfg(any(test, feature = \"std\"))]\nuse crate::d::D;\n";
        // Both of the last two are in the product: `any` does not demand tests.
        let body = read(text).unwrap();
        assert!(body.files.is_empty() && body.inline.is_empty());
        assert_eq!(paths(text), ["crate::b::B", "crate::c::C", "crate::d::D"]);
    }

    #[test]
    fn modules_items_and_unsafe_are_found() {
        let body = read(
            "mod a;\n#[path = \"c.rs\"]\nmod b;\nmod d { unsafe fn x() {} }\npub struct E;\n\
             macro_rules! f { () => {} }\nfn g() { fn h() {} unsafe { i() } }\n\
             #[cfg_attr(unix, path = \"x.rs\")]\n#[cfg_attr(not(unix), path = \"y.rs\")]\nmod e;\n",
        )
        .unwrap();
        assert_eq!(
            body.files,
            [
                ("a".into(), vec![]),
                ("b".into(), vec!["c.rs".into()]),
                ("e".into(), vec!["x.rs".into(), "y.rs".into()]),
            ]
        );
        assert_eq!(body.inline[0].0, "d");
        let items: Vec<&str> = body.items.iter().map(String::as_str).collect();
        assert_eq!(items, ["E", "f", "g"]);
        assert_eq!(body.unsafe_lines, [4, 7]);
    }
}
