//! The files of an identity, read whole and bounded: `ca.crt`, `tls.crt`, `tls.key` and perhaps
//! `crl.pem`.
//!
//! Somebody may write them while they are read. A set is taken only when a second reading finds
//! the same bytes, so no set is of two issues. A renewal replaces certificate and key one after the
//! other, and keeps the new key beside them as `.tls.key.next` meanwhile: whoever reads between the
//! two, or after a writer that died there, finds a key for the certificate.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use ring::digest::{Context, SHA256};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject,
};
use zeroize::{Zeroize, Zeroizing};

use crate::TrustError;

/// The roots that are trusted.
pub(crate) const CA: &str = "ca.crt";
/// The leaf, then intermediates.
pub(crate) const CERTIFICATE: &str = "tls.crt";
/// The leaf's private key.
pub(crate) const KEY: &str = "tls.key";
/// The key of a certificate that a renewal is about to put, or has put, into its place.
pub(crate) const NEXT_KEY: &str = ".tls.key.next";
/// Revocation lists.
pub(crate) const CRL: &str = "crl.pem";

/// Bytes of certificates, of a key and of revocation lists: a hundred times what is usual.
const MAX_CERTIFICATES: u64 = 1 << 20;
const MAX_KEY: u64 = 64 << 10;
const MAX_CRL: u64 = 4 << 20;
/// Permission bits of those who are neither the owner nor of the group.
const OTHERS: u32 = 0o007;
/// Readings until two in a row are alike.
const READINGS: usize = 5;

/// A private key as it was read, zeroised when it is dropped. rustls signs with a copy, which
/// nobody wipes.
pub(crate) struct Key(PrivateKeyDer<'static>);

impl Key {
    /// For rustls, which makes its own of it.
    pub(crate) fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0
    }

    fn of_pem(path: &Path, pem: &[u8]) -> Result<Self, TrustError> {
        match PrivateKeyDer::from_pem_slice(pem) {
            Ok(key) => Ok(Self(key)),
            Err(rustls_pki_types::pem::Error::NoItemsFound) => Err(TrustError::Empty {
                path: path.to_owned(),
                what: "private key (PKCS#8, SEC1 or PKCS#1, unencrypted, in PEM)",
            }),
            // The parser's words may have a piece of the key in them.
            Err(_) => Err(TrustError::bad(path, "private key", "it is no PEM")),
        }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The bytes of a directory's files.
pub(crate) struct Raw {
    dir: PathBuf,
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    next_key: Option<Zeroizing<Vec<u8>>>,
    crl: Option<Vec<u8>>,
}

/// What the files hold.
pub(crate) struct Parsed {
    pub(crate) roots: Vec<CertificateDer<'static>>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) crls: Vec<CertificateRevocationListDer<'static>>,
    /// The key, and the one that a renewal has left.
    pub(crate) keys: Vec<Key>,
}

/// A file's content, up to `limit` bytes. Pipes and devices are not waited for.
pub(crate) fn read_bounded(
    path: &Path,
    limit: u64,
    is_private: bool,
) -> Result<Zeroizing<Vec<u8>>, TrustError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => TrustError::Missing(path.to_owned()),
        _ => TrustError::Read {
            path: path.to_owned(),
            source,
        },
    };
    let flags = rustix::fs::OFlags::RDONLY
        | rustix::fs::OFlags::CLOEXEC
        | rustix::fs::OFlags::NONBLOCK
        | rustix::fs::OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(|errno| failed(errno.into()))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(TrustError::NotAFile(path.to_owned()));
    }
    let mode = metadata.mode() & 0o7777;
    if is_private && mode & OTHERS != 0 {
        return Err(TrustError::KeyOpenToAll {
            path: path.to_owned(),
            mode,
        });
    }
    let too_large = || TrustError::TooLarge {
        path: path.to_owned(),
        limit,
    };
    if metadata.len() > limit {
        return Err(too_large());
    }
    // At once as large as it gets: a buffer that grows leaves copies of a key behind.
    let room = usize::try_from(metadata.len())
        .unwrap_or(0)
        .saturating_add(64);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    (&file)
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

