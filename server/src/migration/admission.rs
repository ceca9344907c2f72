//! Whether a migration may begin: what the fleet knows of the VM and of its destination.

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, MigrationParams, Paging, VmRef, VmSpec, ordinary_bytes},
    v1::{self, Capability, host_service_client::HostServiceClient, vm::State},
};

use super::{
    errors::{frozen_copy, in_progress},
    key::VmKey,
    subject::{ASK, ask},
};
use crate::fleet::{Fleet, NeededPages, Owner, cannot_watch, memory_of, why_not_watched};

/// A migration as asked for, its fields checked.
#[derive(Clone, Debug)]
pub(crate) struct NewMigration {
    pub(crate) name: Option<MigrationName>,
    pub(crate) vm: VmRef,
    pub(crate) destination: HostName,
    pub(crate) params: MigrationParams,
    pub(crate) validate_only: bool,
}

impl NewMigration {
    /// Whether `existing` is what was asked for: then the caller did not hear its first answer.
    pub(super) fn is_already(&self, existing: &v1::Migration) -> bool {
        self.vm
            .name()
            .is_none_or(|name| name.to_string() == existing.vm)
            && self.vm.uid().is_none_or(|uid| uid == existing.vm_uid)
            && self
                .vm
                .host()
                .is_none_or(|source| source.to_string() == existing.source)
            && self.destination.to_string() == existing.destination
            && existing.params == Some(self.params.to_message())
    }
}

/// Everything about VM and destination that can be known before asking them to move. `owner`: the
/// VM and its host; `keeper`: the failed migration that keeps the last copy of a VM.
///
/// # Errors
/// See `MigrationService.CreateMigration`.
pub(super) async fn check(
    fleet: &Fleet,
    wanted: &NewMigration,
    owner: Owner,
    keeper: impl Fn(&VmKey) -> Option<String>,
) -> Result<v1::Vm, ApiError> {
    let destination = fleet.open_host(&wanted.destination.to_string())?;
    let vm = owner.vm;
    if owner.host.name == destination.name {
        return Err(ApiError::new(
            Reason::SameHost,
            format!("{} is on {} already", vm.name, destination.name),
        )
        .with("vm", &vm.name)
        .with("host", destination.name)
        .with("advice", "name another host"));
    }
    if vm.state() == State::Relinquished
        && let Some(keeper) = keeper(&VmKey::from(&vm))
    {
        return Err(frozen_copy(&vm, &keeper, &owner.host.name));
    }
    match vm.state() {
        State::Incoming | State::Relinquished => {
            return Err(in_progress(&vm.name, &vm.migration, "migrate"));
        }
        State::Failed | State::Stopped | State::Lost | State::Unspecified => {
            return Err(ApiError::new(
                Reason::VmNotRunning,
                format!(
                    "{} is {}: {}",
                    vm.name,
                    vm.state().as_str_name(),
                    vm.state_message
                ),
            )
            .with("vm", &vm.name)
            .with("state", vm.state().as_str_name()));
        }
        State::Unresponsive => {
            return Err(ApiError::new(
                Reason::VmUnreachable,
                format!("{} does not answer: {}", vm.name, vm.state_message),
            )
            .with("vm", &vm.name)
            .with("uid", &vm.uid)
            .with("host", &owner.host.name)
            .with("state", vm.state().as_str_name())
            .with(
                "advice",
                format_args!(
                    "look at its process and its log; if it stays silent: slat delete vm {} --uid {} --force",
                    vm.name.trim_start_matches("vms/"),
                    vm.uid
                ),
            ));
        }
        State::Created | State::Running | State::Paused => {}
    }
    if owner.host.arch != destination.arch {
        return Err(ApiError::new(
            Reason::IsaMismatch,
            format!(
                "{} is {}, {} is {}",
                owner.host.name, owner.host.arch, destination.name, destination.arch
            ),
        )
        .with("vm", &vm.name)
        .with("source_arch", &owner.host.arch)
        .with("destination_arch", &destination.arch));
    }
    check_capabilities(&vm, &destination)?;
    check_memory(fleet, &vm, &destination).await?;
    check_pages(fleet, &vm, &destination).await?;
    Ok(vm)
}

