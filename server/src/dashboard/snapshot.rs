//! What the page's answers are made of: the fleet, the migrations and the present rates at one
//! moment, gathered once for all who look.
//!
//! A snapshot is used for [`FRESH`]; ended migrations, which come from the store, for [`LASTING`],
//! or until one more has ended. So a hundred open pages cost what one costs.
//!
//! # Locking
//! One `tokio` mutex around the last snapshot, held while the next one is gathered: the others wait
//! for it instead of gathering their own.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::v1;
use tokio::sync::Mutex;

use crate::{
    fleet::Fleet,
    history::{History, Rates},
    migration::Migrations,
    phase::has_ended,
};

const FRESH: Duration = Duration::from_millis(500);
const LASTING: Duration = Duration::from_secs(5);
/// Ended migrations that are looked at: the newest.
const ENDED: i32 = 1000;

/// See the module.
pub(super) struct Snapshot {
    pub(super) hosts: BTreeMap<String, v1::Host>,
    pub(super) vms: Vec<v1::Vm>,
    pub(super) rates: HashMap<String, Rates>,
    /// The longest running first.
    pub(super) running: Vec<v1::Migration>,
    /// Newest first.
    pub(super) ended: Arc<Vec<v1::Migration>>,
    /// Why the store could not be asked.
    pub(super) error: Option<String>,
}

struct Last {
    at: Instant,
    ended_at: Instant,
    snapshot: Arc<Snapshot>,
}

/// The last snapshot.
#[derive(Default)]
pub(super) struct Cache(Mutex<Option<Last>>);

impl Cache {
    /// A snapshot not older than [`FRESH`].
    pub(super) async fn get(
        &self,
        fleet: &Fleet,
        migrations: &Migrations,
        history: &History,
    ) -> Arc<Snapshot> {
        let mut last = self.0.lock().await;
        if let Some(last) = last.as_ref().filter(|last| last.at.elapsed() < FRESH) {
            return Arc::clone(&last.snapshot);
        }
        let mut running = migrations.running();
        running.sort_by(|a, b| {
            seconds(a)
                .cmp(&seconds(b))
                .then_with(|| a.name.cmp(&b.name))
        });
        let known = last.as_ref().filter(|last| {
            let was = &last.snapshot;
            let over = |one: &v1::Migration| !running.iter().any(|now| now.name == one.name);
            last.ended_at.elapsed() < LASTING
                && was.error.is_none()
                && !was.running.iter().any(over)
        });
        let (ended, ended_at, error) = match known {
            Some(last) => (Arc::clone(&last.snapshot.ended), last.ended_at, None),
            None => {
                let asked = Instant::now();
                match migrations.list(ENDED, "", None, None, |_| true).await {
                    Ok((mut found, _)) => {
                        found.retain(|migration| has_ended(migration.phase()));
                        (Arc::new(found), asked, None)
                    }
                    Err(error) => (Arc::default(), asked, Some(error.message)),
                }
            }
        };
        let hosts = fleet.hosts();
        let snapshot = Arc::new(Snapshot {
            hosts: hosts
                .into_iter()
                .map(|host| (host.name.clone(), host))
                .collect(),
            vms: fleet.vms(),
            rates: history.current(),
            running,
            ended,
            error,
        });
        *last = Some(Last {
            at: Instant::now(),
            ended_at,
            snapshot: Arc::clone(&snapshot),
        });
        snapshot
    }
}

fn seconds(migration: &v1::Migration) -> i64 {
    migration
        .create_time
        .as_ref()
        .map_or(0, |time| time.seconds)
}
