//! One step of the world: which there are in a state, and what each does.

use slat_server::migration::protocol::{Action as Call, Input as ServerInput, Side};
use slat_vmm::handover::protocol::{
    Why,
    destination::{self, Standing},
    source,
};

use super::{
    planted::Planted,
    server::needs_grant,
    source::Fate,
    world::{Budget, DestinationSide, DestinationWork, Frame, InFlight, SourceWork, Stray, World},
};

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The source carries out its next action.
    SourceActs(Fate),
    /// It opens its connections.
    SourceConnects,
    /// It reads a frame.
    SourceReads,
    /// It finds the connection gone.
    SourceLosesLink,
    /// Precopy decides for the switchover.
    PrecopyEnds,
    /// What it does fails.
    SourceFails,
    /// It notices that it was cancelled.
    SourceNotices,
    /// The destination carries out its next action.
    DestinationActs(Fate),
    /// All its memory is there.
    DestinationPopulates,
    /// It reads a frame.
    DestinationReads,
    /// It finds the connection gone.
    DestinationLosesLink,
    /// What it does fails, or the source never comes.
    DestinationFails,
    /// It notices that it was cancelled.
    DestinationNotices,
    /// Some time passes at a destination that nobody talks to.
    DestinationTicks,
    /// Its question reaches the source's agent.
    SourceIsAsked,
    /// Its question, or the answer, is lost.
    QuestionIsLost,
    /// The answer comes back.
    AnswerArrives,
    /// The server's store is written.
    ServerStores,
    /// A request arrives at its agent, and the answer comes back.
    Delivers(Call),
    /// A request arrives at its agent, and other things happen before the answer comes back.
    DeliversSlowly(Call),
    /// The same, and it will arrive once more.
    DeliversTwice(Call),
    /// An answer arrives at the server.
    Replies(Call),
    /// A request or an answer is lost.
    Loses(Call),
    /// The server gives up on a request that is still under way.
    GivesUp(Call),
    /// A request arrives that nobody waits for.
    StrayArrives(Stray),
    /// The server's clock: asks again.
    Retries,
    /// The server's clock: no more figures.
    FiguresOverdue,
    /// The server's clock: silent hosts were waited for long enough.
    PatienceOver,
    /// The user cancels.
    UserCancels,
    /// The user deletes the VM whose last copy is frozen at the source.
    UserDeletes,
    /// The server dies; whether what it was writing is on disk.
    ServerCrashes(bool),
    /// The server is started again.
    ServerRestarts,
    /// kill -9 of the VM's process at the source.
    SourceKilled,
    /// The source's host loses its power; whether its cache reached the disk.
    SourceOutage(bool),
    /// It is back.
    SourceReturns,
    /// kill -9 of the VM's process at the destination.
    DestinationKilled,
    /// The destination's host loses its power; whether its cache reached the disk.
    DestinationOutage(bool),
    /// It is back.
    DestinationReturns,
    /// An operator deletes a host that has no power.
    HostDeleted(Side),
    /// An operator fences a host: its power goes, and the server has the proof on disk.
    HostFenced(Side),
    /// An operator takes the VM that waits at the destination for the commit of a deleted source.
    OperatorAdopts,
    /// The connection between the processes breaks.
    LinkBreaks,
    /// The time of the source's grant is over.
    SourceGrantEnds,
    /// The time of the destination's grant is over.
    DestinationGrantEnds,
    /// A request arrives whose grant's time is over.
    DeliversExpired(Call),
    /// The same of a request that nobody waits for.
    StrayIsExpired(Stray),
}

fn is_follow(call: Call) -> bool {
    matches!(call, Call::FollowSource | Call::FollowDestination)
}

fn spend(budget: &mut u8) {
    *budget = budget.saturating_sub(1);
}

impl World {
    /// The steps that are possible.
    pub fn steps(&self, steps: &mut Vec<Step>, planted: Option<Planted>) {
        self.source_steps(steps);
        self.destination_steps(steps);
        self.server_steps(steps);
        self.fault_steps(steps);
        if self.budget.expiries > 0 {
            self.grant_steps(steps, planted);
        }
    }

    fn grant_steps(&self, steps: &mut Vec<Step>, planted: Option<Planted>) {
        if self.source_grant_matters(planted) {
            steps.push(Step::SourceGrantEnds);
        }
        if self.destination_grant_matters(planted) {
            steps.push(Step::DestinationGrantEnds);
        }
        if self.server.up {
            let calls = self.server.calls.iter().filter(|(call, state)| {
                matches!(state, InFlight::Request(_)) && needs_grant(*call) && self.answers(*call)
            });
            steps.extend(calls.map(|(call, _)| Step::DeliversExpired(*call)));
        }
        let strays = self.strays.iter().filter(|stray| {
            let call = Call::CALLS.get(usize::from(stray.call));
            call.is_some_and(|call| needs_grant(*call))
        });
        steps.extend(strays.map(|stray| Step::StrayIsExpired(*stray)));
    }

