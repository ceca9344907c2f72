//! The oracle of the kernel's mmu_stress_test, through the API: several vCPUs fill memory of many
//! slots, each its own, over and over; slots lose and get back the right to be written, mappings
//! are dropped, slots swap places, are made anew, and lose their pages. Each vCPU faults on what
//! it has lost, and goes on; what it then writes is there, and is told.
//!
//! The kernel's test changes protection by mprotect, and sees a write refused as a failure of
//! KVM_RUN. Here a slot becomes read-only, and a refused write is dropped and counted; memory that
//! is taken away for good ends the guest, by name.
//!
//! The guest of the test on KVM is x86-64 code that needs slots added to its VM; on every backend
//! memstress, in memory of its own, has its mappings dropped.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, Backend, vm_spec::Guest};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, busy},
    memory_file::MemoryFile,
    scene,
    slots::{create, delete, discard, read_only, relocate, update},
    wait::eventually,
};

slat_tests::on_each_backend!(every_vcpu_faults_again_after_its_mappings_are_dropped);

const VCPUS: u64 = 4;
/// Slots of a vCPU, one behind the other, and pages of each.
const SLOTS: u64 = 8;
const PAGES: u64 = 1024;
/// Pages of a vCPU.
const OWN: u64 = SLOTS * PAGES;
/// Where the first vCPU's memory begins, frames.
const BASE: u64 = 0x1_0000;
/// Where the guest says how it fares: 64 bytes a vCPU.
const WORDS: u64 = 0x30_0000;

