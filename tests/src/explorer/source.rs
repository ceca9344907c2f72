//! What the source's driver, its agent and its kernel do, in steps that a crash may part.

use slat_proto::v1::TransferPhase as Phase;
use slat_record::{
    journal::Entry,
    standing::{self, Recorded},
};
use slat_server::migration::protocol::Report;
use slat_vmm::handover::protocol::{
    Settled, Why, Written,
    destination::Standing,
    source::{Action, End, Input, Source},
};

use super::{
    planted::Planted,
    world::{
        DestinationWork, EPOCH, Frame, MIGRATION, SourceHost, SourceSide, SourceWork, UID, World,
    },
};

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It is durable.
    Works,
    /// It reached the cache, the sync failed.
    Unsynced,
    /// It did not even reach the cache.
    Unwritten,
    /// Of a switchover: it takes too long.
    Overruns,
}

/// What the VM's process feeds when the time of a side's grant is over, whatever its state.
const EXPIRED: Input = Input::Cancel(Why::Elsewhere);

/// RELINQUISHED of this migration.
fn relinquished() -> Entry {
    Entry::Relinquished {
        uid: UID.to_owned(),
        migration: MIGRATION.to_owned(),
        epoch: EPOCH,
        grant: None,
    }
}

/// A ticket's bit among the spent ones.
fn spent(ticket: u8) -> u64 {
    1_u64 << (ticket % 64)
}

/// A side in a terminal phase as its record has it.
fn recorded(phase: Phase) -> Recorded {
    match phase {
        Phase::Completed => Recorded::Completed,
        _ => Recorded::Ended,
    }
}

impl SourceHost {
    /// The process and its memory are gone.
    pub fn die(&mut self) {
        self.alive = false;
        self.runs = false;
        self.side = None;
        self.spent = 0;
    }

    /// What the agent says of the side; `None` when nothing here knows it.
    pub fn report(&mut self, planted: Option<Planted>) -> Option<Report> {
        if self.alive {
            return self.side.as_ref().map(|side| Report::new(side.shown));
        }
        // Reading settles: nobody acts on what a crash could take back.
        let journal = self.journal.as_mut();
        let entries = match journal {
            Some(journal) => {
                journal.sync();
                journal.seen()
            }
            None => Vec::new(),
        };
        let entries: Vec<Entry> = entries
            .into_iter()
            .filter(|entry| {
                planted != Some(Planted::RestartForgets)
                    || !matches!(entry, Entry::Relinquished { .. })
            })
            .collect();
        let state =
            slat_record::journal::JournalState::of(&entries).expect("in a handover's order");
        let stands = standing::source(state.as_ref(), &entries, self.record, MIGRATION)?;
        Some(match stands {
            standing::SourceStands::Relinquished => Report {
                gone: true,
                ..Report::new(Phase::Relinquished)
            },
            standing::SourceStands::Completed => Report::new(Phase::Completed),
            standing::SourceStands::Ended => Report::new(self.ended_as.unwrap_or(Phase::Failed)),
            // Not reached: nobody orders an adoption here.
            standing::SourceStands::Adopted => Report::new(Phase::Cancelled),
            // Not reached: nobody tells the process to end its VM here.
            standing::SourceStands::Stopped => Report {
                vm_lost: true,
                ..Report::new(Phase::Failed)
            },
            standing::SourceStands::Died { vm_lost } => Report {
                vm_lost,
                ..Report::new(Phase::Failed)
            },
        })
    }

    /// The VM is here with its epoch and may run.
    pub fn is_owner(&self) -> bool {
        self.alive
            && self
                .side
                .as_ref()
                .is_none_or(|side| !side.machine.relinquished())
    }

    /// What the agent tells a destination in doubt.
    pub fn standing(&mut self, planted: Option<Planted>) -> Standing {
        if !self.up {
            return Standing::Unknown;
        }
        match self.report(planted).map(|report| report.phase) {
            Some(Phase::Relinquished | Phase::Completed) => Standing::Relinquished,
            Some(Phase::Failed | Phase::Cancelled) => Standing::Ended,
            _ => Standing::Unknown,
        }
    }

