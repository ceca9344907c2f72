//! Carries one action out: a call to an agent, within its time limit, and what its answer means.
//!
//! Nothing here decides. What comes back is the protocol's [`Answer`], and beside it what the
//! protocol has no use for: figures, texts, the description of the VM, the ticket.

use std::{fmt, sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::{now, to_own_clock},
    transport::TracedChannel,
    v1::{
        self, resolve_transfer_request::Decision, transfer_service_client::TransferServiceClient,
    },
};
use tokio::time::{Instant, sleep};

use super::{
    leave::{Leave, channel_key, is_behind},
    protocol::{Answer, Side},
    record::report,
    subject::{ASK, Found, Subject, ask, at_host, is_silence, role, side_name},
};
use crate::{fleet::Fleet, grants::Grants};

/// What a decision stands on that a journal is behind.
pub(super) const JOURNAL: &str = "journal";

/// PrepareIncoming maps the VM's memory and starts its process.
const PREPARE: Duration = Duration::from_secs(30);
const START: Duration = Duration::from_secs(10);
/// How long an agent may take to register after its start, and to hear of a new key.
const BEHIND: Duration = Duration::from_secs(5);
/// How long the source's agent may take to notice that a VM's process has ended.
const EXPLAIN: Duration = Duration::from_secs(2);

/// What the source needs to reach the destination. Never printed.
#[derive(Clone)]
pub(super) struct Offer {
    data_address: String,
    ticket: Vec<u8>,
    versions: v1::ChosenVersions,
    channel: i32,
    /// Of the page streams, as both ends' agents vouch for them.
    keys: [[u8; 32]; 2],
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer")
            .field("data_address", &self.data_address)
            .field("versions", &self.versions)
            .finish_non_exhaustive()
    }
}

/// What an answer brought along.
#[derive(Debug)]
pub(super) enum Brought {
    Nothing,
    Side(Side, Box<v1::Transfer>),
    Description(Box<v1::DescribeOutgoingResponse>),
    Offer(Offer, Box<v1::Transfer>),
    /// Who refused, or did not answer.
    Refusal(Side, ApiError),
    /// A side that was not released, and why.
    Unreleased(Side, ApiError),
}

/// How a call ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) answer: Answer,
    pub(super) brought: Brought,
}

impl Ended {
    pub(super) fn with(answer: Answer) -> Self {
        Self {
            answer,
            brought: Brought::Nothing,
        }
    }

    fn found(side: Side, found: Found) -> Self {
        match found {
            Found::Side(transfer) => Self {
                answer: Answer::Side(report(&transfer)),
                brought: Brought::Side(side, transfer),
            },
            Found::Absent { owner } => Self::with(Answer::Absent { owner }),
            Found::Silent => Self::with(Answer::Silent),
        }
    }

    fn refused(subject: &Subject, side: Side, error: ApiError) -> Self {
        let lost = side == Side::Source && says_lost(&error);
        let answer = if is_silence(&error) && !lost {
            Answer::Silent
        } else {
            Answer::Refused { lost }
        };
        Self {
            answer,
            brought: Brought::Refusal(side, at_host(subject.host(side), error)),
        }
    }
}

/// Whether the source's host says that the VM is gone: its agent keeps it as LOST, or has no VM of
/// that uid.
fn says_lost(error: &ApiError) -> bool {
    matches!(error.reason, Reason::VmProcessDied | Reason::NoSuchVm)
        || error
            .metadata
            .get("state")
            .is_some_and(|state| state == "LOST")
}

type Transfers = TransferServiceClient<TracedChannel>;

/// The way to the agents for one migration.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) fleet: Arc<Fleet>,
    pub(super) grants: Arc<Grants>,
    pub(super) subject: Arc<Subject>,
}

impl Caller {
    /// DescribeOutgoing.
    pub(super) async fn describe(self) -> Ended {
        match self.try_describe().await {
            Ok(description) => Ended {
                answer: Answer::Done,
                brought: Brought::Description(Box::new(description)),
            },
            Err(error) if error.reason == Reason::VmUnreachable => {
                Ended::refused(&self.subject, Side::Source, self.explained(error).await)
            }
            Err(error) => Ended::refused(&self.subject, Side::Source, error),
        }
    }

