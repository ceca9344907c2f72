//! The protocol's vocabulary: what happens, what is to be done, what a side says of itself.
//!
//! Small, bounded values only: a state that holds them can be cloned, compared and hashed by the
//! million. Texts stay with the driver, which finds the one that belongs to a [`Cause`].

use slat_proto::v1::{MigrationPhase, TransferPhase, VmLocation};

/// One of a migration's two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Sends.
    Source,
    /// Receives.
    Destination,
}

/// What one side said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Report {
    /// Where it is.
    pub phase: TransferPhase,
    /// Source: its process died before the commit. Destination, COMPLETED: it owned the VM and
    /// died with it.
    pub vm_lost: bool,
    /// Its process is gone: it says what that left, and nothing will be added.
    pub gone: bool,
    /// It knows the result of the comparison of digests.
    pub verified: bool,
}

impl Report {
    /// A side in `phase`, and nothing else to say.
    #[must_use]
    pub const fn new(phase: TransferPhase) -> Self {
        Self {
            phase,
            vm_lost: false,
            gone: false,
            verified: false,
        }
    }
}

/// Something to carry out. All but [`Action::Persist`] are idempotent at the agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Store [`durable`](super::MigrationProtocol::durable) as it is now. Ends with
    /// [`Input::Stored`].
    Persist,
    /// DescribeOutgoing at the source.
    Describe,
    /// PrepareIncoming at the destination, with what the last Describe said.
    Prepare,
    /// StartOutgoing at the source, with what the last Prepare said.
    Start,
    /// GetTransfer at the source, then its watch until it breaks.
    FollowSource,
    /// The same at the destination.
    FollowDestination,
    /// CancelTransfer at the source, by the user's wish.
    CancelSource,
    /// CancelTransfer at the source, with an error: the migration cannot go on.
    FailSource,
    /// CancelTransfer at the destination.
    CancelDestination,
    /// ResolveTransfer(COMMIT) at the destination.
    ResolveCommit,
    /// ResolveTransfer(ABORT) at the destination.
    ResolveAbort,
    /// Ask the source's agent whether the frozen memory is still there.
    AskSourceCopy,
    /// ReleaseTransfer at the source.
    ReleaseSource,
    /// ReleaseTransfer at the destination.
    ReleaseDestination,
}

impl Action {
    /// Every action that is a call, in the order in which they are asked for.
    pub const CALLS: [Self; 13] = [
        Self::Describe,
        Self::Prepare,
        Self::Start,
        Self::FollowSource,
        Self::FollowDestination,
        Self::CancelSource,
        Self::FailSource,
        Self::CancelDestination,
        Self::ResolveCommit,
        Self::ResolveAbort,
        Self::AskSourceCopy,
        Self::ReleaseDestination,
        Self::ReleaseSource,
    ];

    /// The side that is asked; `None` for [`Action::Persist`].
    #[must_use]
    pub const fn side(self) -> Option<Side> {
        match self {
            Self::Persist => None,
            Self::Describe
            | Self::Start
            | Self::FollowSource
            | Self::CancelSource
            | Self::FailSource
            | Self::AskSourceCopy
            | Self::ReleaseSource => Some(Side::Source),
            Self::Prepare
            | Self::FollowDestination
            | Self::CancelDestination
            | Self::ResolveCommit
            | Self::ResolveAbort
            | Self::ReleaseDestination => Some(Side::Destination),
        }
    }
}

