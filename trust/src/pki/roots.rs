//! The roots of a CA and their keys, as they stand in its directory:
//!
//! - `ca.crt`: what is trusted. The first root issues; the others are of before a rotation.
//! - `ca.key`: the first root's key; `old/SERIAL.key`: the others', to sign their lists.
//! - `cross.crt`: each later root vouched for by the one before it, given out with certificates.
//!
//! `ca.crt` decides. A rotation puts the new key beside the old one first, as `.ca.key.next`, and
//! the next command finishes what one that died left. What belongs to no root in `ca.crt`, as after
//! a retirement that died, goes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::CertificateDer;

use super::{
    PkiError,
    disk::{PRIVATE, PUBLIC, make_dir, remove, replace, sync_dir},
    make::{Key, Root, crl},
    record::Issued,
};
use crate::{
    Identity, TrustError,
    files::{CA, CRL, certificates, read_bounded},
    x509::Facts,
};

const KEY: &str = "ca.key";
const NEXT_KEY: &str = ".ca.key.next";
const CROSS: &str = "cross.crt";
const OLD: &str = "old";
/// Bytes of a file of certificates, and of a key.
const MAX_CERTIFICATES: u64 = 1 << 20;
const MAX_KEY: u64 = 64 << 10;

/// A root of a CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootInfo {
    /// Its serial number, in hexadecimal digits.
    pub serial: String,
    /// When it begins to be valid.
    pub not_before: SystemTime,
    /// When it ends to be valid.
    pub not_after: SystemTime,
    /// Whether it is the one that issues.
    pub issues: bool,
}

/// A certificate with what is read in it.
struct Read {
    der: CertificateDer<'static>,
    facts: Facts,
}

/// Of one CA, read whole.
pub(crate) struct Roots {
    dir: PathBuf,
    domain: String,
    /// The first one issues. Never empty.
    first: Read,
    key: Key,
    older: Vec<(Read, Key)>,
    crosses: Vec<Read>,
}

fn to_pem(der: &CertificateDer<'_>) -> String {
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    pem::encode_config(&Pem::new("CERTIFICATE", der.to_vec()), config)
}

fn read_certificates(path: &Path) -> Result<Vec<Read>, TrustError> {
    let pem = read_bounded(path, MAX_CERTIFICATES, false)?;
    let read = |der: CertificateDer<'static>| {
        let facts = Facts::read(&der).map_err(|why| TrustError::bad(path, "certificate", why))?;
        Ok(Read { der, facts })
    };
    certificates(path, &pem)?.into_iter().map(read).collect()
}

fn read_key(path: &Path) -> Result<Key, PkiError> {
    Key::from_pem(&read_bounded(path, MAX_KEY, true)?)
}

/// The domain that a root of `slat pki` is for: its one URI is `spiffe://DOMAIN`.
fn domain_of(root: &Facts) -> Option<&str> {
    let [Some(uri)] = &*root.uris else {
        return None;
    };
    let domain = uri.strip_prefix("spiffe://")?;
    Identity::check_domain(domain).ok().map(|()| domain)
}

impl Roots {
    /// Makes a CA where there is none.
    pub(crate) fn init(dir: &Path, domain: &str) -> Result<(), PkiError> {
        Identity::check_domain(domain)?;
        if dir.join(CA).exists() {
            return Err(PkiError::Exists(dir.to_owned()));
        }
        let root = Root::new(domain)?;
        // `ca.crt` makes it a CA, so it comes last.
        replace(dir, KEY, root.key.pem().as_bytes(), PRIVATE, None)?;
        replace(dir, CA, root.pem.as_bytes(), PUBLIC, None)
    }

    /// Reads a CA and finishes a rotation that was broken off. The directory's lock is held.
    pub(crate) fn open(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join(CA);
        let mut roots = match read_certificates(&path) {
            Err(TrustError::Missing(_)) => return Err(PkiError::NoCa(dir.to_owned())),
            other => other?.into_iter(),
        };
        let first = roots.next().ok_or_else(|| PkiError::NoCa(dir.to_owned()))?;
        let domain = domain_of(&first.facts)
            .ok_or_else(|| PkiError::Foreign(path.clone()))?
            .to_owned();
        let key = Self::own_key(dir, &first)?;
        let mut older = Vec::new();
        for root in roots {
            let key = read_key(&old_key(dir, &root.facts.serial))?;
            older.push((root, key));
        }
        let crosses = match read_certificates(&dir.join(CROSS)) {
            Err(TrustError::Missing(_)) => Vec::new(),
            other => other?,
        };
        let mut roots = Self {
            dir: dir.to_owned(),
            domain,
            first,
            key,
            older,
            crosses,
        };
        roots.forget_keys()?;
        roots.forget_crosses()?;
        Ok(roots)
    }

