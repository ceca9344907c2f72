//! What does not change about a migration, and the questions that can be put to its two sides.

use std::time::Duration;

use slat_proto::{
    ApiError, Reason,
    model::VmRef,
    transport::TracedChannel,
    v1::{
        self, TransferRole, transfer_service_client::TransferServiceClient,
        vm_service_client::VmServiceClient,
    },
};
use tokio::time::timeout;

use super::protocol::Side;
use crate::fleet::{Fleet, host_unreachable};

/// How long a question may take.
pub(super) const ASK: Duration = Duration::from_secs(5);

/// One migration: who goes where.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) migration: String,
    pub(super) vm: String,
    /// The VM's identity; empty in a record that an older version wrote.
    pub(super) vm_uid: String,
    pub(super) epoch: u64,
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) params: Option<v1::MigrationParams>,
}

/// What came back when a side was asked.
#[derive(Clone, Debug)]
pub(super) enum Found {
    Side(Box<v1::Transfer>),
    /// No such side there; `owner`: afterwards the VM was at the source with its epoch, and may
    /// run.
    Absent {
        owner: bool,
    },
    Silent,
}

pub(super) const fn role(side: Side) -> TransferRole {
    match side {
        Side::Source => TransferRole::Source,
        Side::Destination => TransferRole::Destination,
    }
}

/// As in error metadata (`side`).
pub(super) const fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

/// `call` within `limit`; too late is PEER_UNREACHABLE.
pub(super) async fn ask<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, ApiError> {
    match timeout(limit, call).await {
        Ok(answer) => answer
            .map(tonic::Response::into_inner)
            .map_err(ApiError::from),
        Err(_) => Err(ApiError::new(
            Reason::PeerUnreachable,
            format!("no answer within {} s", limit.as_secs()),
        )),
    }
}

/// Whether nobody answered, as against an answer: that refuses, or that cannot be read.
pub(super) fn is_silence(error: &ApiError) -> bool {
    matches!(
        error.reason,
        Reason::PeerUnreachable
            | Reason::PeerRestarted
            | Reason::HostUnreachable
            | Reason::VmUnreachable
            | Reason::ConnectionLost
            | Reason::DescriptorsExhausted
    )
}

/// Whether a side answered and the answer could not be taken: too large, or no message at all.
fn is_unreadable(error: &ApiError) -> bool {
    matches!(
        error.reason,
        Reason::MessageTooLarge | Reason::MessageUndecodable
    )
}

/// What happened to a call to `host`, in words of the server: a host that does not answer is
/// HOST_UNREACHABLE, whatever its connection said.
pub(super) fn at_host(host: &str, error: ApiError) -> ApiError {
    if error.reason != Reason::PeerUnreachable {
        return error;
    }
    host_unreachable(host).with("cause", error.message)
}

impl Subject {
    pub(super) fn of(migration: &v1::Migration) -> Self {
        Self {
            migration: migration.name.clone(),
            vm: migration.vm.clone(),
            vm_uid: migration.vm_uid.clone(),
            epoch: migration.epoch,
            source: migration.source.clone(),
            destination: migration.destination.clone(),
            params: migration.params,
        }
    }

