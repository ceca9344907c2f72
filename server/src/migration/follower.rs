//! Asks one half of a migration how it is, until it ended: GetTransfer, then its watch, and from the beginning with a
//! growing pause when either breaks. Every answer, and every failure to get one, goes to the reconciler, with the time at
//! which it was asked for; a follower decides nothing. It ends with the half's terminal phase, or when its owner drops it.

use std::{sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    transport::TracedChannel,
    v1::{
        self, TransferPhase as Half, TransferRole as Role,
        transfer_service_client::TransferServiceClient, vm_service_client::VmServiceClient,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::fleet::Fleet;

/// How long a question may take.
pub(super) const ASK: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What a follower passes on: of which half, when the question was asked, the answer.
pub(super) type News = (Role, Instant, Heard);

/// Which half, and where.
#[derive(Clone, Debug)]
pub(super) struct HalfOf {
    pub(super) migration: String,
    pub(super) vm: String,
    pub(super) epoch: u64,
    pub(super) host: String,
    pub(super) role: Role,
}

/// What came back.
#[derive(Clone, Debug)]
pub(super) enum Heard {
    Half(Box<v1::Transfer>),
    Silent,
    Absent { owner: bool },
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

/// Whether nobody answered, as against an answer that refuses.
pub(super) fn is_silence(error: &ApiError) -> bool {
    matches!(
        error.reason,
        Reason::PeerUnreachable
            | Reason::PeerRestarted
            | Reason::HostUnreachable
            | Reason::VmUnreachable
            | Reason::ConnectionLost
    ) || error.metadata.contains_key("grpc_code")
}

impl HalfOf {
    pub(super) fn is_source(&self) -> bool {
        self.role == Role::Source
    }

    fn client(&self, fleet: &Fleet) -> Result<TransferServiceClient<TracedChannel>, ApiError> {
        Ok(TransferServiceClient::new(fleet.channel(&self.host)?))
    }

    /// The half now.
    pub(super) async fn get(&self, fleet: &Fleet) -> Heard {
        let answer = match self.client(fleet) {
            Err(error) => Err(error),
            Ok(mut client) => {
                let request = v1::GetTransferRequest {
                    migration: self.migration.clone(),
                    role: self.role.into(),
                };
                ask(ASK, client.get_transfer(request)).await
            }
        };
        self.hear(fleet, answer).await
    }

    /// An agent's answer to any call that returns the half.
    pub(super) async fn hear(
        &self,
        fleet: &Fleet,
        answer: Result<v1::Transfer, ApiError>,
    ) -> Heard {
        match answer {
            Ok(half) => Heard::Half(Box::new(half)),
            Err(error) if error.reason == Reason::NoSuchMigration => {
                if self.is_source() {
                    self.ask_for_vm(fleet).await
                } else {
                    Heard::Absent { owner: false }
                }
            }
            Err(error) => {
                tracing::debug!(migration = %self.migration, host = %self.host, role = ?self.role, %error,
                    "a half does not answer");
                Heard::Silent
            }
        }
    }

    /// The source knows no half: whether the VM is there and could run.
    pub(super) async fn ask_for_vm(&self, fleet: &Fleet) -> Heard {
        use v1::vm::State;
        let Ok(channel) = fleet.channel(&self.host) else {
            return Heard::Silent;
        };
        let request = v1::GetVmRequest {
            name: self.vm.clone(),
        };
        match ask(ASK, VmServiceClient::new(channel).get_vm(request)).await {
            Ok(vm) => Heard::Absent {
                owner: vm.epoch == self.epoch
                    && !matches!(
                        vm.state(),
                        State::Incoming | State::Relinquished | State::Lost
                    ),
            },
            Err(error) if error.reason == Reason::NoSuchVm => Heard::Absent { owner: false },
            Err(_) => Heard::Silent,
        }
    }
}

/// Whether a VM's process at `host` is known to be gone, and its memory with it. Silence is no such knowledge.
pub(super) async fn is_gone(fleet: &Fleet, host: &str, vm: &str) -> bool {
    let Ok(channel) = fleet.channel(host) else {
        return false;
    };
    let request = v1::GetVmRequest {
        name: vm.to_owned(),
    };
    match ask(ASK, VmServiceClient::new(channel).get_vm(request)).await {
        Ok(vm) => vm.state() == v1::vm::State::Lost,
        Err(error) => error.reason == Reason::NoSuchVm,
    }
}

/// Follows a half. See the module.
pub(super) async fn follow(fleet: Arc<Fleet>, half: HalfOf, out: mpsc::Sender<News>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let asked = Instant::now();
        let heard = half.get(&fleet).await;
        let answered = matches!(heard, Heard::Half(_));
        if tell(&half, asked, heard, &out).await {
            return;
        }
        if answered {
            pause = FIRST_PAUSE;
            if watch(&fleet, &half, &out).await {
                return;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Passes one answer on; true when nothing follows it.
async fn tell(half: &HalfOf, asked: Instant, heard: Heard, out: &mpsc::Sender<News>) -> bool {
    let last = matches!(&heard, Heard::Half(half)
        if matches!(half.phase(), Half::Completed | Half::Cancelled | Half::Failed));
    out.send((half.role, asked, heard)).await.is_err() || last
}

/// Passes a watch on until it breaks; true when nothing follows.
async fn watch(fleet: &Fleet, half: &HalfOf, out: &mpsc::Sender<News>) -> bool {
    let Ok(mut client) = half.client(fleet) else {
        return false;
    };
    let request = v1::WatchTransferRequest {
        migration: half.migration.clone(),
        role: half.role.into(),
    };
    let Ok(mut stream) = ask(ASK, client.watch_transfer(request)).await else {
        return false;
    };
    while let Ok(Some(update)) = stream.message().await {
        if tell(half, Instant::now(), Heard::Half(Box::new(update)), out).await {
            return true;
        }
    }
    false
}
