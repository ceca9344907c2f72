//! The arrows between crates, as cargo's metadata has them.

use super::{
    known::Finding,
    table::{FILE, Structure},
};
use crate::workspace::{Metadata, Package};

/// Runs in the compiler only, whatever it is built with.
const PROC_MACROS: [&str; 5] = [
    "thiserror-impl",
    "proc-macro2",
    "quote",
    "syn",
    "unicode-ident",
];

/// Crates that know what they may not.
pub(super) fn findings(structure: &Structure, metadata: &Metadata) -> Vec<Finding> {
    let own = metadata.own();
    let mut findings = Vec::new();
    let mut add = |said: String| findings.push(Finding::new(said.clone(), said));
    for package in &own {
        let name = &package.name;
        let Some(layout) = structure.crates.get(name) else {
            add(format!("{FILE} does not have the crate {name}"));
            continue;
        };
        if let Some(may_use) = &layout.may_use {
            for (other, kind) in &package.dependencies {
                let is_ours =
                    own.iter().any(|it| it.name == *other) || structure.crates.contains_key(other);
                let for_tests = kind == "dev" && layout.tests_may_use.contains(other);
                if is_ours && !for_tests && !may_use.contains(other) {
                    add(format!(
                        "{name} -> {other} ({kind}): arrows point down only"
                    ));
                }
            }
        }
        if let Some(may_link) = &layout.may_link {
            for other in linked(metadata, package) {
                if !may_link.iter().any(|it| it == other) {
                    add(format!(
                        "{name} links {other}: it may link only {may_link:?}"
                    ));
                }
            }
        }
    }
    findings
}

/// Crates of the table that are none of these packages.
pub(super) fn missing(structure: &Structure, packages: &[&Package]) -> Vec<Finding> {
    let there = |name: &&String| packages.iter().any(|package| package.name == **name);
    let gone = structure.crates.keys().filter(|name| !there(name));
    gone.map(|name| format!("{FILE}: there is no crate {name}"))
        .map(|said| Finding::new(said.clone(), said))
        .collect()
}

fn linked<'a>(metadata: &'a Metadata, package: &'a Package) -> Vec<&'a str> {
    let mut linked = metadata.linked(package);
    linked.retain(|name| !PROC_MACROS.contains(name));
    linked
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{super::table::Layout, *};

    fn package(name: &str, dependencies: &[&str]) -> Package {
        Package {
            id: name.into(),
            name: name.into(),
            version: "0.1.0".into(),
            source: None,
            license: None,
            dependencies: dependencies
                .iter()
                .map(|name| ((*name).into(), "normal".into()))
                .collect(),
        }
    }

    /// A crate, what it may use and what it may link.
    type Row<'a> = (&'a str, Option<&'a [&'a str]>, Option<&'a [&'a str]>);

    fn structure(crates: &[Row<'_>]) -> Structure {
        let owned = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect();
        let layout = |(name, may_use, may_link): &Row<'_>| {
            let layout = Layout {
                root: "src/lib.rs".into(),
                may_use: may_use.map(owned),
                tests_may_use: Vec::new(),
                may_link: may_link.map(owned),
                lists: BTreeMap::new(),
            };
            ((*name).to_owned(), layout)
        };
        Structure {
            max_lines: 600,
            max_comment_columns: 100,
            crates: crates.iter().map(layout).collect(),
            may_be_unsafe: BTreeMap::new(),
            known: BTreeMap::new(),
        }
    }

    fn metadata(server: &[&str], mmu: &[&str]) -> Metadata {
        let mut packages = vec![
            package("slat-server", server),
            package("slat-daemon", &["slat-proto"]),
            package("slat-proto", &[]),
            package("slat-mmu", mmu),
            package("tokio", &[]),
        ];
        let node = |package: &Package| {
            let deps = package.dependencies.iter();
            let deps = deps.map(|(name, kind)| (name.clone(), vec![kind.clone()]));
            (package.id.clone(), deps.collect())
        };
        let resolved = packages.iter().map(node).collect();
        packages[4].source = Some("registry".into());
        Metadata { packages, resolved }
    }

    #[test]
    fn arrows_point_down_only() {
        let structure = structure(&[
            ("slat-server", Some(&["slat-proto"]), None),
            ("slat-daemon", None, None),
            ("slat-proto", Some(&[]), None),
            ("slat-mmu", Some(&[]), Some(&["spin"])),
        ]);
        assert!(findings(&structure, &metadata(&["slat-proto", "tokio"], &[])).is_empty());
        let found = findings(&structure, &metadata(&["slat-daemon"], &["tokio"]));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].message.starts_with("slat-mmu links tokio"));
        assert!(found[1].message.starts_with("slat-server -> slat-daemon"));
    }

    #[test]
    fn tests_may_look_up_where_the_table_says_so() {
        let crates: [Row<'_>; 4] = [
            ("slat-server", Some(&[]), None),
            ("slat-daemon", None, None),
            ("slat-proto", Some(&[]), None),
            ("slat-mmu", Some(&[]), None),
        ];
        let with = |kind: &str, allowed: &[&str]| {
            let mut structure = structure(&crates);
            let mmu = structure.crates.get_mut("slat-mmu").unwrap();
            mmu.tests_may_use = allowed.iter().map(|it| (*it).to_owned()).collect();
            let mut metadata = metadata(&[], &["slat-server"]);
            metadata.packages[3].dependencies[0].1 = kind.into();
            findings(&structure, &metadata).len()
        };
        assert_eq!(with("dev", &["slat-server"]), 0);
        assert_eq!(with("dev", &["slat-proto"]), 1);
        assert_eq!(with("normal", &["slat-server"]), 1, "tests alone");
    }

    #[test]
    fn the_table_has_every_crate_and_no_other() {
        let structure = structure(&[("slat-proto", None, None), ("slat-vmm", None, None)]);
        let metadata = metadata(&[], &[]);
        assert_eq!(findings(&structure, &metadata).len(), 3);
        let gone = missing(&structure, &metadata.own());
        assert_eq!(
            gone[0].message,
            "structure.toml: there is no crate slat-vmm"
        );
        assert_eq!(gone.len(), 1);
    }
}
