//! WatchVm for the fleet: one VM's states, by its uid, followed from host to host.
//!
//! # States of a handover
//! Between RELINQUISHED at the source and RUNNING at the destination no host's state is the VM's:
//! who watches the fleet is not told of it, since the migration ends it within moments. Such a
//! state is held back, never thrown away: a frozen VM says nothing twice. It is looked at again
//! until one of three things is true:
//!
//! * the owner's record is another host's: the VM has moved, and the watch with it, whenever the
//!   source is released;
//! * no migration carries the VM on (it failed after the commit, or is in doubt): this is all there
//!   is of the VM, perhaps its last copy, and it is shown;
//! * the host says something newer.
//!
//! There is no lock here; a watch is one task, owned by [`super::Watches`].

use std::time::Duration;

use slat_proto::{
    ApiError, Reason,
    model::VmRef,
    transport::{Scope, TracedChannel},
    v1::{self, vm::State, vm_service_client::VmServiceClient},
};
use tokio::{sync::mpsc, time::sleep};
use tonic::{Status, Streaming};

use super::services::{Services, forwarded};
use crate::fleet::host_unreachable;

/// Pause before a watch looks for its VM again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

type Out = mpsc::Sender<Result<v1::Vm, Status>>;

/// Why a watch of one host's VM went no further.
enum Stop {
    /// Its stream ended: the VM was deleted there, or moved on.
    Ended,
    /// The VM is another host's now.
    Moved,
    /// Nobody listens, or the listener was told why it ends.
    Done,
}

/// What a state is in which its host may not run the VM.
enum Standing {
    /// A migration is about to end it.
    Passing,
    /// All there is of the VM.
    Lasting,
    /// Another host's VM by now.
    Past,
}

fn client(channel: TracedChannel) -> VmServiceClient<TracedChannel> {
    VmServiceClient::new(channel)
}

fn may_run(vm: &v1::Vm) -> bool {
    !matches!(vm.state(), State::Incoming | State::Relinquished)
}

impl Services {
    /// Sends a VM's states to `out`, from host to host, until it is gone or nobody listens. While
    /// its host does not answer, what was last seen is shown once, as old, and the host waited for.
    pub(super) async fn follow(self, scope: Scope, vm: v1::Vm, out: Out) {
        let Ok(wanted) = VmRef::new("", &vm.uid, "") else {
            return;
        };
        let mut stale: Option<v1::Vm> = None;
        loop {
            let route = match self.find(&scope, &wanted) {
                // Nobody can be asked: it stays as it is until it is deleted or comes back.
                Ok(found) if found.kept_by_server => Err(host_unreachable(&found.host)),
                _ => self.route(&scope, &wanted),
            };
            let (owner, channel) = match route {
                Ok(route) => route,
                // Gone from the fleet: the stream ends, as it does at an agent.
                Err(error) if error.reason == Reason::NoSuchVm => return,
                Err(error) if error.reason == Reason::HostUnreachable => {
                    let Ok(found) = self.find(&scope, &wanted) else {
                        return;
                    };
                    let found = if found.kept_by_server {
                        self.with_migration(found)
                    } else {
                        self.last_seen(found)
                    };
                    if stale.as_ref() != Some(&found) {
                        stale = Some(found.clone());
                        if out.send(Ok(found)).await.is_err() {
                            return;
                        }
                    }
                    tokio::select! {
                        () = out.closed() => return,
                        () = sleep(LOOK_AGAIN) => {}
                    }
                    continue;
                }
                Err(error) => {
                    drop(out.send(Err(error.into())).await);
                    return;
                }
            };
            stale = None;
            let host = owner.host.name;
            let request = v1::WatchVmRequest {
                name: vm.name.clone(),
                uid: vm.uid.clone(),
                ..Default::default()
            };
            let stream = match client(channel).watch_vm(request).await {
                Ok(answer) => answer.into_inner(),
                Err(status) => {
                    let error = ApiError::from(status.clone());
                    if error.reason != Reason::NoSuchVm {
                        drop(out.send(Err(forwarded(&host, status))).await);
                        return;
                    }
                    if self.is_gone(&wanted, &vm, &host) {
                        return;
                    }
                    sleep(LOOK_AGAIN).await;
                    continue;
                }
            };
            match self.follow_at(&scope, &host, stream, &out).await {
                Stop::Done => return,
                Stop::Moved => {}
                Stop::Ended => {
                    let request = v1::GetVmRequest {
                        name: vm.name.clone(),
                        uid: vm.uid.clone(),
                        ..Default::default()
                    };
                    let still = match self.fleet.channel(&host) {
                        Ok(channel) => client(channel).get_vm(request).await.is_ok(),
                        Err(_) => false,
                    };
                    if !still && self.is_gone(&wanted, &vm, &host) {
                        return;
                    }
                }
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Sends what one host says of a VM.
    async fn follow_at(
        &self,
        scope: &Scope,
        host: &str,
        mut stream: Streaming<v1::Vm>,
        out: &Out,
    ) -> Stop {
        let mut held = None;
        loop {
            tokio::select! {
                update = stream.message() => match update {
                    Ok(Some(update)) => held = Some(self.noted(host, update)),
                    Ok(None) => return Stop::Ended,
                    Err(status) => {
                        drop(out.send(Err(forwarded(host, status))).await);
                        return Stop::Done;
                    }
                },
                () = out.closed() => return Stop::Done,
                () = sleep(LOOK_AGAIN), if held.is_some() => {}
            }
            let Some(update) = held.take() else {
                continue;
            };
            if !may_run(&update) {
                match self.standing(&update, host) {
                    Standing::Lasting => {}
                    Standing::Past => return Stop::Moved,
                    Standing::Passing => {
                        held = Some(update);
                        continue;
                    }
                }
            }
            if !self.vm_in(scope, &update) {
                // It went where the listener does not see it.
                return Stop::Ended;
            }
            let shown = self.as_seen(scope, self.with_migration(update));
            if out.send(Ok(shown)).await.is_err() {
                return Stop::Done;
            }
        }
    }

    /// What it means that `host` has a VM that it may not run.
    fn standing(&self, vm: &v1::Vm, host: &str) -> Standing {
        // Asked before the owner: a migration's end is shown after the fleet knows where the VM is.
        let carried = self.migrations.carries(vm);
        match self.fleet.home(&vm.uid) {
            Some(home) if home != host => Standing::Past,
            _ if carried => Standing::Passing,
            Some(_) => Standing::Lasting,
            None => Standing::Past,
        }
    }

    /// A VM that `host` has no longer: whether nobody else has it or is about to.
    fn is_gone(&self, wanted: &VmRef, vm: &v1::Vm, host: &str) -> bool {
        if self.migrations.of_vm(vm).is_some() {
            return false;
        }
        match self.fleet.find(wanted) {
            Ok(found) => found.host == host,
            Err(error) => error.reason == Reason::NoSuchVm,
        }
    }
}
