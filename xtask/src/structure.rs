//! The shape of the house: how long files are, how they open, and which crate may know which.

use crate::{
    example,
    tally::Tally,
    workspace::{Metadata, Workspace},
};

/// A file longer than this holds more than one concept.
const MAX_LINES: usize = 800;

/// What a merge leaves where both sides changed.
const CONFLICT: &str = "<<<<<<< ";

/// Which of our crates each crate may name. Tests, benchmarks and this tool stand above the house and may name any.
const ARROWS: [(&str, &[&str]); 9] = [
    (example::NAME, &["slat-arch", "slat-mmu"]),
    (
        "slat",
        &[
            "slat-daemon",
            "slat-vmm",
            "slat-record",
            "slat-server",
            "slat-proto",
        ],
    ),
    ("slat-server", &["slat-proto"]),
    ("slat-daemon", &["slat-record", "slat-proto"]),
    (
        "slat-vmm",
        &["slat-arch", "slat-mmu", "slat-record", "slat-proto"],
    ),
    ("slat-record", &["slat-proto"]),
    ("slat-arch", &["slat-mmu"]),
    ("slat-mmu", &[]),
    ("slat-proto", &[]),
];
/// Arrows that tests alone may have: the MMU's own run it on every format.
const TESTS_ARROWS: [(&str, &str); 1] = [("slat-mmu", "slat-arch")];
const ABOVE: [&str; 3] = ["slat-benches", "slat-tests", "xtask"];

/// All that may be linked into the crates without std.
const PURE: [&str; 3] = ["slat-mmu", "slat-arch", example::NAME];
const PURE_MAY_LINK: [&str; 5] = ["bitflags", "slat-arch", "slat-mmu", "spin", "thiserror"];
/// Runs in the compiler only, whatever it is built with.
const PROC_MACROS: [&str; 5] = [
    "thiserror-impl",
    "proc-macro2",
    "quote",
    "syn",
    "unicode-ident",
];

/// All three.
///
/// # Errors
/// When files or cargo's metadata cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut faults = Vec::new();
    let files = workspace.files(&["."], &[".rs"])?;
    for path in &files {
        let text = workspace.read(path)?;
        faults.extend(
            file_faults(&text)
                .into_iter()
                .map(|fault| format!("{}: {fault}", path.display())),
        );
    }
    let metadata = workspace.metadata()?;
    faults.extend(arrow_faults(&metadata));
    let bare = workspace.metadata_of(example::MANIFEST)?;
    faults.extend(arrow_faults(&bare));
    faults.extend(only_faults(&bare));
    println!(
        "{} files, {} crates and {}",
        files.len(),
        metadata.own().len(),
        example::NAME
    );
    Ok(Tally::of_faults(&faults))
}

fn file_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        faults.push(format!(
            "{lines} lines, more than {MAX_LINES}: split it by concept"
        ));
    }
    if text.lines().any(|line| line.starts_with(CONFLICT)) {
        faults.push("holds a merge conflict".to_owned());
    }
    if !text.starts_with("//!") {
        faults.push("does not open with //!".to_owned());
    }
    faults
}

fn arrow_faults(metadata: &Metadata) -> Vec<String> {
    let mut faults = Vec::new();
    let own = metadata.own();
    for package in &own {
        let known = ARROWS.iter().find(|(name, _)| *name == package.name);
        let Some((_, may)) = known else {
            if !ABOVE.contains(&package.name.as_str()) {
                faults.push(format!(
                    "{} has no place in the table of arrows",
                    package.name
                ));
            }
            continue;
        };
        for (name, kind) in &package.dependencies {
            let arrow = (package.name.as_str(), name.as_str());
            let for_tests = kind == "dev" && TESTS_ARROWS.contains(&arrow);
            let is_own = own.iter().any(|other| other.name == *name);
            if is_own && !for_tests && !may.contains(&name.as_str()) {
                faults.push(format!(
                    "{} -> {name} ({kind}): arrows point down only",
                    package.name
                ));
            }
        }
        if PURE.contains(&package.name.as_str()) {
            for name in metadata.linked(package) {
                if !PURE_MAY_LINK.contains(&name) && !PROC_MACROS.contains(&name) {
                    faults.push(format!(
                        "{} links {name}: it may know nothing beyond {PURE_MAY_LINK:?}",
                        package.name
                    ));
                }
            }
        }
    }
    faults
}

/// The example asks for the two crates that it is an example of, and for nothing else.
fn only_faults(metadata: &Metadata) -> Vec<String> {
    let mut faults = Vec::new();
    let found = metadata.own().into_iter().find(|p| p.name == example::NAME);
    let Some(package) = found else {
        return vec![format!(
            "{} is no package {}",
            example::MANIFEST,
            example::NAME
        )];
    };
    for (name, kind) in &package.dependencies {
        if !["slat-arch", "slat-mmu"].contains(&name.as_str()) {
            faults.push(format!(
                "{} -> {name} ({kind}): it stands on slat-arch and slat-mmu alone",
                example::NAME
            ));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Package;

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

    #[test]
    fn arrows_point_down_only() {
        let metadata = |server: &[&str], mmu: &[&str]| {
            let packages = vec![
                package("slat-server", server),
                package("slat-daemon", &["slat-proto"]),
                package("slat-proto", &[]),
                package("slat-mmu", mmu),
                package("tokio", &[]),
            ];
            let node = |package: &Package| {
                let deps = package
                    .dependencies
                    .iter()
                    .map(|(name, kind)| (name.clone(), vec![kind.clone()]));
                (package.id.clone(), deps.collect())
            };
            let resolved = packages.iter().map(node).collect();
            let mut packages = packages;
            packages[4].source = Some("registry".into());
            Metadata { packages, resolved }
        };
        assert!(arrow_faults(&metadata(&["slat-proto", "tokio"], &[])).is_empty());
        let faults = arrow_faults(&metadata(&["slat-daemon"], &["tokio"]));
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(
            faults
                .iter()
                .any(|fault| fault.starts_with("slat-server -> slat-daemon"))
        );
        assert!(
            faults
                .iter()
                .any(|fault| fault.starts_with("slat-mmu links tokio"))
        );
    }

    #[test]
    fn the_example_stands_on_two_crates() {
        let metadata = |dependencies: &[&str]| Metadata {
            packages: vec![package(example::NAME, dependencies)],
            resolved: Vec::new(),
        };
        assert!(only_faults(&metadata(&["slat-arch", "slat-mmu"])).is_empty());
        let faults = only_faults(&metadata(&["slat-mmu", "spin"]));
        assert_eq!(faults.len(), 1, "{faults:?}");
        let elsewhere = Metadata {
            packages: Vec::new(),
            resolved: Vec::new(),
        };
        assert_eq!(only_faults(&elsewhere).len(), 1);
    }

    #[test]
    fn a_file_opens_with_its_purpose_and_ends_in_time() {
        assert!(file_faults("//! One thing.\n").is_empty());
        assert_eq!(file_faults("use a;\n").len(), 1);
        assert_eq!(file_faults("//! x\n<<<<<<< HEAD\n").len(), 1);
        assert_eq!(
            file_faults(&format!("//! x\n{}", "\n".repeat(800))).len(),
            1
        );
    }
}