    fn source_steps(&self, steps: &mut Vec<Step>) {
        let Some(side) = &self.source.side else {
            return;
        };
        if let Some(action) = side.queue.front() {
            steps.push(Step::SourceActs(Fate::Works));
            let writes = matches!(
                action,
                source::Action::JournalRelinquished | source::Action::SettleJournal
            );
            if writes && self.budget.disk_faults > 0 {
                steps.push(Step::SourceActs(Fate::Unsynced));
                steps.push(Step::SourceActs(Fate::Unwritten));
            }
            let works = matches!(action, source::Action::SwitchOver | source::Action::GoBack);
            if works && self.budget.work_faults > 0 {
                steps.push(Step::SourceFails);
            }
            if *action == source::Action::SwitchOver && self.budget.overruns > 0 {
                steps.push(Step::SourceActs(Fate::Overruns));
            }
            return;
        }
        if side.interrupted && side.work != SourceWork::Idle {
            steps.push(Step::SourceNotices);
        }
        match side.work {
            SourceWork::Connect => steps.push(Step::SourceConnects),
            SourceWork::Precopy => {
                steps.push(Step::PrecopyEnds);
                if self.link.broken {
                    steps.push(Step::SourceLosesLink);
                }
                if self.budget.work_faults > 0 {
                    steps.push(Step::SourceFails);
                }
            }
            SourceWork::AwaitPopulated | SourceWork::AwaitReady | SourceWork::AwaitResumed => {
                if !self.link.back.is_empty() {
                    steps.push(Step::SourceReads);
                }
                if self.link.broken {
                    steps.push(Step::SourceLosesLink);
                }
            }
            SourceWork::Idle => {}
        }
    }

    fn destination_steps(&self, steps: &mut Vec<Step>) {
        let Some(side) = &self.destination.side else {
            return;
        };
        if side.answer.is_some() {
            steps.push(Step::AnswerArrives);
        }
        if side.asking {
            steps.push(Step::SourceIsAsked);
            if self.budget.losses > 0 {
                steps.push(Step::QuestionIsLost);
            }
        }
        if let Some(action) = side.queue.front() {
            steps.push(Step::DestinationActs(Fate::Works));
            let writes = matches!(
                action,
                destination::Action::JournalPrepared | destination::Action::JournalOwned
            );
            if writes && self.budget.disk_faults > 0 {
                steps.push(Step::DestinationActs(Fate::Unsynced));
                steps.push(Step::DestinationActs(Fate::Unwritten));
            }
            if *action == destination::Action::Check && self.budget.work_faults > 0 {
                steps.push(Step::DestinationFails);
            }
            return;
        }
        if side.machine.ended().is_some() {
            return;
        }
        if side.interrupted {
            steps.push(Step::DestinationNotices);
        }
        if side.machine.needs_ticks() && !side.asking && side.answer.is_none() {
            steps.push(Step::DestinationTicks);
        }
        match side.work {
            DestinationWork::Prepare | DestinationWork::Listen => {
                let linked = self.is_linked();
                if side.work == DestinationWork::Prepare && linked && !self.link.broken {
                    steps.push(Step::DestinationPopulates);
                }
                if linked && !self.link.forth.is_empty() {
                    steps.push(Step::DestinationReads);
                }
                if linked && self.link.broken {
                    steps.push(Step::DestinationLosesLink);
                }
                if !linked || self.budget.work_faults > 0 && !side.machine.in_doubt() {
                    steps.push(Step::DestinationFails);
                }
            }
            DestinationWork::Idle => {}
        }
    }

    fn server_steps(&self, steps: &mut Vec<Step>) {
        steps.extend(self.strays.iter().map(|stray| Step::StrayArrives(*stray)));
        if !self.server.up {
            steps.push(Step::ServerRestarts);
            return;
        }
        if self.server.writing.is_some() {
            steps.push(Step::ServerStores);
        }
        for (call, state) in &self.server.calls {
            match state {
                InFlight::Request(_) => {
                    steps.push(Step::Delivers(*call));
                    if self.budget.delays > 0 {
                        steps.push(Step::DeliversSlowly(*call));
                    }
                    if !is_follow(*call) && self.budget.strays > 0 {
                        steps.push(Step::DeliversTwice(*call));
                        steps.push(Step::GivesUp(*call));
                    } else if needs_grant(*call) && self.budget.replays > 0 {
                        steps.push(Step::DeliversTwice(*call));
                    }
                }
                InFlight::Reply(..) => steps.push(Step::Replies(*call)),
            }
            if self.budget.losses > 0 {
                steps.push(Step::Loses(*call));
            }
        }
        if self.server.protocol.finished() {
            return;
        }
        let idle = self.server.calls.iter().all(|(call, _)| is_follow(*call));
        if idle && self.server.writing.is_none() {
            steps.push(Step::Retries);
        }
        if self.server.protocol.awaits_figures() {
            steps.push(Step::FiguresOverdue);
        }
        if self.server.protocol.awaits_hosts() {
            steps.push(Step::PatienceOver);
        }
        if self.budget.cancels > 0 {
            steps.push(Step::UserCancels);
        }
        if self.server.protocol.keeps_source() {
            steps.push(Step::UserDeletes);
        }
    }

