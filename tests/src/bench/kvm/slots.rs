//! Slot calls through gRPC beside KVM_SET_USER_MEMORY_REGION alone: one change a call, by the VM's
//! socket and by its agent, and a thousand changes in one call.
//!
//! No vCPU runs. The API's calls check, map new memory, keep the dirty log and the table; the ioctl
//! has its memory mapped before. A change of flags is two ioctls: the kernel takes no other.

use std::time::Instant;

use slat_proto::v1::{self, Backend};
use slat_vmm::{RawVm, SpareSlot};

use super::{HOST, Lab, Memory};
use crate::{
    bench::rows::{Goal, Row},
    guest::{MIB, busy},
    slots::{create, delete, read_only, relocate},
};

/// Changes of one call.
const BATCH: u32 = 1000;
const PAGES: u64 = 1;
const PLACE: u64 = 1 << 20;
const ELSEWHERE: u64 = 3 << 20;
const MEMORY_MIB: u64 = 64;
/// Single calls for each of the runs asked for.
const CALLS: u32 = 40;

#[derive(Clone, Copy)]
enum Change {
    Create,
    Move,
    Flags,
    Delete,
}

/// In this order, so that each finds what it needs.
const ALL: [(Change, &str); 4] = [
    (Change::Create, "create"),
    (Change::Move, "move"),
    (Change::Flags, "set read-only"),
    (Change::Delete, "delete"),
];

fn at(base: u64, index: u32) -> u64 {
    base + u64::from(index) * 2 * PAGES
}

impl Change {
    /// Through the API, of the slot `index`.
    fn message(self, index: u32) -> v1::SlotChange {
        let slot = index + 1;
        match self {
            Self::Create => create(slot, at(PLACE, index), PAGES),
            Self::Move => relocate(slot, at(ELSEWHERE, index)),
            Self::Flags => read_only(slot, true),
            Self::Delete => delete(slot),
        }
    }

    fn raw(self, vm: &RawVm, index: u32) -> anyhow::Result<()> {
        let slot = |base, read_only| SpareSlot {
            index,
            base_gfn: at(base, index),
            read_only,
        };
        match self {
            Self::Create => vm.set(slot(PLACE, false))?,
            Self::Move => vm.set(slot(ELSEWHERE, false))?,
            Self::Flags => {
                vm.delete(slot(ELSEWHERE, false))?;
                vm.set(slot(ELSEWHERE, true))?;
            }
            Self::Delete => vm.delete(slot(ELSEWHERE, true))?,
        }
        Ok(())
    }
}

/// Nanoseconds of one call, and of what the VM's process did for it.
async fn call(
    memory: &mut Memory,
    vm: &v1::Vm,
    changes: Vec<v1::SlotChange>,
) -> anyhow::Result<(f64, f64)> {
    let request = v1::UpdateSlotsRequest {
        vm: vm.name.clone(),
        changes,
        ..Default::default()
    };
    let begun = Instant::now();
    let answer = memory.update_slots(request).await?;
    let whole = begun.elapsed().as_nanos() as f64;
    Ok((whole, answer.into_inner().duration_nanos as f64))
}

fn raw(vm: &RawVm, change: Change, count: u32) -> anyhow::Result<f64> {
    let begun = Instant::now();
    for index in 0..count {
        change.raw(vm, index)?;
    }
    Ok(begun.elapsed().as_nanos() as f64)
}

/// All rows.
///
/// # Errors
/// When something refuses.
pub async fn measure(lab: &Lab) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, MEMORY_MIB, 1, Some(0));
    let vm = lab.create("slots", spec).await?;
    let beside = RawVm::new(MEMORY_MIB * MIB, BATCH, PAGES)?;
    let mut endpoints = [
        (lab.memory(&vm), "by the VM's socket"),
        (lab.fleet.memory(&lab.fleet.agent(HOST)), "by the agent"),
    ];
    let calls = |name| {
        if matches!(name, Change::Flags) {
            "two ioctls"
        } else {
            "the ioctl"
        }
    };

    let places = ["in the VM's process", endpoints[0].1, endpoints[1].1];
    let mut rows = Vec::new();
    for place in places {
        for (change, word) in ALL {
            let name = format!("{word} a slot, {place}");
            rows.push(Row::new(name, calls(change), Some(Goal::Over(150e3))));
        }
    }
    let warm_up = CALLS;
    for round in 0..lab.runs * CALLS + warm_up {
        for (which, (memory, _)) in endpoints.iter_mut().enumerate() {
            for (number, (change, _)) in ALL.into_iter().enumerate() {
                let (slat, inside) = call(memory, &vm, vec![change.message(0)]).await?;
                let peer = raw(&beside, change, 1)?;
                if round < warm_up {
                    continue;
                }
                if which == 0 {
                    rows[number].add(inside, peer);
                }
                rows[(which + 1) * ALL.len() + number].add(slat, peer);
            }
        }
    }

    let mut batches: Vec<Row> = ALL
        .into_iter()
        .map(|(change, word)| {
            let name = format!("{word} {BATCH} slots in one call");
            Row::new(
                name,
                format!("{} a slot", calls(change)),
                Some(Goal::AtMost(1.3)),
            )
        })
        .collect();
    for round in 0..=lab.runs * 2 {
        for (row, (change, _)) in batches.iter_mut().zip(ALL) {
            let changes = (0..BATCH).map(|index| change.message(index)).collect();
            let (slat, _) = call(&mut endpoints[0].0, &vm, changes).await?;
            let peer = raw(&beside, change, BATCH)?;
            if round > 0 {
                row.add(slat, peer);
            }
        }
    }
    rows.extend(batches);
    lab.delete(&vm).await?;
    Ok(rows)
}
