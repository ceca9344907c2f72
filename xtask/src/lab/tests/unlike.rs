//! Hosts of one kind with unlike processors: what a VM could find missing there is refused by name,
//! before anything is taken or sent. What only the destination has is no hindrance, either way.
//!
//! Host 2 is booted with another processor for each case, and as it was in the end.

use anyhow::ensure;
use serde_json::Value;

use super::scene::{ACCEPTED, Outcome, Scene};
use crate::lab::{
    answer::number,
    fleet::{Fleet, VM},
    machine::Machine,
};

/// A pair of unlike hosts.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// What it is about.
    what: &'static str,
    /// The second host's processor.
    features: &'static str,
    /// Which host is refused the other's VM.
    refuses: u8,
    /// The fact that differs.
    fact: &'static str,
    /// A VM of the other direction is taken, and may go home again.
    back: bool,
}

const X86_64: [Case; 1] = [Case {
    what: "AES to none",
    features: ",-aes",
    refuses: 2,
    fact: "x86.cpuid.1.0.ecx",
    back: true,
}];

const RISCV64: [Case; 3] = [
    Case {
        what: "Sv57 to Sv39",
        features: ",sv57=off,sv48=off",
        refuses: 2,
        fact: "riscv.satp_modes",
        back: false,
    },
    Case {
        what: "AIA to none",
        features: ",smaia=false,ssaia=false",
        refuses: 2,
        fact: "riscv.isa.ssaia",
        back: true,
    },
    Case {
        what: "V to no V",
        features: ",v=true",
        refuses: 1,
        fact: "riscv.isa",
        back: true,
    },
];

/// Every case of the machine.
pub(crate) fn hosts(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let machine = scene.hosts.plan().machine(2);
    let cases: &[Case] = match machine {
        Machine::X86_64 => &X86_64,
        Machine::Riscv64 => &RISCV64,
    };
    let mut said = Vec::new();
    let mut made = Ok(());
    for case in cases {
        made = one(scene, case);
        if made.is_err() {
            break;
        }
        said.push(format!("{} refused", case.what));
    }
    scene.hosts.power_off(2);
    scene.hosts.power_on(2)?;
    made?;
    Ok(Outcome::Passed(format!(
        "{}, nothing sent, guest errors 0",
        said.join(", ")
    )))
}

fn one(scene: &mut Scene<'_>, case: &Case) -> anyhow::Result<()> {
    scene.hosts.power_off(2);
    scene.hosts.power_on_with(2, case.features)?;
    let (to, from) = (case.refuses, 3 - case.refuses);
    let backend = scene.backend;
    let mut fleet = Fleet::start(scene.hosts)?;
    fleet.create(VM, from, backend, [64, 4])?;
    fleet.sound_on(from)?;
    refused(&mut fleet, [from, to], "CPU_INCOMPATIBLE", case.fact)?;
    if case.back {
        fleet.delete(VM)?;
        fleet.create(VM, to, backend, [64, 4])?;
        fleet.sound_on(to)?;
        for host in [from, to] {
            let name = fleet.migrate(host, &format!("--verify after-commit {ACCEPTED}"))?;
            let done = fleet.ends(&name, "COMPLETED")?;
            let verified = &done["progress"]["verification"];
            ensure!(verified == "VERIFICATION_MATCH", "{done:#}");
            fleet.sound_on(host)?;
        }
    }
    fleet.finish()
}

/// A migration of the VM ends by that reason, which names what differs; nothing was sent or taken,
/// and the guest has not stopped.
fn refused(
    fleet: &mut Fleet<'_>,
    [from, to]: [u8; 2],
    reason: &str,
    fact: &str,
) -> anyhow::Result<()> {
    let name = fleet.migrate(to, ACCEPTED)?;
    let end = fleet.ends(&name, "FAILED")?;
    ensure!(end["error"]["reason"] == reason, "{end:#}");
    ensure!(end["error"].to_string().contains(fact), "{end:#}");
    ensure!(end["vmLocation"] == "VM_LOCATION_SOURCE", "{end:#}");
    let progress = &end["progress"];
    for sent in ["bytesTransferred", "pagesTransferred"] {
        ensure!(number(&progress[sent]).unwrap_or(0) == 0, "{end:#}");
    }
    ensure!(
        progress.get("downtime").is_none_or(Value::is_null),
        "{end:#}"
    );
    let taken = fleet.hosts().run(to, "ls -A /srv/agent/vms")?;
    ensure!(taken.trim().is_empty(), "host-{to} has {taken}");
    fleet.sound_on(from)
}
