//! Files that only grow, bounded: when one is long enough it becomes the old one, `<name>.1`, whose
//! predecessor goes, and a new one begins. So there are never more than two, and the last that was
//! written is always there.
//!
//! The one process that writes a file rotates it; readers open either by name at any time. Where
//! the disk has no room for a new file the present one stays what it is. A new file has the mode
//! that the process's umask leaves of 0666, or that its writer says.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

/// The old file beside `path`.
#[must_use]
pub fn old(path: &Path) -> PathBuf {
    with_ending(path, ".1")
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// Makes the file at `path` the old one and returns a new one in its place, open to append.
///
/// # Errors
/// When a file cannot be made or renamed; the file at `path` is then still there.
pub fn rotate(path: &Path) -> io::Result<File> {
    let aside = with_ending(path, ".new");
    let file = OpenOptions::new().create(true).append(true).open(&aside)?;
    take_over(path, &aside)?;
    Ok(file)
}

/// The same, with a new file of this mode, whatever the umask.
///
/// # Errors
/// As [`rotate`].
pub fn rotate_as(path: &Path, mode: u32) -> io::Result<File> {
    let aside = with_ending(path, ".new");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(mode)
        .open(&aside)?;
    // Left by one who died, or narrowed by the umask.
    file.set_permissions(Permissions::from_mode(mode))?;
    take_over(path, &aside)?;
    Ok(file)
}

fn take_over(path: &Path, aside: &Path) -> io::Result<()> {
    match std::fs::rename(path, old(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::rename(aside, path)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn there_are_never_more_than_two() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("log");
        std::fs::write(&path, "first").unwrap();
        for text in ["second", "third"] {
            let mut file = rotate(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert_eq!(read(&path), "third");
        assert_eq!(read(&old(&path)), "second");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_mode_is_kept() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("log");
        std::fs::write(&path, "first").unwrap();
        // What another left, open to all.
        std::fs::write(with_ending(&path, ".new"), "").unwrap();
        for _ in 0..2 {
            rotate_as(&path, 0o600).unwrap();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o600);
        }
    }

    #[test]
    fn what_cannot_be_rotated_stays() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("log");
        std::fs::write(&path, "first").unwrap();
        std::fs::create_dir(with_ending(&path, ".new")).unwrap();
        assert!(rotate(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first");
    }
}
