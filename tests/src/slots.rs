//! Slot changes, written short, and a guest that uses a slot that was added to it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError,
    v1::{
        self, Backend,
        slot_change::{Change, Create, Delete, Move, SetFlags},
        vm_spec::Guest,
    },
};

use crate::{Fleet, guest::MIB};

/// A slot of zeroes that the guest may write.
#[must_use]
pub fn create(slot: u32, base_gfn: u64, pages: u64) -> v1::SlotChange {
    of(Change::Create(Create {
        slot: Some(v1::Slot {
            slot,
            base_gfn,
            pages,
            ..Default::default()
        }),
    }))
}

/// Takes a slot away.
#[must_use]
pub fn delete(slot: u32) -> v1::SlotChange {
    of(Change::Delete(Delete { slot }))
}

/// Moves a slot.
#[must_use]
pub fn relocate(slot: u32, base_gfn: u64) -> v1::SlotChange {
    of(Change::Move(Move { slot, base_gfn }))
}

/// Makes a slot read-only, or writable.
#[must_use]
pub fn read_only(slot: u32, read_only: bool) -> v1::SlotChange {
    of(Change::SetFlags(SetFlags { slot, read_only }))
}

fn of(change: Change) -> v1::SlotChange {
    v1::SlotChange {
        change: Some(change),
    }
}

