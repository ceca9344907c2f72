//! The written pages against the sources: links lead to files that exist, and docs/operations.md
//! explains every reason an error can have.

use std::path::Path;

use crate::{tally::Tally, workspace::Workspace};

/// Where every reason is explained.
const OPERATIONS: &str = "docs/operations.md";
/// Where every reason is declared.
const REASONS: &str = "proto/src/error.rs";

/// Both checks.
///
/// # Errors
/// When a page cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut faults = Vec::new();
    let pages = workspace.files(&["."], &[".md"])?;
    let mut links = 0;
    for page in &pages {
        for link in links_of(&workspace.read(page)?) {
            let file = link.split('#').next().unwrap_or_default();
            let folder = page.parent().unwrap_or(Path::new(""));
            links += 1;
            if !file.is_empty() && !workspace.root.join(folder).join(file).exists() {
                faults.push(format!("{}: no file {file}", page.display()));
            }
        }
    }
    let reasons = reasons_of(&workspace.read(REASONS)?);
    if reasons.is_empty() {
        faults.push(format!(
            "{REASONS} declares no reason that this tool can read"
        ));
    }
    faults.extend(unexplained(&workspace.read(OPERATIONS)?, &reasons));
    println!(
        "{} pages, {links} links, {} reasons",
        pages.len(),
        reasons.len()
    );
    Ok(Tally::of_faults(&faults))
}

/// Targets of `[text](target)` that are neither addresses nor within code blocks.
fn links_of(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for part in line.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')')
                && !target.contains("://")
            {
                found.push(target.to_owned());
            }
        }
    }
    found
}

/// The wire forms in `Variant = "WIRE_FORM" => Code`.
fn reasons_of(source: &str) -> Vec<String> {
    let quoted = |line: &str| {
        let (_, rest) = line.split_once("= \"")?;
        let (reason, rest) = rest.split_once('"')?;
        rest.trim_start()
            .starts_with("=>")
            .then(|| reason.to_owned())
    };
    source.lines().filter_map(quoted).collect()
}

/// Reasons without a row of their own, and rows without a reason.
fn unexplained(page: &str, reasons: &[String]) -> Vec<String> {
    let row = |line: &str| {
        let cell = line.strip_prefix("| `")?.split_once('`')?.0;
        let is_reason = cell.len() > 3 && cell.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
        is_reason.then(|| cell.to_owned())
    };
    let after = page
        .split_once("## Error reasons")
        .map_or("", |(_, after)| after);
    let section = after.split("\n## ").next().unwrap_or_default();
    let rows: Vec<String> = section.lines().filter_map(row).collect();
    let missing = reasons.iter().filter(|reason| !rows.contains(reason));
    let missing = missing.map(|reason| format!("{OPERATIONS} does not explain {reason}"));
    let unknown = rows.iter().filter(|row| !reasons.contains(row));
    missing
        .chain(unknown.map(|row| format!("{OPERATIONS} explains {row}, which no error has")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_reasons_are_found() {
        let text = "[a](b.md) and [c](https://x.example/) [d](e/f.md#g)\n```\n[no](no.md)\n```\n";
        assert_eq!(links_of(text), ["b.md", "e/f.md#g"]);
        let source = "    /// Doc.\n    NoSuchVm = \"NO_SUCH_VM\" => NotFound,\n    const X: &str = \"Y\";\n";
        assert_eq!(reasons_of(source), ["NO_SUCH_VM"]);
    }

    #[test]
    fn a_reason_needs_a_row_and_a_row_its_reason() {
        let page = "# P\n| `READY` | state |\n## Error reasons\n| `NO_SUCH_VM` | x |\n| `OLD_ONE` | x |\n## Files\n| `LOCK` | x |\n";
        let reasons = ["NO_SUCH_VM".to_owned(), "IN_DOUBT".to_owned()];
        let faults = unexplained(page, &reasons);
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].contains("IN_DOUBT") && faults[1].contains("OLD_ONE"));
    }
}
