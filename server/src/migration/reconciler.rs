//! Drives one migration: feeds the protocol, begins what it asks for, shows what is on disk.
//!
//! One task owns everything of one migration: protocol, record, texts, the ticket, the tasks of its
//! calls. Nothing is shared but the watch channel that it publishes through, so there is no lock
//! here. It never waits for a call or for the disk: each is a task of its own whose end is an input
//! ([`super::tasks`]). A crash at any line is repaired by starting again from the record.
//!
//! Shown is what is on disk. A terminal phase is shown after a first attempt to release both sides
//! and a look for the VM where it is now: who sees COMPLETED finds the VM at its new host and may
//! migrate it again. That is waited for briefly; the record on disk does not wait.
//!
//! The ticket lives in this task's memory alone. After a restart PrepareIncoming is asked again (it
//! is idempotent).

use std::{future::ready, sync::Arc, time::Duration};

use slat_proto::{
    model::Timeline,
    v1::{self, MigrationPhase as Phase, resolve_transfer_request::Decision},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

mod answers;
mod grounds;

use super::{
    calls::{Brought, Caller, Ended, JOURNAL, Offer},
    errors::Texts,
    follower::{FIRST_PAUSE, News, follow, longer},
    pairs::Pairs,
    protocol::{Action, Answer, Durable, Input, MigrationProtocol, Side},
    record::{Record, report},
    replies::{Command, Replies},
    subject::Subject,
    tasks::{Outcome, Tasks, Work},
    waiting::{Earlier, HOST_PATIENCE, Released, wait_for},
    waits::{Standing as Waiting, Waits, populated},
};
use crate::{
    fleet::Fleet, grants::Grants, history::History, metrics, phase::has_ended, store::BlockingStore,
};

/// What is still wanted is asked for again this often.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// How long the source's last figures are waited for once the outcome is known, after its last
/// change.
const FIGURES: Duration = Duration::from_secs(5);
/// The same when it said that it compares digests, which it says again every second, or when its
/// agent does not answer.
const FIGURES_VERIFYING: Duration = Duration::from_secs(30);
/// How long the end is held back for the first attempt to clean up: of a cancel or a failure, and
/// of a success.
const HOLD: Duration = Duration::from_millis(300);
const HOLD_COMPLETED: Duration = Duration::from_secs(2);

/// What every reconciler needs.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) fleet: Arc<Fleet>,
    pub(super) store: BlockingStore,
    pub(super) history: Arc<History>,
    pub(super) grants: Arc<Grants>,
    pub(super) pairs: Arc<Pairs>,
}

/// Whether the end can be shown.
#[derive(Clone, Copy, Debug)]
enum End {
    NotYet,
    /// On disk; shown at this time, or when it was cleaned up and the VM looked up.
    Held {
        until: Instant,
        looked_up: bool,
    },
    Shown,
}

/// How a side is followed.
#[derive(Clone, Copy, Debug, Default)]
struct Following {
    /// Before it is asked again.
    pause: Duration,
    /// The running follower heard it.
    heard: bool,
}

/// See the module.
pub(super) struct Reconciler {
    context: Context,
    caller: Caller,
    protocol: MigrationProtocol,
    record: Record,
    texts: Texts,
    tasks: Tasks,
    replies: Replies,
    /// The record that is being written, and the one that was written last.
    writing: Option<v1::Migration>,
    on_disk: v1::Migration,
    end: End,
    shown: watch::Sender<v1::Migration>,
    commands: mpsc::Receiver<Command>,
    released: Released,
    description: Option<Box<v1::DescribeOutgoingResponse>>,
    /// The VM as the fleet knew it when this began.
    last_seen: Option<v1::Vm>,
    offer: Option<Offer>,
    heard: mpsc::Receiver<News>,
    hear: mpsc::Sender<News>,
    following: [Following; 2],
    /// What each side says it waits for.
    sides_wait: [String; 2],
    retry_at: Instant,
    retry_pause: Duration,
    source_changed: Instant,
    /// Since when only the source's last figures are waited for.
    outcome_since: Option<Instant>,
    /// This migration's own time.
    timeline: Timeline,
    /// Sides that PENDING waits for.
    before: Vec<Earlier>,
    waits: Waits,
    /// When the write that is under way began.
    write_begun: Instant,
    /// Since when it waits for hosts that do not answer.
    hosts_since: Instant,
}

