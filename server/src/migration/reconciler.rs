//! Carries one migration out: feeds the machine, stores what it says, does what it asks for.
//!
//! One task owns everything of one migration: machine, record, the ticket, the followers of both halves. Nothing is shared
//! but the watch channel it publishes through, so there is no lock here. Each state is stored before the action that
//! assumes it is taken; every action is idempotent; so a crash at any line is repaired by starting again from the record.
//!
//! Terminal phases are published after the first attempt to release both halves and after the VM was looked up where it is
//! now: who sees COMPLETED finds the VM at its new host and may migrate it again. They are *stored* before that attempt.
//!
//! The ticket lives in this task's memory alone. After a restart PrepareIncoming is asked again (it is idempotent).

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    v1::{
        self, TransferRole as Role, memory_service_client::MemoryServiceClient,
        resolve_transfer_request::Decision, transfer_service_client::TransferServiceClient,
        vm_service_client::VmServiceClient,
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    follower::{ASK, HalfOf, Heard, News, ask, follow, is_gone, is_silence},
    is_terminal,
    machine::{Action, Input, Machine},
    record::{Record, report},
};
use crate::{
    dashboard::History,
    fleet::{Fleet, host_unreachable},
    metrics,
    store::Shelf,
};

/// PrepareIncoming maps the VM's memory and starts its process.
const PREPARE: Duration = Duration::from_secs(30);
const START: Duration = Duration::from_secs(10);
/// What is still wanted is asked for again this often.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// How long the source's last figures are waited for once the outcome is known, after its last change.
const FIGURES: Duration = Duration::from_secs(5);
/// The same when it still compares digests.
const FIGURES_VERIFYING: Duration = Duration::from_secs(120);

/// What the rest of the server asks of a reconciler.
#[derive(Debug)]
pub(super) enum Command {
    /// CancelMigration, with where the answer goes.
    Cancel(oneshot::Sender<Result<v1::Migration, ApiError>>),
    /// DeleteVm of a VM whose last copy is kept at the source, with where the answer goes.
    DeleteKept(oneshot::Sender<Result<(), ApiError>>),
}

/// Says to others that a migration's halves are released; each is cancelled when its half is.
#[derive(Clone, Debug, Default)]
pub(super) struct Released {
    pub(super) source: CancellationToken,
    pub(super) destination: CancellationToken,
}

/// A half of an earlier migration of the VM, on a host that a new one uses.
#[derive(Clone, Debug)]
pub(super) struct Earlier {
    pub(super) migration: String,
    pub(super) host: String,
    pub(super) role: Role,
    pub(super) released: CancellationToken,
}

/// What every reconciler needs.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) fleet: Arc<Fleet>,
    pub(super) shelf: Shelf,
    pub(super) history: Arc<History>,
}

/// How many report intervals a host that holds an earlier half may be unreachable before a new migration gives up on it.
/// After a server's restart that is the time its agents have to come back.
const HOST_PATIENCE: u32 = 10;

/// How long the source's agent may take to notice that a VM's process has ended.
const EXPLAIN: Duration = Duration::from_secs(2);

/// What the source needs to reach the destination. Never printed.
struct Grant {
    data_address: String,
    ticket: Vec<u8>,
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("data_address", &self.data_address)
            .finish_non_exhaustive()
    }
}

/// See the module.
pub(super) struct Reconciler {
    context: Context,
    machine: Machine,
    record: Record,
    shown: watch::Sender<v1::Migration>,
    commands: mpsc::Receiver<Command>,
    released: Released,
    grant: Option<Grant>,
    heard: mpsc::Receiver<News>,
    hear: mpsc::Sender<News>,
    /// When each half was last heard of, source first.
    seen: [Option<Instant>; 2],
    followers: JoinSet<()>,
    following: [bool; 2],
    retry_at: Instant,
    retry_pause: Duration,
    source_changed: Instant,
}

impl Reconciler {
    pub(super) fn new(
        context: Context,
        record: Record,
        shown: watch::Sender<v1::Migration>,
        commands: mpsc::Receiver<Command>,
        released: Released,
    ) -> Self {
        let (hear, heard) = mpsc::channel(64);
        Self {
            machine: Machine::new(&record.durable()),
            context,
            record,
            shown,
            commands,
            released,
            grant: None,
            heard,
            hear,
            seen: [None; 2],
            followers: JoinSet::new(),
            following: [false; 2],
            retry_at: Instant::now() + RETRY,
            retry_pause: RETRY,
            source_changed: Instant::now(),
        }
    }

