//! Leave for what a migration asks of this host: grants that the server signed, checked before
//! anything is done, and checked again by the VM's process, to which they are passed on with the
//! keys that are in force here.
//!
//! A grant is for one step, one migration, one VM at one epoch, one start of this agent. A use of
//! it is on disk before the step is taken, so that no restart makes it good again ([`used`]).
//!
//! # Locking
//! `keys` and `used` are leaf mutexes, held for lookups and changes in memory. `saving` and
//! `writing` are async mutexes, one for each of their files, held until a write has ended. A use is
//! in memory only when it is on disk; keys count at once, whether they can be written or not, and a
//! disk that hangs delays no report.

mod file;
mod keys;
mod used;

#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use ::metrics::{Unit, counter, describe_counter};
use slat_proto::{
    ApiError, Reason,
    model::{HostName, refused_grant, signed_grant},
    v1,
};
use slat_trust::grant::{Checked, Grant, GrantError, Purpose};
use tokio::sync::OwnedMutexGuard;

use self::{
    keys::Keys,
    used::{Refused, Used},
};
use super::side::{Role, SideKey};

/// In the state directory.
const USED: &str = "grants-used.json";
const REFUSED: &str = "slat_grants_refused_total";

/// What a step is about: what its grant must say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step<'a> {
    pub(super) purpose: Purpose,
    pub(super) side: &'a SideKey,
    /// `None`: not known here.
    pub(super) vm_uid: Option<&'a str>,
    pub(super) epoch: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Grants {
    host: String,
    incarnation: String,
    clock: fn() -> SystemTime,
    keys: Mutex<Keys>,
    used: Mutex<Used>,
    used_path: PathBuf,
    writing: Arc<tokio::sync::Mutex<()>>,
    saving: Arc<tokio::sync::Mutex<()>>,
    /// It was said that the keys cannot be kept.
    key_trouble: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Changed by single calls that leave it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a file off the runtime's threads, in the keeping of a guard that comes back: it is held
/// to the end of the write also when nobody waits for that any more.
async fn write(
    path: PathBuf,
    value: serde_json::Value,
    alone: OwnedMutexGuard<()>,
) -> (Result<(), ApiError>, Option<OwnedMutexGuard<()>>) {
    let to = path.clone();
    let written = tokio::task::spawn_blocking(move || (file::write(&to, &value), alone));
    let (written, alone) = match written.await {
        Ok((written, alone)) => (written, Some(alone)),
        Err(error) => (Err(io::Error::other(error)), None),
    };
    let written = written.map_err(|error| ApiError::from_io(Reason::Store, &path, &error));
    (written, alone)
}

impl Grants {
    /// Reads what is known. Blocks on the disk.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn open(
        state_dir: &Path,
        host: &HostName,
        incarnation: &str,
        clock: fn() -> SystemTime,
    ) -> io::Result<Self> {
        let help = "Grants that were refused here, by reason.";
        describe_counter!(REFUSED, Unit::Count, help);
        for reason in [
            Reason::GrantInvalid,
            Reason::GrantExpired,
            Reason::GrantUsed,
            Reason::GrantKeyUnknown,
        ] {
            counter!(REFUSED, "reason" => reason.as_str()).increment(0);
        }
        let used_path = state_dir.join(USED);
        let used = match file::read(&used_path)? {
            None => Used::default(),
            Some(value) => Used::from_json(&value).unwrap_or_else(|| {
                tracing::error!(path = %used_path.display(), "it cannot be read: begun anew");
                Used::default()
            }),
        };
        Ok(Self {
            host: host.id().to_owned(),
            incarnation: incarnation.to_owned(),
            clock,
            keys: Mutex::new(Keys::open(state_dir)?),
            used: Mutex::new(used),
            used_path,
            writing: Arc::default(),
            saving: Arc::default(),
            key_trouble: AtomicBool::new(false),
        })
    }

    /// Takes an announcement of the server in. Whether there is something to save.
    pub(super) fn learn(&self, announced: &[v1::GrantKey]) -> bool {
        let mut keys = lock(&self.keys);
        if let Some(ring) = keys.after(announced, (self.clock)()) {
            keys.set(ring);
        }
        keys.is_unsaved()
    }

    /// Puts the keys on disk; what cannot be written is tried again with the next announcement.
    pub(super) async fn save_keys(&self) {
        // Whoever writes already is asked for again, too.
        let Ok(alone) = Arc::clone(&self.saving).try_lock_owned() else {
            return;
        };
        let (path, value, ring) = lock(&self.keys).to_write();
        let (written, _alone) = write(path, value, alone).await;
        match written {
            Ok(()) => {
                lock(&self.keys).saved(&ring);
                self.key_trouble.store(false, Ordering::Relaxed);
            }
            Err(error) if !self.key_trouble.swap(true, Ordering::Relaxed) => {
                tracing::error!(%error, "the server's keys cannot be kept");
            }
            Err(_) => {}
        }
    }

    /// The keys in force, for a VM's process.
    pub(super) fn keys(&self) -> Vec<v1::GrantKey> {
        lock(&self.keys).in_force((self.clock)())
    }

    /// Checks a request's grant and uses it: returns when that is on disk.
    ///
    /// # Errors
    /// GRANT_INVALID, GRANT_EXPIRED, GRANT_KEY_UNKNOWN, GRANT_USED; LIMIT_REACHED; STORE.
    pub(super) async fn accept(
        &self,
        field: Option<&v1::SignedGrant>,
        step: Step<'_>,
    ) -> Result<(), ApiError> {
        let accepted = self.try_accept(field, step).await;
        accepted.inspect_err(|error| self.count(error, step.side))
    }

    fn count(&self, error: &ApiError, side: &SideKey) {
        counter!(REFUSED, "reason" => error.reason.as_str()).increment(1);
        tracing::warn!(migration = %side.migration, side = side.role.as_str(), %error, reason = %error.reason, "a grant is refused");
    }

    async fn try_accept(
        &self,
        field: Option<&v1::SignedGrant>,
        step: Step<'_>,
    ) -> Result<(), ApiError> {
        let signed = signed_grant(field)?;
        let now = (self.clock)();
        let grant = lock(&self.keys).ring().verify(&signed, now);
        let grant = grant.map_err(|error| told(&error, None))?;
        let own = Some((self.host.as_str(), Some(self.incarnation.as_str())));
        let (source, destination) = match step.side.role {
            Role::Source => (own, None),
            Role::Destination => (None, own),
        };
        let checked = grant.check(&Checked {
            purpose: Some(step.purpose),
            migration: Some(step.side.migration.id()),
            vm_uid: step.vm_uid,
            epoch: step.epoch,
            source,
            destination,
        });
        checked.map_err(|error| told(&error, Some(&grant)))?;
        self.use_up(&grant, step).await
    }

    async fn use_up(&self, grant: &Grant, step: Step<'_>) -> Result<(), ApiError> {
        let alone = Arc::clone(&self.writing).lock_owned().await;
        let mut after = lock(&self.used).clone();
        let now_ms = file::millis((self.clock)());
        let new = after.take(grant, step.side, now_ms).map_err(|refused| {
            let (reason, words, advice) = match refused {
                Refused::Used => (
                    Reason::GrantUsed,
                    "the grant is used up",
                    "migrate again; if nobody called twice, somebody plays old calls back",
                ),
                Refused::TooMany => (
                    Reason::LimitReached,
                    "too many grants are kept here until they end",
                    "try again when some have ended",
                ),
            };
            ApiError::new(reason, words)
                .with("migration", &step.side.migration)
                .with("grant", grant.id_text())
                .with("limit", used::MOST)
                .with("advice", advice)
        })?;
        if !new {
            return Ok(());
        }
        let (written, _alone) = write(self.used_path.clone(), after.to_json(), alone).await;
        match written {
            Ok(()) => {}
            // A decision is about a side that has its own journal, and about no other: it needs no
            // disk here, and a destination in doubt on a full one must hear it.
            Err(error) if matches!(step.purpose, Purpose::Commit | Purpose::Abort) => {
                tracing::warn!(%error, "the use of a decision is not kept");
            }
            Err(error) => return Err(error.with("migration", &step.side.migration)),
        }
        *lock(&self.used) = after;
        Ok(())
    }

    /// Whether who asks how the source of a migration stands received it from this host, by what it
    /// shows: it changes nothing, so no time is asked for. `asking`: the host whose agent asks,
    /// where that is known.
    ///
    /// # Errors
    /// GRANT_INVALID, GRANT_KEY_UNKNOWN; PERMISSION for the destination's side, and for a host that
    /// is not the grant's destination.
    pub(super) fn may_ask(
        &self,
        field: Option<&v1::SignedGrant>,
        side: &SideKey,
        asking: Option<&str>,
    ) -> Result<Grant, ApiError> {
        let may = self.try_may_ask(field, side, asking);
        may.inspect_err(|error| self.count(error, side))
    }

    fn try_may_ask(
        &self,
        field: Option<&v1::SignedGrant>,
        side: &SideKey,
        asking: Option<&str>,
    ) -> Result<Grant, ApiError> {
        let denied = |words: &str| {
            ApiError::new(Reason::Permission, words)
                .with("method", "slat.v1.TransferService/GetTransfer")
                .with("role", "agent")
                .with("identity", asking.unwrap_or_default())
                .with("migration", &side.migration)
                .with("advice", "ask the server")
        };
        if side.role != Role::Source {
            return Err(denied("another agent may ask for the source's side alone"));
        }
        let signed = signed_grant(field)?;
        let grant = lock(&self.keys).ring().verify_old(&signed);
        let grant = grant.map_err(|error| told(&error, None))?;
        let checked = grant.check(&Checked {
            purpose: Some(Purpose::Receive),
            migration: Some(side.migration.id()),
            source: Some((&self.host, None)),
            ..Checked::default()
        });
        checked.map_err(|error| told(&error, Some(&grant)))?;
        if asking.is_some_and(|asking| asking != grant.destination.host) {
            return Err(denied("the grant is another host's"));
        }
        Ok(grant)
    }

    /// A side was released: no grant that was signed before begins it again.
    pub(super) async fn released(&self, side: &SideKey) {
        let alone = Arc::clone(&self.writing).lock_owned().await;
        let mut after = lock(&self.used).clone();
        after.release(side, file::millis((self.clock)()));
        let (written, _alone) = write(self.used_path.clone(), after.to_json(), alone).await;
        if let Err(error) = written {
            tracing::error!(%error, migration = %side.migration, "a released side is not kept as such");
        }
        *lock(&self.used) = after;
    }
}

/// A refusal, with the field that differs.
fn told(error: &GrantError, grant: Option<&Grant>) -> ApiError {
    let refused = refused_grant(error, grant);
    match error {
        GrantError::Other {
            what,
            found,
            wanted,
        } => refused
            .with("field", what)
            .with("found", found)
            .with("wanted", wanted),
        _ => refused,
    }
}