impl Reconciler {
    pub(super) fn new(
        context: Context,
        record: Record,
        shown: watch::Sender<v1::Migration>,
        commands: mpsc::Receiver<Command>,
        released: Released,
        timeline: Timeline,
    ) -> Self {
        let (hear, heard) = mpsc::channel(64);
        let on_disk = record.migration().clone();
        let caller = Caller {
            fleet: Arc::clone(&context.fleet),
            grants: Arc::clone(&context.grants),
            subject: Arc::new(Subject::of(&on_disk)),
        };
        let protocol = MigrationProtocol::new(&record.durable());
        Self {
            protocol,
            context,
            caller,
            texts: Texts::default(),
            tasks: Tasks::default(),
            replies: Replies::default(),
            writing: None,
            end: if has_ended(on_disk.phase()) {
                End::Shown
            } else {
                End::NotYet
            },
            on_disk,
            record,
            shown,
            commands,
            released,
            description: None,
            last_seen: None,
            offer: None,
            heard,
            hear,
            following: [Following::default(); 2],
            sides_wait: Default::default(),
            retry_at: Instant::now() + RETRY,
            retry_pause: RETRY,
            source_changed: Instant::now(),
            outcome_since: None,
            timeline,
            before: Vec::new(),
            waits: Waits::default(),
            write_begun: Instant::now(),
            hosts_since: Instant::now(),
        }
    }

    /// Runs until nothing is left to do, or `stop`. `before`: sides of the VM's earlier migrations
    /// that must be released first.
    pub(super) async fn run(mut self, before: Vec<Earlier>, stop: CancellationToken) {
        if self.protocol.phase() == Phase::Pending {
            self.wait(before);
        } else {
            tracing::info!(migration = %self.name(), phase = ?self.protocol.phase(), "a migration is taken up again");
            // Asks for what the stored state still wants, without the patience of a handover that
            // hangs.
            self.retry_at = Instant::now();
        }
        self.last_seen = self.caller.subject.last_seen(&self.context.fleet);
        self.look_for_fences();
        while !self.is_done() {
            self.show();
            let figures = self.figures_deadline();
            let patience = self.patience_deadline();
            let answers = self.next_answer();
            tokio::select! {
                () = stop.cancelled() => break,
                Some(command) = self.commands.recv() => self.command(command),
                Some((side, transfer)) = self.heard.recv() => self.hear_of(side, transfer),
                Some(outcome) = self.tasks.next() => self.ended(outcome),
                () = sleep_until(self.retry_at) => self.retry(),
                () = wait_until(figures) => self.feed(Input::FiguresOverdue),
                () = wait_until(patience) => self.feed(Input::PatienceOver),
                () = wait_until(answers) => {}
            }
            self.show();
            self.give_answers();
        }
        self.tasks.shut_down().await;
        tracing::info!(migration = %self.name(), phase = ?self.protocol.phase(), "a migration is left alone");
    }

    fn name(&self) -> &str {
        &self.record.migration().name
    }

    fn is_done(&self) -> bool {
        self.protocol.finished() && matches!(self.end, End::Shown) && self.replies.is_empty()
    }

    fn wait(&mut self, before: Vec<Earlier>) {
        self.before.clone_from(&before);
        let fleet = Arc::clone(&self.context.fleet);
        let migration = self.record.migration().clone();
        self.tasks.spawn(Work::Wait, async move {
            Outcome::Waited(wait_for(fleet, migration, before).await)
        });
    }

    /// One input and what follows from it at once.
    fn feed(&mut self, input: Input) {
        let actions = self.protocol.step(input);
        self.outcome_since = self
            .protocol
            .awaits_figures()
            .then(|| self.outcome_since.unwrap_or_else(Instant::now));
        for action in actions {
            self.begin(action);
        }
    }

