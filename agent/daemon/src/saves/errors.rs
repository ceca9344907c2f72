//! What is wrong with a save, as callers hear it.

use std::path::Path;

use slat_image::ImageError;
use slat_proto::{ApiError, Reason, model::SaveName};

/// No save of that name.
pub(crate) fn unknown(name: &SaveName) -> ApiError {
    ApiError::new(Reason::NoSuchSave, format!("no save {name}"))
        .with("save", name)
        .with("host", name.host())
        .with("advice", "slat get saves says which there are")
}

/// There is one of that name.
pub(super) fn exists(name: &SaveName, path: &Path) -> ApiError {
    ApiError::new(Reason::SaveExists, format!("{name} is there already"))
        .with("save", name)
        .with("path", path.display())
        .with("advice", "take another name with --as, or delete that save")
}

/// A save that is no file, or not yet.
pub(super) fn not_written(name: &SaveName, state: &str, why: &str) -> ApiError {
    let words = format!(
        "{name} is {state}{}{why}",
        if why.is_empty() { "" } else { ": " }
    );
    ApiError::new(Reason::SaveNotWritten, words)
        .with("save", name)
        .with("state", state)
        .with("why", why)
        .with(
            "advice",
            if state == "WRITING" {
                "wait for its end: slat get save SAVE --watch"
            } else {
                "save the VM again"
            },
        )
}

/// It is needed.
pub(super) fn in_use(name: &SaveName, users: &[String]) -> ApiError {
    let users = users.join(",");
    ApiError::new(Reason::SaveInUse, format!("{name} is needed by {users}"))
        .with("save", name)
        .with("users", users)
        .with(
            "advice",
            "wait until such a VM has all of its memory, or delete what is built on it first",
        )
}

/// What a saved file, or a disk below it, failed with.
pub(super) fn of_image(name: &SaveName, path: &Path, error: &ImageError) -> ApiError {
    let file = path.display();
    let told = |reason, advice: &str| {
        ApiError::new(reason, format!("{file}: {error}"))
            .with("save", name)
            .with("file", &file)
            .with("cause", error)
            .with("advice", advice)
    };
    match error {
        ImageError::Io { source, .. } => {
            told(Reason::Store, "look at that disk, and try again").because_of(source)
        }
        ImageError::NoSpace { .. } => told(
            Reason::DiskFull,
            "free space on that file system and save again",
        )
        .with("path", file),
        ImageError::Exists { path } => exists(name, path),
        ImageError::Busy { path } => exists(name, path).with("state", "WRITING"),
        ImageError::Version { .. } | ImageError::Feature { .. } => told(
            Reason::StateVersionUnsupported,
            "restore it with the version of Slat that wrote it, or a later one",
        )
        .with("differs", "format"),
        _ => told(
            Reason::SaveCorrupt,
            "put a whole copy of that file, and of those it builds on, in its place",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_a_full_disk_and_an_unknown_version_are_three_things() {
        let name = SaveName::parse("hosts/a/saves/s").unwrap();
        let of = |error: ImageError| of_image(&name, Path::new("/s/s.slatsave"), &error);
        let cut = ImageError::Truncated {
            expected: None,
            found: 7,
        };
        let error = of(cut);
        assert_eq!(error.reason, Reason::SaveCorrupt);
        assert_eq!(error.metadata["file"], "/s/s.slatsave");
        let full = ImageError::NoSpace {
            needed: 1,
            written: 2,
        };
        assert_eq!(of(full).reason, Reason::DiskFull);
        let version = ImageError::Version {
            found: 9,
            known: (1, 1),
        };
        assert_eq!(of(version).reason, Reason::StateVersionUnsupported);
    }
}