/// How a call ended. Which answers an action may have is said at each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Describe, Release: done. Of Release also when the side is not known there.
    Done,
    /// Prepare, Start, Cancel, Fail, Resolve: the side, asked after the call took effect.
    Side(Report),
    /// Follow, Cancel, Fail, Resolve: the agent answered and knows no such side. Of the source,
    /// `owner` says that the VM was there afterwards, with this migration's epoch, and may run; at
    /// a destination it is false.
    Absent {
        /// See above.
        owner: bool,
    },
    /// Describe, Prepare, Start: an answer that refuses. Of Start also: asked afterwards, the agent
    /// knew no such side. What a refused Prepare may have left is cleaned up. `lost`: the source's
    /// agent says that the VM's process is gone.
    Refused {
        /// See above.
        lost: bool,
    },
    /// Any: nobody answered in time, or the agent could not do it. The call may have taken effect,
    /// and may still.
    Silent,
    /// Follow: it ended and there is nothing to add to what was heard.
    Nothing,
    /// AskSourceCopy: whether the process that holds the frozen memory is known to be gone. Silence
    /// is `false`.
    Copy {
        /// See above.
        gone: bool,
    },
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Sides of earlier migrations that were in the way are released. Counts in PENDING only.
    Admitted,
    /// A host that holds such a side does not answer, and was waited for long enough. Counts in
    /// PENDING only.
    Barred,
    /// The last [`Action::Persist`] is on disk. Once for each.
    Stored,
    /// A side that is followed says how it is. Only while its Follow is in flight; true at some
    /// time since that began, perhaps not the newest that was said.
    Heard(Side, Report),
    /// A call has ended: exactly once for each action, within a bounded time. One that is not in
    /// flight is ignored.
    Answered(Action, Answer),
    /// The user wants it ended.
    CancelRequested,
    /// The user deletes the VM whose last copy is kept at the source.
    DeleteRequested,
    /// Nobody waits for that end any more: who asked was told that it did not come. What is under
    /// way may still do it; nothing is asked for again.
    DeleteWithdrawn,
    /// The outcome is known and the source's last figures did not come. Fed by a clock, and only
    /// while [`awaits_figures`](super::MigrationProtocol::awaits_figures).
    FiguresOverdue,
    /// Hosts that do not answer were given time to come back after the server's restart. Fed by a
    /// clock, and only while [`awaits_hosts`](super::MigrationProtocol::awaits_hosts): nothing was
    /// begun, so a host that is silent once more is as one that was silent in the first life.
    PatienceOver,
    /// A host was deleted by order, with all that it holds: its side is asked for nothing any more.
    HostForgotten(Side),
    /// A side's host was fenced: nothing that ran there runs any more, or ever will again. Its
    /// agent may come back and tell what the journals say.
    HostFenced(Side),
    /// Ask again for what is still wanted. Fed by a clock at any time.
    Retry,
}

/// Why a migration ended, or is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// [`Input::Barred`].
    Barred,
    /// The side refused to take part or, before anything was begun, did not answer.
    Refused(Side),
    /// The source reported its own failure.
    SourceFailed,
    /// The source's process died before the commit.
    SourceDied,
    /// Somebody cancelled at the source's agent.
    CancelledAtSource,
    /// The source keeps no record of the migration; the VM is still there.
    SourceForgot,
    /// The VM is gone from the source and was not handed over.
    SourceGone,
    /// The destination's process died after the commit and before it owned the VM.
    DestinationDied,
    /// The destination's process owned the VM and died with it, before the source had heard that it
    /// runs there.
    OwnerDied {
        /// The source's frozen memory is still there.
        kept: bool,
    },
    /// The source cannot be asked whether the commit happened.
    Doubt,
    /// A side's host was deleted by order.
    HostForgotten {
        /// Whose host.
        side: Side,
        /// Of a destination's, after the commit: the source's frozen memory is still there.
        kept: bool,
    },
    /// A side's host was fenced.
    HostFenced {
        /// Whose host.
        side: Side,
        /// Of a destination's, after the commit: the source's frozen memory is still there.
        kept: bool,
    },
}

/// What may become of calls of StartOutgoing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// None was made.
    Never,
    /// One was made, or is about to be.
    Once,
    /// More than one: even when one has ended, another may still arrive.
    Again,
}

/// What is stored of a migration's protocol, and all that a restarted server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Durable {
    /// Its phase.
    pub phase: MigrationPhase,
    /// Where the VM is.
    pub location: VmLocation,
    /// The user wants it ended.
    pub cancel_requested: bool,
    /// The switchover was seen: a commit may have happened.
    pub switched: bool,
    /// The commit is known to have happened.
    pub committed: bool,
    /// A comparison of digests was asked for and has no result yet.
    pub unverified: bool,
    /// Whether the source may have been told to begin.
    pub start: Start,
    /// The source's side is released, or there is none. Before the end: its host was deleted.
    pub source_released: bool,
    /// The destination's side is released, or there is none. Before the end: its host was deleted.
    pub destination_released: bool,
    /// The source's host was fenced while it had its side.
    pub source_fenced: bool,
    /// The destination's host was fenced while it had its side.
    pub destination_fenced: bool,
}

impl Durable {
    /// A migration that was just accepted.
    #[must_use]
    pub const fn pending(unverified: bool) -> Self {
        Self {
            phase: MigrationPhase::Pending,
            location: VmLocation::Source,
            cancel_requested: false,
            switched: false,
            committed: false,
            unverified,
            start: Start::Never,
            source_released: false,
            destination_released: false,
            source_fenced: false,
            destination_fenced: false,
        }
    }
}
