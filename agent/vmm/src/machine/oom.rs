//! How readily the kernel kills this process when the host runs out of memory: more readily while
//! it holds a copy that nobody runs yet. Best effort; nothing depends on it.

use std::{
    io,
    path::{Path, PathBuf},
};

/// While a VM is received; a thousand is the most.
const RECEIVING: i32 = 500;

/// A raised score; put back to what it was when this is dropped.
#[derive(Debug)]
pub(super) struct OomScore {
    path: PathBuf,
    before: i32,
}

impl OomScore {
    /// Raises the score in `path`, unless it is as high already. `None` when it stays as it is.
    pub(super) fn raise(path: &Path) -> Option<Self> {
        let raised = || {
            let text = std::fs::read_to_string(path)?;
            let before: i32 = text.trim().parse().map_err(io::Error::other)?;
            if before < RECEIVING {
                std::fs::write(path, RECEIVING.to_string())?;
            }
            io::Result::Ok(before)
        };
        match raised() {
            Ok(before) => (before < RECEIVING).then(|| Self {
                path: path.to_owned(),
                before,
            }),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "the OOM score stays while a VM is received");
                None
            }
        }
    }
}

impl Drop for OomScore {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, self.before.to_string()) {
            tracing::debug!(path = %self.path.display(), %error, "the OOM score cannot be put back");
        }
    }
}
