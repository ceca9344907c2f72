//! What the server's driver does, and the agents that answer it.
//!
//! A call is a request under way, then an answer under way. Each ends once for its caller. What the
//! caller gave up, or what the network repeats, stays as a stray and may arrive at any later time.

use slat_server::migration::protocol::{
    Action as Call, Answer, Durable, Input, MigrationProtocol, Report, Side, Start,
};
use slat_vmm::handover::protocol::{
    Why,
    destination::{Decision, Input as DestinationInput},
    source::Input as SourceInput,
};

use super::{
    planted::Planted,
    world::{InFlight, Stray, World},
};

fn number(call: Call) -> u8 {
    Call::CALLS
        .iter()
        .position(|other| *other == call)
        .map_or(u8::MAX, |at| at as u8)
}

/// A request whose arrival changes something.
fn has_effect(call: Call) -> bool {
    !matches!(
        call,
        Call::Persist
            | Call::Describe
            | Call::FollowSource
            | Call::FollowDestination
            | Call::AskSourceCopy
    )
}

/// A request that its agent takes by a grant alone.
pub fn needs_grant(call: Call) -> bool {
    matches!(
        call,
        Call::Prepare | Call::Start | Call::ResolveCommit | Call::ResolveAbort
    )
}

impl World {
    /// Whether the agent that a call is for answers.
    pub fn answers(&self, call: Call) -> bool {
        match call.side() {
            Some(Side::Source) => self.source.up,
            Some(Side::Destination) => self.destination.up,
            None => true,
        }
    }

    /// Feeds the server's machine and begins what it asks for.
    pub fn feed_server(&mut self, input: Input, planted: Option<Planted>) {
        for action in self.server.protocol.step(input) {
            if action == Call::Persist {
                let mut durable = self.server.protocol.durable();
                if planted == Some(Planted::StoreForgetsStart) {
                    durable.start = Start::Never;
                }
                self.server.writing = Some(durable);
            } else {
                let ticket = if action == Call::Start {
                    self.server.grant
                } else {
                    0
                };
                self.server.calls.push((action, InFlight::Request(ticket)));
                self.server.calls.sort_by_key(|(call, _)| number(*call));
            }
        }
    }

    /// The store has what was being written.
    pub fn server_stores(&mut self, planted: Option<Planted>) {
        if let Some(durable) = self.server.writing.take() {
            self.server.disk = durable;
            self.feed_server(Input::Stored, planted);
        }
    }

    /// The server dies. `written`: what was being written reached the disk.
    pub fn server_crashes(&mut self, written: bool) {
        if let Some(durable) = self.server.writing.take().filter(|_| written) {
            self.server.disk = durable;
        }
        for (call, state) in std::mem::take(&mut self.server.calls) {
            if let InFlight::Request(ticket) = state
                && has_effect(call)
            {
                self.strays.insert(Stray {
                    call: number(call),
                    ticket,
                });
            }
        }
        self.server.up = false;
        self.server.grant = 0;
        // Nothing of the earlier life is left: equal states are then found equal.
        self.server.protocol = MigrationProtocol::new(&self.server.disk);
    }

    /// The server starts again, and takes up what it finds.
    pub fn server_restarts(&mut self, planted: Option<Planted>) {
        self.server.up = true;
        self.server.protocol = MigrationProtocol::new(&self.server.disk);
        for side in [Side::Source, Side::Destination] {
            if self.server.fences[side as usize] {
                self.feed_server(Input::HostFenced(side), planted);
            }
        }
        let pending = self.server.protocol.phase() == slat_proto::v1::MigrationPhase::Pending;
        self.feed_server(
            if pending {
                Input::Admitted
            } else {
                Input::Retry
            },
            planted,
        );
    }

    /// Whether a call waits at its agent's end, or on the way back.
    pub fn call(&self, call: Call) -> Option<&InFlight> {
        self.server
            .calls
            .iter()
            .find(|(other, _)| *other == call)
            .map(|(_, state)| state)
    }

    /// A request arrives.
    pub fn delivers(&mut self, call: Call, repeated: bool, planted: Option<Planted>) {
        let Some(InFlight::Request(ticket)) = self.call(call).cloned() else {
            return;
        };
        if repeated && has_effect(call) {
            self.strays.insert(Stray {
                call: number(call),
                ticket,
            });
        }
        let (answer, heard) = self.agent_answers(call, ticket, planted);
        let grant = if call == Call::Prepare {
            self.destination.instance
        } else {
            0
        };
        self.put(call, InFlight::Reply(answer, heard, grant));
    }

    /// A request arrives whose grant's time is over: its agent refuses it, whatever it has begun by
    /// an earlier one.
    pub fn refuses_expired(&mut self, call: Call, planted: Option<Planted>) {
        let answer = match call {
            Call::Start => self.after_start(planted),
            Call::Prepare => Answer::Refused { lost: false },
            _ => self.destination_side(),
        };
        self.put(call, InFlight::Reply(answer, None, 0));
        self.replies(call, planted);
    }

