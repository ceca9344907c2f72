//! All that is RISC-V: what a host's KVM gives guests, how a vCPU starts, how its state is saved
//! and loaded, how a guest calls out.
//!
//! | file | what |
//! |---|---|
//! | `register` | a register's number: what it says, its name, its place in the order of loading |
//! | `registers` | values of registers, and how they are written down |
//! | `transfer` | which registers are saved, and the rules of loading them |
//! | `told` | what a vCPU was told of its CPU |
//! | `names` | names of extensions |
//! | `sbi` | calls of the SBI |
//! | `kernel` | the registers of a vCPU in the kernel |
//! | `probe` | asks the hardware what no register tells |
//! | `host` | what the host's KVM gives guests |
//! | `vcpu` | a vCPU's start, turn and end |
//! | `vcpu_state` | its state |
//!
//! All but the last five need no kernel, and are compiled and tested on every host.
//!
//! There is no interrupt controller in the kernel here: nothing makes an AIA device, since no guest
//! has a device that would interrupt it, and none could find the controller (ADR 8,
//! `docs/adr/0008-no-aia-device.md`). The registers of AIA that a vCPU has all the same, where the
//! host has Ssaia, are on the kernel's list, and move with the rest.

#![cfg_attr(
    all(feature = "fuzz", not(target_arch = "riscv64")),
    allow(dead_code, reason = "fuzzing needs the decoders alone")
)]

mod names;
mod register;
mod registers;
mod sbi;
mod told;
mod transfer;

#[cfg(target_arch = "riscv64")]
mod host;
#[cfg(target_arch = "riscv64")]
mod kernel;
#[cfg(target_arch = "riscv64")]
mod probe;
#[cfg(target_arch = "riscv64")]
mod vcpu;
#[cfg(target_arch = "riscv64")]
mod vcpu_state;

#[cfg(target_arch = "riscv64")]
pub(in crate::backend::kvm) use self::{
    host::{ARCH, COUNTED, FAULTS, HostCpu, MIRROR, NEEDED, host_facts, prepare_vm, supported},
    kernel::flush_instruction_caches as before_run,
    told::Told,
    vcpu::{prepare_vcpu, program_counter, run},
    vcpu_state::VcpuState,
};
#[cfg(feature = "fuzz")]
pub(crate) use self::{registers::FUZZED as FUZZED_REGISTERS, told::FUZZED as FUZZED_TOLD};
