//! One fleet with hosts of both kinds under a server on x86-64: each runs its own VMs and says what
//! its kernel counts; none takes a VM of the other's.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::scene::{ACCEPTED, Outcome, Scene};
use crate::lab::{
    answer::number,
    fleet::{Fleet, VM},
    machine::Machine,
};

/// The second VM.
const OTHER: &str = "db";

/// VMs of both kinds of host run beside each other. Counters come from each kernel's own
/// statistics, and page faults of RISC-V from a tracepoint that each confined process counts. What
/// a kernel does not count is absent and said to be missing, not zero.
pub(crate) fn each_runs_its_own(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let backend = scene.backend;
    let machines = [1, 2].map(|host| scene.hosts.plan().machine(host));
    let mut fleet = Fleet::start(scene.hosts)?;
    fleet.create(VM, 1, backend, [64, 4])?;
    fleet.create(OTHER, 2, backend, [64, 4])?;
    let mut said = Vec::new();
    for (host, vm, machine) in [(1, VM, machines[0]), (2, OTHER, machines[1])] {
        let seen = fleet.sound(vm, host)?;
        counted(machine, &seen["mmuStats"]).with_context(|| format!("{vm}: {seen:#}"))?;
        let gaps = gaps(&seen["mmuStats"]);
        said.push(format!(
            "{}: {} page faults by {}, lacks {} counters",
            machine.name(),
            seen["mmuStats"]["faultsTaken"].as_str().unwrap_or("?"),
            word(&seen["mmuStats"]["faultsSource"]),
            gaps.len()
        ));
    }
    fleet.delete(OTHER)?;
    fleet.finish()?;
    Ok(Outcome::Passed(said.join(", ")))
}

/// The last part of an enumeration's name.
fn word(value: &Value) -> String {
    let name = value.as_str().unwrap_or_default();
    let short = name.trim_start_matches("COUNTER_SOURCE_");
    short.to_lowercase().replace('_', " ")
}

fn gaps(stats: &Value) -> Vec<&str> {
    let gaps = stats["gaps"].as_array().map_or(&[][..], Vec::as_slice);
    gaps.iter().filter_map(Value::as_str).collect()
}

/// What each kernel's counters are to be.
fn counted(machine: Machine, stats: &Value) -> anyhow::Result<()> {
    let gaps = gaps(stats);
    let lacks = |gap: &str| gaps.contains(&format!("COUNTER_GAP_{gap}").as_str());
    let faults = number(&stats["faultsTaken"]);
    ensure!(faults > Some(0), "no faults: {}", stats["faultsUncounted"]);
    let by = match machine {
        Machine::X86_64 => "KVM_STATISTICS",
        Machine::Riscv64 => "TRACEPOINT",
    };
    let source = format!("COUNTER_SOURCE_{by}");
    ensure!(stats["faultsSource"] == source, "faults by another");
    ensure!(number(&stats["exits"]) > Some(0), "no exits");
    ensure!(stats["source"] == "COUNTER_SOURCE_KVM_STATISTICS", "source");
    match machine {
        Machine::X86_64 => {
            ensure!(number(&stats["pages4k"]).is_some(), "no pages");
            ensure!(gaps.is_empty(), "{gaps:?}");
        }
        Machine::Riscv64 => {
            for absent in ["pages4k", "remoteTlbFlushes", "vcpuTlbFlushes"] {
                ensure!(stats.get(absent).is_none_or(Value::is_null), "{absent}");
            }
            for gap in [
                "FAULT_OUTCOMES",
                "RANGE_FLUSHES",
                "FLUSHES_THAT_REACHED",
                "MAPPINGS",
            ] {
                ensure!(lacks(gap), "{gap} is not said to be missing");
            }
            ensure!(!lacks("FAULTS"), "faults are said to be missing");
        }
    }
    Ok(())
}

/// A VM of one kind is refused by hosts of the other, by name and before a page moves.
pub(crate) fn no_migration(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let backend = scene.backend;
    let mut fleet = Fleet::start(scene.hosts)?;
    for (from, to) in [(1, 2), (2, 1)] {
        fleet.create(VM, from, backend, [64, 4])?;
        fleet.sound_on(from)?;
        refused(&mut fleet, to).with_context(|| format!("to host-{to}"))?;
        fleet.sound_on(from)?;
        if from == 1 {
            fleet.delete(VM)?;
        }
    }
    fleet.finish()?;
    Ok(Outcome::Passed(
        "both ways ISA_MISMATCH, no migration made, nothing taken, guest errors 0".to_owned(),
    ))
}

/// The server knows what its hosts are, and refuses by itself: there is no migration, and the
/// destination has heard of nothing.
fn refused(fleet: &mut Fleet<'_>, to: u8) -> anyhow::Result<()> {
    /// Of `slat`: refused.
    const REFUSED: i32 = 4;
    let said = fleet.slat(&format!("migrate {VM} --to host-{to} --no-wait {ACCEPTED}"))?;
    ensure!(said.code == REFUSED, "{said:?}");
    let error: Value = serde_json::from_str(&said.err)
        .or_else(|_| serde_json::from_str(&said.out))
        .with_context(|| format!("{said:?}"))?;
    let error = &error["error"];
    ensure!(error["reason"] == "ISA_MISMATCH", "{error:#}");
    for arch in ["x86_64", "riscv64"] {
        ensure!(error["message"].to_string().contains(arch), "{error:#}");
    }
    let all = fleet.ask("get migrations")?;
    let made = all["migrations"].as_array().map_or(0, Vec::len);
    ensure!(made == 0, "{all:#}");
    let taken = fleet.hosts().run(to, "ls -A /srv/agent/vms")?;
    ensure!(taken.trim().is_empty(), "host-{to} has {taken}");
    Ok(())
}
