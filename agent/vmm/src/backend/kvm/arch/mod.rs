//! The architecture façade: everything of KVM that differs between x86-64 and RISC-V, behind one
//! set of names. Nothing outside this folder asks which architecture it is built for.
//!
//! # Contract
//! Each architecture exports exactly these, and the list of re-exports below holds it to that.
//!
//! | name | what |
//! |---|---|
//! | `ARCH` | the architecture's number in saved vCPU state |
//! | `MIRROR` | the format in which a pager mirrors what its guests have mapped |
//! | `NEEDED` | capabilities of KVM that a VM of this architecture cannot do without |
//! | `supported` | whether this build can run vCPUs here, and in words why not |
//! | `host_facts` | what KVM gives guests here; works wherever `/dev/kvm` opens |
//! | `HostCpu` | what the host offers a VM; `end_gfn`: where guest-physical frames end |
//! | `COUNTED` | what its kernels count of flushes |
//! | `FAULTS` | the tracepoint that page faults pass, where statistics have none |
//! | `prepare_vm` | what a new VM needs before it has slots |
//! | `prepare_vcpu` | a new vCPU's first registers; gives back what it was told of its CPU |
//! | `Told` | that; `facts` says it for the preamble |
//! | `VcpuState` | `save`, `write`, `read`, `load`, and what it was `told` |
//! | `before_run` | what must be so before vCPUs run, after memory was filled |
//! | `run` | enters the guest and decodes why it left |
//! | `program_counter` | with the register's own name, for messages |
//!
//! An architecture that cannot run vCPUs takes most of these from `refused`: its `HostCpu` has no
//! values, so what needs one is there and can never be called. Of RISC-V, what needs no kernel (the
//! order of registers, their written form, the rules of loading) is compiled for the tests of every
//! host.

#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
mod other;
#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
mod refused;
#[cfg(any(test, feature = "fuzz", target_arch = "riscv64"))]
mod riscv64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
use self::other as this;
#[cfg(target_arch = "riscv64")]
use self::riscv64 as this;
#[cfg(target_arch = "x86_64")]
use self::x86_64 as this;

pub(super) use self::this::{
    ARCH, COUNTED, FAULTS, HostCpu, MIRROR, NEEDED, Told, VcpuState, before_run, host_facts,
    prepare_vcpu, prepare_vm, program_counter, run, supported,
};

#[cfg(feature = "fuzz")]
pub(crate) use self::riscv64::{
    FUZZED_REGISTERS as FUZZED_RISCV64_REGISTERS, FUZZED_TOLD as FUZZED_RISCV64_TOLD,
};
#[cfg(all(feature = "fuzz", target_arch = "x86_64"))]
pub(crate) use self::x86_64::FUZZED as FUZZED_X86_64_VCPU;
