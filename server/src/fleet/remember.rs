//! The memory of the fleet: what was seen goes to the store, and comes back at a start.
//!
//! One task writes. It is woken by a change, takes everything that is unsaved at that moment, and
//! writes it in one transaction; what could not be written is unsaved again and tried again after a
//! pause. So there is one write at a time, a later write never loses to an earlier one, and a disk
//! that hangs holds up nobody who does not ask for it. Who must not be forgotten waits for
//! `Fleet::settled`, which has a bound.
//!
//! When a host was last heard from is written every ten seconds and at the end: it changes all the
//! time and is of use only when the host falls silent.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, model::HostName, v1};
use tokio::time::{MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{shared::Fleet, table::Table, unsaved::Unsaved};
use crate::store::{BlockingStore, SeenChanges, SeenFleet, StoreError};

/// How long an answer waits for the disk.
const SETTLE: Duration = Duration::from_secs(1);
/// How often the times of hosts are written.
const STAMP: Duration = Duration::from_secs(10);
/// Before a write is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A host without what is only true while it is heard.
fn stored_host(host: &v1::Host) -> v1::Host {
    v1::Host {
        state: v1::host::State::Unspecified.into(),
        state_message: String::new(),
        contender: String::new(),
        clock_offset: None,
        reported: false,
        vms: 0,
        leftovers: 0,
        ..host.clone()
    }
}

/// A VM without statistics and without what the server says of it.
fn stored_vm(vm: &v1::Vm) -> v1::Vm {
    v1::Vm {
        mmu_stats: None,
        guest_counters: None,
        conflicts: Vec::new(),
        stale: false,
        dirty_logging: false,
        migration: String::new(),
        ..vm.clone()
    }
}

fn changes(table: &Table, unsaved: &Unsaved) -> SeenChanges {
    let vm = |host: &str, uid: &str| table.hosts.get(host)?.records.get(uid).map(stored_vm);
    let epoch = |uid: &str| Some(table.epochs.of(uid)).filter(|epoch| *epoch > 0);
    let hosts = unsaved.hosts.iter().map(|name| {
        let host = table.hosts.get(name).map(|entry| v1::Host {
            // Known here until its agent registers again.
            incarnation: entry.last_incarnation.clone(),
            ..stored_host(&entry.host)
        });
        (name.clone(), host)
    });
    let vms = unsaved.vms.iter().map(|key| {
        let stored = vm(&key.0, &key.1);
        (key.clone(), stored)
    });
    let epochs = unsaved.epochs.iter().map(|uid| (uid.clone(), epoch(uid)));
    SeenChanges {
        hosts: hosts.collect(),
        vms: vms.collect(),
        epochs: epochs.collect(),
    }
}

impl Fleet {
    /// Begins with what the store has. There is no way to a host before it registers again when its
    /// address is one that is not called any more, such as a socket's by a server that has
    /// credentials now.
    ///
    /// # Errors
    /// When a host in it has no name.
    pub(crate) fn restore(&self, seen: SeenFleet) -> Result<(), StoreError> {
        let at = Instant::now();
        for host in seen.hosts {
            let bad = |error: ApiError| StoreError::Record {
                table: "fleet_hosts",
                key: host.name.clone(),
                message: error.message,
            };
            HostName::parse(&host.name).map_err(bad)?;
            match self.channel_to(&host.name, &host.address) {
                Ok(channel) => self.set_channel(&host.name, &host.address, channel),
                Err(error) => {
                    tracing::warn!(host = %host.name, %error, "there is no way to a host before it registers");
                }
            }
            self.table().restore_host(host, at);
        }
        let mut table = self.table();
        for vm in seen.vms {
            table.restore_vm(vm);
        }
        for (uid, epoch) in seen.epochs {
            table.epochs.raise(&uid, epoch);
        }
        Ok(())
    }

    /// Waits until all that has changed so far is on disk.
    ///
    /// # Errors
    /// STORE when it is not within a second; it is written as soon as the disk allows it.
    pub(crate) async fn settled(&self) -> Result<(), ApiError> {
        self.settled_within(SETTLE).await
    }

    /// The same for a report, which must not take so long that the next one is late.
    pub(crate) async fn settled_report(&self) -> Result<(), ApiError> {
        self.settled_within(SETTLE.min(self.interval() / 2)).await
    }

    async fn settled_within(&self, bound: Duration) -> Result<(), ApiError> {
        let wanted = self.table().unsaved.generation();
        let mut saved = self.saved.subscribe();
        let on_disk = timeout(bound, saved.wait_for(|saved| *saved >= wanted)).await;
        // The sender is the fleet's own.
        match on_disk {
            Ok(_) => Ok(()),
            Err(_) => Err(ApiError::new(
                Reason::Store,
                "what was done is not on disk yet; it is written when the store can be",
            )
            .with("advice", "see the server's log and its state directory")),
        }
    }

    async fn save(&self, store: &BlockingStore) -> Result<(), StoreError> {
        let (unsaved, changes) = {
            let mut table = self.table();
            let unsaved = table.unsaved.take();
            let changes = changes(&table, &unsaved);
            (unsaved, changes)
        };
        if !unsaved.is_empty() {
            let written = store.with(move |store| store.put_seen(&changes)).await;
            if let Err(error) = written {
                self.table().unsaved.put_back(unsaved);
                return Err(error);
            }
        }
        self.saved.send_replace(unsaved.generation());
        Ok(())
    }
}

/// Writes until `stop`, and once more then.
pub(crate) async fn remember(fleet: Arc<Fleet>, store: BlockingStore, stop: CancellationToken) {
    let mut stamp = interval_at(tokio::time::Instant::now() + STAMP, STAMP);
    stamp.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        let last = tokio::select! {
            () = stop.cancelled() => true,
            () = fleet.changed.notified() => false,
            _ = stamp.tick() => {
                fleet.table().stamp(Instant::now());
                false
            }
        };
        if last {
            fleet.table().stamp(Instant::now());
        }
        match fleet.save(&store).await {
            Ok(()) => failing = false,
            Err(error) => {
                if !failing {
                    tracing::error!(%error, "what is seen of the fleet cannot be stored");
                }
                failing = true;
                if !last {
                    fleet.changed.notify_one();
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = sleep(RETRY) => {}
                    }
                }
            }
        }
        if last {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
