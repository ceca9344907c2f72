//! The tests between hosts, each with a fleet of its own.
//!
//! Those with a VM exist twice, on KVM and on the software backend with the host's own format, but
//! for those that are about KVM. In the brief form the second is left out where the first can be
//! had.

mod counters;
mod demo;
mod downtime;
mod faults;
mod hardware;
mod mixed;
mod moves;
mod scene;
mod storm;
mod unlike;

pub(crate) use self::scene::{Outcome, Scene};
use super::{fleet::Backend, machine::Machine};

/// Makes one test.
pub(crate) type Make = fn(&mut Scene<'_>) -> anyhow::Result<Outcome>;

/// A test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Test {
    pub(crate) name: &'static str,
    pub(crate) make: Make,
    /// Part of the brief form.
    pub(crate) brief: bool,
    /// About KVM: there is nothing to test on the software backend.
    pub(crate) of_kvm: bool,
}

impl Test {
    /// On both backends.
    const fn of_both(name: &'static str, make: Make, brief: bool) -> Self {
        Self {
            name,
            make,
            brief,
            of_kvm: false,
        }
    }

    /// On KVM alone.
    const fn of_kvm(name: &'static str, make: Make, brief: bool) -> Self {
        Self {
            name,
            make,
            brief,
            of_kvm: true,
        }
    }

    /// Backends that it is made on, where the first host is that machine.
    pub(crate) fn backends(&self, machine: Machine) -> Vec<Backend> {
        let native = Backend::Software(machine.format());
        match self.of_kvm {
            true => vec![Backend::Kvm],
            false => vec![Backend::Kvm, native],
        }
    }
}

/// About the hosts themselves.
pub(crate) const HARDWARE: Test = Test::of_both(
    "hardware::kvm_is_as_on_hardware",
    hardware::kvm_is_as_on_hardware,
    true,
);

/// About what hosts' kernels say in the end.
pub(crate) const KERNELS: Test = Test::of_both(
    "hardware::kernels_are_sound",
    hardware::kernels_are_sound,
    true,
);

/// Those with a VM on hosts of one kind, in order. What reboots a host comes last.
pub(crate) static WITH_A_VM: [Test; 13] = [
    Test::of_both("demo", demo::demo, true),
    Test::of_kvm("counters::faults", counters::faults, true),
    Test::of_both("migrate::there_and_back", moves::there_and_back, true),
    Test::of_both("migrate::cancel", moves::cancel, false),
    Test::of_both("migrate::storm", storm::storm, true),
    Test::of_both("kill::destination_vm", faults::destination_vm, false),
    Test::of_both("kill::source_vm", faults::source_vm, false),
    Test::of_both("kill::both_agents", faults::both_agents, true),
    Test::of_both("kill::server", faults::server, false),
    Test::of_both("kill::network", faults::network, false),
    Test::of_both("downtime::under_load", downtime::under_load, true),
    Test::of_both("kill::destination_host", faults::destination_host, false),
    Test::of_kvm("unlike::hosts", unlike::hosts, true),
];

/// Those of a fleet with hosts of both kinds.
pub(crate) static MIXED: [Test; 2] = [
    Test::of_kvm("mixed::each_runs_its_own", mixed::each_runs_its_own, true),
    Test::of_kvm("mixed::no_migration", mixed::no_migration, true),
];
