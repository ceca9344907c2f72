//! `structure.toml`, read strictly: which crate may know which, the layers inside a crate, where
//! `unsafe` may stand, how long things may be, and the exceptions.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context as _, anyhow, bail};
use toml_edit::{DocumentMut, Item, Table};

use super::layers::Lists;
use crate::workspace::Workspace;

/// Where it is.
pub(super) const FILE: &str = "structure.toml";

/// All of it.
#[derive(Debug)]
pub(super) struct Structure {
    pub(super) max_lines: usize,
    pub(super) max_comment_columns: usize,
    pub(super) crates: BTreeMap<String, Layout>,
    /// Files and folders (ending in `/`) that may say `unsafe`, with the reason.
    pub(super) may_be_unsafe: BTreeMap<String, String>,
    pub(super) known: BTreeMap<String, usize>,
}

/// One crate.
#[derive(Debug)]
pub(super) struct Layout {
    /// `src/lib.rs` or `src/main.rs`, from the workspace's root.
    pub(super) root: PathBuf,
    /// Which of our crates it may ask for; `None`: any.
    pub(super) may_use: Option<Vec<String>>,
    /// And which its integration tests may ask for besides.
    pub(super) tests_may_use: Vec<String>,
    /// All that may be linked into it; `None`: anything.
    pub(super) may_link: Option<Vec<String>>,
    /// Layers, bottom first, of the crate's root and of folders.
    pub(super) lists: Lists,
}

impl Structure {
    /// The workspace's.
    ///
    /// # Errors
    /// When it cannot be read, or is not as it must be.
    pub(super) fn of(workspace: &Workspace) -> anyhow::Result<Self> {
        Self::parse(&workspace.read(FILE)?).context(FILE)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let document: DocumentMut = text.parse()?;
        let root = document.as_table();
        only(root, &["files", "crates", "unsafe", "known"])?;
        let files = table(root, "files")?;
        only(files, &["max-lines", "max-comment-columns"])?;
        let mut crates = BTreeMap::new();
        for (name, item) in table(root, "crates")? {
            let layout = item.as_table().ok_or_else(|| anyhow!("no table"));
            let layout = layout.and_then(Layout::parse);
            crates.insert(
                name.to_owned(),
                layout.with_context(|| format!("crate {name}"))?,
            );
        }
        let mut may_be_unsafe = BTreeMap::new();
        for (place, why) in table(root, "unsafe")? {
            let why = why.as_str().filter(|why| !why.is_empty());
            let why = why.with_context(|| format!("unsafe: {place}: no reason"))?;
            may_be_unsafe.insert(place.to_owned(), why.to_owned());
        }
        let mut known = BTreeMap::new();
        for (key, item) in table(root, "known")? {
            known.insert(
                key.to_owned(),
                count(item)
                    .filter(|count| *count > 0)
                    .with_context(|| format!("known: {key}: no count"))?,
            );
        }
        Ok(Self {
            max_lines: number(files, "max-lines")?,
            max_comment_columns: number(files, "max-comment-columns")?,
            crates,
            may_be_unsafe,
            known,
        })
    }
}

impl Layout {
    fn parse(layout: &Table) -> anyhow::Result<Self> {
        only(
            layout,
            &[
                "root",
                "may-use",
                "tests-may-use",
                "may-link",
                "modules",
                "folders",
            ],
        )?;
        let root = layout.get("root").and_then(Item::as_str);
        let mut lists = Lists::new();
        if let Some(modules) = names(layout, "modules")? {
            lists.insert(String::new(), modules);
        }
        if layout.contains_key("folders") {
            let folders = table(layout, "folders")?;
            for (folder, _) in folders {
                let list = names(folders, folder)?.unwrap_or_default();
                lists.insert(folder.to_owned(), list);
            }
        }
        Ok(Self {
            root: root.context("no `root`")?.into(),
            may_use: names(layout, "may-use")?,
            tests_may_use: names(layout, "tests-may-use")?.unwrap_or_default(),
            may_link: names(layout, "may-link")?,
            lists,
        })
    }
}

