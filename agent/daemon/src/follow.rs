//! The tasks that keep what a VM's process last said: one for the VM, one for each of its sides of
//! a migration. They end with the process or with the agent; a side's also when the side is
//! released.

use std::{sync::Arc, time::Duration};

use slat_proto::{ApiError, Reason, v1};

use super::{
    announce::forget_record,
    identity::save_seen,
    living::{ASK_EVERY, LiveVm, QUICK, SMALL},
    registry::Registry,
    side::{SideKey, is_terminal},
    traffic::Counted,
};

/// Between two attempts to follow, doubling from the first.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(2);
/// A VM that has said nothing for so long is asked whether its process answers. A running one says
/// something every second.
const QUIET: Duration = Duration::from_secs(3);

/// Waits before the next attempt; false when the process is gone.
async fn again(vm: &LiveVm, wait: &mut Duration) -> bool {
    let now = *wait;
    *wait = (now * 2).min(RETRY_LAST);
    tokio::select! {
        () = vm.gone().cancelled() => false,
        () = tokio::time::sleep(now) => true,
    }
}

/// Keeps what a VM said; true when it is more than new figures. From the moment that it has arrived
/// it owns its VM: what its process leaves may be a lost one, so that is kept on disk too.
pub(super) async fn keep_seen(vm: &LiveVm, said: &v1::Vm) -> bool {
    let news = vm.see(said.clone());
    if news.arrived {
        let (dir, said) = (vm.dir().clone(), said.clone());
        let kept = tokio::task::spawn_blocking(move || save_seen(&dir, &said));
        if let Err(error) = kept.await {
            tracing::error!(%error, "keeping a VM's description failed");
        }
    }
    news.any
}

/// Keeps the snapshot until the process is gone. `heard` is called after each message.
pub(super) async fn follow_vm(vm: Arc<LiveVm>, registry: Arc<Registry>, heard: impl Fn(&v1::Vm)) {
    tokio::select! {
        () = listen(&vm, &registry, &heard) => {}
        () = ask_quiet(&vm, &registry, &heard) => {}
    }
}

/// Asks a process that says nothing for a while, and shows the VM as its journal has it when there
/// is no answer. Ends with the process.
async fn ask_quiet(vm: &Arc<LiveVm>, registry: &Registry, heard: &impl Fn(&v1::Vm)) {
    loop {
        let wait = if vm.is_silent() {
            ASK_EVERY
        } else {
            QUIET.saturating_sub(vm.quiet())
        };
        tokio::select! {
            () = vm.gone().cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        if !vm.is_silent() && vm.quiet() < QUIET {
            continue;
        }
        let stopped = vm.process().is_stopped();
        let answer = if stopped {
            // No answer can come; what it answers when it goes on is asked for then.
            Err(vm.unreachable("does not run".to_owned()))
        } else {
            ask_twice(vm).await
        };
        match answer {
            Ok(said) => {
                heard(&said);
                if keep_seen(vm, &said).await {
                    registry.note_change();
                }
            }
            Err(error) if error.reason == Reason::VmUnreachable => {
                if vm.gone().is_cancelled() {
                    return;
                }
                let before = vm.is_silent();
                if vm.fall_silent().await {
                    registry.note_change();
                    if !before {
                        tracing::warn!(vm = %vm.name(), uid = %vm.uid(), %error, "a VM process does not answer");
                    }
                }
            }
            // It refuses, so it answers.
            Err(_) => {
                if vm.hear() {
                    registry.note_change();
                }
            }
        }
    }
}

/// Asks for the VM, and once more after a pause: a process that is ending refuses connections.
async fn ask_twice(vm: &LiveVm) -> Result<v1::Vm, ApiError> {
    let ask = async || {
        let mut vms = vm.vms();
        vm.answer(SMALL, vms.get_vm(vm.get_request())).await
    };
    match ask().await {
        Err(error) if error.reason == Reason::VmUnreachable && !vm.is_silent() => {
            tokio::time::sleep(ASK_EVERY).await;
            ask().await
        }
        answer => answer,
    }
}

async fn listen(vm: &LiveVm, registry: &Registry, heard: &impl Fn(&v1::Vm)) {
    let mut wait = RETRY_FIRST;
    loop {
        let request = v1::WatchVmRequest {
            name: vm.name().to_string(),
            uid: vm.own_uid(),
            ..Default::default()
        };
        match vm.vms().watch_vm(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Ok(Some(said)) = stream.message().await {
                    wait = RETRY_FIRST;
                    heard(&said);
                    if keep_seen(vm, &said).await {
                        registry.note_change();
                    }
                }
            }
            Err(status) => {
                tracing::debug!(vm = %vm.name(), error = status.message(), "cannot watch a VM")
            }
        }
        if !again(vm, &mut wait).await {
            return;
        }
    }
}