/// Of pages that a VM takes and its destination set aside, there must be enough.
async fn check_pages(fleet: &Fleet, vm: &v1::Vm, destination: &v1::Host) -> Result<(), ApiError> {
    let Some(spec) = &vm.spec else {
        return Ok(());
    };
    // A spec that is not understood here is the hosts' to judge.
    let Ok(spec) = VmSpec::from_resource(spec) else {
        return Ok(());
    };
    let Some(needed) = NeededPages::of(&spec, memory_of(vm)) else {
        return Ok(());
    };
    let too_few = |free: Option<u64>| free.filter(|free| *free < needed.pages());
    if too_few(needed.free_on(destination)).is_none() {
        return Ok(());
    }
    // The last report may be older than a VM that left: the agent itself decides.
    let fresh = fresh(fleet, &destination.name).await?;
    match too_few(needed.free_on(fresh.as_ref().unwrap_or(destination))) {
        None => Ok(()),
        Some(free) => Err(needed
            .refuse(&format!("{} has", destination.name), free)
            .with("vm", &vm.name)
            .with("host", &destination.name)
            .with("vm_location", "SOURCE")
            .with(
                "advice",
                "name another host, or set more pages aside there (vm.nr_hugepages)",
            )),
    }
}

/// What a host's agent says of it now; `None` when it does not answer.
async fn fresh(fleet: &Fleet, host: &str) -> Result<Option<v1::Host>, ApiError> {
    let channel = fleet.channel(host)?;
    let request = v1::GetHostRequest {
        name: host.to_owned(),
    };
    let asked = ask(ASK, HostServiceClient::new(channel).get_host(request)).await;
    Ok(asked.ok())
}

/// Of ordinary memory there must be as much as all slots of the VM take.
async fn check_memory(fleet: &Fleet, vm: &v1::Vm, destination: &v1::Host) -> Result<(), ApiError> {
    let needed = ordinary_bytes(vm.spec.as_ref(), memory_of(vm));
    let free = |host: &v1::Host| host.memory_bytes.saturating_sub(host.memory_used_bytes);
    if free(destination) >= needed {
        return Ok(());
    }
    // The last report may be older than a VM that left: the agent itself decides.
    let fresh = fresh(fleet, &destination.name).await?;
    let free = free(fresh.as_ref().unwrap_or(destination));
    if free >= needed {
        return Ok(());
    }
    Err(ApiError::new(
        Reason::DstNoMemory,
        format!(
            "{} has {free} bytes free, {} needs {needed}",
            destination.name, vm.name
        ),
    )
    .with("vm", &vm.name)
    .with("host", &destination.name)
    .with("needed_bytes", needed)
    .with("free_bytes", free)
    .with("vm_location", "SOURCE")
    .with("advice", "name another host, or free memory there"))
}

fn check_capabilities(vm: &v1::Vm, destination: &v1::Host) -> Result<(), ApiError> {
    for needed in [Capability::DirtyLog, Capability::VcpuState] {
        if !vm.capabilities.contains(&needed.into()) {
            return Err(ApiError::new(
                Reason::CapabilityMissing,
                format!("{} lacks {}", vm.name, needed.as_str_name()),
            )
            .with("vm", &vm.name)
            .with("capability", needed.as_str_name()));
        }
    }
    let backend = vm
        .spec
        .as_ref()
        .map_or(v1::Backend::Unspecified, |spec| spec.backend());
    if !destination.backends.contains(&backend.into()) {
        return Err(ApiError::new(
            Reason::CapabilityMissing,
            format!(
                "{} runs on {}, which {} lacks: {}",
                vm.name,
                backend
                    .as_str_name()
                    .trim_start_matches("BACKEND_")
                    .to_lowercase(),
                destination.name,
                destination.backend_message
            ),
        )
        .with("vm", &vm.name)
        .with("host", &destination.name)
        .with("capability", backend.as_str_name())
        .with("advice", "name a host with that backend"));
    }
    let paging = vm
        .spec
        .as_ref()
        .and_then(|spec| VmSpec::from_resource(spec).ok());
    let paging = paging.map_or(Paging::Kernel, |spec| spec.paging);
    if let Some(why) = why_not_watched(destination, paging) {
        let hosts = std::iter::once((destination.name.as_str(), why));
        return Err(cannot_watch(&vm.name, hosts)
            .with("vm", &vm.name)
            .with("host", &destination.name)
            .with("vm_location", "SOURCE"));
    }
    Ok(())
}
