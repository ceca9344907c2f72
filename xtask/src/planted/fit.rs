//! Finding a text in a source, and putting another in its place.
//!
//! White space and line comments do not count, and words are whole: `find` may be indented and
//! wrapped as the table likes, and an entry still fits after its source was re-indented or its
//! comments were rewritten. What is found keeps its bytes' places in the source, so that everything
//! around it stays as it was.

use std::ops::Range;

use anyhow::bail;

use super::table::Edit;

/// A text without what does not count: each byte that is left with its place.
struct Squeezed {
    bytes: Vec<u8>,
    places: Vec<usize>,
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

impl Squeezed {
    fn of(text: &str) -> Self {
        let text = text.as_bytes();
        let (mut bytes, mut places): (Vec<u8>, Vec<usize>) = (Vec::new(), Vec::new());
        let mut gap = false;
        let mut at = 0;
        while let Some(&byte) = text.get(at) {
            if byte.is_ascii_whitespace() {
                gap = true;
                at += 1;
            } else if text[at..].starts_with(b"//") {
                gap = true;
                let rest = &text[at..];
                at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
            } else {
                // A space counts only where it keeps two words from being one.
                if gap && is_word(byte) && bytes.last().copied().is_some_and(is_word) {
                    bytes.push(b' ');
                    places.push(at - 1);
                }
                gap = false;
                bytes.push(byte);
                places.push(at);
                at += 1;
            }
        }
        Self { bytes, places }
    }

    /// Whether a word goes on across the boundary before byte `at`.
    fn is_inside_word(&self, at: usize) -> bool {
        let word = |at: usize| self.bytes.get(at).copied().is_some_and(is_word);
        at > 0 && word(at - 1) && word(at)
    }
}

/// Each place of a text in a source.
fn places(source: &Squeezed, find: &str) -> Vec<Range<usize>> {
    let wanted = Squeezed::of(find).bytes;
    let (Some(&first), Some(&last)) = (wanted.first(), wanted.last()) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for begin in 0..source.bytes.len() {
        let end = begin + wanted.len();
        if source.bytes[begin] != first || source.bytes.get(begin..end) != Some(&wanted[..]) {
            continue;
        }
        let cut = is_word(first) && source.is_inside_word(begin)
            || is_word(last) && source.is_inside_word(end);
        if !cut {
            found.push(source.places[begin]..source.places[end - 1] + 1);
        }
    }
    found
}

/// The source of a file with the edits that are for it, each of which must be found exactly once.
///
/// # Errors
/// Says how often the text of an edit is found instead, or which two edits meet.
pub(super) fn replaced(source: &str, edits: &[&Edit]) -> anyhow::Result<String> {
    let squeezed = Squeezed::of(source);
    let mut changes = Vec::new();
    for edit in edits {
        match &places(&squeezed, &edit.find)[..] {
            [place] => changes.push((place.clone(), edit.replace.as_str())),
            places => bail!(
                "{} times in {}: {}",
                places.len(),
                edit.file,
                edit.find.trim()
            ),
        }
    }
    changes.sort_by_key(|(place, _)| place.start);
    for pair in changes.windows(2) {
        if pair[0].0.end > pair[1].0.start {
            bail!("two edits meet: {}", &source[pair[0].0.clone()]);
        }
    }
    let mut text = source.to_owned();
    for (place, with) in changes.into_iter().rev() {
        text.replace_range(place, with);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "fn a() {\n    // Why it is so.\n    let x = f(1,\n        2); // here\n    g(x);\n}\nlet unchanged, changed,\n";

    fn edit(find: &str, replace: &str) -> Edit {
        Edit {
            file: "a.rs".into(),
            find: find.into(),
            replace: replace.into(),
        }
    }

    #[test]
    fn white_space_and_comments_do_not_count() {
        let source = Squeezed::of(SOURCE);
        for find in [
            "let x = f(1, 2);",
            "\n  let x = f( 1,2 );\n",
            "{ let x = f(1, 2); // another reason\n g(x); }",
        ] {
            assert_eq!(places(&source, find).len(), 1, "{find}");
        }
        assert!(places(&source, "letx = f(1, 2);").is_empty());
        assert!(places(&source, " // only a comment\n").is_empty());
    }

    #[test]
    fn words_are_whole() {
        let source = Squeezed::of(SOURCE);
        assert_eq!(places(&source, "changed,").len(), 1);
        assert!(places(&source, "unchange").is_empty());
        assert_eq!(places(&source, "g(").len(), 1);
    }

    #[test]
    fn edits_are_made_together_and_nothing_else_changes() {
        let (one, two) = (edit("g(x);", ""), edit("f(1, 2)", "h"));
        let text = replaced(SOURCE, &[&one, &two]).unwrap();
        assert_eq!(
            text,
            SOURCE.replace("g(x);", "").replace("f(1,\n        2)", "h")
        );
    }

    #[test]
    fn a_text_that_is_not_there_once_is_told_with_how_often_it_is() {
        let error = replaced(SOURCE, &[&edit("x", "y")]).unwrap_err();
        assert_eq!(error.to_string(), "2 times in a.rs: x");
        let error = replaced(SOURCE, &[&edit("gone", "y")]).unwrap_err();
        assert_eq!(error.to_string(), "0 times in a.rs: gone");
        let (one, two) = (edit("let x =", ""), edit("x = f(", ""));
        assert!(replaced(SOURCE, &[&one, &two]).is_err());
    }
}
