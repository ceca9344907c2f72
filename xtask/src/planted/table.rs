//! The table of planted bugs: `tests/planted/*.toml`, read strictly.
//!
//! A key that is missing, misspelt or of another type is an error, as is a name that two bugs
//! share: what is silently left out of an entry would silently not be planted.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, anyhow, bail};
use toml_edit::{DocumentMut, Item, Table};

use super::target::Target;
use crate::workspace::Workspace;

/// Where the tables are.
pub(crate) const FOLDER: &str = "tests/planted";

/// A bug that can be planted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bug {
    pub(super) name: String,
    /// The test that must fail.
    pub(super) target: Target,
    /// That test does not end before its bound.
    pub(super) hangs: bool,
    pub(super) edits: Vec<Edit>,
}

/// One text of one file, and what takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Edit {
    pub(super) file: String,
    pub(super) find: String,
    pub(super) replace: String,
}

impl Bug {
    /// The files that are edited, each once.
    pub(super) fn files(&self) -> BTreeSet<&str> {
        self.edits.iter().map(|edit| edit.file.as_str()).collect()
    }
}

/// All bugs, by name.
///
/// # Errors
/// When a table cannot be read, or two bugs share a name.
pub(super) fn all(workspace: &Workspace) -> anyhow::Result<Vec<Bug>> {
    let mut bugs = Vec::new();
    for path in workspace.files(&[FOLDER], &[".toml"])? {
        bugs.extend(parse(&path, &workspace.read(&path)?)?);
    }
    bugs.sort_by(|a, b| a.name.cmp(&b.name));
    for pair in bugs.windows(2) {
        if pair[0].name == pair[1].name {
            bail!("{FOLDER}: two bugs are called {}", pair[0].name);
        }
    }
    Ok(bugs)
}

/// The bugs of one table.
///
/// # Errors
/// When it is not as the module's head says.
pub(super) fn parse(path: &Path, text: &str) -> anyhow::Result<Vec<Bug>> {
    let place = || path.display().to_string();
    let document: DocumentMut = text.parse().with_context(place)?;
    only(document.as_table(), &["bug"]).with_context(place)?;
    tables(document.as_table(), "bug")
        .with_context(place)?
        .into_iter()
        .map(|table| {
            let name = table.get("name").and_then(Item::as_str).unwrap_or("?");
            bug(table).with_context(|| format!("{}: {name}", path.display()))
        })
        .collect()
}

fn bug(table: &Table) -> anyhow::Result<Bug> {
    only(table, &["name", "what", "test", "hangs", "edit"])?;
    let what = text(table, "what")?;
    if what.trim().is_empty() {
        bail!("`what` says nothing");
    }
    let edits = tables(table, "edit")?
        .into_iter()
        .map(edit)
        .collect::<anyhow::Result<Vec<_>>>()?;
    let hangs = match table.get("hangs") {
        None => false,
        Some(item) => item.as_bool().context("`hangs` is no boolean")?,
    };
    Ok(Bug {
        name: text(table, "name")?,
        target: Target::parse(&text(table, "test")?)?,
        hangs,
        edits,
    })
}

fn edit(table: &Table) -> anyhow::Result<Edit> {
    only(table, &["file", "find", "replace"])?;
    Ok(Edit {
        file: text(table, "file")?,
        find: text(table, "find")?,
        replace: text(table, "replace")?,
    })
}

fn text(table: &Table, key: &str) -> anyhow::Result<String> {
    let found = table.get(key).and_then(Item::as_str);
    found
        .map(str::to_owned)
        .ok_or_else(|| anyhow!("no text `{key}`"))
}

/// The tables of an array that has at least one.
fn tables<'a>(table: &'a Table, key: &str) -> anyhow::Result<Vec<&'a Table>> {
    let found = table.get(key).and_then(Item::as_array_of_tables);
    found
        .map(|tables| tables.iter().collect())
        .ok_or_else(|| anyhow!("no [[{key}]]"))
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

    const ONE: &str = r#"
        [[bug]]
        name = "27-x"
        what = "Breaks x."
        test = "-p slat-arch --test history a::b"
        [[bug.edit]]
        file = "mmu/src/a.rs"
        find = 'one'
        replace = ''
        [[bug.edit]]
        file = "mmu/src/a.rs"
        find = 'two'
        replace = 'three'
    "#;

    fn read(text: &str) -> anyhow::Result<Vec<Bug>> {
        parse(Path::new("x.toml"), text)
    }

    #[test]
    fn a_bug_has_its_edits_and_its_test() {
        let bugs = read(ONE).unwrap();
        assert_eq!((bugs[0].name.as_str(), bugs[0].hangs), ("27-x", false));
        assert_eq!(bugs[0].edits[1].replace, "three");
        assert_eq!(bugs[0].files().len(), 1);
        let hanging = ONE.replace("what =", "hangs = true\nwhat =");
        assert!(read(&hanging).unwrap()[0].hangs);
    }

    #[test]
    fn what_is_wrong_with_an_entry_is_said_with_its_name() {
        for (from, to, why) in [
            ("find = 'one'", "", "no text `find`"),
            ("replace = ''", "replace = ''\nand = 1", "unknown key `and`"),
            ("Breaks x.", " ", "`what` says nothing"),
            ("--test history", "history", "--lib NAME"),
            ("[[bug.edit]]", "[[bug.edits]]", "unknown key `edits`"),
        ] {
            let error = read(&ONE.replace(from, to)).unwrap_err();
            let said = format!("{error:#}");
            assert!(said.starts_with("x.toml: 27-x: "), "{said}");
            assert!(said.contains(why), "{said}");
        }
        assert!(read("").is_err());
    }
}
