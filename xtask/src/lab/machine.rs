//! The two kinds of emulated host: what each is made of and how its emulator is started.
//!
//! Both are emulated instruction by instruction (TCG), so any x86-64 machine can run them, and both
//! have KVM as on hardware: SVM with nested paging, so kvm-amd with the kernel's own TDP MMU; and
//! RISC-V's H extension with its G-stage. The kernel is a distribution's own, and never pinned.

use std::process::Command;

use slat_packages::{Root, Set};

/// A kind of host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    /// AMD's SVM with nested paging.
    X86_64,
    /// RISC-V with the H extension.
    Riscv64,
}

/// QEMU, a kernel, a shell, and what unpacks kernel modules.
const X86_64: Set = Set {
    alone: &["busybox-static"],
    named_by: &["linux-image-amd64"],
    ..Set::of(
        "lab-x86_64",
        &["base-files", "qemu-system-x86", "seabios", "xz-utils"],
    )
};
const RISCV64: Set = Set {
    alone: &["busybox-static:riscv64"],
    named_by: &["linux-image-riscv64:riscv64"],
    architectures: "amd64 riscv64",
    ..Set::of(
        "lab-riscv64",
        &["base-files", "qemu-system-riscv", "opensbi", "xz-utils"],
    )
};

/// Modules that each host loads, besides KVM's: network, the lab's channel, entropy.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_net", "virtio_console", "virtio_rng"];

impl Machine {
    /// As the compiler calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Riscv64 => "riscv64",
        }
    }

    /// What it is made of.
    pub(crate) fn packages(self) -> Set {
        match self {
            Self::X86_64 => X86_64,
            Self::Riscv64 => RISCV64,
        }
    }

    /// Kernel modules to load, without what they need themselves.
    pub(crate) fn modules(self) -> Vec<&'static str> {
        let kvm = match self {
            Self::X86_64 => "kvm_amd",
            Self::Riscv64 => "kvm",
        };
        std::iter::once(kvm).chain(MODULES).collect()
    }

    /// Second-stage format of software VMs there: the host's own.
    pub(crate) fn format(self) -> &'static str {
        match self {
            Self::X86_64 => "npt4",
            Self::Riscv64 => "sv48x4",
        }
    }

    /// The emulator with processor, memory and firmware; no devices yet. `features` are what this
    /// processor has or lacks beside the usual one, as the emulator says it: `,-aes`, or nothing.
    /// Those of a `steady` host take turns, and do not run at the same time.
    pub(crate) fn emulator(self, root: &Root, features: &str, steady: bool) -> Command {
        let mut command = match self {
            Self::X86_64 => root.command("usr/bin/qemu-system-x86_64"),
            Self::Riscv64 => root.command("usr/bin/qemu-system-riscv64"),
        };
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.path(data));
        }
        let (board, processor) = match self {
            // As it is known to boot fast: nothing here needs an x2APIC.
            Self::X86_64 => ("q35", "EPYC-Rome,+svm,+npt,-x2apic"),
            // With AIA's registers in the harts, and no controller of it.
            Self::Riscv64 => ("virt", "rv64,h=true,smaia=true,ssaia=true"),
        };
        command.args(["-M", board, "-cpu", &format!("{processor}{features}")]);
        let threads = if steady { "single" } else { "multi" };
        command.args(["-accel", &format!("tcg,thread={threads}")]);
        command.args(["-smp", "2", "-m", "2G"]);
        command
    }

    /// What its kernel is told. The clock of an emulated processor is steady, and mitigations cost
    /// what nobody here needs.
    pub(crate) fn kernel_arguments(self) -> &'static str {
        match self {
            Self::X86_64 => "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable",
            Self::Riscv64 => "console=ttyS0 quiet panic=-1",
        }
    }
}