    async fn try_describe(&self) -> Result<v1::DescribeOutgoingResponse, ApiError> {
        let subject = &self.subject;
        let request = v1::DescribeOutgoingRequest {
            migration: subject.migration.clone(),
            vm: subject.vm.clone(),
            vm_uid: subject.vm_uid.clone(),
            epoch: subject.epoch,
        };
        let mut transfers = subject.transfers(&self.fleet, Side::Source)?;
        let answer = ask(ASK, transfers.describe_outgoing(request)).await;
        let mut description = answer.map_err(|error| self.if_too_old(Side::Source, error))?;
        if let Some(vm) = &mut description.vm {
            to_own_clock(&mut vm.create_time, description.send_time.as_ref());
        }
        let (Some(vm), true) = (&description.vm, description.preamble.is_some()) else {
            return Err(self.too_old(Side::Source));
        };
        if !subject.vm_uid.is_empty() && vm.uid != subject.vm_uid {
            // An agent that knows names only described another VM of that name.
            return Err(ApiError::no_such_vm(&subject.vm)
                .with("uid", &subject.vm_uid)
                .with("found_uid", &vm.uid));
        }
        Ok(description)
    }

    /// Of a source whose process did not answer: whether it is gone. Its agent needs a moment to
    /// find out.
    async fn explained(&self, error: ApiError) -> ApiError {
        let begin = Instant::now();
        while begin.elapsed() < EXPLAIN {
            match self.subject.find_vm(&self.fleet).await {
                Found::Absent { owner: false } => return error.with("state", "LOST"),
                Found::Absent { owner: true } | Found::Side(_) => break,
                Found::Silent => sleep(EXPLAIN / 20).await,
            }
        }
        error
    }

    /// What a dry run asks: whether the destination would take the VM, as its source describes it.
    /// Reserves nothing.
    ///
    /// # Errors
    /// As DescribeOutgoing and PrepareIncoming refuse.
    pub(super) async fn compare(&self) -> Result<(), ApiError> {
        let at = |side, error| at_host(self.subject.host(side), error);
        let description = self.try_describe().await;
        let description = description.map_err(|error| at(Side::Source, error))?;
        let request = self.announcement(description, true)?;
        let mut transfers = self.subject.transfers(&self.fleet, Side::Destination)?;
        let answer = ask(ASK, transfers.prepare_incoming(request)).await;
        let answer = answer.map_err(|error| at(Side::Destination, error))?;
        // One that does not know of dry runs would have made a side.
        if answer.transfer.is_some() {
            let ended = self.clone().cancel(Side::Destination, None).await;
            tracing::warn!(host = %self.subject.destination, ?ended, "an agent took a dry run for a migration");
            self.clone().release(Side::Destination).await;
        }
        Ok(())
    }

    /// PrepareIncoming, with what the source said of itself.
    pub(super) async fn prepare(self, description: v1::DescribeOutgoingResponse) -> Ended {
        match self.try_prepare(description).await {
            Ok((offer, transfer)) => Ended {
                answer: Answer::Side(report(&transfer)),
                brought: Brought::Offer(offer, Box::new(transfer)),
            },
            Err(error) => Ended::refused(&self.subject, Side::Destination, error),
        }
    }

    async fn try_prepare(
        &self,
        description: v1::DescribeOutgoingResponse,
    ) -> Result<(Offer, v1::Transfer), ApiError> {
        let source_key = channel_key(&description.channel_key)?;
        let request = self.announcement(description, false)?;
        let sign = || {
            let grant = self.leave().receive(source_key)?;
            Ok(v1::PrepareIncomingRequest {
                grant: Some(grant),
                send_time: Some(now()),
                ..request.clone()
            })
        };
        let send = |mut transfers: Transfers, request| async move {
            ask(PREPARE, transfers.prepare_incoming(request)).await
        };
        let answer = self.leaving(Side::Destination, sign, send).await?;
        // An agent that knows no preamble compared nothing.
        let Some(versions) = answer.versions else {
            return Err(self.too_old(Side::Destination));
        };
        let offer = Offer {
            data_address: answer.data_address,
            ticket: answer.ticket,
            versions,
            channel: answer.channel,
            keys: [source_key, channel_key(&answer.channel_key)?],
        };
        Ok((offer, answer.transfer.unwrap_or_default()))
    }