    pub(super) fn host(&self, side: Side) -> &str {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    pub(super) fn transfers(
        &self,
        fleet: &Fleet,
        side: Side,
    ) -> Result<TransferServiceClient<TracedChannel>, ApiError> {
        Ok(TransferServiceClient::new(fleet.channel(self.host(side))?))
    }

    /// A side now.
    pub(super) async fn find(&self, fleet: &Fleet, side: Side) -> Found {
        let answer = self.get(fleet, side).await;
        self.found(fleet, side, answer).await
    }

    /// The side as it says itself. When that cannot be taken (histories that have grown beyond one
    /// message), it is asked again for what matters: without figures.
    async fn get(&self, fleet: &Fleet, side: Side) -> Result<v1::Transfer, ApiError> {
        match self.get_with(fleet, side, false).await {
            Err(error) if is_unreadable(&error) => {
                tracing::warn!(migration = %self.migration, host = %self.host(side), ?side, %error,
                    reason = %error.reason, "a side's answer cannot be taken; it is asked for less");
                self.get_with(fleet, side, true).await
            }
            answer => answer,
        }
    }

    async fn get_with(
        &self,
        fleet: &Fleet,
        side: Side,
        without_progress: bool,
    ) -> Result<v1::Transfer, ApiError> {
        let request = v1::GetTransferRequest {
            migration: self.migration.clone(),
            role: role(side).into(),
            without_progress,
            ..Default::default()
        };
        ask(ASK, self.transfers(fleet, side)?.get_transfer(request)).await
    }

    /// What an agent's answer to a call that returns the side says of it.
    pub(super) async fn found(
        &self,
        fleet: &Fleet,
        side: Side,
        answer: Result<v1::Transfer, ApiError>,
    ) -> Found {
        match (answer, side) {
            (Ok(transfer), _) => Found::Side(Box::new(transfer)),
            (Err(error), Side::Destination) if error.reason == Reason::NoSuchMigration => {
                Found::Absent { owner: false }
            }
            (Err(error), Side::Source) if error.reason == Reason::NoSuchMigration => {
                match self.find_vm(fleet).await {
                    // It may have begun, and handed over, between the two questions: then the side
                    // is there now.
                    Found::Absent { owner: false } => match self.get(fleet, side).await {
                        Ok(transfer) => Found::Side(Box::new(transfer)),
                        Err(error) if error.reason == Reason::NoSuchMigration => {
                            Found::Absent { owner: false }
                        }
                        Err(_) => Found::Silent,
                    },
                    found => found,
                }
            }
            // It answered something: not what was asked of it, so how it stands is asked for.
            (Err(error), _) if is_unreadable(&error) => match self.get(fleet, side).await {
                Ok(transfer) => Found::Side(Box::new(transfer)),
                Err(_) => Found::Silent,
            },
            (Err(error), _) => {
                tracing::debug!(migration = %self.migration, host = %self.host(side), ?side, %error,
                    "a side does not answer");
                Found::Silent
            }
        }
    }

    /// The source knows no side: whether the VM is there and could run.
    pub(super) async fn find_vm(&self, fleet: &Fleet) -> Found {
        use v1::vm::State;
        match self.vm_at(fleet, Side::Source).await {
            // Its process will say more when it answers.
            Ok(vm) if vm.state() == State::Unresponsive => Found::Silent,
            Ok(vm) => Found::Absent {
                owner: vm.epoch == self.epoch
                    && !matches!(
                        vm.state(),
                        State::Incoming | State::Relinquished | State::Lost
                    ),
            },
            Err(error) if error.reason == Reason::NoSuchVm => Found::Absent { owner: false },
            Err(_) => Found::Silent,
        }
    }

    /// The VM as the fleet knows it now.
    pub(super) fn last_seen(&self, fleet: &Fleet) -> Option<v1::Vm> {
        let wanted = VmRef::new(&self.vm, &self.vm_uid, "").ok()?;
        fleet.find(&wanted).ok()
    }

    /// The VM as it is kept once it is lost and no host has anything of it: what was known of it,
    /// at the host that it was handed over to.
    pub(super) fn lost(&self, last: v1::Vm) -> v1::Vm {
        v1::Vm {
            state: v1::vm::State::Lost.into(),
            state_message: format!(
                "its processes died at both ends of {}, and its memory with them",
                self.migration
            ),
            ..self.handed_over(last)
        }
    }

    /// The VM as its destination must have it, from what was last seen of it.
    pub(super) fn arrived(&self, last: v1::Vm, location: v1::VmLocation) -> v1::Vm {
        let state = if location == v1::VmLocation::Lost {
            v1::vm::State::Lost.into()
        } else {
            last.state
        };
        v1::Vm {
            state,
            state_message: format!(
                "handed over by {}; its host has not been heard since",
                self.migration
            ),
            ..self.handed_over(last)
        }
    }

    /// What was last seen of the VM, moved to its destination. What its process there would have
    /// to say is left out.
    fn handed_over(&self, last: v1::Vm) -> v1::Vm {
        v1::Vm {
            name: self.vm.clone(),
            uid: self.vm_uid.clone(),
            host: self.destination.clone(),
            epoch: self.epoch + 1,
            migration: String::new(),
            mmu_stats: None,
            guest_counters: None,
            pid: 0,
            dirty_logging: false,
            conflicts: Vec::new(),
            stale: false,
            kept_by_server: false,
            ..last
        }
    }

    /// The VM as one host shows it. Another VM of its name is not it: NO_SUCH_VM.
    pub(super) async fn vm_at(&self, fleet: &Fleet, side: Side) -> Result<v1::Vm, ApiError> {
        let request = v1::GetVmRequest {
            name: self.vm.clone(),
            uid: self.vm_uid.clone(),
            ..Default::default()
        };
        let mut vms = VmServiceClient::new(fleet.channel(self.host(side))?);
        let vm = ask(ASK, vms.get_vm(request)).await?;
        // An agent that knows names only answers with whatever has the name.
        if self.vm_uid.is_empty() || vm.uid == self.vm_uid {
            Ok(vm)
        } else {
            Err(ApiError::no_such_vm(&self.vm).with("uid", &self.vm_uid))
        }
    }
}
