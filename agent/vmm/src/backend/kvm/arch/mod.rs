//! The architecture façade: everything of KVM that differs between x86-64 and RISC-V, behind one
//! set of names. Nothing outside this folder asks which architecture it is built for.
//!
//! # Contract
//! Each architecture exports exactly these, and the list of re-exports below holds it to that.
//!
//! | name | what |
//! |---|---|
//! | `ARCH` | the architecture's number in saved vCPU state |
//! | `NEEDED` | capabilities of KVM that a VM of this architecture cannot do without |
//! | `supported` | whether this build can run vCPUs here, and in words why not |
//! | `host_facts` | what KVM gives guests here; works wherever `/dev/kvm` opens |
//! | `HostCpu` | what the host offers a VM; `end_gfn`: where guest-physical frames end |
//! | `prepare_vm` | what a new VM needs before it has slots |
//! | `prepare_vcpu` | a new vCPU's first registers; gives back what it was told of its CPU |
//! | `Told` | that; `facts` says it for the preamble |
//! | `VcpuState` | `save`, `write`, `read`, `load`, and what it was `told` |
//! | `run` | enters the guest and decodes why it left |
//! | `program_counter` | with the register's own name, for messages |
//!
//! An architecture that cannot run vCPUs yet takes most of these from `refused`: its `HostCpu`
//! has no values, so what needs one is there and can never be called.

#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
mod other;
#[cfg(not(target_arch = "x86_64"))]
mod refused;
#[cfg(target_arch = "riscv64")]
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
    ARCH, HostCpu, NEEDED, Told, VcpuState, host_facts, prepare_vcpu, prepare_vm, program_counter,
    run, supported,
};
