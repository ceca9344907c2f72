//! The credentials of this end: one directory, the set of its files that is in force, and the
//! endpoints made of it.
//!
//! Locking: `force` holds the set in force, which never changes; it is read for a clone of the Arc
//! and written for one assignment. `refreshing` is held through one look at the files, so that two
//! looks at once bring no older set after a newer one. `failed` is taken alone. None is held while
//! another is waited for, but `refreshing`, which comes first.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::SystemTime,
};

use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;

use crate::{Identity, Refusal, TrustError, files::Raw, set::Set, verify::Expects};

/// The credentials in one directory. A clone is the same credentials.
#[derive(Clone)]
pub struct Credentials(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    force: RwLock<Arc<Set>>,
    refreshing: Mutex<()>,
    failed: Mutex<Option<String>>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = self.set();
        f.debug_struct("Credentials")
            .field("dir", &self.0.dir)
            .field("identity", &set.identity.to_string())
            .field("generation", &set.generation)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads a directory.
    ///
    /// # Errors
    /// When its files are not there, are not bounded, are open to every user, do not belong
    /// together or name no identity. A certificate out of its time is no error: [`Self::trouble`].
    pub fn load(dir: &Path) -> Result<Self, TrustError> {
        let set = Set::new(&Raw::read_settled(dir)?, dir, 1)?;
        Ok(Self(Arc::new(Inner {
            dir: dir.to_owned(),
            force: RwLock::new(Arc::new(set)),
            refreshing: Mutex::new(()),
            failed: Mutex::new(None),
        })))
    }

    fn set(&self) -> Arc<Set> {
        let force = self.0.force.read();
        Arc::clone(&force.unwrap_or_else(PoisonError::into_inner))
    }

    /// Where they are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Who this end is, by the files in force.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.set().identity.clone()
    }

    /// The earliest end in the own chain.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.set().not_after
    }

    /// The earliest end among the trusted roots.
    #[must_use]
    pub fn ca_not_after(&self) -> SystemTime {
        self.set().ca_not_after
    }

    /// Counts the sets that were in force, from 1.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.set().generation
    }

    /// Looks at the files again. `true` when a new set is in force since this look.
    ///
    /// # Errors
    /// When the files make no set; the old one stays in force.
    pub fn refresh(&self) -> Result<bool, TrustError> {
        let _one = self
            .0
            .refreshing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let looked = self.look();
        let failed = looked.as_ref().err().map(ToString::to_string);
        *self.0.failed.lock().unwrap_or_else(PoisonError::into_inner) = failed;
        looked
    }

    fn look(&self) -> Result<bool, TrustError> {
        let old = self.set();
        if Raw::read(&self.0.dir)?.digest() == old.digest {
            return Ok(false);
        }
        let raw = Raw::read_settled(&self.0.dir)?;
        if raw.digest() == old.digest {
            return Ok(false);
        }
        let new = Set::new(&raw, &self.0.dir, old.generation.saturating_add(1))?;
        *self.0.force.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(true)
    }

    /// Why the newest files are not in force, or why those in force would be refused by an end that
    /// trusts the same roots.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let failed = self.0.failed.lock();
        let failed = failed.unwrap_or_else(PoisonError::into_inner).clone();
        failed.or_else(|| {
            let set = self.set();
            let itself = Expects::Exactly(set.identity.clone());
            let refusal = set.judge(set.chain(), &itself).err()?;
            Some(format!("the own certificate would be refused: {refusal}"))
        })
    }

    /// For an end that accepts connections: a client certificate is required, of anybody of the own
    /// domain. Each connection is to begin with a new call, or it is judged by files of the past.
    #[must_use]
    pub fn acceptor(&self) -> Arc<ServerConfig> {
        self.set().acceptor()
    }

    /// For an end that connects. The server's name is asked by rustls and plays no part: who
    /// answers is judged by `expects`.
    #[must_use]
    pub fn connector(&self, expects: Expects) -> Arc<ClientConfig> {
        self.set().connector(expects)
    }

    /// Judges a chain, the leaf first, by the files in force and the time it is. For a connection
    /// that lasts: what was good when it began may have expired or been revoked since.
    ///
    /// # Errors
    /// Why it would be refused.
    pub fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        expects: &Expects,
    ) -> Result<Identity, Refusal> {
        self.set().judge(chain, expects)
    }
}