    /// Runs until nothing is left to do. `before`: halves of the VM's earlier migrations that must be released first.
    pub(super) async fn run(mut self, before: Vec<Earlier>) {
        if self.machine.phase() == v1::MigrationPhase::Pending {
            if !self.wait_for(before).await {
                return;
            }
            self.feed(Input::Begin).await;
        } else {
            tracing::info!(migration = %self.name(), phase = ?self.machine.phase(), "a migration is taken up again");
            // Asks for what the stored state still wants, without the patience of a handover that hangs.
            self.retry_at = Instant::now();
        }
        while !self.machine.finished() {
            self.spawn_followers();
            let figures = self.figures_deadline();
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return,
                },
                Some(news) = self.heard.recv() => self.take(news).await,
                () = sleep_until(self.retry_at) => {
                    self.retry_pause = if is_terminal(self.machine.phase()) {
                        (self.retry_pause * 2).min(LONGEST_RETRY)
                    } else {
                        RETRY
                    };
                    self.retry_at = Instant::now() + self.retry_pause;
                    self.feed(Input::Retry).await;
                }
                () = wait_until(figures) => self.feed(Input::FiguresOverdue).await,
            }
        }
        tracing::info!(migration = %self.name(), phase = ?self.machine.phase(), "a migration is done with");
    }

    fn name(&self) -> &str {
        &self.record.migration().name
    }

    /// Waits for earlier migrations' halves to be released, no longer than their hosts can be reached; false when the
    /// server stops.
    async fn wait_for(&mut self, before: Vec<Earlier>) -> bool {
        let interval = self.context.fleet.interval();
        for earlier in before {
            let mut reachable = Instant::now();
            while !earlier.released.is_cancelled() {
                tokio::select! {
                    () = earlier.released.cancelled() => {}
                    () = sleep(interval) => match self.context.fleet.ready_host(&earlier.host) {
                        Ok(_) => reachable = Instant::now(),
                        Err(error) if reachable.elapsed() >= interval * HOST_PATIENCE => {
                            self.give_up_waiting(&earlier, error).await;
                        }
                        Err(_) => {}
                    },
                    command = self.commands.recv() => match command {
                        Some(command) => self.command(command).await,
                        None => return false,
                    },
                }
                if is_terminal(self.machine.phase()) {
                    return true;
                }
            }
        }
        true
    }

    async fn give_up_waiting(&mut self, earlier: &Earlier, cause: ApiError) {
        let side = if earlier.host == self.record.migration().source {
            "source"
        } else {
            "destination"
        };
        let mut error = ApiError::new(
            Reason::HostUnreachable,
            format!(
                "{} does not answer and still has its half of {}, an earlier migration of {}",
                earlier.host,
                earlier.migration,
                self.record.migration().vm
            ),
        )
        .with("host", &earlier.host)
        .with("migration", &earlier.migration)
        .with("role", earlier.role.as_str_name());
        if let Some(advice) = cause.metadata.get("advice") {
            error = error.with("advice", advice);
        }
        self.feed(Input::PrepareFailed {
            error,
            side,
            unreachable: false,
        })
        .await;
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Cancel(reply) => {
                self.feed(Input::CancelRequested).await;
                let answer = if self.machine.committed() {
                    Err(past_point(self.record.migration()))
                } else {
                    Ok(self.record.migration().clone())
                };
                // Who asked may have gone; the cancel stands.
                drop(reply.send(answer));
            }
            Command::DeleteKept(reply) => {
                let kept = self.machine.keeps_source();
                self.feed(Input::DeleteRequested).await;
                let migration = self.record.migration();
                let answer = if self.machine.source_released() {
                    Ok(())
                } else if kept {
                    Err(host_unreachable(&migration.source)
                        .with("vm", &migration.vm)
                        .with("migration", &migration.name)
                        .with(
                            "advice",
                            "the frozen copy is still kept there; delete the VM again when its agent answers",
                        ))
                } else {
                    Err(ApiError::no_such_vm(&migration.vm))
                };
                drop(reply.send(answer));
            }
        }
    }

    fn half(&self, role: Role) -> HalfOf {
        let migration = self.record.migration();
        HalfOf {
            migration: migration.name.clone(),
            vm: migration.vm.clone(),
            epoch: migration.epoch,
            host: match role {
                Role::Source => migration.source.clone(),
                _ => migration.destination.clone(),
            },
            role,
        }
    }

    fn spawn_followers(&mut self) {
        let wanted = [
            (Role::Source, self.machine.source_exists()),
            (Role::Destination, self.machine.destination_exists()),
        ];
        for (index, (role, exists)) in wanted.into_iter().enumerate() {
            if exists && !self.following[index] {
                self.following[index] = true;
                let half = self.half(role);
                let fleet = Arc::clone(&self.context.fleet);
                self.followers.spawn(follow(fleet, half, self.hear.clone()));
            }
        }
    }

    fn figures_deadline(&self) -> Option<Instant> {
        if !self.machine.awaits_figures() {
            return None;
        }
        let patience = if self.machine.awaits_verdict() {
            FIGURES_VERIFYING
        } else {
            FIGURES
        };
        Some(self.source_changed + patience)
    }

    async fn take(&mut self, (role, asked, heard): News) {
        // Asked before the half was last heard of, for instance while it was being started: it is there by now. Whoever
        // follows it asks again.
        let stale = matches!(heard, Heard::Absent { .. })
            && self.seen[seat(role)].is_some_and(|seen| asked <= seen);
        if stale {
            tracing::debug!(migration = %self.name(), ?role, "an absence that is no longer true");
            return;
        }
        let input = self.input(role, heard);
        self.feed(input).await;
    }

    /// Keeps a half's figures and makes its input.
    fn input(&mut self, role: Role, heard: Heard) -> Input {
        if matches!(heard, Heard::Half(_)) {
            self.seen[seat(role)] = Some(Instant::now());
        }
        match (role, heard) {
            (Role::Source, Heard::Half(half)) => {
                self.source_changed = Instant::now();
                self.record.source_figures(&half);
                self.context.history.progress(self.record.migration());
                Input::SourceReport(report(&half))
            }
            (_, Heard::Half(half)) => {
                self.record.destination_figures(&half);
                Input::DestinationReport(report(&half))
            }
            (Role::Source, Heard::Silent) => Input::SourceUnreachable,
            (_, Heard::Silent) => Input::DestinationUnreachable,
            (Role::Source, Heard::Absent { owner }) => Input::SourceAbsent { owner },
            (_, Heard::Absent { .. }) => Input::DestinationAbsent,
        }
    }

    /// One input and everything that follows from it.
    async fn feed(&mut self, input: Input) {
        let was_terminal = is_terminal(self.machine.phase());
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for action in self.machine.step(input) {
                let answer = self.act(action).await;
                inputs.extend(answer);
            }
            self.publish(false);
        }
        if is_terminal(self.machine.phase()) {
            if !was_terminal {
                self.find_vm().await;
                metrics::migration_ended(self.record.migration());
            }
            self.publish(true);
        }
        if self.machine.source_released() {
            self.released.source.cancel();
        }
        if self.machine.destination_released() {
            self.released.destination.cancel();
        }
    }

    /// Shows the record. A terminal one is held back until `clean_up_tried`.
    fn publish(&self, clean_up_tried: bool) {
        let migration = self.record.migration();
        if is_terminal(migration.phase()) && !clean_up_tried {
            return;
        }
        self.shown.send_if_modified(|shown| {
            let changed = shown != migration;
            if changed {
                shown.clone_from(migration);
            }
            changed
        });
    }

    async fn act(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Persist => {
                self.persist().await;
                None
            }
            Action::Prepare => Some(self.prepare().await),
            Action::Start => Some(self.start().await),
            Action::CancelSource => Some(self.cancel(Role::Source, None).await),
            Action::FailSource => {
                let error = destination_lost(self.machine.phase());
                Some(self.cancel(Role::Source, Some(error)).await)
            }
            Action::CancelDestination => {
                let error = self.record.migration().error.clone();
                Some(self.cancel(Role::Destination, error).await)
            }
            Action::ResolveCommit => Some(self.resolve(Decision::Commit).await),
            Action::ResolveAbort => Some(self.resolve(Decision::Abort).await),
            Action::AskSourceCopy => {
                let migration = self.record.migration();
                let gone = is_gone(&self.context.fleet, &migration.source, &migration.vm).await;
                Some(Input::SourceCopy { gone })
            }
            Action::ReleaseSource => self.release(Role::Source).await,
            Action::ReleaseDestination => self.release(Role::Destination).await,
        }
    }

    /// Stores the machine's state. Does not return before it is on disk: nothing may be done on a state that is not.
    async fn persist(&mut self) {
        self.record.apply(&self.machine.durable());
        self.retry_pause = RETRY;
        self.retry_at = Instant::now() + RETRY;
        tracing::info!(
            migration = %self.name(),
            phase = ?self.machine.phase(),
            vm_location = ?self.record.migration().vm_location(),
            "migration"
        );
        loop {
            let stored = self.record.to_stored();
            match self
                .context
                .shelf
                .with(move |store| store.put_migration(&stored))
                .await
            {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(migration = %self.name(), %error, "a migration waits for the store");
                    sleep(RETRY).await;
                }
            }
        }
    }

    fn transfers(
        &self,
        role: Role,
    ) -> Result<TransferServiceClient<slat_proto::transport::TracedChannel>, ApiError> {
        let host = self.half(role).host;
        Ok(TransferServiceClient::new(
            self.context.fleet.channel(&host)?,
        ))
    }

    async fn prepare(&mut self) -> Input {
        match self.try_prepare().await {
            Ok(grant) => {
                self.grant = Some(grant);
                self.seen[seat(Role::Destination)] = Some(Instant::now());
                Input::PrepareAnswered
            }
            Err((side, error)) => {
                let error = if side == "source" && error.reason == Reason::VmUnreachable {
                    self.explained(error).await
                } else {
                    error
                };
                Input::PrepareFailed {
                    side,
                    unreachable: is_silence(&error),
                    error,
                }
            }
        }
    }

    /// Of a source whose process did not answer: whether it is gone. Its agent needs a moment to find out.
    async fn explained(&self, error: ApiError) -> ApiError {
        let half = self.half(Role::Source);
        let begin = Instant::now();
        while begin.elapsed() < EXPLAIN {
            match half.ask_for_vm(&self.context.fleet).await {
                Heard::Absent { owner: false } => return error.with("state", "LOST"),
                Heard::Absent { owner: true } | Heard::Half(_) => break,
                Heard::Silent => sleep(EXPLAIN / 20).await,
            }
        }
        error
    }

    async fn try_prepare(&self) -> Result<Grant, (&'static str, ApiError)> {
        let at_source = |error| ("source", error);
        let at_destination = |error| ("destination", error);
        let migration = self.record.migration();
        let fleet = &self.context.fleet;
        let source = fleet.channel(&migration.source).map_err(at_source)?;
        let name = migration.vm.clone();
        let mut vms = VmServiceClient::new(source.clone());
        let vm = ask(ASK, vms.get_vm(v1::GetVmRequest { name: name.clone() }))
            .await
            .map_err(at_source)?;
        if vm.epoch != migration.epoch {
            let error = ApiError::new(
                Reason::StaleEpoch,
                format!(
                    "{name} has epoch {} at {}, not {}",
                    vm.epoch, migration.source, migration.epoch
                ),
            )
            .with("vm", &name)
            .with("epoch", vm.epoch);
            return Err(at_source(error));
        }
        let mut memory = MemoryServiceClient::new(source);
        let slots = ask(ASK, memory.list_slots(v1::ListSlotsRequest { vm: name }))
            .await
            .map_err(at_source)?
            .slots;
        let request = v1::PrepareIncomingRequest {
            migration: migration.name.clone(),
            vm: Some(vm),
            slots,
            params: migration.params,
            source_agent_address: fleet.host(&migration.source).map_err(at_source)?.address,
            preamble: None,
        };
        let mut transfers = self.transfers(Role::Destination).map_err(at_destination)?;
        let answer = ask(PREPARE, transfers.prepare_incoming(request))
            .await
            .map_err(at_destination)?;
        Ok(Grant {
            data_address: answer.data_address,
            ticket: answer.ticket,
        })
    }

    async fn start(&mut self) -> Input {
        let migration = self.record.migration();
        let half = self.half(Role::Source);
        let Some(grant) = &self.grant else {
            // Start follows PrepareAnswered in this life; without it there is nothing to say yet.
            return Input::SourceUnreachable;
        };
        let request = v1::StartOutgoingRequest {
            migration: migration.name.clone(),
            vm: migration.vm.clone(),
            data_address: grant.data_address.clone(),
            ticket: grant.ticket.clone(),
            params: migration.params,
            epoch: migration.epoch,
            versions: None,
        };
        let answer = match self.transfers(Role::Source) {
            Ok(mut transfers) => ask(START, transfers.start_outgoing(request)).await,
            Err(error) => Err(error),
        };
        let fleet = Arc::clone(&self.context.fleet);
        match answer {
            Ok(transfer) => self.input(Role::Source, Heard::Half(Box::new(transfer))),
            Err(error) if is_silence(&error) => Input::SourceUnreachable,
            Err(error) => {
                // A refusal counts only when there is no half: an earlier call may have begun it.
                match half.get(&fleet).await {
                    Heard::Absent { .. } => Input::StartFailed(error),
                    heard => self.input(Role::Source, heard),
                }
            }
        }
    }

    async fn cancel(&mut self, role: Role, error: Option<v1::MigrationError>) -> Input {
        let half = self.half(role);
        let request = v1::CancelTransferRequest {
            migration: half.migration.clone(),
            role: role.into(),
            error,
        };
        let answer = match self.transfers(role) {
            Ok(mut transfers) => ask(ASK, transfers.cancel_transfer(request)).await,
            Err(error) => Err(error),
        };
        self.after(&half, answer).await
    }

    async fn resolve(&mut self, decision: Decision) -> Input {
        let half = self.half(Role::Destination);
        tracing::info!(migration = %half.migration, ?decision, "a destination in doubt is told");
        let request = v1::ResolveTransferRequest {
            migration: half.migration.clone(),
            decision: decision.into(),
        };
        let answer = match self.transfers(Role::Destination) {
            Ok(mut transfers) => ask(ASK, transfers.resolve_transfer(request)).await,
            Err(error) => Err(error),
        };
        self.after(&half, answer).await
    }

    /// What an answer, or a refusal, says of the half it was asked of.
    async fn after(&mut self, half: &HalfOf, answer: Result<v1::Transfer, ApiError>) -> Input {
        let fleet = Arc::clone(&self.context.fleet);
        let heard = match answer {
            Err(error) if !is_silence(&error) && error.reason != Reason::NoSuchMigration => {
                tracing::info!(migration = %half.migration, host = %half.host, %error, "a half refuses");
                half.get(&fleet).await
            }
            answer => half.hear(&fleet, answer).await,
        };
        self.input(half.role, heard)
    }

    async fn release(&mut self, role: Role) -> Option<Input> {
        let half = self.half(role);
        let request = v1::ReleaseTransferRequest {
            migration: half.migration.clone(),
            role: role.into(),
        };
        let answer = match self.transfers(role) {
            Ok(mut transfers) => ask(ASK, transfers.release_transfer(request)).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(_) => {}
            Err(error) if error.reason == Reason::NoSuchMigration => {}
            Err(error) => {
                tracing::info!(migration = %half.migration, host = %half.host, %error, "a half is not released yet");
                return None;
            }
        }
        Some(if half.is_source() {
            Input::SourceReleased
        } else {
            Input::DestinationReleased
        })
    }

    /// Looks the VM up where it is now, so that the fleet knows before the outcome is published.
    async fn find_vm(&mut self) {
        let migration = self.record.migration().clone();
        let fleet = &self.context.fleet;
        let completed = migration.vm_location() == v1::VmLocation::Destination;
        let host = if completed {
            &migration.destination
        } else {
            &migration.source
        };
        let Ok(channel) = fleet.channel(host) else {
            return;
        };
        let request = v1::GetVmRequest {
            name: migration.vm.clone(),
        };
        // Nobody answering is no failure here: the next report tells.
        if let Ok(vm) = ask(ASK, VmServiceClient::new(channel).get_vm(request)).await {
            if completed {
                fleet.raise_epoch(&vm.uid, migration.epoch + 1);
                fleet.forget(&migration.source, &migration.vm);
            } else {
                fleet.forget(&migration.destination, &migration.vm);
            }
            fleet.observe(host, vm);
        }
    }
}

/// The refusal of a cancel that comes too late.
pub(super) fn past_point(migration: &v1::Migration) -> ApiError {
    ApiError::new(
        Reason::PastPointOfNoReturn,
        format!(
            "{} is past the point of no return: {} goes to {}",
            migration.name, migration.vm, migration.destination
        ),
    )
    .with("migration", &migration.name)
    .with("vm", &migration.vm)
    .with("phase", migration.phase().as_str_name())
    .with("vm_location", "DESTINATION")
    .with("advice", "migrate it back when it has arrived")
}

fn destination_lost(phase: v1::MigrationPhase) -> v1::MigrationError {
    ApiError::new(
        Reason::ConnectionLost,
        "the destination's half ended; the VM runs on at the source",
    )
    .with(
        "advice",
        "see the destination host's log, then migrate again",
    )
    .to_migration_error(phase, "destination")
}

/// Where a half's things stand in pairs.
fn seat(role: Role) -> usize {
    usize::from(role != Role::Source)
}

/// Sleeps until `deadline`; for ever without one.
async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
