//! Why a CA's directory does not do what it is asked.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{Identity, IdentityError, TrustError};

/// Why not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// There is a CA already.
    #[error("{} holds a CA already", .0.display())]
    Exists(PathBuf),
    /// There is none.
    #[error("{} holds no CA", .0.display())]
    NoCa(PathBuf),
    /// Another command works on it, for longer than is waited.
    #[error("another command works on {}", .0.display())]
    Busy(PathBuf),
    /// A file cannot be written.
    #[error("{} cannot be written: {source}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read, or holds something else.
    #[error(transparent)]
    Read(#[from] TrustError),
    /// A domain or a name is none.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A record of what was issued is damaged.
    #[error("{} is no record of a certificate: {why}", path.display())]
    Record {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The CA's certificate says of no trust domain.
    #[error("{} is of a CA that `slat pki init` did not make: its root names no trust domain", .0.display())]
    Foreign(PathBuf),
    /// The directory to issue into is in use.
    #[error("{} holds a certificate already", .0.display())]
    Taken(PathBuf),
    /// The identity is of another domain.
    #[error("{identity} is not of {domain}, the domain of this CA")]
    OtherDomain {
        /// Whose.
        identity: Identity,
        /// The CA's.
        domain: String,
    },
    /// The time asked for is none.
    #[error("a certificate cannot be valid for that time: {0}")]
    Time(&'static str),
    /// The CA's own time is over.
    #[error("the CA's root has expired")]
    RootExpired,
    /// Nothing that was issued goes by that.
    #[error("no certificate that was issued here goes by \"{0}\"")]
    Unknown(String),
    /// The certificate to renew came from elsewhere.
    #[error("the certificate in {} was not issued by this CA", .0.display())]
    NotIssuedHere(PathBuf),
    /// What is trusted there is another CA's to say.
    #[error(
        "the certificate in {} was not issued by this CA, whose roots would take the place of \
         those that are trusted there",
        .0.display()
    )]
    OthersTrust(PathBuf),
    /// The certificate to renew is revoked.
    #[error("the certificate in {} is revoked", .0.display())]
    Revoked(PathBuf),
    /// Certificates in use depend on the root.
    #[error(
        "{count} certificates that are in use were issued under root {root}, {first} among them"
    )]
    InUse {
        /// Which root.
        root: String,
        /// How many.
        count: usize,
        /// One of them.
        first: Identity,
    },
    /// There is no root to retire.
    #[error("there is no root but the one that issues")]
    NothingToRetire,
    /// A certificate could not be made.
    #[error("a certificate or list cannot be made: {0}")]
    Make(String),
}

impl PkiError {
    pub(crate) fn write(path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Write {
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// What to do about it, where there is something.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        Some(match self {
            Self::Exists(_) => "`slat pki rotate` gives it a new root; another CA needs another \
                directory"
                .to_owned(),
            Self::NoCa(dir) => {
                format!("slat pki init --dir {} --domain DOMAIN", dir.display())
            }
            Self::Busy(_) => "try again when it has ended".to_owned(),
            Self::Read(error) => error.advice(),
            Self::Foreign(_) => {
                "`slat pki` works on its own CAs; let the other CA's tools issue".to_owned()
            }
            Self::Taken(dir) => format!(
                "`slat pki renew --out {}` replaces it; another identity needs another directory",
                dir.display()
            ),
            Self::RootExpired => "slat pki rotate".to_owned(),
            Self::Unknown(_) => "`slat pki list` shows identities and serial numbers".to_owned(),
            Self::NotIssuedHere(_) | Self::Revoked(_) => {
                "`slat pki issue` makes a new one, into an empty directory".to_owned()
            }
            Self::OthersTrust(_) => {
                "publish with the CA that issued it (--dir), or add --force if \
                this one is to take its place"
                    .to_owned()
            }
            Self::InUse { .. } => "renew them first (`slat pki list` shows which), or retire it \
                with --force and they are refused from then on"
                .to_owned(),
            Self::OtherDomain { .. }
            | Self::Write { .. }
            | Self::Identity(_)
            | Self::Record { .. }
            | Self::Time(_)
            | Self::NothingToRetire
            | Self::Make(_) => return None,
        })
    }
}
