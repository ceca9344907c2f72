//! `cargo xtask planted --check`: whether every entry still fits the sources, without building
//! anything.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::Path,
};

use anyhow::Context as _;
use toml_edit::DocumentMut;

use super::{
    fit,
    table::{Bug, Edit, FOLDER},
    target::Target,
};
use crate::workspace::Workspace;

/// What does not fit: an edit's text that is not in its file exactly once, or a test that is not
/// there.
///
/// # Errors
/// When the workspace cannot be read.
pub(super) fn faults(workspace: &Workspace, bugs: &[Bug]) -> anyhow::Result<Vec<String>> {
    let packages = packages(workspace)?;
    let mut faults = Vec::new();
    let mut functions = BTreeMap::new();
    for bug in bugs {
        for file in bug.files() {
            let edits: Vec<&Edit> = bug.edits.iter().filter(|it| it.file == file).collect();
            let fits = workspace
                .read(file)
                .and_then(|source| fit::replaced(&source, &edits).map(drop));
            if let Err(error) = fits {
                faults.push(format!("{FOLDER}: {}: {error:#}", bug.name));
            }
        }
        if !has_test(workspace, &packages, &mut functions, &bug.target)? {
            let Target { package, name, .. } = &bug.target;
            faults.push(format!(
                "{FOLDER}: {}: {package} has no test {name}",
                bug.name
            ));
        }
    }
    Ok(faults)
}

/// The folder of each package of the workspace.
fn packages(workspace: &Workspace) -> anyhow::Result<BTreeMap<String, String>> {
    let mut packages = BTreeMap::new();
    for member in members(&workspace.read("Cargo.toml")?)? {
        let manifest = Path::new(&member).join("Cargo.toml");
        let document: DocumentMut = workspace.read(&manifest)?.parse()?;
        let name = document["package"]["name"].as_str();
        let name = name.with_context(|| format!("{} names no package", manifest.display()))?;
        packages.insert(name.to_owned(), member);
    }
    Ok(packages)
}

fn members(manifest: &str) -> anyhow::Result<Vec<String>> {
    let document: DocumentMut = manifest.parse()?;
    let members = document["workspace"]["members"].as_array();
    let members = members.context("Cargo.toml has no list of members")?;
    let text = |member: &toml_edit::Value| member.as_str().map(str::to_owned);
    Ok(members.iter().filter_map(text).collect())
}

/// Whether the package defines a function of the test's name. `known` keeps the functions of each
/// package.
fn has_test(
    workspace: &Workspace,
    packages: &BTreeMap<String, String>,
    known: &mut BTreeMap<String, BTreeSet<String>>,
    target: &Target,
) -> anyhow::Result<bool> {
    let Some(folder) = packages.get(&target.package) else {
        return Ok(false);
    };
    let functions = match known.entry(target.package.clone()) {
        Entry::Occupied(there) => there.into_mut(),
        Entry::Vacant(place) => {
            let mut functions = BTreeSet::new();
            for file in workspace.files(&[folder], &[".rs"])? {
                functions.extend(functions_of(&workspace.read(file)?).map(str::to_owned));
            }
            place.insert(functions)
        }
    };
    Ok(functions.contains(target.function()))
}

fn functions_of(source: &str) -> impl Iterator<Item = &str> {
    let name = |rest: &'_ str| rest.find(|c: char| !c.is_alphanumeric() && c != '_');
    source
        .split("fn ")
        .skip(1)
        .filter_map(move |rest| rest.get(..name(rest)?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::table, *};

    #[test]
    fn what_no_longer_fits_is_named() {
        let scratch = slat_test_dir::TestDir::new();
        let root = scratch.path().to_owned();
        let put = |file: &str, text: &str| {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("Cargo.toml", "[workspace]\nmembers = [\"a\"]\n");
        put("a/Cargo.toml", "[package]\nname = \"p\"\n");
        put("a/src/lib.rs", "fn f() { one(); two(); two(); }\n");
        put("a/tests/t.rs", "mod m { #[test] fn it_works() {} }\n");
        let workspace = Workspace { root };
        let said = |find: &str, file: &str, test: &str| {
            let text = format!(
                "[[bug]]\nname = \"b\"\nwhat = \"w\"\ntest = \"-p p --test t {test}\"\n[[bug.edit]]\nfile = \"{file}\"\nfind = \"{find}\"\nreplace = \"\"\n"
            );
            let bugs = table::parse(Path::new("x.toml"), &text).unwrap();
            faults(&workspace, &bugs).unwrap().join("\n")
        };
        let (good, test) = ("a/src/lib.rs", "m::it_works");
        assert_eq!(said("one();", good, test), "");
        let twice = said("two();", good, test);
        assert_eq!(twice, "tests/planted: b: 2 times in a/src/lib.rs: two();");
        assert!(said("three", good, test).contains(" b: 0 times in a/src/lib.rs"));
        assert!(said("one", "a/src/gone.rs", test).contains("reading a/src/gone.rs"));
        let other = said("one();", good, "m::it_work");
        assert_eq!(other, "tests/planted: b: p has no test m::it_work");
    }
}