    fn fault_steps(&self, steps: &mut Vec<Step>) {
        if self.server.up && self.budget.server_crashes > 0 && !self.server.protocol.finished() {
            steps.push(Step::ServerCrashes(true));
            if self.server.writing.is_some() {
                steps.push(Step::ServerCrashes(false));
            }
        }
        if self.source.alive && self.budget.kills > 0 {
            steps.push(Step::SourceKilled);
        }
        if self.destination.alive && self.budget.kills > 0 {
            steps.push(Step::DestinationKilled);
        }
        if self.source.up && self.budget.outages > 0 {
            steps.push(Step::SourceOutage(false));
            if self
                .source
                .journal
                .as_ref()
                .is_some_and(|j| j.cached.is_some())
            {
                steps.push(Step::SourceOutage(true));
            }
        }
        if self.destination.up && self.budget.outages > 0 {
            steps.push(Step::DestinationOutage(false));
            if self
                .destination
                .journal
                .as_ref()
                .is_some_and(|j| j.cached.is_some())
            {
                steps.push(Step::DestinationOutage(true));
            }
        }
        if self.server.up && self.budget.fences > 0 && !self.server.protocol.finished() {
            for (side, forgotten) in [
                (Side::Source, self.source.forgotten),
                (Side::Destination, self.destination.forgotten),
            ] {
                if !forgotten && !self.server.fences[side as usize] {
                    steps.push(Step::HostFenced(side));
                }
            }
        }
        if !self.source.up && !self.source.forgotten {
            steps.push(Step::SourceReturns);
            if self.server.up && self.budget.deletions > 0 {
                steps.push(Step::HostDeleted(Side::Source));
            }
        }
        if !self.destination.up && !self.destination.forgotten {
            steps.push(Step::DestinationReturns);
            if self.server.up && self.budget.deletions > 0 {
                steps.push(Step::HostDeleted(Side::Destination));
            }
        }
        // The server shows it to be adopted while the migration is in doubt. An order that crosses
        // the record of an end was given on what was shown a moment before.
        let doubt = self.server.protocol.phase() == slat_proto::v1::MigrationPhase::InDoubt
            && self.server.writing.is_none();
        let waits = |side: &DestinationSide| side.machine.in_doubt();
        if doubt && self.source.forgotten && self.destination.side.as_ref().is_some_and(waits) {
            steps.push(Step::OperatorAdopts);
        }
        if self.budget.breaks > 0 && self.link.instance.is_some() && !self.link.broken {
            steps.push(Step::LinkBreaks);
        }
    }

    /// The world after `step`.
    pub fn take_step(&mut self, step: Step, planted: Option<Planted>) {
        match step {
            Step::SourceActs(fate) => {
                match fate {
                    Fate::Works => {}
                    Fate::Overruns => spend(&mut self.budget.overruns),
                    Fate::Unsynced | Fate::Unwritten => spend(&mut self.budget.disk_faults),
                }
                self.source_acts(fate, planted);
            }
            Step::SourceConnects => self.source_connects(),
            Step::SourceReads => self.source_reads(),
            Step::SourceLosesLink => {
                self.link.back.clear();
                self.feed_source(source::Input::LinkLost);
            }
            Step::PrecopyEnds => self.feed_source(source::Input::SwitchoverDecided),
            Step::SourceFails => {
                spend(&mut self.budget.work_faults);
                if let Some(side) = &mut self.source.side {
                    side.queue.clear();
                }
                self.feed_source(source::Input::Failed(Why::Fault));
            }
            Step::SourceNotices => {
                if let Some(side) = &mut self.source.side {
                    side.interrupted = false;
                }
                self.feed_source(source::Input::Failed(Why::Fault));
            }
            Step::DestinationActs(fate) => {
                if fate != Fate::Works {
                    spend(&mut self.budget.disk_faults);
                }
                self.destination_acts(fate, planted);
            }
            Step::DestinationPopulates => {
                self.link.back.push_back(Frame::Populated);
                self.feed_destination(destination::Input::Populated);
            }
            Step::DestinationReads => self.destination_reads(),
            Step::DestinationLosesLink => self.destination_loses_link(),
            Step::DestinationFails => {
                if self.is_linked() {
                    spend(&mut self.budget.work_faults);
                }
                if let Some(side) = &mut self.destination.side {
                    side.queue.clear();
                }
                self.feed_destination(destination::Input::Failed(Why::Fault));
            }
            Step::DestinationNotices => {
                if let Some(side) = &mut self.destination.side {
                    side.interrupted = false;
                }
                self.feed_destination(destination::Input::Failed(Why::Fault));
            }
            Step::DestinationTicks => {
                if planted == Some(Planted::TimerDecides) {
                    self.feed_destination(destination::Input::SourceSays(Standing::Relinquished));
                } else {
                    self.feed_destination(destination::Input::Tick);
                }
            }
            Step::SourceIsAsked => self.source_is_asked(planted),
            Step::QuestionIsLost => {
                spend(&mut self.budget.losses);
                self.answer_with(Standing::Unknown);
            }
            Step::AnswerArrives => self.answer_arrives(),
            _ => self.take_outer_step(step, planted),
        }
    }