    /// The VM is claimed here: it runs, or the agent says that it was lost here.
    pub fn claims(&self, planted: Option<Planted>) -> bool {
        if self.forgotten {
            return false;
        }
        if self.alive {
            return self.runs;
        }
        let Some(journal) = &self.journal else {
            return false;
        };
        let given = matches!(
            self.record,
            Some(Recorded::Relinquished | Recorded::Completed)
        );
        let forgets = planted == Some(Planted::RestartForgets);
        let entries: Vec<Entry> = journal
            .seen()
            .into_iter()
            .filter(|entry| !forgets || !matches!(entry, Entry::Relinquished { .. }))
            .collect();
        let state =
            slat_record::journal::JournalState::of(&entries).expect("in a handover's order");
        standing::lost_epoch(state.as_ref(), given).is_some()
    }
}

impl World {
    /// The source begins, or answers for the side it has.
    pub fn source_starts(&mut self, ticket: u8, planted: Option<Planted>) {
        let host = &mut self.source;
        // A grant, and a ticket, is good for one side.
        let used = host.spent & spent(ticket) != 0 && planted != Some(Planted::GrantUsedTwice);
        if !host.alive || host.side.is_some() || used {
            return;
        }
        host.record = Some(Recorded::Running);
        host.side = Some(SourceSide {
            machine: Source::new(),
            queue: [].into(),
            work: SourceWork::Connect,
            interrupted: false,
            stopped: false,
            ticket,
            shown: Phase::Preparing,
        });
    }

    /// Whether the end of its grant's time does anything to the source.
    pub fn source_grant_matters(&self, planted: Option<Planted>) -> bool {
        self.source.side.as_ref().is_some_and(|side| {
            let after = planted == Some(Planted::ExpiryTakesBack) && side.machine.relinquished();
            after || !side.machine.clone().step(EXPIRED).is_empty()
        })
    }

    /// The time of the source's grant is over.
    pub fn source_grant_ends(&mut self, planted: Option<Planted>) {
        let given = self.source.side.as_ref();
        if planted == Some(Planted::ExpiryTakesBack)
            && given.is_some_and(|side| side.machine.relinquished())
        {
            self.source.runs = true;
        }
        self.feed_source(EXPIRED);
    }

    /// Feeds the source's machine; what needs no step of its own is done at once.
    pub fn feed_source(&mut self, input: Input) {
        let Some(side) = &mut self.source.side else {
            return;
        };
        let actions = side.machine.step(input);
        if actions.is_empty() && matches!(input, Input::LinkLost | Input::Failed(_)) {
            side.work = SourceWork::Idle;
        }
        for action in actions {
            match action {
                Action::Interrupt => side.interrupted = true,
                Action::Precopy => {
                    side.work = SourceWork::Precopy;
                    side.shown = Phase::Precopy;
                }
                Action::AwaitReady => side.work = SourceWork::AwaitReady,
                Action::StopLogging => {}
                other => {
                    side.work = SourceWork::Idle;
                    side.queue.push_back(other);
                }
            }
        }
    }

    /// Carries out the source's next action.
    pub fn source_acts(&mut self, fate: Fate, planted: Option<Planted>) {
        let Some(action) = self
            .source
            .side
            .as_mut()
            .and_then(|side| side.queue.pop_front())
        else {
            return;
        };
        match action {
            Action::SwitchOver => {
                self.source.runs = false;
                if let Some(side) = &mut self.source.side {
                    side.stopped = true;
                    side.shown = Phase::Switchover;
                }
                if fate == Fate::Overruns && planted == Some(Planted::GoesBackLate) {
                    self.source.runs = true;
                    self.link.forth.push_back(Frame::State);
                    self.feed_source(Input::StateSent);
                } else if fate == Fate::Overruns {
                    self.feed_source(Input::Overran);
                } else if self.link.broken {
                    self.feed_source(Input::Failed(Why::Fault));
                } else {
                    self.link.forth.push_back(Frame::State);
                    self.feed_source(Input::StateSent);
                }
            }
            Action::GoBack => {
                // The process has pages under way and nothing else: the link is as it was.
                if let Some(side) = &mut self.source.side {
                    self.source.runs |= std::mem::take(&mut side.stopped);
                }
                self.feed_source(Input::WentBack);
            }
            Action::JournalRelinquished => {
                let written = self.source.append(relinquished(), fate, planted);
                if planted == Some(Planted::CommitUndurable) {
                    self.feed_source(Input::Journalled(Written::Durable));
                } else {
                    self.feed_source(Input::Journalled(written));
                }
            }
            Action::SettleJournal => {
                let settled = self.source.settle(fate);
                self.feed_source(Input::JournalSettled(settled));
            }
            Action::PublishRelinquished => {
                if let Some(side) = &mut self.source.side {
                    side.shown = Phase::Relinquished;
                }
            }
            Action::Commit => {
                if let Some(side) = &mut self.source.side {
                    side.work = SourceWork::AwaitResumed;
                }
                if self.link.broken {
                    self.feed_source(Input::LinkLost);
                } else {
                    self.link.forth.push_back(Frame::Commit);
                }
            }
            Action::ResumeVm => {
                if let Some(side) = &mut self.source.side {
                    self.source.runs |= std::mem::take(&mut side.stopped);
                }
            }
            Action::SayAbort(_) => {
                if self.link.instance.is_some() && !self.link.broken {
                    self.link.forth.push_back(Frame::Abort);
                    self.link.broken = true;
                }
            }
            Action::RecordEnd(end) => {
                let shown = match end {
                    End::HandedOver => Phase::Completed,
                    End::Kept(Why::Cancelled) | End::TakenBack => Phase::Cancelled,
                    End::Kept(_) => Phase::Failed,
                };
                self.source.record = Some(recorded(shown));
                self.source.ended_as = Some(shown);
                if let Some(side) = &mut self.source.side {
                    side.shown = shown;
                }
            }
            // Nobody orders an adoption here: it is an operator's assertion, not a step of the
            // protocol.
            Action::JournalAdopted
            | Action::Precopy
            | Action::AwaitReady
            | Action::Interrupt
            | Action::StopLogging => {}
        }
    }