    /// An answer arrives.
    pub fn replies(&mut self, call: Call, planted: Option<Planted>) {
        let Some(InFlight::Reply(answer, heard, grant)) = self.take(call) else {
            return;
        };
        if call == Call::Prepare && matches!(answer, Answer::Side(_)) {
            self.server.grant = grant;
        }
        if let Some(report) = heard {
            let side = if call == Call::FollowSource {
                Side::Source
            } else {
                Side::Destination
            };
            self.feed_server(Input::Heard(side, report), planted);
        }
        self.feed_server(Input::Answered(call, answer), planted);
    }

    /// The caller gives up. `late`: the request is still under way.
    pub fn loses(&mut self, call: Call, late: bool, planted: Option<Planted>) {
        let Some(state) = self.take(call) else {
            return;
        };
        if let InFlight::Request(ticket) = state
            && late
            && has_effect(call)
        {
            self.strays.insert(Stray {
                call: number(call),
                ticket,
            });
        }
        let answer = if call == Call::AskSourceCopy {
            Answer::Copy { gone: false }
        } else {
            Answer::Silent
        };
        self.feed_server(Input::Answered(call, answer), planted);
    }

    /// A request arrives that nobody waits for.
    pub fn stray_arrives(&mut self, stray: Stray, planted: Option<Planted>) {
        if self.strays.remove(&stray)
            && let Some(call) = Call::CALLS.get(usize::from(stray.call))
        {
            self.agent_answers(*call, stray.ticket, planted);
        }
    }

    fn put(&mut self, call: Call, state: InFlight) {
        if let Some((_, slot)) = self
            .server
            .calls
            .iter_mut()
            .find(|(other, _)| *other == call)
        {
            *slot = state;
        }
    }

    fn take(&mut self, call: Call) -> Option<InFlight> {
        let at = self
            .server
            .calls
            .iter()
            .position(|(other, _)| *other == call)?;
        Some(self.server.calls.remove(at).1)
    }

    /// What the agent that is asked does and says.
    fn agent_answers(
        &mut self,
        call: Call,
        ticket: u8,
        planted: Option<Planted>,
    ) -> (Answer, Option<Report>) {
        if !self.answers(call) {
            let silent = if call == Call::AskSourceCopy {
                Answer::Copy { gone: false }
            } else {
                Answer::Silent
            };
            return (silent, None);
        }
        let answer = match call {
            Call::Persist => Answer::Done,
            Call::Describe if self.source.is_owner() => Answer::Done,
            Call::Describe => Answer::Refused {
                lost: self.source.claims(planted) && !self.source.alive,
            },
            Call::Prepare => {
                if self.destination_prepares(planted) {
                    self.destination_side()
                } else {
                    Answer::Refused { lost: false }
                }
            }
            Call::Start => {
                self.source_starts(ticket, planted);
                self.after_start(planted)
            }
            Call::FollowSource => match self.source.report(planted) {
                Some(report) => return (Answer::Nothing, Some(report)),
                None => self.source_side(planted),
            },
            Call::FollowDestination => match self.destination.report() {
                Some(report) => return (Answer::Nothing, Some(report)),
                None => self.destination_side(),
            },
            Call::CancelSource => {
                self.feed_source(SourceInput::Cancel(Why::Cancelled));
                self.source_side(planted)
            }
            Call::FailSource => {
                self.feed_source(SourceInput::Cancel(Why::Elsewhere));
                self.source_side(planted)
            }
            Call::CancelDestination => {
                self.feed_destination(DestinationInput::Cancel(Why::Cancelled));
                self.destination_side()
            }
            Call::ResolveCommit => {
                self.feed_destination(DestinationInput::ControlSays(Decision::Commit));
                self.destination_side()
            }
            Call::ResolveAbort => {
                self.feed_destination(DestinationInput::ControlSays(Decision::Abort));
                self.destination_side()
            }
            Call::AskSourceCopy => Answer::Copy {
                gone: !self.source.alive,
            },
            Call::ReleaseSource => {
                let alive = self.source.alive;
                if self.source_released() {
                    if alive && !self.source.alive {
                        self.link.broken |= self.link.instance.is_some();
                    }
                    Answer::Done
                } else {
                    Answer::Silent
                }
            }
            Call::ReleaseDestination => {
                if self.destination_released() {
                    Answer::Done
                } else {
                    Answer::Silent
                }
            }
        };
        (answer, None)
    }

    /// The side that a StartOutgoing was for: a refusal counts only when there is none, since an
    /// earlier one may have begun it.
    fn after_start(&mut self, planted: Option<Planted>) -> Answer {
        match self.source.report(planted) {
            Some(report) => Answer::Side(report),
            None => Answer::Refused {
                lost: !self.source.alive && self.source.claims(planted),
            },
        }
    }

    fn source_side(&mut self, planted: Option<Planted>) -> Answer {
        match self.source.report(planted) {
            Some(report) => Answer::Side(report),
            None => Answer::Absent {
                owner: self.source.is_owner(),
            },
        }
    }

    fn destination_side(&mut self) -> Answer {
        match self.destination.report() {
            Some(report) => Answer::Side(report),
            None => Answer::Absent { owner: false },
        }
    }

    /// A phase that is final and on disk.
    #[must_use]
    pub fn shown_end(&self) -> Option<Durable> {
        use slat_proto::v1::MigrationPhase as M;
        let disk = self.server.disk;
        matches!(disk.phase, M::Completed | M::Cancelled | M::Failed).then_some(disk)
    }
}