    /// Removes the keys of roots that are trusted no longer, and what was half written beside them.
    fn forget_keys(&self) -> Result<(), PkiError> {
        let old = self.dir.join(OLD);
        let read = |source| TrustError::Read {
            path: old.clone(),
            source,
        };
        let entries = match fs::read_dir(&old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(read)?,
        };
        for entry in entries {
            let path = entry.map_err(read)?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let is_key = name.is_some_and(|name| name.ends_with(".key") || name.ends_with(".new"));
            let mut older = self.older.iter();
            if is_key && !older.any(|(root, _)| old_key(&self.dir, &root.facts.serial) == path) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Keeps the crosses from root to root among those that are trusted.
    fn forget_crosses(&mut self) -> Result<(), PkiError> {
        let older = self.older.iter().map(|(root, _)| root);
        let all = std::iter::once(&self.first).chain(older);
        let names: Vec<&[u8]> = all.map(|root| &*root.facts.subject).collect();
        let before = self.crosses.len();
        self.crosses.retain(|cross| {
            names.contains(&&*cross.facts.subject) && names.contains(&&*cross.facts.issuer)
        });
        if self.crosses.len() == before {
            return Ok(());
        }
        if self.crosses.is_empty() {
            return remove(&self.dir.join(CROSS));
        }
        let crosses: String = self.crosses.iter().map(|it| to_pem(&it.der)).collect();
        replace(&self.dir, CROSS, crosses.as_bytes(), PUBLIC, None)
    }

    fn own_key(dir: &Path, first: &Read) -> Result<Key, PkiError> {
        let (path, next) = (dir.join(KEY), dir.join(NEXT_KEY));
        let key = read_key(&path)?;
        if key.is_of(&first.der) {
            // What a rotation left that did not come to its end.
            remove(&next)?;
            return Ok(key);
        }
        let key = match read_key(&next) {
            Err(PkiError::Read(TrustError::Missing(_))) => None,
            other => Some(other?).filter(|key| key.is_of(&first.der)),
        };
        let key = key.ok_or_else(|| {
            let why = "it is not the key of the first certificate in ca.crt";
            TrustError::bad(&path, "private key", why)
        })?;
        fs::rename(&next, &path).map_err(|error| PkiError::write(&path, error))?;
        sync_dir(dir)?;
        Ok(key)
    }

    pub(crate) fn domain(&self) -> &str {
        &self.domain
    }

    /// The one that issues: its certificate, key and what is read in it.
    pub(crate) fn issuing(&self) -> (&CertificateDer<'static>, &Key, &Facts) {
        (&self.first.der, &self.key, &self.first.facts)
    }

    pub(crate) fn infos(&self) -> Vec<RootInfo> {
        let info = |root: &Read, issues| RootInfo {
            serial: root.facts.serial.clone(),
            not_before: root.facts.not_before,
            not_after: root.facts.not_after,
            issues,
        };
        let older = self.older.iter().map(|(root, _)| info(root, false));
        std::iter::once(info(&self.first, true))
            .chain(older)
            .collect()
    }

    /// `ca.crt`.
    pub(crate) fn trusted(&self) -> String {
        let older = self.older.iter().map(|(root, _)| root);
        let all = std::iter::once(&self.first).chain(older);
        all.map(|root| to_pem(&root.der)).collect()
    }

    /// What follows a certificate in its chain: the issuing root as the older ones vouch for it,
    /// one after the other. Empty when there are none.
    pub(crate) fn chain(&self) -> String {
        let mut chain = String::new();
        let mut subject = &self.first.facts.subject;
        // Each links to an older one; a circle ends with the list.
        for _ in 0..self.crosses.len() {
            let mut crosses = self.crosses.iter();
            let Some(cross) = crosses.find(|cross| cross.facts.subject == *subject) else {
                break;
            };
            chain.push_str(&to_pem(&cross.der));
            subject = &cross.facts.issuer;
        }
        chain
    }

    /// Writes `crl.pem`, one list for each root, and returns it.
    pub(crate) fn write_crl(&self, records: &[Issued]) -> Result<String, PkiError> {
        let now = SystemTime::now();
        let mut lists = String::new();
        let older = self.older.iter().map(|(root, key)| (root, key));
        for (root, key) in std::iter::once((&self.first, &self.key)).chain(older) {
            let revoked: Vec<&Issued> = records
                .iter()
                .filter(|it| it.revoked.is_some() && it.not_after >= now)
                .filter(|it| it.root == root.facts.serial)
                .collect();
            lists.push_str(&crl(&root.der, key, &revoked)?);
        }
        replace(&self.dir, CRL, lists.as_bytes(), PUBLIC, None)?;
        Ok(lists)
    }

    /// Makes a new root the one that issues; the others stay trusted.
    pub(crate) fn rotate(&self) -> Result<(), PkiError> {
        let dir = &self.dir;
        let new = Root::new(&self.domain)?;
        let cross = new.crossed_by(&self.first.der, &self.key, self.first.facts.not_after)?;
        let old = dir.join(OLD);
        make_dir(&old, 0o700)?;
        let name = format!("{}.key", self.first.facts.serial);
        replace(&old, &name, self.key.pem().as_bytes(), PRIVATE, None)?;
        replace(dir, NEXT_KEY, new.key.pem().as_bytes(), PRIVATE, None)?;
        let crosses: String = self.crosses.iter().map(|it| to_pem(&it.der)).collect();
        replace(dir, CROSS, (cross + &crosses).as_bytes(), PUBLIC, None)?;
        let trusted = to_pem(&new.der) + &self.trusted();
        replace(dir, CA, trusted.as_bytes(), PUBLIC, None)?;
        let key = dir.join(KEY);
        fs::rename(dir.join(NEXT_KEY), &key).map_err(|error| PkiError::write(&key, error))?;
        sync_dir(dir)
    }

    /// Trusts no root but the one that issues, and forgets the others' keys.
    pub(crate) fn retire(&self) -> Result<(), PkiError> {
        let own = to_pem(&self.first.der);
        replace(&self.dir, CA, own.as_bytes(), PUBLIC, None)?;
        remove(&self.dir.join(CROSS))?;
        for (root, _) in &self.older {
            remove(&old_key(&self.dir, &root.facts.serial))?;
        }
        Ok(())
    }
}

fn old_key(dir: &Path, serial: &str) -> PathBuf {
    dir.join(OLD).join(format!("{serial}.key"))
}