    /// The request for an empty VM at the destination.
    fn announcement(
        &self,
        description: v1::DescribeOutgoingResponse,
        validate_only: bool,
    ) -> Result<v1::PrepareIncomingRequest, ApiError> {
        let subject = &self.subject;
        Ok(v1::PrepareIncomingRequest {
            migration: subject.migration.clone(),
            vm: description.vm,
            slots: description.slots,
            params: subject.params,
            source_agent_address: self.fleet.host(&subject.source)?.address,
            preamble: description.preamble,
            send_time: Some(now()),
            validate_only,
            ..Default::default()
        })
    }

    fn if_too_old(&self, side: Side, error: ApiError) -> ApiError {
        if error.reason == Reason::NoSuchMethod {
            self.too_old(side)
        } else {
            error
        }
    }

    fn too_old(&self, side: Side) -> ApiError {
        let host = self.subject.host(side);
        ApiError::new(
            Reason::StateVersionUnsupported,
            format!("the agent of {host} is too old: it cannot say which versions it speaks"),
        )
        .with("host", host)
        .with("side", side_name(side))
        .with("differs", "preamble")
        .with("advice", format_args!("upgrade the agent of {host}"))
    }

    /// StartOutgoing, with what the destination said and what is remembered of the two hosts.
    pub(super) async fn start(
        self,
        offer: Offer,
        remembered: Option<v1::RememberedCosts>,
    ) -> Ended {
        let subject = &self.subject;
        let request = v1::StartOutgoingRequest {
            migration: subject.migration.clone(),
            vm: subject.vm.clone(),
            data_address: offer.data_address,
            ticket: offer.ticket,
            params: subject.params,
            epoch: subject.epoch,
            versions: Some(offer.versions),
            vm_uid: subject.vm_uid.clone(),
            remembered,
            channel: offer.channel,
            ..Default::default()
        };
        let sign = || {
            let grant = self.leave().send(offer.keys)?;
            Ok(v1::StartOutgoingRequest {
                grant: Some(grant),
                ..request.clone()
            })
        };
        let send = |mut transfers: Transfers, request| async move {
            ask(START, transfers.start_outgoing(request)).await
        };
        match self.leaving(Side::Source, sign, send).await {
            Ok(transfer) => Ended::found(Side::Source, Found::Side(Box::new(transfer))),
            Err(error) if is_silence(&error) => Ended::with(Answer::Silent),
            // A refusal counts only when there is no side: an earlier call may have begun it.
            Err(error) => match subject.find(&self.fleet, Side::Source).await {
                Found::Absent { owner: true } => Ended::refused(subject, Side::Source, error),
                // Not there at all: where it is, this refusal does not say.
                Found::Absent { owner: false } => {
                    Ended::refused(subject, Side::Source, error.with("state", "LOST"))
                }
                found => Ended::found(Side::Source, found),
            },
        }
    }

    /// CancelTransfer.
    pub(super) async fn cancel(self, side: Side, error: Option<v1::MigrationError>) -> Ended {
        let request = v1::CancelTransferRequest {
            migration: self.subject.migration.clone(),
            role: role(side).into(),
            error,
        };
        let answer = match self.subject.transfers(&self.fleet, side) {
            Ok(mut transfers) => ask(ASK, transfers.cancel_transfer(request)).await,
            Err(error) => Err(error),
        };
        self.after(side, answer).await
    }

    /// ResolveTransfer. `ground`: what the decision stands on.
    pub(super) async fn resolve(self, decision: Decision, ground: String) -> Ended {
        let migration = &self.subject.migration;
        tracing::info!(%migration, ?decision, ground, "a destination in doubt is told");
        let sign = || {
            let commit = decision == Decision::Commit;
            Ok(v1::ResolveTransferRequest {
                migration: migration.clone(),
                decision: decision.into(),
                grant: Some(self.leave().decision(commit, &ground)?),
                ..Default::default()
            })
        };
        let send = |mut transfers: Transfers, request| async move {
            ask(ASK, transfers.resolve_transfer(request)).await
        };
        let answer = self.leaving(Side::Destination, sign, send).await;
        self.after(Side::Destination, answer).await
    }