    /// ReleaseTransfer; false when the side has not ended.
    pub fn source_released(&mut self) -> bool {
        let Some(shown) = self.source.report(None).map(|report| report.phase) else {
            return true;
        };
        match shown {
            Phase::Relinquished | Phase::Completed => {
                self.source.die();
                self.source.journal = None;
            }
            Phase::Cancelled | Phase::Failed => {
                if let Some(side) = self.source.side.take() {
                    self.source.spent |= spent(side.ticket);
                }
            }
            _ => return false,
        }
        self.source.record = None;
        self.source.ended_as = None;
        true
    }

    /// `kept`: what was in its cache reached the disk.
    pub fn source_loses_power(&mut self, kept: bool) {
        self.source_dies();
        self.source.up = false;
        if let Some(journal) = &mut self.source.journal {
            if kept {
                journal.sync();
            }
            journal.cached = None;
        }
    }

    /// kill -9 of the source's process.
    pub fn source_dies(&mut self) {
        self.source.die();
        self.link.broken |= self.link.instance.is_some();
        self.link.back.clear();
    }

    /// The source opens its connections.
    pub fn source_connects(&mut self) {
        let Some(side) = &mut self.source.side else {
            return;
        };
        let listens = self.destination.up
            && self.destination.alive
            && self.destination.instance == side.ticket
            && self.destination.side.as_ref().is_some_and(|side| {
                side.machine.ended().is_none() && side.work == DestinationWork::Prepare
            });
        if listens && self.link.instance != Some(side.ticket) {
            side.work = SourceWork::AwaitPopulated;
            self.link.instance = Some(side.ticket);
            self.link.broken = false;
            self.link.forth.clear();
            self.link.back.clear();
        } else {
            self.feed_source(Input::Failed(Why::Fault));
        }
    }

    /// The source reads a frame.
    pub fn source_reads(&mut self) {
        let Some(frame) = self.link.back.pop_front() else {
            return;
        };
        let input = match frame {
            Frame::Populated => Input::Connected,
            Frame::Ready => Input::ReadyHeard,
            Frame::Resumed => Input::ResumedHeard,
            _ => Input::Failed(Why::Elsewhere),
        };
        self.feed_source(input);
    }
}

impl SourceHost {
    fn append(&mut self, entry: Entry, fate: Fate, planted: Option<Planted>) -> Written {
        let Some(journal) = &mut self.journal else {
            return Written::Refused;
        };
        if planted == Some(Planted::NoSync) {
            journal.cached = Some(entry);
            return Written::Durable;
        }
        match fate {
            Fate::Works => {
                journal.cached = Some(entry);
                journal.sync();
                Written::Durable
            }
            Fate::Unsynced => {
                journal.cached = Some(entry);
                Written::Unknown
            }
            Fate::Unwritten | Fate::Overruns => Written::Unknown,
        }
    }

    /// Reading again: what is in the cache is written anew, or cut off where the disk is full.
    fn settle(&mut self, fate: Fate) -> Settled {
        let Some(journal) = &mut self.journal else {
            return Settled::Absent;
        };
        if fate == Fate::Works {
            let present = journal.cached.is_some();
            journal.sync();
            if present {
                return Settled::Present;
            }
        }
        journal.cached = None;
        Settled::Absent
    }
}
