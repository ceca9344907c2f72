//! Which bugs are planted: all, those named, those that a change touches, or the few of a commit.

use std::{collections::BTreeSet, path::Path, process::Command};

use anyhow::bail;

use super::table::{self, Bug, FOLDER};
use crate::{shell, workspace::Workspace};

/// How many of those that need no model are planted in each run of `cargo xtask ci`.
const PLAIN: usize = 4;
/// And how many of loom's.
const LOOM: usize = 1;

/// Those whose names contain one of `names`; all when none is given.
///
/// # Errors
/// When a name is in none of them: it would look as if its bug had been caught.
pub(super) fn named(mut bugs: Vec<Bug>, names: &[String]) -> anyhow::Result<Vec<Bug>> {
    for name in names {
        if !bugs.iter().any(|bug| bug.name.contains(name)) {
            bail!("no bug of {FOLDER} has {name:?} in its name");
        }
    }
    bugs.retain(|bug| names.is_empty() || names.iter().any(|name| bug.name.contains(name)));
    Ok(bugs)
}

/// Those that edit a file which differs between `base` and the tree as it is now, committed or not,
/// and those whose entry does.
///
/// # Errors
/// When git does not know `base`.
pub(super) fn changed(
    workspace: &Workspace,
    mut bugs: Vec<Bug>,
    base: &str,
) -> anyhow::Result<Vec<Bug>> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        shell::output(command.current_dir(&workspace.root).args(arguments))
    };
    // What `base` got since we left it is no change of ours.
    let base = git(&["merge-base", base, "HEAD"])?.trim().to_owned();
    let mut files = git(&["diff", "--name-only", "--no-renames", &base])?;
    files += &git(&["ls-files", "--others", "--exclude-standard"])?;
    let files: BTreeSet<&str> = files.lines().collect();
    let mut before = Vec::new();
    let tables = format!("{FOLDER}/");
    for path in git(&["ls-tree", "--name-only", &base, &tables])?.lines() {
        if path.ends_with(".toml") {
            let text = git(&["show", &format!("{base}:{path}")])?;
            before.extend(table::parse(Path::new(path), &text)?);
        }
    }
    bugs.retain(|bug| is_touched(bug, &files, &before));
    Ok(bugs)
}

fn is_touched(bug: &Bug, files: &BTreeSet<&str>, before: &[Bug]) -> bool {
    bug.files().iter().any(|file| files.contains(file)) || !before.contains(bug)
}

/// A few, another few for each commit, so that in time all have been; the same commit has the same
/// ones.
pub(super) fn sample(workspace: &Workspace, bugs: Vec<Bug>) -> Vec<Bug> {
    let mut command = Command::new("git");
    command.current_dir(&workspace.root);
    command.args(["rev-parse", "HEAD"]);
    // Sources without their history draw the same few every time.
    let commit = shell::output(&mut command).unwrap_or_else(|_| "unknown".to_owned());
    let commit = commit.trim();
    let chosen = draw(bugs, commit);
    let names: Vec<&str> = chosen.iter().map(|it| it.name.as_str()).collect();
    println!("of commit {commit}: {}", names.join(", "));
    chosen
}

/// [`PLAIN`] and [`LOOM`] of them, drawn by the commit. None whose test takes until its bound: CI
/// has better things to do.
fn draw(mut bugs: Vec<Bug>, commit: &str) -> Vec<Bug> {
    bugs.sort_by_cached_key(|it| (lot(commit, &it.name), it.name.clone()));
    let (mut plain, mut loom) = (PLAIN, LOOM);
    bugs.retain(|it| {
        if it.hangs {
            return false;
        }
        let left = match it.target.feature.as_deref() {
            None => &mut plain,
            Some("loom") => &mut loom,
            Some(_) => return false,
        };
        let take = *left > 0;
        *left = left.saturating_sub(1);
        take
    });
    bugs.sort_by(|a, b| a.name.cmp(&b.name));
    bugs
}

/// FNV-1a of both, then mixed: neighbours in the alphabet are to draw far from each other.
fn lot(commit: &str, name: &str) -> u64 {
    let bytes = commit.bytes().chain([0]).chain(name.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{table::Edit, target::Target},
        *,
    };

    fn bug(name: &str, feature: &str) -> Bug {
        Bug {
            name: name.to_owned(),
            target: Target::parse(&format!("-p slat-mmu {feature}--lib a")).unwrap(),
            hangs: false,
            edits: vec![Edit {
                file: format!("{name}.rs"),
                find: "a".into(),
                replace: "b".into(),
            }],
        }
    }

    #[test]
    fn a_commit_draws_its_own_few() {
        let all = || -> Vec<Bug> {
            let kinds = [
                ("plain", ""),
                ("loom", "--features loom "),
                ("shuttle", "--features shuttle "),
            ];
            let of = |(kind, feature)| (0..20).map(move |n| bug(&format!("{kind}-{n}"), feature));
            kinds.into_iter().flat_map(of).collect()
        };
        let names = |commit: &str| -> Vec<String> {
            let drawn = draw(all(), commit);
            drawn.into_iter().map(|it| it.name).collect()
        };
        let drawn = names("0123abcd");
        assert_eq!(drawn, names("0123abcd"));
        let of = |kind: &str| drawn.iter().filter(|name| name.starts_with(kind)).count();
        assert_eq!(
            (of("plain"), of("loom"), drawn.len()),
            (PLAIN, LOOM, PLAIN + LOOM)
        );
        // In time everything has its turn.
        let seen: BTreeSet<String> = (0..200).flat_map(|n| names(&format!("{n:08x}"))).collect();
        assert_eq!(seen.len(), 40);
    }

    #[test]
    fn a_name_that_is_in_none_is_an_error() {
        let bugs = || vec![bug("27-x", ""), bug("loom-y", "")];
        assert_eq!(named(bugs(), &[]).unwrap().len(), 2);
        assert_eq!(named(bugs(), &["loom-".into()]).unwrap()[0].name, "loom-y");
        assert!(named(bugs(), &["27".into(), "28".into()]).is_err());
    }

    #[test]
    fn a_change_touches_the_bugs_of_its_files_and_those_whose_entry_it_changes() {
        let (one, two) = (bug("one", ""), bug("two", ""));
        let before = [one.clone(), two.clone()];
        assert!(is_touched(&one, &["one.rs"].into(), &before));
        assert!(!is_touched(&two, &["one.rs"].into(), &before));
        let refitted = Bug {
            hangs: true,
            ..two.clone()
        };
        assert!(is_touched(&refitted, &["one.rs"].into(), &before));
        assert!(is_touched(&two, &["one.rs"].into(), &before[..1]));
    }
}
