//! Why the files of an identity are not taken.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::IdentityError;

/// Why a directory's files are no credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file is not there.
    #[error("{path} is missing", path = .0.display())]
    Missing(PathBuf),
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("{path} is no regular file", path = .0.display())]
    NotAFile(PathBuf),
    /// It is larger than any such file is.
    #[error("{path} has more than {limit} bytes, which no such file has", path = path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// What is read at most.
        limit: u64,
    },
    /// Every user of the machine can read or change the private key.
    #[error("{path} is open to every user of this machine (mode {mode:04o})", path = path.display())]
    KeyOpenToAll {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds nothing of what it is for.
    #[error("{path} holds no {what}", path = path.display())]
    Empty {
        /// Which.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// What it holds cannot be understood.
    #[error("{path} holds a {what} that cannot be understood: {why}", path = path.display())]
    Bad {
        /// Which.
        path: PathBuf,
        /// What it should have been.
        what: &'static str,
        /// Why it is not.
        why: String,
    },
    /// The private key is another's.
    #[error("tls.key does not belong to tls.crt in {dir}", dir = .0.display())]
    KeyMismatch(PathBuf),
    /// The certificate names none, or more than one.
    #[error("{path} has {found} URIs among its subject alternative names, and needs exactly one", path = path.display())]
    NotOneIdentity {
        /// Which.
        path: PathBuf,
        /// How many there are.
        found: usize,
    },
    /// The certificate names somebody who is none of Slat's.
    #[error("{path}: {source}", path = path.display())]
    Identity {
        /// Which.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
    /// They were written anew each time that they were read.
    #[error("the files in {dir} change while they are read", dir = .0.display())]
    Unsettled(PathBuf),
    /// rustls does not take them.
    #[error("the files in {dir} make no TLS endpoint: {source}", dir = dir.display())]
    Tls {
        /// Where they are.
        dir: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

impl TrustError {
    pub(crate) fn bad(path: &Path, what: &'static str, why: impl ToString) -> Self {
        Self::Bad {
            path: path.to_owned(),
            what,
            why: why.to_string(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        match self {
            Self::KeyOpenToAll { path, .. } => format!(
                "chmod o= {}; for a Kubernetes secret set defaultMode: 0400 or 0440 on its volume",
                path.display()
            ),
            Self::NotOneIdentity { .. } | Self::Identity { .. } => {
                "a certificate for Slat has one URI, spiffe://DOMAIN/slat/agent/NAME (or server, user); \
                 `slat pki issue` makes one"
                    .to_owned()
            }
            Self::KeyMismatch(dir) => format!(
                "put the key and the certificate of one issue there, or `slat pki renew --out {}`",
                dir.display()
            ),
            Self::Unsettled(_) => "try again".to_owned(),
            Self::Missing(_) => {
                "a directory for --tls-dir has ca.crt, tls.crt and tls.key, and may have crl.pem; \
                 `slat pki issue` makes one"
                    .to_owned()
            }
            Self::Read { path, .. } => {
                format!("let this user read {}", path.display())
            }
            Self::NotAFile(_)
            | Self::TooLarge { .. }
            | Self::Empty { .. }
            | Self::Bad { .. }
            | Self::Tls { .. } => {
                "put the files there that the CA gave out, or make new ones with `slat pki issue`"
                    .to_owned()
            }
        }
    }
}
