//! How often, and over how many connections, one identity may call.
//!
//! Each identity has a bucket of calls that fills at the rate of its role, and a number of
//! connections. Those who were not heard of for [`FORGET`] are forgotten; there is room for
//! [`MOST`] identities, and one more pushes the one out that was quiet for longest.
//!
//! # Locking
//! `known` is a leaf mutex, held for one look or change.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::role::Role;
use crate::{ApiError, Reason};

/// Identities that are known at a time.
const MOST: usize = 20_000;
/// Whoever is quiet for as long has a full bucket again.
const FORGET: Duration = Duration::from_secs(60);

/// What one identity may.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    /// Calls a second, in the long run.
    per_second: u32,
    /// Calls at once.
    burst: u32,
    /// Connections at once.
    connections: u32,
}

pub(super) const fn rate(role: Option<Role>) -> Rate {
    match role {
        Some(Role::Server) => Rate {
            per_second: 5000,
            burst: 10_000,
            connections: 64,
        },
        Some(Role::Agent) => Rate {
            per_second: 500,
            burst: 1000,
            connections: 16,
        },
        _ => Rate {
            per_second: 100,
            burst: 500,
            connections: 64,
        },
    }
}

#[derive(Debug)]
struct Known {
    calls: f64,
    at: Instant,
    connections: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Limits {
    known: Mutex<HashMap<Arc<str>, Known>>,
}

/// One connection of an identity; its drop gives the place back.
#[derive(Debug)]
pub(in super::super) struct Place {
    limits: Arc<Limits>,
    identity: Arc<str>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(known) = self.limits.known().get_mut(&self.identity) {
            known.connections = known.connections.saturating_sub(1);
        }
    }
}

impl Limits {
    fn known(&self) -> MutexGuard<'_, HashMap<Arc<str>, Known>> {
        // Only whole changes happen under it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(
        &self,
        identity: &Arc<str>,
        rate: Rate,
        now: Instant,
        then: impl FnOnce(&mut Known) -> T,
    ) -> T {
        let mut known = self.known();
        if !known.contains_key(identity) && known.len() >= MOST {
            known.retain(|_, known| {
                known.connections > 0 || now.saturating_duration_since(known.at) < FORGET
            });
            let quiet = known
                .iter()
                .filter(|(_, known)| known.connections == 0)
                .min_by_key(|(_, known)| known.at)
                .map(|(identity, _)| Arc::clone(identity));
            if known.len() >= MOST
                && let Some(quiet) = quiet
            {
                known.remove(&quiet);
            }
        }
        let entry = known.entry(Arc::clone(identity)).or_insert(Known {
            calls: f64::from(rate.burst),
            at: now,
            connections: 0,
        });
        let passed = now.saturating_duration_since(entry.at).as_secs_f64();
        entry.calls = passed
            .mul_add(f64::from(rate.per_second), entry.calls)
            .min(f64::from(rate.burst));
        entry.at = now;
        then(entry)
    }

    /// Takes one call.
    pub(super) fn call(
        &self,
        identity: &Arc<str>,
        rate: Rate,
        now: Instant,
    ) -> Result<(), ApiError> {
        let left = self.with(identity, rate, now, |known| {
            let enough = known.calls >= 1.0;
            if enough {
                known.calls -= 1.0;
            }
            (!enough).then_some(1.0 - known.calls)
        });
        let Some(missing) = left else {
            return Ok(());
        };
        let wait = Duration::from_secs_f64(missing / f64::from(rate.per_second));
        Err(ApiError::new(
            Reason::RateLimited,
            format!(
                "{identity} makes more than {} calls a second; no call was made",
                rate.per_second
            ),
        )
        .with("identity", identity)
        .with("calls_per_second", rate.per_second)
        .with("retry_after_ms", wait.as_millis().max(1))
        .with("advice", "call less often; watch instead of asking again"))
    }

    /// Takes one connection; `None` when there is no place.
    pub(super) fn connection(self: &Arc<Self>, identity: &Arc<str>, rate: Rate) -> Option<Place> {
        let taken = self.with(identity, rate, Instant::now(), |known| {
            let free = known.connections < rate.connections;
            known.connections += u32::from(free);
            free
        });
        taken.then(|| Place {
            limits: Arc::clone(self),
            identity: Arc::clone(identity),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_taken_and_then_the_rate_holds() {
        let limits = Limits::default();
        let (rate, who, now) = (rate(Some(Role::Viewer)), "u".into(), Instant::now());
        for call in 0..500 {
            assert!(limits.call(&who, rate, now).is_ok(), "{call}");
        }
        let refused = limits.call(&who, rate, now).unwrap_err();
        assert_eq!(refused.reason, Reason::RateLimited);
        assert_eq!(refused.metadata["retry_after_ms"], "10");
        let other = "other".into();
        assert!(limits.call(&other, rate, now).is_ok(), "each has its own");
        let later = now + Duration::from_secs(1);
        let passed = (0..200).filter(|_| limits.call(&who, rate, later).is_ok());
        assert_eq!(passed.count(), 100);
    }

    #[test]
    fn connections_are_counted_and_given_back() {
        let limits = Arc::new(Limits::default());
        let (rate, who) = (rate(Some(Role::Agent)), "a".into());
        let places: Vec<_> = (0..16)
            .map(|_| limits.connection(&who, rate).unwrap())
            .collect();
        assert!(limits.connection(&who, rate).is_none());
        drop(places);
        assert!(limits.connection(&who, rate).is_some());
    }

    #[test]
    fn no_more_identities_are_known_than_there_is_room_for() {
        let limits = Arc::new(Limits::default());
        let rate = rate(None);
        let kept = limits.connection(&"kept".into(), rate);
        for number in 0..MOST + 50 {
            let who = format!("u{number}").into();
            assert!(limits.call(&who, rate, Instant::now()).is_ok());
        }
        assert!(limits.known().len() <= MOST);
        assert!(limits.known().contains_key("kept"), "it has a connection");
        drop(kept);
    }
}