/// Makes changes, through the server.
///
/// # Errors
/// What it answers.
pub async fn update(
    fleet: &Fleet,
    vm: &str,
    changes: Vec<v1::SlotChange>,
) -> Result<v1::UpdateSlotsResponse, ApiError> {
    let request = v1::UpdateSlotsRequest {
        vm: vm.into(),
        changes,
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    Ok(memory.update_slots(request).await?.into_inner())
}

/// The table, through the server.
///
/// # Errors
/// What it answers.
pub async fn list(fleet: &Fleet, vm: &str) -> Result<v1::ListSlotsResponse, ApiError> {
    let request = v1::ListSlotsRequest {
        vm: vm.into(),
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    Ok(memory.list_slots(request).await?.into_inner())
}

/// Gives pages back, through the server.
///
/// # Errors
/// What it answers.
pub async fn discard(
    fleet: &Fleet,
    vm: &str,
    gfn: u64,
    pages: u64,
) -> Result<v1::DiscardMemoryResponse, ApiError> {
    let request = v1::DiscardMemoryRequest {
        vm: vm.into(),
        ranges: vec![v1::GfnRange { gfn, pages }],
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    Ok(memory.discard_memory(request).await?.into_inner())
}

/// Where [`slot_user`] expects its slot, and how long that is at least.
pub const USED_GFN: u64 = 0x1000;
/// Pages of 2 MiB.
pub const USED_PAGES: u64 = 512;
/// The frame in its own memory that it writes all the time.
pub const PROGRESS_GFN: u64 = 0x300;

/// What [`slot_user`] does, in code of x86-64. Of 8 MiB the last three pages are the guest's page
/// tables, the last of these its page directory: entry 8 maps 16 MiB.
const X86_64: [&[u8]; 17] = [
    &[0x48, 0xb8, 0xe7, 0, 0, 1, 0, 0, 0, 0], // mov rax, 0x10000e7
    &[0xbb, 0x40, 0xf0, 0x7f, 0],             // mov ebx, 0x7ff040
    &[0x48, 0x89, 0x03],                      // mov [rbx], rax
    &[0xbb, 0, 0, 0, 1],                      // mov ebx, 0x1000000
    &[0xbe, 0, 0, 0x30, 0],                   // mov esi, 0x300000
    &[0x31, 0xc9],                            // xor ecx, ecx
    &[0x48, 0x8b, 0x03],                      // again: mov rax, [rbx]
    &[0x3d, 0xa7, 0x51, 0, 0],                // cmp eax, 0x51a7
    &[0x74, 0x0b],                            // je count
    &[0x85, 0xc0],                            // test eax, eax
    &[0x75, 0x13],                            // jne bad
    &[0x48, 0xc7, 0x03, 0xa7, 0x51, 0, 0],    // mov qword [rbx], 0x51a7
    &[0x48, 0xff, 0xc1],                      // count: inc rcx
    &[0x48, 0x89, 0x4b, 0x08],                // mov [rbx + 8], rcx
    &[0x48, 0x89, 0x0e],                      // mov [rsi], rcx
    &[0xeb, 0xdf],                            // jmp again
    &[0x0f, 0x0b],                            // bad: ud2
];

/// The same in code of RISC-V, whose guests have no page tables.
const RISCV64: [u32; 14] = [
    0x0100_0437, // lui s0, 0x1000
    0x0030_04b7, // lui s1, 0x300
    0x0000_5337, // lui t1, 5
    0x1a73_031b, // addiw t1, t1, 0x1a7
    0x0000_0293, // li t0, 0
    0x0004_3503, // again: ld a0, 0(s0)
    0x0065_0663, // beq a0, t1, count
    0x0005_1c63, // bnez a0, bad
    0x0064_3023, // sd t1, 0(s0)
    0x0012_8293, // count: addi t0, t0, 1
    0x0054_3423, // sd t0, 8(s0)
    0x0054_b023, // sd t0, 0(s1)
    0xfe5f_f06f, // j again
    0x0010_0073, // bad: ebreak
];

/// Why no image of [`slot_user`] runs here.
#[must_use]
pub fn no_slot_user() -> Option<&'static str> {
    let known = cfg!(any(target_arch = "x86_64", target_arch = "riscv64"));
    (!known).then_some("the guest of this test is code of x86-64 or RISC-V")
}

/// A raw image that reads and writes the first page at [`USED_GFN`] without a pause. A word there
/// is what it wrote, or 0, and then it writes it again; anything else ends it, as does an access
/// where no memory is. Another word there, and one in its own memory, count.
#[must_use]
pub fn slot_user() -> v1::VmSpec {
    let image = if cfg!(target_arch = "riscv64") {
        RISCV64.iter().flat_map(|word| word.to_le_bytes()).collect()
    } else {
        X86_64.concat()
    };
    v1::VmSpec {
        memory_bytes: 8 * MIB,
        vcpus: 1,
        backend: Backend::Kvm.into(),
        guest: Some(Guest::RawImage(v1::RawImage {
            image,
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// Creates a VM of [`slot_user`], gives it slot 5 at [`USED_GFN`], and starts it.
///
/// # Errors
/// What the server answers.
pub async fn run_slot_user(fleet: &Fleet, id: &str, host: &str) -> anyhow::Result<v1::Vm> {
    let mut vms = fleet.vms(&fleet.server());
    let create_vm = v1::CreateVmRequest {
        vm_id: id.into(),
        spec: Some(slot_user()),
        host: format!("hosts/{host}"),
        validate_only: false,
    };
    let vm = vms.create_vm(create_vm).await?.into_inner();
    update(fleet, &vm.name, vec![create(5, USED_GFN, USED_PAGES)]).await?;
    let start = v1::StartVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    Ok(vms.start_vm(start).await?.into_inner())
}

/// Waits until the guest of [`slot_user`] has gone round once more, and returns the frames that it
/// wrote since the last call.
///
/// # Errors
/// When it has not in time, or has ended.
pub async fn goes_round(
    fleet: &Fleet,
    vm: &str,
    batch: &mut u64,
) -> anyhow::Result<Vec<v1::GfnRange>> {
    for _ in 0..1000 {
        let request = v1::HarvestDirtyPagesRequest {
            vm: vm.into(),
            cursor: "round".into(),
            acknowledge_batch: *batch,
            ..Default::default()
        };
        let mut memory = fleet.memory(&fleet.server());
        let dirty = memory.harvest_dirty_pages(request).await;
        let dirty = dirty.context("dirty pages")?.into_inner();
        *batch = dirty.batch;
        let has =
            |range: &v1::GfnRange| (range.gfn..range.gfn + range.pages).contains(&PROGRESS_GFN);
        if dirty.ranges.iter().any(has) {
            return Ok(dirty.ranges);
        }
        let now = fleet.vm(&fleet.agent("host-a"), vm).await;
        if let Ok(now) = now {
            ensure!(now.state() == v1::vm::State::Running, "{now:#?}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("the guest of {vm} does nothing")
}
