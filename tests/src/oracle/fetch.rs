//! What packages the emulators and their tools come from.

use slat_packages::Set;

/// QEMU for RISC-V, with an assembler and a linker for it.
pub const RISCV: Set = Set::of(
    "riscv",
    &[
        "base-files",
        "qemu-system-riscv",
        "binutils-riscv64-linux-gnu",
    ],
);
/// QEMU for x86.
pub const X86: Set = Set::of("x86", &["base-files", "qemu-system-x86"]);
/// Bochs.
pub const BOCHS: Set = Set::of("bochs", &["base-files", "bochs"]);
