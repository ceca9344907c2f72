//! `cargo xtask bench kvm`: what Slat's calls cost beside the kernel calls below them. A VM of a
//! fleet is used through the API, by its process's own socket and by its agent; beside it, in
//! turns, a VM in this process by plain ioctls ([`slat_vmm::RawVm`]).
//!
//! * [`floor`]: calls that do nothing.
//! * [`slots`]: the slot table.
//! * [`harvest`]: dirty pages, and rings beside bitmaps.
//! * [`guest`]: what readers of dirty pages cost a guest, and what its memory costs it.
//! * [`populate`]: new memory.
//!
//! Sizes that memory must hold are chosen by what is free, and stand in the rows' names.

pub mod floor;
pub mod guest;
pub mod harvest;
mod plain;
pub mod populate;
pub mod slots;

use anyhow::{Context as _, ensure};
use slat_proto::{
    transport::{Address, TracedChannel},
    v1::{self, memory_service_client::MemoryServiceClient},
};
use slat_record::dir::VmDir;

use crate::Fleet;

/// Where VMs are.
pub const HOST: &str = "host-a";
/// Where those are that are held against another VM: each host gives away what the machine has.
pub const OTHER: &str = "host-b";

pub(super) type Memory = MemoryServiceClient<TracedChannel>;

/// What every measurement needs.
#[derive(Debug)]
pub struct Lab {
    /// Has [`HOST`] and [`OTHER`].
    pub fleet: Fleet,
    /// Samples of what takes long; of what does not there are more.
    pub runs: u32,
}

impl Lab {
    /// Builds a VM on [`HOST`] and leaves it stopped.
    pub(super) async fn create(&self, id: &str, spec: v1::VmSpec) -> anyhow::Result<v1::Vm> {
        self.create_on(HOST, id, spec).await
    }

    /// Builds a VM and leaves it stopped.
    pub(super) async fn create_on(
        &self,
        host: &str,
        id: &str,
        spec: v1::VmSpec,
    ) -> anyhow::Result<v1::Vm> {
        let request = v1::CreateVmRequest {
            vm_id: id.into(),
            spec: Some(spec),
            host: format!("hosts/{host}"),
            validate_only: false,
        };
        let mut vms = self.fleet.vms(&self.fleet.server());
        Ok(vms.create_vm(request).await?.into_inner())
    }

    pub(super) async fn start(&self, vm: &v1::Vm) -> anyhow::Result<()> {
        let request = v1::StartVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        self.vms(vm).start_vm(request).await?;
        Ok(())
    }

    pub(super) async fn pause(&self, vm: &v1::Vm) -> anyhow::Result<()> {
        let request = v1::PauseVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        self.vms(vm).pause_vm(request).await?;
        Ok(())
    }

    pub(super) async fn resume(&self, vm: &v1::Vm) -> anyhow::Result<()> {
        let request = v1::ResumeVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        self.vms(vm).resume_vm(request).await?;
        Ok(())
    }

    pub(super) async fn delete(&self, vm: &v1::Vm) -> anyhow::Result<()> {
        let request = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        let mut vms = self.fleet.vms(&self.fleet.server());
        vms.delete_vm(request).await?;
        self.fleet.vm_dir_gone(host_of(vm), &vm.name).await
    }

    /// The endpoint of the VM's own process.
    fn socket(&self, vm: &v1::Vm) -> Address {
        Address::Unix(VmDir::new(self.fleet.vm_dir(host_of(vm), &vm.name)).socket())
    }

    fn vms(&self, vm: &v1::Vm) -> v1::vm_service_client::VmServiceClient<TracedChannel> {
        self.fleet.vms(&self.socket(vm))
    }

    /// The memory service of the VM's own process.
    pub(super) fn memory(&self, vm: &v1::Vm) -> Memory {
        self.fleet.memory(&self.socket(vm))
    }

    /// The guest's own counters now.
    pub(super) async fn counters(&self, vm: &v1::Vm) -> anyhow::Result<v1::GuestCounters> {
        let vm = self.fleet.vm(&self.socket(vm), &vm.name).await?;
        let counters = vm.guest_counters.context("no counters")?;
        ensure!(counters.errors == 0, "the guest found errors: {counters:?}");
        Ok(counters)
    }
}

fn host_of(vm: &v1::Vm) -> &str {
    vm.host.strip_prefix("hosts/").unwrap_or(&vm.host)
}

/// MiB that programs can have now.
///
/// # Errors
/// When the kernel does not say.
pub fn available_mib() -> anyhow::Result<u64> {
    meminfo_mib("MemAvailable:")
}

/// MiB that a host of the fleet gives away: most of what the machine has.
///
/// # Errors
/// When the kernel does not say.
pub fn host_mib() -> anyhow::Result<u64> {
    Ok(meminfo_mib("MemTotal:")? / 10 * 9)
}

fn meminfo_mib(field: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib: u64 = line
        .and_then(|line| line.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse().ok())
        .with_context(|| format!("{field} in /proc/meminfo"))?;
    Ok(kib / 1024)
}

/// The most of `wanted` MiB, halved as often as needed, of which so many fit into what is free.
#[must_use]
pub fn fitting(wanted_mib: u64, times: u64, available_mib: u64) -> u64 {
    let mut size = wanted_mib;
    // A fifth, and what the fleet itself takes, stays free.
    while size > 64 && size * times + 512 > available_mib / 5 * 4 {
        size /= 2;
    }
    size
}

/// A size for people.
pub(super) fn size(mib: u64) -> String {
    if mib.is_multiple_of(1024) {
        format!("{} GiB", mib / 1024)
    } else {
        format!("{mib} MiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_halved_until_they_fit() {
        assert_eq!(fitting(16_384, 2, 64 << 10), 16_384);
        assert_eq!(fitting(16_384, 2, 22 << 10), 8192);
        assert_eq!(fitting(16_384, 2, 0), 64);
        assert_eq!((size(4096), size(768)), ("4 GiB".into(), "768 MiB".into()));
    }
}