    fn leave(&self) -> Leave<'_> {
        Leave {
            fleet: &self.fleet,
            grants: &self.grants,
            subject: &self.subject,
        }
    }

    /// A call with a grant. While its host's agent does not know what the grant stands on (it
    /// started a moment ago, or the key is new) it is signed and sent again, for a while.
    async fn leaving<R, T, F: Future<Output = Result<T, ApiError>>>(
        &self,
        side: Side,
        sign: impl Fn() -> Result<R, ApiError>,
        send: impl Fn(Transfers, R) -> F,
    ) -> Result<T, ApiError> {
        let begin = Instant::now();
        let patience = BEHIND.max(self.fleet.interval() * 3);
        loop {
            let transfers = self.subject.transfers(&self.fleet, side)?;
            let (answer, again) = match sign() {
                Ok(request) => {
                    let answer = send(transfers, request).await;
                    let again = answer.as_ref().is_err_and(is_behind);
                    (answer, again)
                }
                // Who has not registered since this server started will.
                Err(error) => {
                    let again = is_silence(&error);
                    (Err(error), again)
                }
            };
            match answer {
                Err(error) if again && begin.elapsed() < patience => {
                    tracing::debug!(migration = %self.subject.migration, host = %self.subject.host(side), %error,
                        "a grant waits for an agent");
                    sleep(BEHIND / 50).await;
                }
                answer => return answer,
            }
        }
    }

    /// What an answer, or a refusal, says of the side it was asked of.
    async fn after(&self, side: Side, answer: Result<v1::Transfer, ApiError>) -> Ended {
        let (subject, fleet) = (&self.subject, &self.fleet);
        let found = match answer {
            Err(error) if !is_silence(&error) && error.reason != Reason::NoSuchMigration => {
                tracing::info!(migration = %subject.migration, host = %subject.host(side), %error, "a side refuses");
                subject.find(fleet, side).await
            }
            answer => subject.found(fleet, side, answer).await,
        };
        Ended::found(side, found)
    }

    /// Whether the process that holds the frozen memory is known to be gone. Silence is no such
    /// knowledge.
    pub(super) async fn ask_source_copy(self) -> Ended {
        let gone = match self.subject.vm_at(&self.fleet, Side::Source).await {
            Ok(vm) => vm.state() == v1::vm::State::Lost,
            Err(error) => error.reason == Reason::NoSuchVm,
        };
        Ended::with(Answer::Copy { gone })
    }

    /// ReleaseTransfer.
    pub(super) async fn release(self, side: Side) -> Ended {
        let subject = &self.subject;
        let request = v1::ReleaseTransferRequest {
            migration: subject.migration.clone(),
            role: role(side).into(),
        };
        let answer = match subject.transfers(&self.fleet, side) {
            Ok(mut transfers) => ask(ASK, transfers.release_transfer(request)).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(_) => Ended::with(Answer::Done),
            Err(error) if error.reason == Reason::NoSuchMigration => Ended::with(Answer::Done),
            Err(error) => {
                tracing::info!(migration = %subject.migration, host = %subject.host(side), %error,
                    "a side is not released yet");
                Ended {
                    answer: Answer::Silent,
                    brought: Brought::Unreleased(side, error),
                }
            }
        }
    }

    /// Looks the VM up where it is now, so that the fleet knows before the outcome is shown. A
    /// destination that does not answer has it all the same: `arrived` is the VM as it is expected
    /// there, `None` when it was not handed over.
    pub(super) async fn look_up(self, arrived: Option<v1::Vm>) {
        let (subject, fleet) = (&self.subject, &self.fleet);
        let side = if arrived.is_some() {
            Side::Destination
        } else {
            Side::Source
        };
        match (subject.vm_at(fleet, side).await, arrived) {
            (Ok(mut vm), arrived) => {
                fleet.clocks().vm_from(subject.host(side), &mut vm);
                if arrived.is_some() {
                    fleet.raise_epoch(&vm.uid, subject.epoch + 1);
                    fleet.forget(&subject.source, &vm.uid);
                } else {
                    fleet.forget(&subject.destination, &vm.uid);
                }
                fleet.observe(subject.host(side), vm);
            }
            (Err(error), Some(arrived)) if is_silence(&error) && !arrived.uid.is_empty() => {
                fleet.forget(&subject.source, &arrived.uid);
                fleet.expect(arrived);
            }
            // The next report tells.
            (Err(_), _) => {}
        }
    }
}
