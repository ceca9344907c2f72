//! What a host's kernel counts, beside what the guest says it did; and what is said where nothing
//! can count.

use anyhow::ensure;
use serde_json::Value;

use super::scene::{Outcome, Scene};
use crate::lab::{
    answer::number,
    fleet::{Backend, Fleet, VM},
    machine::Machine,
};

/// Where tracefs can be found; the second appears by itself below debugfs.
const UNMOUNT: &str = "umount /sys/kernel/tracing; umount /sys/kernel/debug/tracing 2>/dev/null; \
                       umount /sys/kernel/debug";
const MOUNT: &str = "mount -t debugfs debugfs /sys/kernel/debug; \
                     mount -t tracefs tracefs /sys/kernel/tracing";

/// A guest that wrote each of its pages, of small pages that were not there, took as many faults at
/// least: by statistics where the kernel has them, by a tracepoint of the confined process where
/// not. Without tracefs the second kind of kernel counts none, and it is said why.
pub(crate) fn faults(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let machine = scene.hosts.plan().machine(1);
    let backend = scene.backend;
    let mut fleet = Fleet::start(scene.hosts)?;
    let (pages, stats) = written_once(&mut fleet, backend)?;
    let faults = number(&stats["faultsTaken"]).unwrap_or(0);
    ensure!(faults >= pages, "{faults} faults, {pages} pages: {stats:#}");
    let by = match machine {
        Machine::X86_64 => "COUNTER_SOURCE_KVM_STATISTICS",
        Machine::Riscv64 => "COUNTER_SOURCE_TRACEPOINT",
    };
    ensure!(stats["faultsSource"] == by, "{stats:#}");
    fleet.delete(VM)?;
    fleet.hosts().run(1, UNMOUNT)?;
    let blind = written_once(&mut fleet, backend);
    fleet.hosts().run(1, MOUNT)?;
    let (_, stats) = blind?;
    let without = match machine {
        Machine::X86_64 => {
            ensure!(stats["faultsSource"] == by, "{stats:#}");
            "the same without tracefs"
        }
        Machine::Riscv64 => {
            let why = stats["faultsUncounted"].as_str().unwrap_or_default();
            ensure!(why.contains("tracefs is not mounted"), "{stats:#}");
            let taken = &stats["faultsTaken"];
            ensure!(number(taken).is_none(), "{stats:#}");
            let gaps = stats["gaps"].to_string();
            ensure!(gaps.contains("COUNTER_GAP_FAULTS"), "{stats:#}");
            "without tracefs none, and said so"
        }
    };
    fleet.finish()?;
    Ok(Outcome::Passed(format!(
        "{pages} pages written first, {faults} faults; {without}"
    )))
}

/// Lets a new VM write each of its pages: how many they are, and what was counted.
fn written_once(fleet: &mut Fleet<'_>, backend: Backend) -> anyhow::Result<(u64, Value)> {
    let options = backend.options();
    fleet.ask(&format!(
        "create vm {VM} --host host-1 --memory 32MiB --backing small --fill zero \
         --pattern sequential {options}"
    ))?;
    let get = format!("get vm {VM}");
    let passes = |vm: &Value| number(&vm["guestCounters"]["passes"]).unwrap_or(0);
    let first = fleet.until(&get, "each page was written", |vm| passes(vm) > 0)?;
    // What is said next was counted after that.
    let seen = fleet.until(&get, "it goes on", |vm| passes(vm) > passes(&first))?;
    ensure!(
        number(&seen["guestCounters"]["errors"]) == Some(0),
        "{seen:#}"
    );
    let pages = number(&seen["guestCounters"]["pages"]).unwrap_or(0);
    ensure!(pages > 0, "{seen:#}");
    Ok((pages, seen["mmuStats"].clone()))
}