/// `None` when the file is not there.
fn optional<T>(read: Result<T, TrustError>) -> Result<Option<T>, TrustError> {
    match read {
        Ok(found) => Ok(Some(found)),
        Err(TrustError::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The content of a file that holds no secret, up to `limit` bytes. Pipes and devices are refused
/// and not waited for.
///
/// # Errors
/// When it is not there, is larger, is no regular file or cannot be read.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, TrustError> {
    read_bounded(path, limit, false).map(|mut bytes| std::mem::take(&mut *bytes))
}

/// Every certificate in a PEM file.
pub(crate) fn certificates(
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| TrustError::bad(path, "certificate", error))?;
    if found.is_empty() {
        return Err(TrustError::Empty {
            path: path.to_owned(),
            what: "certificate in PEM",
        });
    }
    Ok(found)
}

impl Raw {
    /// Reads once.
    pub(crate) fn read(dir: &Path) -> Result<Self, TrustError> {
        let path = |name: &str| dir.join(name);
        Ok(Self {
            dir: dir.to_owned(),
            ca: read_file(&path(CA), MAX_CERTIFICATES)?,
            certificate: read_file(&path(CERTIFICATE), MAX_CERTIFICATES)?,
            key: read_bounded(&path(KEY), MAX_KEY, true)?,
            next_key: optional(read_bounded(&path(NEXT_KEY), MAX_KEY, true))?,
            crl: optional(read_file(&path(CRL), MAX_CRL))?,
        })
    }

    /// Reads until two readings are alike.
    pub(crate) fn read_settled(dir: &Path) -> Result<Self, TrustError> {
        let mut last = Self::read(dir)?;
        for _ in 1..READINGS {
            let again = Self::read(dir)?;
            if again.digest() == last.digest() {
                return Ok(again);
            }
            last = again;
        }
        Err(TrustError::Unsettled(dir.to_owned()))
    }

    /// Stands for the content.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        let parts = [
            Some(&*self.ca),
            Some(&*self.certificate),
            Some(&**self.key),
            self.next_key.as_ref().map(|key| key.as_slice()),
            self.crl.as_deref(),
        ];
        for part in parts {
            // Absent and empty differ, and no byte counts for two files.
            let length = part.map_or(u64::MAX, |part| {
                u64::try_from(part.len()).unwrap_or(u64::MAX)
            });
            context.update(&length.to_be_bytes());
            context.update(part.unwrap_or_default());
        }
        let mut digest = [0; 32];
        for (to, from) in digest.iter_mut().zip(context.finish().as_ref()) {
            *to = *from;
        }
        digest
    }

    /// Decodes.
    pub(crate) fn parse(&self) -> Result<Parsed, TrustError> {
        let path = |name: &str| self.dir.join(name);
        let mut keys = vec![Key::of_pem(&path(KEY), &self.key)?];
        if let Some(next) = &self.next_key
            // Its writer may be in the middle of it; it counts only once it fits.
            && let Ok(next) = Key::of_pem(&path(NEXT_KEY), next)
        {
            keys.push(next);
        }
        let crls = match &self.crl {
            None => Vec::new(),
            Some(pem) => CertificateRevocationListDer::pem_slice_iter(pem)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| TrustError::bad(&path(CRL), "revocation list", error))?,
        };
        if self.crl.is_some() && crls.is_empty() {
            return Err(TrustError::Empty {
                path: path(CRL),
                what: "revocation list in PEM",
            });
        }
        Ok(Parsed {
            roots: certificates(&path(CA), &self.ca)?,
            chain: certificates(&path(CERTIFICATE), &self.certificate)?,
            crls,
            keys,
        })
    }
}