    fn take_outer_step(&mut self, step: Step, planted: Option<Planted>) {
        match step {
            Step::ServerStores => self.server_stores(planted),
            Step::Delivers(call) => {
                self.delivers(call, false, planted);
                self.replies(call, planted);
            }
            Step::DeliversSlowly(call) => {
                spend(&mut self.budget.delays);
                self.delivers(call, false, planted);
            }
            Step::DeliversTwice(call) => {
                let Budget {
                    strays, replays, ..
                } = &mut self.budget;
                spend(if *strays > 0 { strays } else { replays });
                self.delivers(call, true, planted);
                self.replies(call, planted);
            }
            Step::Replies(call) => self.replies(call, planted),
            Step::Loses(call) => {
                spend(&mut self.budget.losses);
                self.loses(call, false, planted);
            }
            Step::GivesUp(call) => {
                spend(&mut self.budget.strays);
                self.loses(call, true, planted);
            }
            Step::StrayArrives(stray) => self.stray_arrives(stray, planted),
            Step::Retries => self.feed_server(ServerInput::Retry, planted),
            Step::FiguresOverdue => self.feed_server(ServerInput::FiguresOverdue, planted),
            Step::PatienceOver => self.feed_server(ServerInput::PatienceOver, planted),
            Step::UserCancels => {
                spend(&mut self.budget.cancels);
                self.feed_server(ServerInput::CancelRequested, planted);
            }
            Step::UserDeletes => self.feed_server(ServerInput::DeleteRequested, planted),
            Step::ServerCrashes(written) => {
                spend(&mut self.budget.server_crashes);
                self.server_crashes(written);
            }
            Step::ServerRestarts => self.server_restarts(planted),
            Step::SourceKilled => {
                spend(&mut self.budget.kills);
                self.source_dies();
            }
            Step::SourceOutage(kept) => {
                spend(&mut self.budget.outages);
                self.source_loses_power(kept);
            }
            Step::SourceReturns => self.source.up = true,
            Step::DestinationKilled => {
                spend(&mut self.budget.kills);
                self.destination_dies();
            }
            Step::DestinationOutage(kept) => {
                spend(&mut self.budget.outages);
                self.destination_loses_power(kept);
            }
            Step::DestinationReturns => self.destination.up = true,
            Step::HostDeleted(side) => {
                spend(&mut self.budget.deletions);
                match side {
                    Side::Source => self.source.forgotten = true,
                    Side::Destination => self.destination.forgotten = true,
                }
                self.feed_server(ServerInput::HostForgotten(side), planted);
            }
            Step::HostFenced(side) => {
                spend(&mut self.budget.fences);
                match side {
                    _ if planted == Some(Planted::HookLies) => {}
                    Side::Source => self.source_loses_power(false),
                    Side::Destination => self.destination_loses_power(false),
                }
                self.server.fences[side as usize] = true;
                self.feed_server(ServerInput::HostFenced(side), planted);
            }
            // What an adoption journals; nothing else says that the source is gone for good.
            Step::OperatorAdopts => {
                let commit = destination::Decision::Commit;
                self.feed_destination(destination::Input::ControlSays(commit));
            }
            Step::LinkBreaks => {
                spend(&mut self.budget.breaks);
                self.link.broken = true;
            }
            Step::SourceGrantEnds => {
                spend(&mut self.budget.expiries);
                self.source_grant_ends(planted);
            }
            Step::DestinationGrantEnds => {
                spend(&mut self.budget.expiries);
                self.destination_grant_ends(planted);
            }
            Step::DeliversExpired(call) => {
                spend(&mut self.budget.expiries);
                self.refuses_expired(call, planted);
            }
            // It is refused, and nobody hears of that.
            Step::StrayIsExpired(stray) => {
                spend(&mut self.budget.expiries);
                self.strays.remove(&stray);
            }
            _ => {}
        }
    }
}
