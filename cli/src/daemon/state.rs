//! The directory a daemon keeps its state in: where it is by default, and that it can be written
//! before anything starts.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use crate::failure::Failure;

/// The directory of `role`: what was given; `/var/lib/slat/<role>` for root; the XDG state
/// directory for others.
pub(crate) fn directory(given: Option<PathBuf>, role: &str) -> Result<PathBuf, Failure> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    choose(
        given,
        role,
        rustix::process::geteuid().is_root(),
        variable("XDG_STATE_HOME"),
        variable("HOME"),
    )
    .ok_or_else(|| {
        Failure::advised(
            "there is no home directory to keep state in",
            "say where with --state-dir",
        )
    })
}

fn choose(
    given: Option<PathBuf>,
    role: &str,
    root: bool,
    xdg: Option<PathBuf>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    if given.is_some() {
        return given;
    }
    if root {
        return Some(Path::new("/var/lib/slat").join(role));
    }
    // The XDG specification has relative paths ignored.
    let base = xdg
        .filter(|path| path.is_absolute())
        .or_else(|| Some(home?.join(".local/state")))?;
    Some(base.join("slat").join(role))
}

/// Makes the directory if need be, for its owner alone, and proves that files can be made in it.
pub(crate) fn prepare(directory: &Path) -> Result<(), Failure> {
    let refused = |error: std::io::Error| {
        Failure::advised(
            format!("cannot keep state in {}: {error}", directory.display()),
            "choose another directory with --state-dir",
        )
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(refused)?;
    tempfile::Builder::new()
        .prefix(".writable-")
        .tempfile_in(directory)
        .and_then(|file| file.close())
        .map_err(refused)?;
    fs::read_dir(directory).map(drop).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_depends_on_who_runs_it() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(choose(path("/x"), "server", true, None, None), path("/x"));
        assert_eq!(
            choose(None, "server", true, path("/s"), None),
            path("/var/lib/slat/server")
        );
        assert_eq!(
            choose(None, "agent", false, path("/s"), path("/home/u")),
            path("/s/slat/agent")
        );
        assert_eq!(
            choose(None, "agent", false, path("relative"), path("/home/u")),
            path("/home/u/.local/state/slat/agent")
        );
        assert_eq!(choose(None, "agent", false, None, None), None);
    }

    #[test]
    fn a_file_in_the_way_is_one_sentence() {
        let dir = slat_test_dir::TestDir::new();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let text = prepare(&file.join("below")).unwrap_err().render();
        assert!(text.starts_with("error: cannot keep state in "), "{text}");
        assert!(text.contains("--state-dir"), "{text}");
        prepare(&dir.path().join("a/b")).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0);
    }
}
