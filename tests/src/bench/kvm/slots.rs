//! Slot calls through gRPC beside KVM_SET_USER_MEMORY_REGION alone: one change a call, by the VM's
//! socket and by its agent, and a thousand changes in one call. By its socket a VM is measured
//! twice: with its process and the plain ioctl on one processor (see [`affinity`]), which is what
//! the goal is held against, and with both where the scheduler puts them.
//!
//! No vCPU runs. The API's calls check, map new memory, keep the dirty log and the table; the ioctl
//! has its memory mapped before. A change of flags is two ioctls: the kernel takes no other.

use std::time::Instant;

use rustix::thread::CpuSet;
use slat_proto::v1::{self, Backend};
use slat_vmm::RawVm;

use super::{
    HOST, Lab, Memory,
    plain::{ALL, Change, PAGES, Plain},
};
use crate::{
    bench::{
        affinity,
        rows::{Goal, Row},
    },
    guest::{MIB, busy},
};

/// Changes of one call.
const BATCH: u32 = 1000;
const MEMORY_MIB: u64 = 64;
/// Single calls for each of the runs asked for.
const CALLS: u32 = 40;

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

/// How calls come to the VM's process, and where that runs.
struct Way {
    memory: Memory,
    cpus: CpuSet,
    rows: Vec<Row>,
}

impl Way {
    fn new(words: &str, memory: Memory, cpus: CpuSet, goal: Option<Goal>) -> Self {
        Self {
            memory,
            cpus,
            rows: rows(words, goal),
        }
    }
}

/// One for each change, of calls that come in this way.
fn rows(words: &str, goal: Option<Goal>) -> Vec<Row> {
    let row = |(change, word): (Change, _)| {
        Row::new(format!("{word} a slot, {words}"), change.ioctls(), goal)
    };
    ALL.into_iter().map(row).collect()
}

/// All rows.
///
/// # Errors
/// When something refuses.
pub async fn measure(lab: &Lab) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, MEMORY_MIB, 1, Some(0));
    let vm = lab.create("slots", spec).await?;
    let beside = Plain::new(RawVm::new(MEMORY_MIB * MIB, BATCH, PAGES)?)?;
    let process = lab.fleet.vm_process(HOST, &vm.name)?.pid();
    let (one, others, all) = (
        affinity::first()?,
        affinity::others()?,
        affinity::allowed()?,
    );
    let by_agent = lab.fleet.memory(&lab.fleet.agent(HOST));
    let goal = Some(Goal::Over(150e3));
    let mut ways = [
        Way::new("by the VM's socket", lab.memory(&vm), one, goal),
        Way::new(
            "by the socket, where the scheduler puts it",
            lab.memory(&vm),
            all,
            None,
        ),
        Way::new("by the agent", by_agent, all, goal),
    ];
    let mut inside = rows("in the VM's process", goal);
    let warm_up = CALLS;
    // One way after the other: a call is not to pay for what the agent's left in the caches.
    for way in &mut ways {
        affinity::keep_process(process, &way.cpus)?;
        affinity::keep(if way.cpus == one { &others } else { &all })?;
        for round in 0..lab.runs * CALLS + warm_up {
            for (number, (change, _)) in ALL.into_iter().enumerate() {
                let (slat, within) = call(&mut way.memory, &vm, vec![change.message(0)]).await?;
                let peer = beside.time(change, 1, &way.cpus)?;
                if round < warm_up {
                    continue;
                }
                way.rows[number].add(slat, peer);
                if way.cpus == one {
                    inside[number].add(within, peer);
                }
            }
        }
    }

    let mut batches: Vec<Row> = ALL
        .into_iter()
        .map(|(change, word)| {
            let name = format!("{word} {BATCH} slots in one call");
            Row::new(
                name,
                format!("{} a slot", change.ioctls()),
                Some(Goal::AtMost(1.3)),
            )
        })
        .collect();
    affinity::keep_process(process, &one)?;
    for round in 0..=lab.runs * 2 {
        for (row, (change, _)) in batches.iter_mut().zip(ALL) {
            let changes = (0..BATCH).map(|index| change.message(index)).collect();
            let (slat, _) = call(&mut ways[0].memory, &vm, changes).await?;
            let peer = beside.time(change, BATCH, &one)?;
            if round > 0 {
                row.add(slat, peer);
            }
        }
    }
    lab.delete(&vm).await?;
    let ways = ways.into_iter().flat_map(|way| way.rows);
    Ok(inside.into_iter().chain(ways).chain(batches).collect())
}
