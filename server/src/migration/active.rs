//! A migration with work left, as all but its own task see it: what it shows, the way to its task,
//! which of its sides are released. Nothing here waits.

use slat_proto::{
    model::Timeline,
    v1::{self, MigrationPhase as Phase},
};
use tokio::sync::{mpsc, watch};

use super::{key::VmKey, protocol::Side, replies::Command, waiting::Released};

/// One of those with work left.
pub(super) struct Active {
    pub(super) shown: watch::Receiver<v1::Migration>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) released: Released,
    pub(super) timeline: Timeline,
}

impl Active {
    /// Its sides on a host that are not released yet.
    pub(super) fn unreleased_on(&self, host: &str) -> Vec<Side> {
        let (migration, released) = (self.shown.borrow(), &self.released);
        let sides = [
            (Side::Source, &migration.source, &released.source),
            (
                Side::Destination,
                &migration.destination,
                &released.destination,
            ),
        ];
        let here = sides
            .into_iter()
            .filter(|(_, home, released)| *home == host && !released.is_set());
        here.map(|(side, ..)| side).collect()
    }

    /// Whether it ended so that its source keeps the last copy of this VM.
    pub(super) fn keeps(&self, vm: &VmKey) -> bool {
        vm.is_of(&self.shown.borrow()) && self.keeps_source()
    }

    /// Whether its source keeps a last copy: FAILED past the commit and not LOST, or COMPLETED and
    /// LOST.
    pub(super) fn keeps_source(&self) -> bool {
        let migration = self.shown.borrow();
        let committed = migration
            .phase_times
            .iter()
            .any(|entry| entry.phase() == Phase::Committed);
        let lost = migration.vm_location() == v1::VmLocation::Lost;
        let last = match migration.phase() {
            Phase::Failed => !lost,
            Phase::Completed => lost,
            _ => false,
        };
        last && committed && !self.released.source.is_set()
    }

    /// Whether it ends what is its own on its hosts without anybody's help.
    pub(super) fn ends_its_own(&self) -> bool {
        let in_doubt = self.shown.borrow().phase() == Phase::InDoubt;
        let stuck = self.released.source.is_stuck() || self.released.destination.is_stuck();
        !in_doubt && !self.keeps_source() && !stuck
    }
}
