//! What the destination's driver, its agent and its kernel do, in steps that a crash may part.

use slat_proto::v1::TransferPhase as Phase;
use slat_record::{
    journal::{Entry, JournalState, Ownership},
    standing::{self, Recorded},
};
use slat_server::migration::protocol::Report;
use slat_vmm::handover::protocol::{
    Why, Written,
    destination::{Action, Destination, End, Input, Standing},
};

use super::{
    planted::Planted,
    source::Fate,
    world::{
        DestinationHost, DestinationSide, DestinationWork, EPOCH, Frame, JournalOnDisk, MIGRATION,
        UID, World,
    },
};

/// What the VM's process feeds when the time of a side's grant is over, whatever its state.
const EXPIRED: Input = Input::Cancel(Why::Elsewhere);

impl DestinationHost {
    /// The process and its memory are gone.
    pub fn die(&mut self) {
        self.alive = false;
        self.runs = false;
        self.side = None;
    }

    /// What the agent says of the side; `None` when nothing here knows it.
    pub fn report(&mut self) -> Option<Report> {
        if self.released {
            return None;
        }
        if self.alive {
            return self.side.as_ref().map(|side| Report::new(side.shown));
        }
        let journal = self.journal.as_mut()?;
        journal.sync();
        Some(
            match standing::destination(&journal.seen(), self.record, MIGRATION)? {
                standing::DestinationStands::Completed => Report {
                    vm_lost: standing::lost_epoch(journal.state().as_ref(), false).is_some(),
                    gone: true,
                    ..Report::new(Phase::Completed)
                },
                standing::DestinationStands::Ended => {
                    Report::new(self.ended_as.unwrap_or(Phase::Failed))
                }
                standing::DestinationStands::Died { .. } => Report::new(Phase::Failed),
            },
        )
    }

    /// OWNED is durable.
    pub fn owns(&self) -> bool {
        let Some(journal) = &self.journal else {
            return false;
        };
        let state = JournalState::of(journal.durable.iter()).expect("in a handover's order");
        matches!(state.map(|state| state.ownership), Some(Ownership::Owner { epoch }) if epoch > EPOCH)
    }

    /// The VM is claimed here: it runs, or the agent says that it was lost here.
    pub fn claims(&self) -> bool {
        if self.alive {
            return self.runs;
        }
        self.journal
            .as_ref()
            .is_some_and(|journal| standing::lost_epoch(journal.state().as_ref(), false).is_some())
    }

    fn append(&mut self, entry: Entry, fate: Fate) -> Written {
        let Some(journal) = &mut self.journal else {
            return Written::Refused;
        };
        // An append after a failed one settles first: the cache is written anew.
        let there = journal.cached.as_ref() == Some(&entry);
        if fate == Fate::Works {
            journal.sync();
            if !there {
                journal.cached = Some(entry);
                journal.sync();
            }
            return Written::Durable;
        }
        if fate == Fate::Unsynced && journal.cached.is_none() {
            journal.cached = Some(entry);
        }
        Written::Unknown
    }
}

impl World {
    /// PrepareIncoming: a process that listens. False when it is refused.
    pub fn destination_prepares(&mut self, planted: Option<Planted>) -> bool {
        let host = &mut self.destination;
        if host.alive {
            return host.side.is_some();
        }
        if !host.released && host.journal.is_some() {
            // A side that ended and that nobody released.
            return false;
        }
        if host.claims() {
            return false;
        }
        // Every grant for this side was signed before its release: none is asked for after it.
        if host.released && planted != Some(Planted::GrantUsedTwice) {
            return false;
        }
        host.alive = true;
        host.runs = false;
        host.released = false;
        host.record = None;
        host.ended_as = None;
        host.instance += 1;
        host.journal = Some(JournalOnDisk::new(Entry::Incoming {
            vm: "v".to_owned(),
            uid: UID.to_owned(),
            migration: MIGRATION.to_owned(),
            epoch: EPOCH,
        }));
        host.side = Some(DestinationSide {
            machine: Destination::new(),
            queue: [].into(),
            work: DestinationWork::Prepare,
            interrupted: false,
            asking: false,
            answer: None,
            shown: Phase::Preparing,
        });
        true
    }

    /// Whether the end of its grant's time does anything to the destination.
    pub fn destination_grant_matters(&self, planted: Option<Planted>) -> bool {
        self.destination.side.as_ref().is_some_and(|side| {
            let after = planted == Some(Planted::ExpiryEndsReady) && side.machine.in_doubt();
            after || !side.machine.clone().step(EXPIRED).is_empty()
        })
    }

    /// The time of the destination's grant is over.
    pub fn destination_grant_ends(&mut self, planted: Option<Planted>) {
        let ready = self.destination.side.as_ref();
        if planted == Some(Planted::ExpiryEndsReady)
            && ready.is_some_and(|side| side.machine.in_doubt())
        {
            self.feed_destination(Input::SourceSays(Standing::Ended));
        }
        self.feed_destination(EXPIRED);
    }

    /// Whether the link leads to the process that lives now.
    pub fn is_linked(&self) -> bool {
        self.link.instance == Some(self.destination.instance)
    }

