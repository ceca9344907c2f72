//! A certificate authority in a directory, for those who have none: what `slat pki` does.
//!
//! Every command takes the directory's lock, reads it whole, and writes files that are whole or not
//! there, in an order in which a command that dies leaves nothing that the next one cannot go on
//! from: the record of a certificate before the certificate, the revocation of a record before the
//! list, a root's key before the root. What is written last is what counts.
//!
//! Only the CA's directory holds keys that can issue. It belongs on a machine that runs no agent.

mod disk;
mod error;
mod make;
mod out;
mod record;
mod roots;

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

pub use error::PkiError;
pub use make::{Validity, usual_lifetime};
pub use record::Issued;
pub use roots::RootInfo;

use self::{
    disk::{Lock, make_dir},
    roots::Roots,
};
use crate::{Identity, Kind, files::CA};

/// A CA in a directory.
#[derive(Clone, Debug)]
pub struct Ca {
    dir: PathBuf,
}

impl Ca {
    /// Makes one in a directory that holds none, for a trust domain. Only its owner reads the
    /// directory.
    ///
    /// # Errors
    /// When there is one, the domain is none, or it cannot be written.
    pub fn init(dir: &Path, domain: &str) -> Result<Self, PkiError> {
        Identity::check_domain(domain)?;
        make_dir(dir, 0o700)?;
        let _lock = Lock::take(dir)?;
        Roots::init(dir, domain)?;
        Roots::open(dir)?.write_crl(&[])?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// The one in a directory.
    ///
    /// # Errors
    /// When there is none, or its files are damaged.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        let ca = Self {
            dir: dir.to_owned(),
        };
        ca.work(|_| Ok(()))?;
        Ok(ca)
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Does one command's work on it.
    fn work<T>(&self, work: impl FnOnce(&Roots) -> Result<T, PkiError>) -> Result<T, PkiError> {
        // Before anything is made there, be it a lock.
        if !self.dir.join(CA).is_file() {
            return Err(PkiError::NoCa(self.dir.clone()));
        }
        let _lock = Lock::take(&self.dir)?;
        work(&Roots::open(&self.dir)?)
    }