/// Each vCPU goes over its pages: writes the number of the round, reads it again, and counts what
/// it does not find. At the end of a round it notes how many those were, then the round.
fn writers() -> v1::VmSpec {
    let image = [
        // The memory it was created with is mapped; the rest of the first GiB is not yet.
        &[0xb9, 0xff, 0x01, 0, 0][..],    // mov ecx, 511
        &[0xba, 0, 0xf0, 0x7f, 0],        // mov edx, 0x7ff000, its page directory
        &[0x48, 0x89, 0xc8],              // map: mov rax, rcx
        &[0x48, 0xc1, 0xe0, 0x15],        // shl rax, 21
        &[0x0d, 0xe7, 0, 0, 0],           // or eax, 0xe7
        &[0x48, 0x89, 0x04, 0xca],        // mov [rdx + rcx * 8], rax
        &[0xff, 0xc9],                    // dec ecx
        &[0x83, 0xf9, 0x03],              // cmp ecx, 3
        &[0x75, 0xe9],                    // jne map
        &[0x41, 0x89, 0xf8],              // mov r8d, edi
        &[0x49, 0xc1, 0xe0, 0x19],        // shl r8, 25, bytes of a vCPU
        &[0x49, 0x81, 0xc0, 0, 0, 0, 16], // add r8, 0x10000000
        &[0x89, 0xfe],                    // mov esi, edi
        &[0xc1, 0xe6, 0x06],              // shl esi, 6
        &[0x81, 0xc6, 0, 0, 0x30, 0],     // add esi, 0x300000
        &[0x45, 0x31, 0xc9],              // xor r9d, r9d
        &[0x49, 0xff, 0xc1],              // round: inc r9
        &[0x45, 0x31, 0xd2],              // xor r10d, r10d
        &[0x4c, 0x89, 0xc3],              // mov rbx, r8
        &[0xb9, 0, 0x20, 0, 0],           // mov ecx, 8192
        &[0x4c, 0x89, 0x0b],              // page: mov [rbx], r9
        &[0x4c, 0x39, 0x0b],              // cmp [rbx], r9
        &[0x74, 0x03],                    // je ok
        &[0x49, 0xff, 0xc2],              // inc r10
        &[0x48, 0x81, 0xc3, 0, 16, 0, 0], // ok: add rbx, 4096
        &[0xff, 0xc9],                    // dec ecx
        &[0x75, 0xea],                    // jnz page
        &[0x4c, 0x89, 0x56, 0x08],        // mov [rsi + 8], r10
        &[0x4c, 0x89, 0x0e],              // mov [rsi], r9
        &[0xeb, 0xd3],                    // jmp round
    ]
    .concat();
    v1::VmSpec {
        memory_bytes: 8 * MIB,
        vcpus: VCPUS as u32,
        backend: Backend::Kvm.into(),
        guest: Some(Guest::RawImage(v1::RawImage {
            image,
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn slot(vcpu: u64, index: u64) -> u32 {
    (8 + vcpu * SLOTS + index) as u32
}

fn gfn(vcpu: u64, index: u64) -> u64 {
    BASE + vcpu * OWN + index * PAGES
}

fn each(of: impl Fn(u64, u64) -> v1::SlotChange) -> Vec<v1::SlotChange> {
    let all = (0..VCPUS).flat_map(|vcpu| (0..SLOTS).map(move |index| (vcpu, index)));
    all.map(|(vcpu, index)| of(vcpu, index)).collect()
}

struct Scene<'a> {
    fleet: &'a Fleet,
    vm: String,
    memory: MemoryFile,
    batch: u64,
}

impl Scene<'_> {
    fn rounds(&self) -> anyhow::Result<Vec<u64>> {
        let word = |vcpu| self.memory.word(WORDS + vcpu * 64);
        (0..VCPUS).map(word).collect()
    }

    /// Waits until every vCPU has gone over all its pages since the call; returns what each did not
    /// find as it wrote it.
    async fn go_round(&self, what: &str) -> anyhow::Result<Vec<u64>> {
        // The round that a vCPU is in began before.
        let before = self.rounds()?;
        eventually(what, || async {
            let now = self.rounds()?;
            let done = now
                .iter()
                .zip(&before)
                .all(|(now, before)| *now >= before + 2);
            let vm = self.fleet.vm(&self.fleet.agent("host-a"), &self.vm).await?;
            ensure!(done, "rounds {before:?}, now {now:?}: {vm:#?}");
            Ok(())
        })
        .await?;
        let word = |vcpu| self.memory.word(WORDS + vcpu * 64 + 8);
        (0..VCPUS).map(word).collect()
    }

    async fn change(&self, changes: Vec<v1::SlotChange>) -> anyhow::Result<()> {
        update(self.fleet, &self.vm, changes).await?;
        Ok(())
    }

    async fn all_found(&self, what: &str) -> anyhow::Result<()> {
        let lost = self.go_round(what).await?;
        ensure!(lost.iter().all(|lost| *lost == 0), "{what}: {lost:?}");
        Ok(())
    }

    /// The frames of the vCPUs' own memory that were told since the last call.
    async fn told(&mut self) -> anyhow::Result<BTreeSet<u64>> {
        let mut frames = BTreeSet::new();
        loop {
            let request = v1::HarvestDirtyPagesRequest {
                vm: self.vm.clone(),
                acknowledge_batch: self.batch,
                ..Default::default()
            };
            let mut memory = self.fleet.memory(&self.fleet.server());
            let answer = memory.harvest_dirty_pages(request).await?.into_inner();
            self.batch = answer.batch;
            for range in &answer.ranges {
                frames.extend(range.gfn..range.gfn + range.pages);
            }
            if !answer.more {
                break;
            }
        }
        ensure!(
            frames
                .iter()
                .all(|frame| *frame < 2048 || (BASE..BASE + VCPUS * OWN).contains(frame)),
            "frames of no slot"
        );
        Ok(frames.split_off(&BASE))
    }

    async fn faults(&self) -> anyhow::Result<Option<u64>> {
        let vm = self.fleet.vm(&self.fleet.agent("host-a"), &self.vm).await?;
        Ok(vm.mmu_stats.context("no statistics")?.faults_taken)
    }

    async fn drop_mappings(&self) -> anyhow::Result<()> {
        drop_mappings(self.fleet, &self.vm).await
    }
}

async fn drop_mappings(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::InvalidateMemoryRequest {
        vm: vm.to_owned(),
        ..Default::default()
    };
    fleet
        .memory(&fleet.server())
        .invalidate_memory(request)
        .await?;
    Ok(())
}

#[test]
fn every_vcpu_faults_on_what_it_lost_and_goes_on() {
    if cfg!(not(target_arch = "x86_64")) {
        println!("SKIPPED: the guest of this test is x86-64 code");
        return;
    }
    scene::run(Layout::two(Backend::Kvm), async |fleet| {
        let mut scene = begin(fleet).await?;
        scene.all_found("all memory is filled").await?;
        protect(&scene).await?;
        drop_and_move(&scene).await?;
        scene.told().await?;
        logged(&mut scene).await?;

        // What is taken away for good ends the guest, by name.
        scene.change(vec![delete(slot(2, 3))]).await?;
        let failed = |vm: &v1::Vm| vm.state() == v1::vm::State::Failed;
        let agent = fleet.agent("host-a");
        let ended = fleet.vm_until(&agent, &scene.vm, "it ends", failed).await?;
        ensure!(
            ended.state_message.contains("where no slot is"),
            "{ended:#?}"
        );
        Ok(())
    });
}

async fn begin(fleet: &Fleet) -> anyhow::Result<Scene<'_>> {
    let mut vms = fleet.vms(&fleet.server());
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(writers()),
        host: "hosts/host-a".into(),
        validate_only: false,
    };
    let vm = vms.create_vm(request).await?.into_inner();
    let slots = each(|vcpu, index| create(slot(vcpu, index), gfn(vcpu, index), PAGES));
    update(fleet, &vm.name, slots).await?;
    let request = v1::StartVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    let vm = vms.start_vm(request).await?.into_inner();
    Ok(Scene {
        fleet,
        memory: MemoryFile::of(vm.pid, 0)?,
        vm: vm.name,
        batch: 0,
    })
}

/// All slots of a vCPU cannot be written, one of another's, and then all can again.
async fn protect(scene: &Scene<'_>) -> anyhow::Result<()> {
    for round in 0..3 {
        let (whole, part) = (round % VCPUS, (round + 1) % VCPUS);
        let toggle = |to| {
            let mut changes: Vec<_> = (0..SLOTS)
                .map(|index| read_only(slot(whole, index), to))
                .collect();
            changes.push(read_only(slot(part, round), to));
            changes
        };
        scene.change(toggle(true)).await?;
        let lost = scene
            .go_round("vCPUs go on without some of their writes")
            .await?;
        let expected: Vec<u64> = (0..VCPUS)
            .map(|vcpu| match vcpu {
                vcpu if vcpu == whole => OWN,
                vcpu if vcpu == part => PAGES,
                _ => 0,
            })
            .collect();
        ensure!(lost == expected, "{lost:?}, not {expected:?}");
        let vm = scene
            .fleet
            .vm(&scene.fleet.agent("host-a"), &scene.vm)
            .await?;
        let dropped = vm.mmu_stats.and_then(|stats| stats.read_only_writes);
        ensure!(
            dropped.is_some_and(|dropped| dropped >= OWN),
            "{dropped:?} dropped"
        );
        scene.change(toggle(false)).await?;
        scene.all_found("vCPUs write again").await?;
    }
    Ok(())
}

async fn drop_and_move(scene: &Scene<'_>) -> anyhow::Result<()> {
    for _ in 0..3 {
        let before = scene.faults().await?;
        scene.drop_mappings().await?;
        scene.all_found("vCPUs fault everything in again").await?;
        if let (Some(before), Some(after)) = (before, scene.faults().await?) {
            ensure!(after > before, "no vCPU has faulted");
        }
    }
    // Of the first vCPU and the last, by way of a third place.
    let swap = vec![
        relocate(slot(0, 0), 1 << 20),
        relocate(slot(3, 7), gfn(0, 0)),
        relocate(slot(0, 0), gfn(3, 7)),
    ];
    scene.change(swap).await?;
    scene.all_found("two slots have swapped places").await?;
    let back = vec![
        relocate(slot(0, 0), 1 << 20),
        relocate(slot(3, 7), gfn(3, 7)),
        relocate(slot(0, 0), gfn(0, 0)),
    ];
    scene.change(back).await?;
    let anew = (0..VCPUS).flat_map(|vcpu| {
        let number = slot(vcpu, vcpu);
        [delete(number), create(number, gfn(vcpu, vcpu), PAGES)]
    });
    scene.change(anew.collect()).await?;
    scene.all_found("each vCPU has a slot that is new").await?;
    let freed = discard(scene.fleet, &scene.vm, gfn(1, 2), 3 * PAGES).await?;
    ensure!(freed.pages == 3 * PAGES, "{freed:?}");
    scene
        .all_found("three slots of a vCPU have lost their pages")
        .await
}

/// With the dirty log on: what vCPUs fault on is told, exactly.
async fn logged(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    let all: BTreeSet<u64> = (BASE..BASE + VCPUS * OWN).collect();
    for _ in 0..3 {
        scene.drop_mappings().await?;
        scene.all_found("vCPUs fault again, and are logged").await?;
        let told = scene.told().await?;
        ensure!(told == all, "{} of {} pages told", told.len(), all.len());
    }
    let kept = |index: u64| index.is_multiple_of(2);
    let odd = |to| each(move |vcpu, index| read_only(slot(vcpu, index), to && !kept(index)));
    scene.change(odd(true)).await?;
    scene.told().await?;
    let lost = scene.go_round("vCPUs write to every other slot").await?;
    ensure!(lost.iter().all(|lost| *lost == OWN / 2), "{lost:?}");
    let writable = |frame: &u64| kept((frame - BASE) / PAGES % SLOTS);
    let told = scene.told().await?;
    let expected: BTreeSet<u64> = all.iter().copied().filter(writable).collect();
    ensure!(
        told == expected,
        "{} of {} pages told",
        told.len(),
        expected.len()
    );
    scene.change(odd(false)).await?;
    scene.all_found("vCPUs write everywhere").await?;
    let told = scene.told().await?;
    ensure!(told == all, "{} of {} pages told", told.len(), all.len());
    Ok(())
}

async fn every_vcpu_faults_again_after_its_mappings_are_dropped(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let spec = busy(fleet.backend(), 128, 8, None);
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let agent = fleet.agent("host-a");
    let mut passes = 0;
    for _ in 0..5 {
        drop_mappings(fleet, &vm.name).await?;
        let further = |vm: &v1::Vm| vm.guest_counters.is_some_and(|seen| seen.passes > passes);
        let now = fleet
            .vm_until(&agent, &vm.name, "the vCPUs go on", further)
            .await?;
        let counters = now.guest_counters.context("no counters")?;
        ensure!(counters.errors == 0, "{counters:?}");
        passes = counters.passes;
    }
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}