    /// Feeds the destination's machine; what needs no step of its own is done at once.
    pub fn feed_destination(&mut self, input: Input) {
        let Some(side) = &mut self.destination.side else {
            return;
        };
        for action in side.machine.step(input) {
            match action {
                Action::Interrupt => side.interrupted = true,
                Action::Receive => {
                    side.work = DestinationWork::Listen;
                    side.shown = Phase::Precopy;
                }
                Action::AskSource => side.asking = true,
                other => side.queue.push_back(other),
            }
        }
    }

    /// Carries out the destination's next action.
    pub fn destination_acts(&mut self, fate: Fate, planted: Option<Planted>) {
        let Some(side) = &mut self.destination.side else {
            return;
        };
        let Some(action) = side.queue.pop_front() else {
            return;
        };
        match action {
            Action::Check => {
                side.shown = Phase::Switchover;
                self.feed_destination(Input::Checked);
            }
            Action::JournalPrepared => {
                let entry = Entry::Prepared {
                    uid: UID.to_owned(),
                    migration: MIGRATION.to_owned(),
                    epoch: EPOCH + 1,
                    grant: None,
                };
                let written = self.destination.append(entry, fate);
                self.feed_destination(Input::PreparedWritten(written));
            }
            Action::SayReady => {
                side.shown = Phase::Ready;
                self.destination.runs |= planted == Some(Planted::RunsOnReady);
                if self.link.broken {
                    self.feed_destination(Input::LinkLost);
                } else {
                    self.link.back.push_back(Frame::Ready);
                }
            }
            Action::JournalOwned => {
                let entry = Entry::Owned {
                    uid: UID.to_owned(),
                    migration: MIGRATION.to_owned(),
                    epoch: EPOCH + 1,
                };
                let written = self.destination.append(entry, fate);
                self.feed_destination(Input::OwnedWritten(written));
            }
            Action::RunVm => {
                self.destination.runs = true;
                if !self.link.broken {
                    self.link.back.push_back(Frame::Resumed);
                }
            }
            Action::SayAbort(_) => {
                if self.is_linked() && !self.link.broken {
                    self.link.back.push_back(Frame::Abort);
                    self.link.broken = true;
                }
            }
            Action::RecordEnd(end) => {
                self.destination.record = Some(match end {
                    End::Owned => Recorded::Completed,
                    End::GivenUp(_) => Recorded::Ended,
                });
                self.destination.ended_as = Some(shown(end));
            }
            Action::JournalAborted => {
                let entry = Entry::Aborted {
                    uid: UID.to_owned(),
                    migration: MIGRATION.to_owned(),
                };
                let _ = self.destination.append(entry, fate);
                self.feed_destination(Input::AbortedWritten);
            }
            Action::PublishEnd(end) => {
                side.shown = shown(end);
                if end != End::Owned {
                    // Giving up ends the process.
                    self.break_link();
                    self.destination.die();
                }
            }
            Action::Receive | Action::AskSource | Action::Interrupt => {}
        }
    }

    /// ReleaseTransfer; false when the side has not ended.
    pub fn destination_released(&mut self) -> bool {
        let Some(report) = self.destination.report() else {
            return true;
        };
        if !matches!(
            report.phase,
            Phase::Completed | Phase::Cancelled | Phase::Failed
        ) {
            return false;
        }
        self.destination.side = None;
        self.destination.released = true;
        self.destination.record = None;
        self.destination.ended_as = None;
        if !self.destination.alive && !self.destination.claims() {
            self.destination.journal = None;
        }
        true
    }

    /// What the source's agent answered reaches the destination.
    pub fn answer_arrives(&mut self) {
        if let Some(side) = &mut self.destination.side
            && let Some(standing) = side.answer.take()
        {
            self.feed_destination(Input::SourceSays(standing));
        }
    }

    /// The source's agent is asked.
    pub fn source_is_asked(&mut self, planted: Option<Planted>) {
        let standing = self.source.standing(planted);
        self.answer_with(standing);
    }

    /// The question, or its answer, is lost.
    pub fn answer_with(&mut self, standing: Standing) {
        if let Some(side) = &mut self.destination.side {
            side.asking = false;
            side.answer = Some(standing);
        }
    }

    /// No more can be written on the connection.
    pub fn break_link(&mut self) {
        if self.is_linked() {
            self.link.broken = true;
        }
    }

    /// The connection is given up by whoever still reads it.
    pub fn destination_loses_link(&mut self) {
        self.link.forth.clear();
        self.feed_destination(Input::LinkLost);
    }

    /// `kept`: what was in its cache reached the disk.
    pub fn destination_loses_power(&mut self, kept: bool) {
        self.destination_dies();
        self.destination.up = false;
        if let Some(journal) = &mut self.destination.journal {
            if kept {
                journal.sync();
            }
            journal.cached = None;
        }
    }

    /// kill -9 of the destination's process.
    pub fn destination_dies(&mut self) {
        if self.destination.alive {
            self.break_link();
            if self.is_linked() {
                self.link.forth.clear();
            }
        }
        self.destination.die();
    }

    /// The destination reads a frame.
    pub fn destination_reads(&mut self) {
        let Some(frame) = self.link.forth.pop_front() else {
            return;
        };
        let input = match frame {
            Frame::State => Input::StateHeard,
            Frame::Commit => Input::CommitHeard,
            _ => Input::AbortHeard,
        };
        self.feed_destination(input);
    }
}

fn shown(end: End) -> Phase {
    match end {
        End::Owned => Phase::Completed,
        End::GivenUp(Why::Cancelled) => Phase::Cancelled,
        End::GivenUp(_) => Phase::Failed,
    }
}