    /// Its trust domain.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn domain(&self) -> Result<String, PkiError> {
        self.work(|roots| Ok(roots.domain().to_owned()))
    }

    /// Its roots, the one that issues first.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn roots(&self) -> Result<Vec<RootInfo>, PkiError> {
        self.work(|roots| Ok(roots.infos()))
    }

    /// What it issued, the oldest first.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn issued(&self) -> Result<Vec<Issued>, PkiError> {
        self.work(|_| Issued::all(&self.dir))
    }

    /// Issues a certificate into a directory that holds none. It ends no later than the root.
    ///
    /// # Errors
    /// When the name is none, the directory holds a certificate, or something cannot be written.
    pub fn issue(
        &self,
        kind: Kind,
        name: &str,
        validity: Option<Validity>,
        out: &Path,
    ) -> Result<Issued, PkiError> {
        self.work(|roots| {
            let identity = Identity::new(roots.domain(), kind, name)?;
            if out::is_taken(out) {
                return Err(PkiError::Taken(out.to_owned()));
            }
            self.give_out(roots, &identity, validity, out)
        })
    }

    /// Replaces the certificate in a directory by a new one, with a new key, for the same identity.
    ///
    /// # Errors
    /// When this CA did not issue it, it was revoked, or something cannot be written.
    pub fn renew(&self, out: &Path, validity: Option<Validity>) -> Result<Issued, PkiError> {
        self.work(|roots| {
            let mut record = self.record_in(out)?;
            if record.revoked.is_some() {
                return Err(PkiError::Revoked(out.to_owned()));
            }
            let issued = self.give_out(roots, &record.identity, validity, out)?;
            record.replaced_by = Some(issued.serial.clone());
            record.write(&self.dir)?;
            Ok(issued)
        })
    }

    fn give_out(
        &self,
        roots: &Roots,
        identity: &Identity,
        validity: Option<Validity>,
        out: &Path,
    ) -> Result<Issued, PkiError> {
        let (root, root_key, facts) = roots.issuing();
        let now = SystemTime::now();
        if facts.not_after <= now {
            return Err(PkiError::RootExpired);
        }
        let mut validity = match validity {
            Some(validity) => validity,
            None => Validity::usual(identity.kind())?,
        };
        validity.not_before = validity.not_before.max(facts.not_before);
        validity.not_after = validity.not_after.min(facts.not_after);
        if validity.not_after <= validity.not_before {
            return Err(PkiError::Time("it ends before it begins"));
        }
        let (issued, pem, key) = make::leaf(root, root_key, &facts.serial, identity, validity)?;
        issued.write(&self.dir)?;
        let crl = roots.write_crl(&Issued::all(&self.dir)?)?;
        out::write_trust(out, &roots.trusted(), &crl)?;
        out::write_own(out, &(pem + &roots.chain()), &key.pem())?;
        Ok(issued)
    }

    /// The record of the certificate in a directory.
    ///
    /// # Errors
    /// When there is none, or this CA did not issue it.
    pub fn holds(&self, out: &Path) -> Result<Issued, PkiError> {
        self.work(|_| self.record_in(out))
    }

    fn record_in(&self, out: &Path) -> Result<Issued, PkiError> {
        let found = out::read(out)?;
        Issued::find(&self.dir, &found.serial)?
            .filter(|record| record.identity == found.identity)
            .ok_or_else(|| PkiError::NotIssuedHere(out.to_owned()))
    }

    /// Writes what is trusted and what is revoked, as it is now, into a directory that this CA has
    /// issued a certificate into.
    ///
    /// # Errors
    /// When the directory is none of those, or something cannot be written.
    pub fn publish(&self, out: &Path) -> Result<Identity, PkiError> {
        self.publish_into(out, false)
    }

    /// The same, also where another CA of the same domain has issued: its roots are trusted there
    /// no longer.
    ///
    /// # Errors
    /// When the certificate there is of another domain, or something cannot be written.
    pub fn publish_by_force(&self, out: &Path) -> Result<Identity, PkiError> {
        self.publish_into(out, true)
    }

    fn publish_into(&self, out: &Path, force: bool) -> Result<Identity, PkiError> {
        self.work(|roots| {
            let found = out::read(out)?;
            if found.identity.domain() != roots.domain() {
                return Err(PkiError::OtherDomain {
                    identity: found.identity,
                    domain: roots.domain().to_owned(),
                });
            }
            if !force {
                self.record_in(out).map_err(|error| match error {
                    PkiError::NotIssuedHere(out) => PkiError::OthersTrust(out),
                    other => other,
                })?;
            }
            let crl = roots.write_crl(&Issued::all(&self.dir)?)?;
            out::write_trust(out, &roots.trusted(), &crl)?;
            Ok(found.identity)
        })
    }

    /// Revokes the certificate of a serial number, or all of an identity that were issued until
    /// now: by its URI, or as `agent/NAME`. What was revoked before stays as it was. Returns what
    /// is revoked by that, and writes the list anew.
    ///
    /// # Errors
    /// When nothing goes by that, or something cannot be written.
    pub fn revoke(&self, which: &str) -> Result<Vec<Issued>, PkiError> {
        self.work(|roots| {
            let mut all = Issued::all(&self.dir)?;
            let uri = format!("spiffe://{}/slat/{which}", roots.domain());
            let goes_by = |record: &Issued| {
                let identity = record.identity.to_string();
                record.serial == which || identity == which || identity == uri
            };
            let now = SystemTime::now();
            let mut revoked = Vec::new();
            for record in all.iter_mut().filter(|record| goes_by(record)) {
                if record.revoked.is_none() {
                    record.revoked = Some(now);
                    record.write(&self.dir)?;
                }
                revoked.push(record.clone());
            }
            if revoked.is_empty() {
                return Err(PkiError::Unknown(crate::identity::shown(which)));
            }
            roots.write_crl(&all)?;
            Ok(revoked)
        })
    }

    /// Makes a new root, which issues from now on. The older ones stay trusted, and vouch for it,
    /// so that an end that knows them only trusts what is issued from now on.
    ///
    /// # Errors
    /// When something cannot be written.
    pub fn rotate(&self) -> Result<RootInfo, PkiError> {
        self.work(|roots| {
            roots.rotate()?;
            let roots = Roots::open(&self.dir)?;
            roots.write_crl(&Issued::all(&self.dir)?)?;
            let mut infos = roots.infos().into_iter();
            infos.next().ok_or_else(|| PkiError::NoCa(self.dir.clone()))
        })
    }

    /// Trusts no root from now on but the one that issues, and returns those that are no longer.
    /// Where certificates in use were issued under one of them, only if `force`.
    ///
    /// # Errors
    /// When there is none to retire, one is in use, or something cannot be written.
    pub fn retire(&self, force: bool) -> Result<Vec<RootInfo>, PkiError> {
        self.work(|roots| {
            let mut infos = roots.infos();
            infos.retain(|root| !root.issues);
            if infos.is_empty() {
                return Err(PkiError::NothingToRetire);
            }
            let records = Issued::all(&self.dir)?;
            let now = SystemTime::now();
            for root in infos.iter().filter(|_| !force) {
                let depends = |it: &&Issued| it.root == root.serial && it.is_in_use(now);
                let mut used = records.iter().filter(depends);
                if let Some(first) = used.next() {
                    return Err(PkiError::InUse {
                        root: root.serial.clone(),
                        count: used.count().saturating_add(1),
                        first: first.identity.clone(),
                    });
                }
            }
            roots.retire()?;
            Roots::open(&self.dir)?.write_crl(&records)?;
            Ok(infos)
        })
    }
}