    fn retry(&mut self) {
        self.retry_pause = if has_ended(self.protocol.phase()) {
            (self.retry_pause * 2).min(LONGEST_RETRY)
        } else {
            RETRY
        };
        self.retry_at = Instant::now() + self.retry_pause;
        self.feed(Input::Retry);
    }

    fn figures_deadline(&self) -> Option<Instant> {
        if !self.protocol.awaits_figures() {
            return None;
        }
        let progress = self.record.migration().progress.as_ref();
        let compares = progress
            .is_some_and(|progress| progress.verification() == v1::Verification::Pending)
            || self.protocol.is_silent(Side::Source);
        let patience = if self.protocol.awaits_verdict() && compares {
            FIGURES_VERIFYING
        } else {
            FIGURES
        };
        Some(self.source_changed.max(self.outcome_since?) + patience)
    }

    fn patience_deadline(&self) -> Option<Instant> {
        let patience = self.context.fleet.interval() * HOST_PATIENCE;
        (self.protocol.awaits_hosts() && self.writing.is_none())
            .then(|| self.hosts_since + patience)
    }

    /// A followed side says how it is.
    fn hear_of(&mut self, side: Side, transfer: Box<v1::Transfer>) {
        self.following[side as usize].heard = true;
        let report = report(&transfer);
        self.note(side, transfer);
        self.feed(Input::Heard(side, report));
    }

    /// Keeps a side's figures and texts.
    fn note(&mut self, side: Side, mut transfer: Box<v1::Transfer>) {
        let host = self.caller.subject.host(side);
        self.context.fleet.clocks().side_from(host, &mut transfer);
        let error = transfer.error.clone();
        // Theirs to bound; not believed.
        self.sides_wait[side as usize] = transfer.waiting_for.chars().take(500).collect();
        match side {
            Side::Source => {
                self.source_changed = Instant::now();
                self.record.source_figures(&transfer, &self.timeline.now());
                self.context.history.progress(self.record.migration());
                self.texts.source = error.or(self.texts.source.take());
            }
            Side::Destination => {
                self.record.destination_figures(&transfer);
                self.texts.destination = error.or(self.texts.destination.take());
                let ended = self.record.migration();
                if let Some(known) = ended
                    .error
                    .as_ref()
                    .filter(|_| ended.phase() == Phase::Failed)
                    && let Some(better) = self.texts.better(known.phase(), known)
                {
                    self.record.refine_error(better);
                }
            }
        }
    }