/// The text with exceptions lowered to what is there; what is not there any more goes.
pub(super) fn lowered(text: &str, counts: &BTreeMap<&str, usize>) -> String {
    let mut is_known = false;
    let mut lines = String::new();
    for line in text.lines() {
        if line.starts_with('[') {
            is_known = line == "[known]";
        }
        let entry = line
            .strip_prefix('"')
            .and_then(|rest| rest.split_once("\" = "));
        let lower = entry.filter(|_| is_known).and_then(|(key, rest)| {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let excused: usize = rest[..digits].parse().ok()?;
            let there = counts.get(key).copied().unwrap_or(0);
            (there < excused)
                .then(|| (there > 0).then(|| format!("\"{key}\" = {there}{}", &rest[digits..])))
        });
        let line = match lower {
            None => Some(line.to_owned()),
            Some(line) => line,
        };
        if let Some(line) = line {
            lines += &line;
            lines.push('\n');
        }
    }
    lines
}

fn count(item: &Item) -> Option<usize> {
    item.as_integer().and_then(|count| count.try_into().ok())
}

fn number(table: &Table, key: &str) -> anyhow::Result<usize> {
    let found = table.get(key).and_then(count);
    found.with_context(|| format!("no number `{key}`"))
}

fn table<'a>(parent: &'a Table, key: &str) -> anyhow::Result<&'a Table> {
    let found = parent.get(key).and_then(Item::as_table);
    found.with_context(|| format!("no table [{key}]"))
}

/// A list of names, if there is one.
fn names(table: &Table, key: &str) -> anyhow::Result<Option<Vec<String>>> {
    let Some(item) = table.get(key) else {
        return Ok(None);
    };
    let array = item
        .as_array()
        .with_context(|| format!("`{key}` is no list"))?;
    let text = |value: &toml_edit::Value| value.as_str().map(str::to_owned);
    let names: Option<Vec<String>> = array.iter().map(text).collect();
    names
        .with_context(|| format!("`{key}` lists more than names"))
        .map(Some)
}

fn only(table: &Table, known: &[&str]) -> anyhow::Result<()> {
    match table.iter().find(|(key, _)| !known.contains(key)) {
        Some((key, _)) => bail!("unknown key `{key}`; known are {known:?}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
[files]
max-lines = 600
max-comment-columns = 100
[crates.a]
root = "a/src/lib.rs"
may-use = ["b"]
modules = ["x", "y"]
[crates.a.folders]
"x::z" = ["v", "w"]
[unsafe]
"a/src/x/" = "mappings"
[known]
"a::x -> a::y" = 3 # until they part
"gone" = 1
"#;

    #[test]
    fn a_table_is_read_and_what_it_does_not_know_is_refused() {
        let structure = Structure::parse(TEXT).unwrap();
        assert_eq!(structure.max_lines, 600);
        let layout = &structure.crates["a"];
        assert_eq!(layout.may_use.as_deref(), Some(&["b".to_owned()][..]));
        assert!(layout.may_link.is_none());
        assert_eq!(layout.lists[""], ["x", "y"]);
        assert_eq!(layout.lists["x::z"], ["v", "w"]);
        assert_eq!(structure.known["a::x -> a::y"], 3);
        for (from, to) in [
            ("max-lines", "most-lines"),
            ("may-use", "uses"),
            ("[\"b\"]", "[1]"),
            ("\"mappings\"", "\"\""),
            ("\"gone\" = 1", "\"gone\" = 0"),
        ] {
            assert!(Structure::parse(&TEXT.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn exceptions_are_lowered_and_never_raised() {
        let text = lowered(TEXT, &BTreeMap::from([("a::x -> a::y", 2)]));
        let expected = TEXT.replace("= 3 #", "= 2 #").replace("\"gone\" = 1\n", "");
        assert_eq!(text, expected);
        let text = lowered(TEXT, &BTreeMap::from([("a::x -> a::y", 9), ("gone", 1)]));
        assert_eq!(text, TEXT);
    }
}
