//! What each source file must keep, whichever crate it is in: its length, its opening, the width of
//! its comments, and whether it may say `unsafe`.

use std::path::Path;

use super::{known::Finding, table::Structure};

/// What a merge leaves where both sides changed.
const CONFLICT: &str = "<<<<<<< ";

/// What a file's text breaks.
pub(super) fn findings(structure: &Structure, path: &Path, text: &str) -> Vec<Finding> {
    let file = path.display();
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if lines > structure.max_lines && !is_test(path) {
        let most = structure.max_lines;
        findings.push(Finding {
            key: format!("{file}: lines over {most}"),
            message: format!("{file}: {lines} lines, more than {most}: split it by concept"),
            weight: lines - most,
        });
    }
    if !text.starts_with("//!") {
        let said = format!("{file}: does not open with //!");
        findings.push(Finding::new(said.clone(), said));
    }
    let most = structure.max_comment_columns;
    for (at, line) in text.lines().enumerate() {
        let at = at + 1;
        if line.starts_with(CONFLICT) {
            let said = format!("{file}:{at}: a merge conflict");
            findings.push(Finding::new(said.clone(), said));
        }
        let columns = line.chars().count();
        if columns > most && line.trim_start().starts_with("//") {
            findings.push(Finding::new(
                format!("{}: comment lines over {most} columns", area(path)),
                format!("{file}:{at}: a comment of {columns} columns, more than {most}"),
            ));
        }
    }
    findings
}

/// `unsafe` where the table does not have it.
pub(super) fn unsafe_findings(structure: &Structure, path: &Path, lines: &[usize]) -> Vec<Finding> {
    if structure
        .may_be_unsafe
        .keys()
        .any(|place| covers(place, path))
    {
        return Vec::new();
    }
    let file = path.display();
    let finding = |line: &usize| {
        Finding::new(
            format!("{file}: unsafe"),
            format!("{file}:{line}: unsafe, which structure.toml does not allow here"),
        )
    };
    lines.iter().map(finding).collect()
}

/// Places that may be unsafe and are not.
pub(super) fn unneeded(structure: &Structure, files: &[(&Path, bool)]) -> Vec<Finding> {
    let needs = |place: &&String| {
        files
            .iter()
            .any(|(path, is_unsafe)| *is_unsafe && covers(place, path))
    };
    let unneeded = structure.may_be_unsafe.keys().filter(|place| !needs(place));
    unneeded
        .map(|place| format!("structure.toml: {place} may be unsafe, and nothing there is"))
        .map(|said| Finding::new(said.clone(), said))
        .collect()
}

/// Whether a place of the table is this file, or a folder above it.
fn covers(place: &str, path: &Path) -> bool {
    if place.ends_with('/') {
        path.starts_with(place)
    } else {
        path == Path::new(place)
    }
}

/// The crate's folder, or what stands for it.
fn area(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
    let end = parts
        .iter()
        .position(|part| ["src", "tests", "benches"].contains(&&**part));
    let end = end.unwrap_or(parts.len() - 1).max(1);
    parts[..end.min(parts.len())].join("/")
}

/// Whether a file holds tests alone.
fn is_test(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.iter().any(|part| part == "tests")
        || stem == "tests"
        || stem.starts_with("tests_")
        || stem.ends_with("_tests")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn structure() -> Structure {
        Structure {
            max_lines: 3,
            max_comment_columns: 20,
            crates: BTreeMap::new(),
            may_be_unsafe: BTreeMap::from([("a/src/map/".to_owned(), "mappings".to_owned())]),
            known: BTreeMap::new(),
        }
    }

    fn said(path: &str, text: &str) -> Vec<String> {
        let findings = findings(&structure(), Path::new(path), text);
        findings
            .into_iter()
            .map(|finding| finding.message)
            .collect()
    }

    #[test]
    fn a_file_opens_with_its_purpose_and_ends_in_time() {
        assert!(said("a/src/b.rs", "//! One thing.\n").is_empty());
        assert_eq!(
            said("a/src/b.rs", "use a;\n"),
            ["a/src/b.rs: does not open with //!"]
        );
        assert_eq!(
            said("a/src/b.rs", "//! x\n<<<<<<< HEAD\n"),
            ["a/src/b.rs:2: a merge conflict"]
        );
        let long = "//! x\n\n\n\n";
        assert!(said("a/src/b.rs", long)[0].starts_with("a/src/b.rs: 4 lines, more than 3"));
        for test in [
            "a/tests/b.rs",
            "a/src/tests.rs",
            "a/src/b_tests.rs",
            "a/src/b/tests/c.rs",
        ] {
            assert!(said(test, long).is_empty(), "{test}");
        }
    }

    #[test]
    fn comments_are_counted_by_their_crate() {
        let text = "//! x\n    // This line is too wide.\nlet wide = \"// no comment at all\";\n";
        assert_eq!(
            said("agent/vmm/src/b.rs", text),
            ["agent/vmm/src/b.rs:2: a comment of 29 columns, more than 20"]
        );
        let findings = findings(&structure(), Path::new("agent/vmm/src/b.rs"), text);
        assert_eq!(findings[0].key, "agent/vmm: comment lines over 20 columns");
        assert_eq!(area(Path::new("tests/src/b.rs")), "tests");
        assert_eq!(area(Path::new("examples/bare/src/b.rs")), "examples/bare");
        assert_eq!(area(Path::new("proto/build.rs")), "proto");
    }

    #[test]
    fn unsafe_stands_where_the_table_has_it() {
        let structure = structure();
        let at = |path: &str, lines: &[usize]| unsafe_findings(&structure, Path::new(path), lines);
        assert!(at("a/src/map/view.rs", &[3]).is_empty());
        let found = at("a/src/mapped.rs", &[3, 5]);
        assert_eq!(found.len(), 2);
        assert!(found[1].message.starts_with("a/src/mapped.rs:5: unsafe"));
        let view = Path::new("a/src/map/view.rs");
        assert!(unneeded(&structure, &[(view, true)]).is_empty());
        assert_eq!(unneeded(&structure, &[(view, false)]).len(), 1);
    }
}