/// What a side says next; `None` when its stream has ended. One that says more than a message can
/// hold is asked how it stands, without its figures.
async fn next(
    vm: &LiveVm,
    key: &SideKey,
    stream: &mut tonic::Streaming<v1::Transfer>,
) -> Option<v1::Transfer> {
    let status = match stream.message().await {
        Ok(said) => return said,
        Err(status) => status,
    };
    let error = vm.refusal(status);
    if error.reason != Reason::MessageTooLarge {
        return None;
    }
    tracing::warn!(vm = %vm.name(), migration = %key.migration, %error, "a side is asked for less");
    // What is made in vain is large: not in haste.
    tokio::time::sleep(RETRY_LAST).await;
    let request = v1::GetTransferRequest {
        migration: key.migration.to_string(),
        role: key.role.to_message().into(),
        without_progress: true,
        ..Default::default()
    };
    vm.answer(QUICK, vm.transfers().get_transfer(request))
        .await
        .ok()
}

/// Keeps a side's last state until it ended by itself (true), was released or its process is gone
/// (false).
pub(super) async fn follow_side(vm: Arc<LiveVm>, registry: Arc<Registry>, key: SideKey) -> bool {
    let mut wait = RETRY_FIRST;
    let mut counted = Counted::default();
    loop {
        let Some(known) = vm.side(&key) else {
            return false;
        };
        let request = v1::WatchTransferRequest {
            migration: key.migration.to_string(),
            role: key.role.to_message().into(),
        };
        match vm.transfers().watch_transfer(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Some(said) = next(&vm, &key, &mut stream).await {
                    if let Err(error) = vm.witness(&said).await {
                        tracing::error!(vm = %vm.name(), migration = %key.migration, %error, "not passed on: a sighting cannot be kept");
                        break;
                    }
                    wait = RETRY_FIRST;
                    counted.see(&said);
                    let ended = is_terminal(said.phase());
                    if vm.see_side(&key, said) {
                        registry.note_change();
                    }
                    if ended {
                        return true;
                    }
                }
            }
            // Its process is still beginning it.
            Err(status)
                if vm.refusal(status.clone()).reason == Reason::NoSuchMigration
                    && vm.is_receiving(&key).await => {}
            Err(status) if vm.refusal(status.clone()).reason == Reason::NoSuchMigration => {
                // Released, or never begun: then a record that the agent made before is of no use.
                // Unless it was begun since this was asked.
                let (forgetting, of) = (Arc::clone(&vm), key.clone());
                let forgotten = tokio::task::spawn_blocking(move || {
                    let remove = || forget_record(&forgetting, &of);
                    forgetting.forget_unknown_side(&of, known.as_ref(), remove)
                });
                if forgotten.await.unwrap_or(false) {
                    registry.note_change();
                    return false;
                }
            }
            Err(status) => {
                tracing::debug!(vm = %vm.name(), migration = %key.migration, error = status.message(), "cannot watch a side");
            }
        }
        if vm.side(&key).is_none() || !again(&vm, &mut wait).await {
            return false;
        }
    }
}
