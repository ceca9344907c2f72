//! Guests whose memory is watched: saved, restored lazily, forked, paged by the agent.

mod deaths;
mod ends;
mod forks;
mod full_disk;
mod oracles;
mod paged;
mod prefault;
mod saves;
mod sources;
mod storm;

use anyhow::{Context as _, ensure};
use slat_proto::v1;
use slat_tests::Fleet;

/// Pauses a VM and digests its memory.
async fn frozen_digest(fleet: &Fleet, vm: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let request = v1::PauseVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).pause_vm(request).await?;
    digest(fleet, vm).await
}

/// Digests the memory of a VM that does not run.
async fn digest(fleet: &Fleet, vm: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let request = v1::DigestMemoryRequest {
        vm: vm.into(),
        ..Default::default()
    };
    let answer = fleet.memory(&fleet.server()).digest_memory(request).await?;
    let slots = answer.into_inner().slots;
    Ok(slots.into_iter().map(|slot| slot.digest.into()).collect())
}

async fn resume(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::ResumeVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).resume_vm(request).await?;
    Ok(())
}

async fn delete(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::DeleteVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).delete_vm(request).await?;
    Ok(())
}

/// A guest that writes all it can, paged by the agent.
fn watched(memory_mib: u64, vcpus: u32, rate: Option<u64>) -> v1::VmSpec {
    v1::VmSpec {
        paging: v1::Paging::Agent.into(),
        ..slat_tests::guest::busy(v1::Backend::Kvm, memory_mib, vcpus, rate)
    }
}

fn status(vm: &v1::Vm) -> anyhow::Result<&v1::PagingStatus> {
    vm.paging
        .as_ref()
        .with_context(|| format!("it is not watched: {vm:#?}"))
}

/// The guest has found nothing that is not as it wrote it.
fn sound(vm: &v1::Vm) -> anyhow::Result<()> {
    let counters = vm.guest_counters.as_ref().context("no counters")?;
    ensure!(counters.errors == 0, "{vm:#?}");
    Ok(())
}
