//! The arrows between the modules of one folder.
//!
//! Where `structure.toml` lists a folder's modules, bottom first, each may use only those that
//! stand before it. Everywhere else modules may use each other as they like, but not in a circle. A
//! folder's own file (`mod`, or `lib` and `main` at a crate's root) is one of its modules: unless
//! it is listed it stands on top. That it passes a name on (`pub use`) is no use.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    known::Finding,
    modules::{Modules, Use},
};

/// A folder's own file among its modules.
const OWN: &str = "mod";

/// Listed modules by folder: the path below the crate's root, joined by `::`; the root itself is
/// empty.
pub(super) type Lists = BTreeMap<String, Vec<String>>;

/// One use, seen from the folder in which it is an arrow between two modules.
#[derive(Debug)]
struct Arrow<'a> {
    from: String,
    to: String,
    at: &'a Use,
}

/// What points up, and what runs in a circle.
pub(super) fn findings(crate_name: &str, modules: &Modules, lists: &Lists) -> Vec<Finding> {
    let uses = modules.uses();
    let mut folders: BTreeMap<Vec<String>, Vec<Arrow<'_>>> = BTreeMap::new();
    for at in &uses {
        let shared = at.from.iter().zip(&at.to).take_while(|(a, b)| a == b);
        let depth = shared.count();
        let own = if depth == 0 { modules.root() } else { OWN };
        let name = |path: &[String]| path.get(depth).map_or(own, String::as_str).to_owned();
        let (from, to) = (name(&at.from), name(&at.to));
        if !(at.is_export && from == own) {
            let arrow = Arrow { from, to, at };
            folders
                .entry(at.from[..depth].to_vec())
                .or_default()
                .push(arrow);
        }
    }
    let mut findings = unlisted(crate_name, modules, lists);
    for (folder, arrows) in &folders {
        match lists.get(&folder.join("::")) {
            Some(list) => findings.extend(upward(crate_name, folder, list, arrows)),
            None => findings.extend(circles(crate_name, folder, arrows)),
        }
    }
    // Several names on one line are one import.
    findings.dedup();
    findings
}

/// Modules that a list forgets, and those it lists and that are not there.
fn unlisted(crate_name: &str, modules: &Modules, lists: &Lists) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (folder, list) in lists {
        let path: Vec<String> = folder
            .split("::")
            .filter(|it| !it.is_empty())
            .map(str::to_owned)
            .collect();
        let there = modules.children(&path);
        let place = shown(crate_name, &path, "");
        let own = if path.is_empty() { modules.root() } else { OWN };
        for name in &there {
            if !list.iter().any(|listed| listed == name) {
                let said = format!("structure.toml: {place} has a module {name} that has no layer");
                findings.push(Finding::new(said.clone(), said));
            }
        }
        for name in list {
            if !there.contains(&name.as_str()) && name != own {
                let said = format!("structure.toml: {place} has no module {name}");
                findings.push(Finding::new(said.clone(), said));
            }
        }
    }
    findings
}

/// A module with its crate and folder.
fn shown(crate_name: &str, folder: &[String], name: &str) -> String {
    let parts = [crate_name]
        .into_iter()
        .chain(folder.iter().map(String::as_str));
    let parts = parts.chain([name].into_iter().filter(|name| !name.is_empty()));
    parts.collect::<Vec<_>>().join("::")
}

