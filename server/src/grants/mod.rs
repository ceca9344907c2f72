//! The server's keys, and the grants that it signs by them: see `slat_trust::grant`.
//!
//! # Keys
//! ```text
//! announced |------- 2 days ------|
//! signs                           |-------- 7 days --------|
//! announced, only the public half                          |-- the longest life of a grant --|
//! ```
//! [`Grants::tend`] makes the first key, a key's successor in time, and the next key at once when
//! somebody took the file of the one that signs away: so a key that is not to be trusted any more
//! is revoked by the removal of its file. Agents are told all keys whose grants may still be good,
//! with each answer to a report; one that is told no more is over for them. A key is on disk
//! before it signs. When the time of a key is over its private half is removed.
//!
//! # Times
//! A grant is read by one host, so its times are by that host's clock, as far as the server has
//! measured it. Keys are announced with a margin before their time for hosts whose clocks are late.
//!
//! # Locking
//! `keys` is a `std` mutex, held for lookups and signatures in memory. [`Grants::tend`] touches the
//! disk without it; `tending` keeps two of them apart. Private keys are in no log;
//! what is wiped of them when they are dropped, `slat_trust::grant` says.

mod error;
mod file;

#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use slat_proto::{model::key_message, v1};
use slat_trust::grant::{Grant, GrantKey, Party, Purpose, Signer};
use tokio_util::sync::CancellationToken;

pub(crate) use self::error::GrantsError;
use self::file::{Half, Key};

/// How long a key signs.
const SIGNS: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long before that it is announced.
const AHEAD: Duration = Duration::from_secs(2 * 24 * 3600);
/// The longest life of a grant, whatever time its migration has.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
/// What a grant for one side has more than its migration may take.
const MARGIN: Duration = Duration::from_secs(5 * 60);
/// Life of a decision.
const DECISION: Duration = Duration::from_secs(2 * 60);
/// Keys that are announced at most.
const ANNOUNCED: usize = 8;
/// How often the directory is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// In the server's state directory.
const DIRECTORY: &str = "grant-keys";

const SIGNED: &str = "slat_grants_signed_total";
const NOT_AFTER: &str = "slat_grant_key_not_after_timestamp_seconds";

/// The server's wall clock; a test has its own.
pub(crate) type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// What grants are about.
#[derive(Clone, Debug)]
pub(crate) struct About {
    /// The migration's id.
    pub(crate) migration: String,
    pub(crate) vm_uid: String,
    /// At the source.
    pub(crate) epoch: u64,
    pub(crate) source: Party,
    pub(crate) destination: Party,
    /// Of the two ends' page streams; zeroes: in the clear, or not known yet.
    pub(crate) source_key: [u8; 32],
    pub(crate) destination_key: [u8; 32],
    /// By how much the clock of the host that it goes to is ahead of the server's, milliseconds.
    pub(crate) ahead_ms: i64,
}

/// See the module.
pub(crate) struct Grants {
    directory: PathBuf,
    clock: Clock,
    keys: Mutex<Vec<Key>>,
    /// The names in the directory, as they were left.
    tending: Mutex<Vec<String>>,
}

fn later(time: SystemTime, by_ms: i64) -> SystemTime {
    let by = Duration::from_millis(by_ms.unsigned_abs());
    let moved = if by_ms < 0 {
        time.checked_sub(by)
    } else {
        time.checked_add(by)
    };
    moved.unwrap_or(time)
}

impl Grants {
    /// Takes up the keys in a state directory, or makes the first one. Blocks on the disk.
    ///
    /// # Errors
    /// See [`GrantsError`].
    pub(crate) fn open(state_dir: &std::path::Path, clock: Clock) -> Result<Self, GrantsError> {
        let help = "Grants that this server signed, by what for.";
        describe_counter!(SIGNED, Unit::Count, help);
        for purpose in [
            Purpose::Receive,
            Purpose::Send,
            Purpose::Commit,
            Purpose::Abort,
        ] {
            counter!(SIGNED, "purpose" => purpose.as_str()).increment(0);
        }
        let help = "When the last key that this server has for grants stops signing.";
        describe_gauge!(NOT_AFTER, Unit::Seconds, help);
        let this = Self {
            directory: state_dir.join(DIRECTORY),
            clock,
            keys: Mutex::default(),
            tending: Mutex::default(),
        };
        file::make(&this.directory)?;
        this.tend()?;
        Ok(this)
    }

