//! Answers that users wait for. Each is given when what it says is on disk, or at its deadline.

use std::time::Duration;

use slat_proto::{ApiError, Reason, v1};
use tokio::{sync::oneshot, time::Instant};

use super::{errors::past_point, protocol::Side};
use crate::{fleet::host_unreachable, phase::has_ended};

/// How long a cancel's answer waits for the outcome, so that it mostly says CANCELLED rather than
/// CANCELLING.
const OUTCOME: Duration = Duration::from_millis(300);
/// How long an answer waits for the disk, or for the source's agent.
const LONGEST: Duration = Duration::from_secs(6);

/// What the rest of the server asks of a reconciler.
#[derive(Debug)]
pub(super) enum Command {
    /// CancelMigration, with where the answer goes.
    Cancel(oneshot::Sender<Result<v1::Migration, ApiError>>),
    /// DeleteVm of a VM whose last copy is kept at the source, with where the answer goes.
    DeleteKept(oneshot::Sender<Result<(), ApiError>>),
    /// A host was fenced, and that is on disk. Nobody waits for an answer.
    Fenced,
    /// A side's host is deleted by order, with where the answer goes.
    Forget(Side, oneshot::Sender<Result<(), ApiError>>),
}

#[derive(Debug)]
struct Waiting {
    command: Command,
    since: Instant,
}

/// How a migration stands, for its answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing<'a> {
    /// As on disk.
    pub(super) migration: &'a v1::Migration,
    /// It is past the point of no return, on disk.
    pub(super) committed: bool,
    /// Its end, if it has ended, can be shown.
    pub(super) may_show_end: bool,
    /// Its source's side is released, on disk.
    pub(super) source_released: bool,
    /// Its destination's side is released, on disk.
    pub(super) destination_released: bool,
    /// A release of the source's side is wanted or under way.
    pub(super) releasing: bool,
}

/// Those that wait.
#[derive(Debug, Default)]
pub(super) struct Replies(Vec<Waiting>);

impl Replies {
    pub(super) fn push(&mut self, command: Command) {
        let since = Instant::now();
        self.0.push(Waiting { command, since });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When one is to be given at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        self.0
            .iter()
            .flat_map(|waiting| [waiting.since + OUTCOME, waiting.since + LONGEST])
            .filter(|deadline| *deadline > now)
            .min()
    }

    /// Gives those that can be given. Whether somebody was told that a copy is not deleted, and
    /// nobody waits for it any more: then the order is withdrawn.
    #[must_use]
    pub(super) fn give(&mut self, standing: Standing<'_>) -> bool {
        let now = Instant::now();
        let mut refused = false;
        for waiting in std::mem::take(&mut self.0) {
            let age = now.duration_since(waiting.since);
            match waiting.command {
                Command::Fenced => {}
                Command::Cancel(reply) => match cancel_answer(standing, age) {
                    // Who asked may have gone; the cancel stands.
                    Some(answer) => drop(reply.send(answer)),
                    None => self.0.push(Waiting {
                        command: Command::Cancel(reply),
                        since: waiting.since,
                    }),
                },
                Command::DeleteKept(reply) => match delete_answer(standing, age) {
                    Some(answer) => {
                        refused |= answer.is_err();
                        drop(reply.send(answer));
                    }
                    None => self.0.push(Waiting {
                        command: Command::DeleteKept(reply),
                        since: waiting.since,
                    }),
                },
                Command::Forget(side, reply) => match forget_answer(standing, side, age) {
                    Some(answer) => drop(reply.send(answer)),
                    None => self.0.push(Waiting {
                        command: Command::Forget(side, reply),
                        since: waiting.since,
                    }),
                },
            }
        }
        let waits = |waiting: &Waiting| matches!(waiting.command, Command::DeleteKept(_));
        refused && !self.0.iter().any(waits)
    }
}

fn cancel_answer(standing: Standing<'_>, age: Duration) -> Option<Result<v1::Migration, ApiError>> {
    let migration = standing.migration;
    let told = if has_ended(migration.phase()) {
        standing.may_show_end
    } else {
        migration.cancel_requested && age >= OUTCOME
    };
    if standing.committed {
        Some(Err(past_point(migration)))
    } else if told {
        Some(Ok(migration.clone()))
    } else if age >= LONGEST {
        let text = "the cancel is not on disk yet; it stands while the server runs";
        Some(Err(ApiError::new(Reason::Store, text)
            .with("migration", &migration.name)
            .with(
                "advice",
                "see the server's log and its state directory",
            )))
    } else {
        None
    }
}

fn forget_answer(
    standing: Standing<'_>,
    side: Side,
    age: Duration,
) -> Option<Result<(), ApiError>> {
    let on_disk = match side {
        Side::Source => standing.source_released,
        Side::Destination => standing.destination_released,
    };
    if on_disk {
        Some(Ok(()))
    } else if age >= LONGEST {
        let text = "the migration's record is not on disk yet";
        Some(Err(ApiError::new(Reason::Store, text)
            .with("migration", &standing.migration.name)
            .with(
                "advice",
                "see the server's log and its state directory, then delete the host again",
            )))
    } else {
        None
    }
}

fn delete_answer(standing: Standing<'_>, age: Duration) -> Option<Result<(), ApiError>> {
    let migration = standing.migration;
    if standing.source_released {
        Some(Ok(()))
    } else if standing.releasing && age < LONGEST {
        None
    } else {
        Some(Err(host_unreachable(&migration.source)
            .with("vm", &migration.vm)
            .with("migration", &migration.name)
            .with(
                "advice",
                "nothing is deleted later: delete the VM again when that agent answers; if it was just about to answer, \
                 the copy may be gone",
            )))
    }
}
