//! The directory that a certificate is issued into: the files that `--tls-dir` reads. Whoever reads
//! it at any moment finds certificate and key of one issue (`files.rs`): the new key is put beside
//! the old one, then the certificate is replaced, then the key takes its place.

use std::{fs, path::Path};

use super::{
    PkiError,
    disk::{PRIVATE, PUBLIC, make_dir, metadata, replace, sync_dir},
    make::Key,
};
use crate::{
    Identity, TrustError,
    files::{CA, CERTIFICATE, CRL, KEY, NEXT_KEY, certificates, read_bounded},
    x509::Facts,
};

/// Bytes of a file of certificates.
const MAX_CERTIFICATES: u64 = 1 << 20;
/// And of a key.
const MAX_KEY: u64 = 64 << 10;

/// What stands in such a directory.
pub(crate) struct Found {
    pub(crate) identity: Identity,
    pub(crate) serial: String,
}

/// The certificate in `dir`.
pub(crate) fn read(dir: &Path) -> Result<Found, TrustError> {
    let path = dir.join(CERTIFICATE);
    let pem = read_bounded(&path, MAX_CERTIFICATES, false)?;
    let chain = certificates(&path, &pem)?;
    let leaf = chain.first().map(|leaf| Facts::read(leaf));
    let facts = match leaf {
        Some(facts) => facts.map_err(|why| TrustError::bad(&path, "certificate", why))?,
        None => {
            return Err(TrustError::Empty {
                path,
                what: "certificate in PEM",
            });
        }
    };
    let [Some(uri)] = &*facts.uris else {
        return Err(TrustError::NotOneIdentity {
            path,
            found: facts.uris.len(),
        });
    };
    let identity = uri.parse();
    Ok(Found {
        identity: identity.map_err(|source| TrustError::Identity { path, source })?,
        serial: facts.serial,
    })
}

/// What is trusted and what is revoked, anew.
pub(crate) fn write_trust(dir: &Path, trusted: &str, crl: &str) -> Result<(), PkiError> {
    make_dir(dir, 0o755)?;
    for (name, content) in [(CA, trusted), (CRL, crl)] {
        let like = metadata(&dir.join(name));
        replace(dir, name, content.as_bytes(), PUBLIC, like.as_ref())?;
    }
    Ok(())
}

/// Certificate and key, anew.
pub(crate) fn write_own(dir: &Path, chain: &str, key: &str) -> Result<(), PkiError> {
    finish(dir)?;
    let (certificate, own) = (metadata(&dir.join(CERTIFICATE)), metadata(&dir.join(KEY)));
    replace(dir, NEXT_KEY, key.as_bytes(), PRIVATE, own.as_ref())?;
    replace(
        dir,
        CERTIFICATE,
        chain.as_bytes(),
        PUBLIC,
        certificate.as_ref(),
    )?;
    take_next(dir)
}

fn take_next(dir: &Path) -> Result<(), PkiError> {
    let path = dir.join(KEY);
    fs::rename(dir.join(NEXT_KEY), &path).map_err(|error| PkiError::write(&path, error))?;
    sync_dir(dir)
}

/// Brings a renewal to its end that died between its two renames: the only key of the certificate
/// that is there must not be overwritten before the next certificate is.
fn finish(dir: &Path) -> Result<(), PkiError> {
    let Ok(next) = read_bounded(&dir.join(NEXT_KEY), MAX_KEY, true) else {
        // None, or one that no reader takes either.
        return Ok(());
    };
    let path = dir.join(CERTIFICATE);
    let Ok(pem) = read_bounded(&path, MAX_CERTIFICATES, false) else {
        return Ok(());
    };
    let Ok(chain) = certificates(&path, &pem) else {
        return Ok(());
    };
    let is_its_key = |leaf| Key::from_pem(&next).is_ok_and(|key| key.is_of(leaf));
    if chain.first().is_some_and(is_its_key) {
        take_next(dir)?;
    }
    Ok(())
}

/// Whether a certificate or key is there.
pub(crate) fn is_taken(dir: &Path) -> bool {
    [CERTIFICATE, KEY]
        .iter()
        .any(|name| dir.join(name).symlink_metadata().is_ok())
}