    fn keys(&self) -> MutexGuard<'_, Vec<Key>> {
        // Replaced as a whole.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings keys, disk and time together: see the module. Blocks on the disk.
    ///
    /// # Errors
    /// When the directory cannot be used; the keys that were there go on.
    pub(crate) fn tend(&self) -> Result<(), GrantsError> {
        let mut left = self.tending.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)();
        let names = file::names(&self.directory)?;
        if names == *left && !due(&self.keys(), now) {
            return Ok(());
        }
        let read = |name: &String| file::read(&self.directory, name);
        let mut keys: Vec<Key> = names.iter().filter_map(read).collect();
        if !keys.iter().any(|key| signs(key, now)) {
            keys.push(self.make(now)?);
        }
        let last = keys.iter().filter(|key| key.signer().is_some());
        if let Some(last) = last.map(|key| key.until).max()
            && last <= now + AHEAD
        {
            keys.push(self.make(last)?);
        }
        for key in &mut keys {
            if key.until <= now && key.signer().is_some() {
                let was = key.file();
                key.half = Half::Public(key.public_key());
                file::write(&self.directory, key)?;
                file::remove(&self.directory, &was)?;
                tracing::info!(key = %was, "a key signs no more grants");
            }
        }
        for over in keys.iter().filter(|key| over(key, now)) {
            file::remove(&self.directory, &over.file())?;
        }
        keys.retain(|key| !over(key, now));
        let last = keys.iter().filter(|key| key.signer().is_some());
        if let Some(last) = last.map(|key| key.until).max() {
            let since = last.duration_since(SystemTime::UNIX_EPOCH);
            gauge!(NOT_AFTER).set(since.unwrap_or_default().as_secs_f64());
        }
        *self.keys() = keys;
        *left = file::names(&self.directory)?;
        Ok(())
    }

    fn make(&self, from: SystemTime) -> Result<Key, GrantsError> {
        let key = Key {
            half: Half::Both(Signer::generate()?),
            from,
            until: from + SIGNS,
        };
        file::write(&self.directory, &key)?;
        tracing::info!(key = %key.file(), "a new key that signs grants");
        // Its times as its name has them.
        Ok(file::read(&self.directory, &key.file()).unwrap_or(key))
    }

    /// Tends to the keys until `stop`.
    pub(crate) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let mut trouble = String::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let this = Arc::clone(&self);
            let now = match tokio::task::spawn_blocking(move || this.tend()).await {
                Ok(Ok(())) => String::new(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            if now != trouble && !now.is_empty() {
                tracing::error!(error = %now, "the keys that sign grants cannot be tended to");
            }
            trouble = now;
        }
    }

    /// The keys to tell an agent whose clock is so far ahead: the newest first.
    pub(crate) fn announced(&self, ahead_ms: i64) -> Vec<v1::GrantKey> {
        // Whole days, so that an agent hears the same again and again.
        const DAY: i64 = 24 * 3600 * 1000;
        let shift = ahead_ms.saturating_add(ahead_ms.signum() * DAY / 2) / DAY * DAY;
        let now = (self.clock)();
        let keys = self.keys();
        let mut good: Vec<&Key> = keys.iter().filter(|key| !over(key, now)).collect();
        good.sort_by_key(|key| std::cmp::Reverse(key.from));
        let told = good.into_iter().take(ANNOUNCED).map(|key| {
            let key = GrantKey {
                public_key: key.public_key(),
                not_before: later(key.from.checked_sub(AHEAD).unwrap_or(key.from), shift),
                not_after: later(key.until + LONGEST, shift),
            };
            key_message(&key)
        });
        told.collect()
    }

    /// Leave for one side of a migration that may take `total`.
    ///
    /// # Errors
    /// See [`GrantsError`].
    pub(crate) fn side(
        &self,
        purpose: Purpose,
        about: &About,
        total: Duration,
    ) -> Result<v1::SignedGrant, GrantsError> {
        let lasts = total.saturating_add(MARGIN).min(LONGEST);
        self.sign(purpose, about, lasts, "")
    }

    /// A decision for a destination in doubt: the VM is its own (`commit`), or is not. `ground`:
    /// what it stands on, `journal`, or `fence` and the fence's id.
    ///
    /// # Errors
    /// See [`GrantsError`].
    pub(crate) fn decision(
        &self,
        commit: bool,
        about: &About,
        ground: &str,
    ) -> Result<v1::SignedGrant, GrantsError> {
        let purpose = if commit {
            Purpose::Commit
        } else {
            Purpose::Abort
        };
        self.sign(purpose, about, DECISION, ground)
    }

    fn sign(
        &self,
        purpose: Purpose,
        about: &About,
        lasts: Duration,
        ground: &str,
    ) -> Result<v1::SignedGrant, GrantsError> {
        let now = (self.clock)();
        let grant = Grant {
            source_key: about.source_key,
            destination_key: about.destination_key,
            ground: ground.to_owned(),
            ..Grant::new(
                purpose,
                &about.migration,
                (&about.vm_uid, about.epoch),
                (about.source.clone(), about.destination.clone()),
                later(now, about.ahead_ms),
                lasts,
            )?
        };
        let keys = self.keys();
        let with_both = || keys.iter().filter(|key| key.signer().is_some());
        // One whose successor could not be written yet signs on.
        let of_now = with_both().filter(|key| key.from <= now);
        let key = of_now
            .max_by_key(|key| key.from)
            .or_else(|| with_both().min_by_key(|key| key.from));
        let signer = key.and_then(Key::signer).ok_or(GrantsError::NoKey)?;
        let signed = signer.sign(&grant)?;
        counter!(SIGNED, "purpose" => purpose.as_str()).increment(1);
        tracing::debug!(grant = %grant.id_text(), %purpose, migration = %about.migration, "a grant is signed");
        Ok((&signed).into())
    }
}

fn signs(key: &Key, now: SystemTime) -> bool {
    key.signer().is_some() && key.from <= now && now < key.until
}

/// No grant by it can be good any more.
fn over(key: &Key, now: SystemTime) -> bool {
    key.until + LONGEST <= now
}

/// Whether time alone asks for something.
fn due(keys: &[Key], now: SystemTime) -> bool {
    let last = keys.iter().filter(|key| key.signer().is_some());
    !keys.iter().any(|key| signs(key, now))
        || last
            .map(|key| key.until)
            .max()
            .is_none_or(|last| last <= now + AHEAD)
        || keys
            .iter()
            .any(|key| over(key, now) || (key.until <= now && key.signer().is_some()))
}
