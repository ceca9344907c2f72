//! What lies on this host and is no VM of its own, and what an order about it would give up.
//!
//! Everything that is here for a migration alone is listed, whether that still runs or not: only
//! the server knows. The orders are in `order`.

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, VmName},
    v1::{self, TransferPhase as Phase, leftover::Kind},
};
use slat_record::uid::VmUid;

use super::Supervisor;
use crate::{
    dead::DeadVm,
    living::LiveVm,
    registry::Held,
    side::{Role, SideKey},
};

/// What is lost with a directory that nobody can read.
pub(super) const UNREADABLE_GIVES_UP: &str = "it may have owned the VM, or say who does: a handover whose answer it \
                                              holds is decided by nobody any more";

impl Supervisor {
    /// Everything here that is no VM, by uid; from caches, calls nobody.
    pub(crate) fn leftovers(&self) -> Vec<v1::Leftover> {
        let mut found: Vec<v1::Leftover> = Vec::new();
        for (name, uid, held) in self.registry.all() {
            let leftover = match held {
                Held::Live(live) => self.of_living(&live),
                Held::Dead(dead) => of_dead(&dead),
                Held::Busy { .. } => None,
            };
            found.extend(leftover.map(|leftover| v1::Leftover {
                host: self.host.to_string(),
                uid: uid.to_string(),
                vm: name.to_string(),
                ..leftover
            }));
        }
        found.extend(self.ended.all().iter().map(|side| v1::Leftover {
            host: self.host.to_string(),
            ..of_record(side)
        }));
        found.sort_by(|a, b| (&a.uid, &a.migration).cmp(&(&b.uid, &b.migration)));
        found
    }

    fn of_living(&self, live: &LiveVm) -> Option<v1::Leftover> {
        let vm = live.snapshot()?;
        let role = match vm.state() {
            v1::vm::State::Relinquished => Role::Source,
            v1::vm::State::Incoming => Role::Destination,
            _ => return None,
        };
        let side = MigrationName::parse(&vm.migration)
            .ok()
            .and_then(|migration| live.side(&SideKey { migration, role }).flatten());
        let phase = side.map(|side| side.phase());
        let memory_bytes = self
            .registry
            .label(live.uid())
            .map_or(0, |(_, memory)| memory);
        let base = v1::Leftover {
            migration: vm.migration.clone(),
            epoch: vm.epoch,
            pid: live.process().pid(),
            memory_bytes,
            ..Default::default()
        };
        let theirs = vm.epoch.saturating_add(1);
        Some(match (role, phase) {
            (Role::Source, Some(Phase::Completed)) => v1::Leftover {
                kind: Kind::RelinquishedSource.into(),
                message: format!(
                    "the source of {}: its destination said that it has the VM, at epoch {theirs}",
                    vm.migration
                ),
                ..base
            },
            (Role::Source, _) => v1::Leftover {
                kind: Kind::RelinquishedSource.into(),
                message: format!(
                    "the source of {}: it gave the VM away and never heard that the destination has it",
                    vm.migration
                ),
                adoptable: true,
                adopt_gives_up: format!(
                    "a destination may own this VM at epoch {theirs}, and may have run it: what the guest did since, and \
                     wrote to the outside world, is not in this copy; and if it still \
                     runs, or comes back, the VM runs twice. Make sure that no other host has it"
                ),
                delete_gives_up:
                    "this frozen copy is the last one, unless a destination owns the VM".to_owned(),
                ..base
            },
            (Role::Destination, Some(Phase::Ready)) => v1::Leftover {
                kind: Kind::ReadyDestination.into(),
                message: format!(
                    "the destination of {}: it holds the whole VM and does not know whether its source gave it away",
                    vm.migration
                ),
                adoptable: true,
                adopt_gives_up: "a source that did not give the VM away runs it still, or will when it comes back: \
                                 then the VM runs twice. Make sure that its source never does"
                    .to_owned(),
                delete_gives_up:
                    "if its source gave the VM away, this copy is the last one".to_owned(),
                ..base
            },
            (Role::Destination, _) => v1::Leftover {
                kind: Kind::IncomingDestination.into(),
                message: format!(
                    "the destination of {}: it waits for its source",
                    vm.migration
                ),
                ..base
            },
        })
    }

    /// The one of that uid.
    ///
    /// # Errors
    /// NO_SUCH_LEFTOVER.
    pub(super) fn leftover(&self, uid: &VmUid) -> Result<v1::Leftover, ApiError> {
        let all = self.leftovers().into_iter();
        // A process or a directory before records of the same VM's earlier sides.
        all.filter(|leftover| leftover.uid == uid.as_str())
            .min_by_key(|leftover| leftover.kind() == Kind::EndedSide)
            .ok_or_else(|| {
                ApiError::new(
                    Reason::NoSuchLeftover,
                    format!("no leftover with uid {uid} on {}", self.host),
                )
                .with("uid", uid)
                .with("host", &self.host)
                .with("advice", "list the leftovers of the host")
            })
    }
}

fn of_dead(dead: &DeadVm) -> Option<v1::Leftover> {
    if let Some(error) = dead.unreadable() {
        return Some(v1::Leftover {
            kind: Kind::Unreadable.into(),
            message: format!("a directory that cannot be read: {error}"),
            delete_gives_up: UNREADABLE_GIVES_UP.to_owned(),
            ..Default::default()
        });
    }
    // A lost VM is a VM, and deleted as one.
    if dead.lost().is_some() {
        return None;
    }
    let sides = dead.sides();
    let side = sides.first()?;
    Some(v1::Leftover {
        epoch: dead.epoch().max(side.epoch),
        ..of_record(side)
    })
}

/// A side of which nothing but its record is left.
pub(super) fn of_record(side: &v1::Transfer) -> v1::Leftover {
    let key = SideKey::of(side);
    let role = key.as_ref().map_or("side", |key| key.role.as_str());
    // Older records do not say whose they are.
    let uid = if side.vm_uid.is_empty() {
        key.as_ref()
            .map_or_else(String::new, |key| format!("{}-{role}", key.migration.id()))
    } else {
        side.vm_uid.clone()
    };
    let open = side.phase() == Phase::Relinquished;
    v1::Leftover {
        uid,
        vm: VmName::parse(&side.vm).map_or_else(|_| String::new(), |vm| vm.to_string()),
        kind: Kind::EndedSide.into(),
        migration: side.migration.clone(),
        epoch: side.epoch,
        message: format!(
            "what is left of the {role} of {}, whose process is gone: {}",
            side.migration,
            side.phase().as_str_name()
        ),
        delete_gives_up: if open {
            "a destination that still asks whether the VM was given away gets no answer any more"
                .to_owned()
        } else {
            String::new()
        },
        ..Default::default()
    }
}
