//! What must hold in every state.

use slat_proto::v1::{MigrationPhase as Phase, VmLocation};
use slat_record::journal::Entry;

use super::{planted::Planted, world::World};

/// A rule and its name.
#[derive(Debug)]
pub struct Rule {
    /// For reports.
    pub name: &'static str,
    /// Whether it holds.
    pub holds: fn(&World, Option<Planted>) -> bool,
}

/// The rules.
pub const RULES: [Rule; 7] = [
    Rule {
        name: "at most one process runs the VM",
        holds: |world, _| !(world.source.runs && world.destination.runs),
    },
    Rule {
        name: "at most one host claims the VM",
        holds: |world, planted| !(world.source_claims(planted) && world.destination.claims()),
    },
    Rule {
        name: "a VM that was handed over is not given up by its destination",
        holds: |world, _| !(world.relinquished() && world.given_up_when_prepared()),
    },
    Rule {
        name: "CANCELLED is never followed by a handover",
        holds: |world, _| {
            world
                .shown_end()
                .is_none_or(|end| end.phase != Phase::Cancelled)
                || !(world.destination.owns() || world.relinquished())
        },
    },
    Rule {
        name: "COMPLETED is said of a VM that the destination owns",
        holds: |world, _| {
            world
                .shown_end()
                .is_none_or(|end| end.phase != Phase::Completed)
                || world.destination.owns()
        },
    },
    Rule {
        name: "a VM that is said to be at its source was not handed over",
        holds: |world, _| {
            world
                .shown_end()
                .is_none_or(|end| end.location != VmLocation::Source)
                || !world.relinquished()
        },
    },
    Rule {
        name: "a VM that is said to be lost runs nowhere",
        holds: |world, _| {
            world
                .shown_end()
                .is_none_or(|end| end.location != VmLocation::Lost)
                || !(world.source.runs || world.destination.runs)
        },
    },
];

impl World {
    /// As of its agent's word; a VM that is said to have died with a fenced host is one of an epoch
    /// that is over.
    fn source_claims(&self, planted: Option<Planted>) -> bool {
        let fenced = self.server.fences[0] && !self.source.alive;
        !fenced && self.source.claims(planted)
    }

    /// RELINQUISHED can be read at the source.
    fn relinquished(&self) -> bool {
        self.source.journal.as_ref().is_some_and(|journal| {
            journal
                .durable
                .iter()
                .any(|entry| matches!(entry, Entry::Relinquished { .. }))
        })
    }

    /// The destination had said READY, lived, and went away on its own.
    fn given_up_when_prepared(&self) -> bool {
        self.destination.journal.as_ref().is_some_and(|journal| {
            let has = |test: fn(&Entry) -> bool| journal.seen().iter().any(test);
            has(|entry| matches!(entry, Entry::Prepared { .. }))
                && has(|entry| matches!(entry, Entry::Aborted { .. }))
        })
    }

    /// Nothing is left to do: the server is done with the migration, and neither side is under way.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.server.up
            && self.server.protocol.finished()
            && self
                .source
                .side
                .as_ref()
                .is_none_or(|side| side.queue.is_empty() && side.machine.ended().is_some())
            && self
                .destination
                .side
                .as_ref()
                .is_none_or(|side| side.queue.is_empty() && side.machine.ended().is_some())
    }
}