fn upward(
    crate_name: &str,
    folder: &[String],
    list: &[String],
    arrows: &[Arrow<'_>],
) -> Vec<Finding> {
    // What is not listed is the folder's own file, or was told of by `unlisted`.
    let layer = |name: &str| list.iter().position(|it| it == name).unwrap_or(list.len());
    let points_up = |arrow: &&Arrow<'_>| layer(&arrow.to) >= layer(&arrow.from);
    arrows
        .iter()
        .filter(points_up)
        .map(|arrow| {
            let (from, to) = (
                shown(crate_name, folder, &arrow.from),
                shown(crate_name, folder, &arrow.to),
            );
            let message = format!(
                "{}:{}: module {from} (layer {}) imports module {to} (layer {}) above it",
                arrow.at.file.display(),
                arrow.at.line,
                layer(&arrow.from) + 1,
                layer(&arrow.to) + 1,
            );
            Finding::new(format!("{from} -> {to}"), message)
        })
        .collect()
}

fn circles(crate_name: &str, folder: &[String], arrows: &[Arrow<'_>]) -> Vec<Finding> {
    let mut edges: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for arrow in arrows {
        edges.entry(&arrow.from).or_default().insert(&arrow.to);
    }
    let reach: BTreeMap<&str, BTreeSet<&str>> = edges
        .keys()
        .map(|from| (*from, reached(&edges, from)))
        .collect();
    let is_between = |a: &str, b: &str| {
        let has = |a: &str, b: &str| reach.get(a).is_some_and(|reached| reached.contains(b));
        has(a, b) && has(b, a)
    };
    let mut done: BTreeSet<&str> = BTreeSet::new();
    let mut findings = Vec::new();
    for start in reach.keys() {
        if done.contains(start) {
            continue;
        }
        let members: BTreeSet<&str> = reach
            .keys()
            .copied()
            .filter(|it| is_between(start, it))
            .collect();
        if members.is_empty() {
            continue;
        }
        let names: Vec<&str> = members.iter().copied().collect();
        let place = shown(crate_name, folder, "");
        let key = format!("{place}: circle of {}", names.join(", "));
        let mut message = format!("{key}:");
        let mut told = BTreeSet::new();
        for arrow in arrows {
            let (from, to) = (arrow.from.as_str(), arrow.to.as_str());
            if members.contains(from) && members.contains(to) && told.insert((from, to)) {
                let (file, line) = (arrow.at.file.display(), arrow.at.line);
                message += &format!("\n  {file}:{line}: {from} imports {to}");
            }
        }
        findings.push(Finding::new(key, message));
        done.extend(members);
    }
    findings
}

fn reached<'a>(edges: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop() {
        for next in edges.get(name).into_iter().flatten() {
            if reached.insert(*next) {
                open.push(*next);
            }
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::anyhow;

    use super::*;

    fn found(files: &[(&str, &str)], lists: &[(&str, &[&str])]) -> Vec<Finding> {
        let read = |file: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == file);
            found
                .map(|(_, text)| (*text).to_owned())
                .ok_or_else(|| anyhow!("no file {}", file.display()))
        };
        let modules = Modules::read(Path::new("vmm/src/lib.rs"), &read).unwrap();
        let owned = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect();
        let lists = lists
            .iter()
            .map(|(folder, list)| ((*folder).to_owned(), owned(list)));
        findings("slat-vmm", &modules, &lists.collect())
    }

    const LAYERS: [(&str, &[&str]); 1] = [("", &["memory", "backend", "machine"])];
    const LIB: (&str, &str) = (
        "vmm/src/lib.rs",
        "mod backend; mod machine; mod memory; pub use machine::Machine;",
    );
    const MACHINE: (&str, &str) = (
        "vmm/src/machine.rs",
        "pub struct Machine; use crate::{backend::Kvm, memory};",
    );
    const BACKEND: (&str, &str) = ("vmm/src/backend/mod.rs", "mod kvm; pub use kvm::Kvm;");
    const MEMORY: (&str, &str) = ("vmm/src/memory.rs", "use std::fmt;");

    #[test]
    fn a_planted_upward_import_is_refused() {
        let clean = (
            "vmm/src/backend/kvm.rs",
            "use crate::memory::View; pub struct Kvm;",
        );
        assert!(found(&[LIB, MACHINE, BACKEND, clean, MEMORY], &LAYERS).is_empty());
        // Directly, and by a name that the crate's root passes on.
        for planted in ["use crate::machine::Machine;", "use crate::Machine;"] {
            let kvm = (
                "vmm/src/backend/kvm.rs",
                format!("//! Kvm.\n\n{planted} pub struct Kvm;"),
            );
            let findings = found(&[LIB, MACHINE, BACKEND, (kvm.0, &kvm.1), MEMORY], &LAYERS);
            assert_eq!(findings.len(), 1, "{findings:?}");
            assert_eq!(
                findings[0].message,
                "vmm/src/backend/kvm.rs:3: module slat-vmm::backend (layer 2) imports module slat-vmm::machine (layer 3) above it"
            );
            assert_eq!(findings[0].key, "slat-vmm::backend -> slat-vmm::machine");
        }
    }

    #[test]
    fn modules_of_a_folder_have_layers_of_their_own() {
        let lib = ("vmm/src/lib.rs", "mod backend;");
        let own = (
            "vmm/src/backend/mod.rs",
            "mod kvm; mod dirty; pub trait Backend {}",
        );
        let kvm = (
            "vmm/src/backend/kvm.rs",
            "use super::{Backend, dirty::Log};",
        );
        let dirty = ("vmm/src/backend/dirty.rs", "pub struct Log;");
        let files = [lib, own, kvm, dirty];
        let down: [(&str, &[&str]); 1] = [("backend", &["mod", "dirty", "kvm"])];
        assert!(found(&files, &down).is_empty());
        let up: [(&str, &[&str]); 1] = [("backend", &["kvm", "dirty", "mod"])];
        let keys: Vec<String> = found(&files, &up).into_iter().map(|it| it.key).collect();
        assert_eq!(
            keys,
            [
                "slat-vmm::backend::kvm -> slat-vmm::backend::mod",
                "slat-vmm::backend::kvm -> slat-vmm::backend::dirty",
            ]
        );
    }

    #[test]
    fn a_listed_folder_lists_all_its_modules_and_no_others() {
        let kvm = ("vmm/src/backend/kvm.rs", "pub struct Kvm;");
        let files = [LIB, MACHINE, BACKEND, kvm, MEMORY];
        let findings = found(&files, &[("", &["memory", "machine", "guest", "lib"])]);
        let said: Vec<&str> = findings.iter().map(|it| it.message.as_str()).collect();
        assert!(said.contains(&"structure.toml: slat-vmm has a module backend that has no layer"));
        assert!(said.contains(&"structure.toml: slat-vmm has no module guest"));
    }

    #[test]
    fn a_module_that_uses_the_root_itself_points_up() {
        let lib = ("vmm/src/lib.rs", "mod memory; pub struct Config;");
        let memory = ("vmm/src/memory.rs", "use crate::Config;");
        let findings = found(&[lib, memory], &[("", &["memory"])]);
        assert_eq!(findings[0].key, "slat-vmm::memory -> slat-vmm::lib");
        assert!(found(&[lib, memory], &[("", &["lib", "memory"])]).is_empty());
    }

    #[test]
    fn files_of_a_folder_that_use_each_other_in_a_circle_are_refused() {
        let lib = ("vmm/src/lib.rs", "mod a;");
        let own = (
            "vmm/src/a/mod.rs",
            "mod b; mod c; mod d; pub use b::B; pub struct A;",
        );
        let b = ("vmm/src/a/b.rs", "pub struct B; use super::c::C;");
        let c = ("vmm/src/a/c.rs", "pub struct C; use super::A;");
        let d = ("vmm/src/a/d.rs", "use super::c::C;\nuse super::b::B;");
        assert!(found(&[lib, own, b, c, d], &[]).is_empty());
        let back = ("vmm/src/a/c.rs", "pub struct C; use super::d;");
        let findings = found(&[lib, own, b, back, d], &[]);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].key, "slat-vmm::a: circle of b, c, d");
        assert!(
            findings[0]
                .message
                .contains("\n  vmm/src/a/d.rs:1: d imports c")
        );
        // A folder's own file counts too, when it does more than pass names on.
        let own = (
            "vmm/src/a/mod.rs",
            "mod b; mod c; mod d; use c::C; pub struct A(C);",
        );
        let c = ("vmm/src/a/c.rs", "pub struct C; impl super::A {}");
        let findings = found(&[lib, own, b, c, d], &[]);
        assert_eq!(findings[0].key, "slat-vmm::a: circle of c, mod");
    }
}
