//! What kinds of host a lab has: one kind, or both in one fleet.

use clap::ValueEnum;

use super::machine::Machine;

/// The hosts of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// AMD's SVM with nested paging: kvm-amd with the TDP MMU
    #[value(name = "x86_64")]
    X86_64,
    /// RISC-V with the H extension
    Riscv64,
    /// Both in turn: the server on an x86-64 host, every second host RISC-V
    Mixed,
}

impl Kind {
    /// On the command line, and of its folder.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => Machine::X86_64.name(),
            Self::Riscv64 => Machine::Riscv64.name(),
            Self::Mixed => "mixed",
        }
    }

    /// The machines that are among its hosts.
    pub(crate) fn machines(self) -> &'static [Machine] {
        match self {
            Self::X86_64 => &[Machine::X86_64],
            Self::Riscv64 => &[Machine::Riscv64],
            Self::Mixed => &[Machine::X86_64, Machine::Riscv64],
        }
    }

    /// What host number `host` is; the first is number 1.
    pub(crate) fn machine(self, host: u8) -> Machine {
        let machines = self.machines();
        machines[usize::from(host - 1) % machines.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_fleet_has_its_server_on_x86() {
        let of = |kind: Kind| [1, 2, 3].map(|host| kind.machine(host));
        let (x86, riscv) = (Machine::X86_64, Machine::Riscv64);
        assert_eq!(of(Kind::Mixed), [x86, riscv, x86]);
        assert_eq!(of(Kind::Riscv64), [riscv; 3]);
    }
}
