//! What a lab is for: KVM on each host is as it is on hardware.

use std::fs;

use anyhow::ensure;

use super::scene::{Outcome, Scene};
use crate::lab::machine::Machine;

/// On x86-64 kvm-amd walks nested page tables that its TDP MMU builds; on RISC-V the G-stage is the
/// hart's.
pub(crate) fn kvm_is_as_on_hardware(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut all: Vec<String> = Vec::new();
    for host in scene.hosts.numbers() {
        let machine = scene.hosts.plan().machine(host);
        let mut said = scene.hosts.run(host, "uname -r")?.trim().to_owned();
        let device = scene.hosts.run(host, "ls /dev/kvm")?;
        ensure!(device.trim() == "/dev/kvm", "{device}");
        let fact = match machine {
            Machine::X86_64 => {
                "cat /sys/module/kvm_amd/parameters/npt /sys/module/kvm/parameters/tdp_mmu"
            }
            Machine::Riscv64 => "dmesg | grep 'kvm \\[' | grep -i 'G-stage'",
        };
        let facts = scene.hosts.run(host, fact)?;
        match machine {
            Machine::X86_64 => {
                ensure!(facts == "Y\nY\n", "npt and tdp_mmu are {facts}");
                said.push_str(", npt Y, tdp_mmu Y");
            }
            Machine::Riscv64 => {
                let words = facts.lines().next().unwrap_or_default();
                let words = words.split_once(": ").map_or(words, |(_, words)| words);
                said.push_str(&format!(", {}", words.trim()));
            }
        }
        if !all.contains(&said) {
            all.push(said);
        }
    }
    Ok(Outcome::Passed(format!("Linux {}", all.join("; "))))
}

/// What a kernel says when something is wrong with it.
const ALARMS: [&str; 5] = [
    "BUG:",
    "Oops",
    "WARNING:",
    "general protection",
    "Call Trace",
];
/// What kvm says of a register that a guest or its monitor sets and that it does not know.
const UNHANDLED: &str = "nhandled ";

/// After everything: no kernel met anything wrong with itself.
pub(crate) fn kernels_are_sound(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut unhandled = 0;
    for host in scene.hosts.numbers() {
        let said = scene.hosts.run(host, "dmesg")?;
        let path = scene.hosts.plan().folder.join(format!("host-{host}.dmesg"));
        fs::write(path, &said)?;
        let alarms: Vec<&str> = said
            .lines()
            .filter(|line| ALARMS.iter().any(|alarm| line.contains(alarm)))
            .collect();
        ensure!(alarms.is_empty(), "host-{host}'s kernel: {alarms:#?}");
        unhandled += said.lines().filter(|line| line.contains(UNHANDLED)).count();
    }
    Ok(Outcome::Passed(format!(
        "no alarm; {unhandled} lines about unhandled registers"
    )))
}
