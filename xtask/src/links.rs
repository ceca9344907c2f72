//! Links between the written pages: each that names a file leads to one.

use std::path::Path;

use crate::{tally::Tally, workspace::Workspace};

/// The check.
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
    println!("{} pages, {links} links", pages.len());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_outside_code() {
        let text = "[a](b.md) and [c](https://x.example/) [d](e/f.md#g)\n```\n[no](no.md)\n```\n";
        assert_eq!(links_of(text), ["b.md", "e/f.md#g"]);
    }
}