    fn ended(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Waited(Ok(())) => self.feed(Input::Admitted),
            Outcome::Waited(Err(refusal)) => {
                self.texts.refusal = Some(refusal);
                self.feed(Input::Barred);
            }
            Outcome::Stored => self.stored(),
            Outcome::Called(action, ended) => self.called(action, ended),
            Outcome::LookedUp | Outcome::Lost(Work::LookUp) => {
                if let End::Held { looked_up, .. } = &mut self.end {
                    *looked_up = true;
                }
            }
            Outcome::Lost(Work::Store) => self.write(),
            Outcome::Lost(Work::Wait | Work::Call(_)) => {
                // The host's state is not known: it is waited for no longer.
                self.feed(Input::Barred);
            }
        }
    }

    fn called(&mut self, action: Action, ended: Ended) {
        let followed = match action {
            Action::FollowSource => Some(Side::Source),
            Action::FollowDestination => Some(Side::Destination),
            _ => None,
        };
        if let Some(side) = followed {
            // What it heard comes before its end.
            while let Ok((side, transfer)) = self.heard.try_recv() {
                self.hear_of(side, transfer);
            }
            let following = &mut self.following[side as usize];
            following.pause = if following.heard {
                FIRST_PAUSE
            } else {
                longer(following.pause)
            };
        }
        match ended.brought {
            Brought::Nothing => {}
            Brought::Side(side, transfer) => self.note(side, transfer),
            Brought::Description(description) => self.description = Some(description),
            Brought::Offer(offer, transfer) => {
                self.offer = Some(offer);
                self.note(Side::Destination, transfer);
            }
            Brought::Unreleased(side, error) => self.released.of(side).refused(error),
            Brought::Refusal(side, error) => {
                tracing::info!(migration = %self.name(), ?action, %error, "a side does not take part");
                self.texts.refusal = Some((side, error));
            }
        }
        self.feed(Input::Answered(action, ended.answer));
    }

    fn begin(&mut self, action: Action) {
        let caller = self.caller.clone();
        let tasks = &mut self.tasks;
        match action {
            Action::Persist => self.persist(),
            Action::Describe => tasks.call(action, caller.describe()),
            Action::Prepare => {
                let description = self.description.clone().unwrap_or_default();
                tasks.call(action, caller.prepare(*description));
            }
            Action::Start => match self.offer.clone() {
                Some(offer) => {
                    let migration = self.record.migration();
                    let (source, destination) = (&migration.source, &migration.destination);
                    let remembered = self.context.pairs.of(source, destination);
                    tasks.call(action, caller.start(offer, remembered));
                }
                // Start follows a Prepare of this life.
                None => tasks.call(action, ready(Ended::with(Answer::Silent))),
            },
            Action::FollowSource => self.follow(action, Side::Source),
            Action::FollowDestination => self.follow(action, Side::Destination),
            Action::CancelSource => tasks.call(action, caller.cancel(Side::Source, None)),
            Action::FailSource => {
                let error = Some(self.error_for_source());
                self.tasks.call(action, caller.cancel(Side::Source, error));
            }
            Action::CancelDestination => {
                let error = self.record.migration().error.clone();
                tasks.call(action, caller.cancel(Side::Destination, error));
            }
            Action::ResolveCommit => {
                let ground = self.ground();
                self.tasks
                    .call(action, caller.resolve(Decision::Commit, ground));
            }
            Action::ResolveAbort => {
                tasks.call(action, caller.resolve(Decision::Abort, JOURNAL.to_owned()));
            }
            Action::AskSourceCopy => tasks.call(action, caller.ask_source_copy()),
            Action::ReleaseSource => tasks.call(action, caller.release(Side::Source)),
            Action::ReleaseDestination => tasks.call(action, caller.release(Side::Destination)),
        }
    }

    fn follow(&mut self, action: Action, side: Side) {
        let following = &mut self.following[side as usize];
        following.heard = false;
        let (pause, out) = (following.pause, self.hear.clone());
        self.tasks
            .call(action, follow(self.caller.clone(), side, pause, out));
    }

    /// Brings the record to the protocol's state and begins to store it.
    fn persist(&mut self) {
        let durable = self.protocol.durable();
        let before = self.record.migration().phase();
        let knew_commit = self.record.durable().committed;
        let error = self.protocol.cause().and_then(|cause| {
            let subject = &self.caller.subject;
            self.texts.error(cause, before, durable.location, subject)
        });
        self.record.apply(&durable, error, &self.timeline.now());
        // A fenced source may tell after the end that it had handed the VM over.
        if !has_ended(before) || !knew_commit {
            self.bury(&durable);
        }
        self.retry_pause = RETRY;
        self.retry_at = Instant::now() + RETRY;
        tracing::info!(
            migration = %self.name(),
            phase = ?durable.phase,
            vm_location = ?durable.location,
            "migration"
        );
        self.writing = Some(self.record.migration().clone());
        self.write_begun = Instant::now();
        self.write();
    }

    /// A VM that was handed over and died at both ends is in no agent's report any more. Kept
    /// before the end is stored, so that no crash loses it between the two.
    fn bury(&mut self, durable: &Durable) {
        let handed_over = durable.committed && durable.phase == Phase::Failed;
        if handed_over && durable.location == v1::VmLocation::Lost {
            let subject = &self.caller.subject;
            let last = self.last_seen.take().unwrap_or_default();
            self.context.fleet.bury(subject.lost(last));
        }
    }

    /// Does not end before the record is on disk.
    fn write(&mut self) {
        let stored = self.record.to_stored();
        let store = self.context.store.clone();
        let migration = self.name().to_owned();
        let ended = has_ended(self.record.migration().phase());
        let fleet = Arc::clone(&self.context.fleet);
        self.tasks.spawn(Work::Store, async move {
            if ended {
                // What is kept of a lost VM comes first; a disk that fails is waited for below.
                drop(fleet.settled().await);
            }
            loop {
                let stored = stored.clone();
                match store.with(move |store| store.put_migration(&stored)).await {
                    Ok(()) => return Outcome::Stored,
                    Err(error) => {
                        tracing::error!(%migration, %error, "a migration waits for the store");
                        sleep(RETRY).await;
                    }
                }
            }
        });
    }

    fn stored(&mut self) {
        if let Some(written) = self.writing.take() {
            self.on_disk = written;
        }
        self.feed(Input::Stored);
        let stored = self.protocol.stored();
        if stored.source_released {
            self.released.source.set();
        }
        if stored.destination_released {
            self.released.destination.set();
        }
        if has_ended(stored.phase) && matches!(self.end, End::NotYet) {
            let hold = if stored.phase == Phase::Completed {
                HOLD_COMPLETED
            } else {
                HOLD
            };
            self.end = End::Held {
                until: Instant::now() + hold,
                looked_up: false,
            };
            metrics::migration_ended(&self.on_disk);
            self.context.pairs.learn(&self.on_disk);
            // Handed over, it is there, alive or LOST.
            let handed_over = stored.phase == Phase::Completed;
            let last = || self.last_seen.clone().unwrap_or_default();
            let arrived = handed_over.then(|| self.caller.subject.arrived(last(), stored.location));
            let look = self.caller.clone().look_up(arrived);
            self.tasks.spawn(Work::LookUp, async move {
                look.await;
                Outcome::LookedUp
            });
        }
    }

    /// Whether an attempt to release a side is under way.
    fn is_cleaning_up(&self) -> bool {
        [
            Action::CancelDestination,
            Action::ResolveAbort,
            Action::ReleaseSource,
            Action::ReleaseDestination,
        ]
        .into_iter()
        .any(|action| self.protocol.is_in_flight(action))
    }

    /// Shows what is on disk, with the newest figures. See the module.
    fn show(&mut self) {
        if let End::Held { until, looked_up } = self.end {
            let cleaned = looked_up && !self.is_cleaning_up();
            if !cleaned && Instant::now() < until {
                return;
            }
            self.end = End::Shown;
        }
        self.look_at_waits();
        let migration = if self.writing.is_none() {
            self.record.migration()
        } else {
            &self.on_disk
        };
        self.shown.send_if_modified(|shown| {
            let changed = shown != migration;
            if changed {
                shown.clone_from(migration);
            }
            changed
        });
    }

    /// What it waits for is shown at once, and is no part of what must be on disk.
    fn look_at_waits(&mut self) {
        let migration = self.record.migration();
        let standing = Waiting {
            subject: &self.caller.subject,
            protocol: &self.protocol,
            before: &self.before,
            populated: populated(migration.populated_bytes, migration.progress.as_ref()),
            sides: [&self.sides_wait[0], &self.sides_wait[1]],
            disk_hangs: self.writing.is_some() && self.write_begun.elapsed() >= RETRY,
        };
        self.waits.update(standing, &self.timeline.now());
        let (words, since) = (self.waits.words(), self.waits.since());
        self.record.set_waiting(words, since);
        words.clone_into(&mut self.on_disk.waiting_for);
        self.on_disk.waiting_since = since;
        // A better reason changes nothing that was decided; the release of the sides stores it.
        if self.on_disk.phase() == Phase::Failed {
            let ended = self.record.migration();
            self.on_disk.error.clone_from(&ended.error);
        }
    }
}

/// Sleeps until `deadline`; for ever without one.
async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
