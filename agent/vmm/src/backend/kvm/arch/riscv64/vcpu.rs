//! How a vCPU starts, and why it leaves the guest.

use std::slice;

use kvm_bindings::{KVM_EXIT_RISCV_SBI, KVM_MP_STATE_RUNNABLE};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{
    host::HostCpu,
    kernel::{set_word, word},
    register::Register,
    sbi::{Call, system_event},
    told::Told,
    transfer::RegisterFile,
};
use crate::{
    backend::{
        BackendError,
        kvm::{
            exit::{Contract, GuestExit},
            vcpu_error::set,
        },
    },
    guest::BootEntry,
};

/// Makes a new vCPU ready to enter the guest: VS-mode without page tables, exceptions to the
/// handler in the support, the entry's registers. Returns what the vCPU was told.
///
/// The kernel starts vCPUs other than the first stopped, to be started by the guest; here all
/// start. The SBI's console is off until it is asked for; a kernel that has none gives a raw image
/// none.
pub(in crate::backend::kvm) fn prepare_vcpu(
    host: &HostCpu,
    vcpu: &VcpuFd,
    _: u32,
    entry: BootEntry,
) -> Result<Told, BackendError> {
    if word(vcpu, Register::SBI_DBCN) == Some(0) {
        set_word(vcpu, Register::SBI_DBCN, 1)?;
    }
    for (register, value) in [
        (Register::PC, entry.pc),
        (Register::SP, entry.sp),
        (Register::A0, entry.argument),
        (Register::STVEC, entry.support),
    ] {
        set_word(vcpu, register, value)?;
    }
    set("KVM_SET_MP_STATE", "MP state", || {
        RegisterFile::set_mp_state(vcpu, KVM_MP_STATE_RUNNABLE)
    })?;
    host.tell(vcpu)
}

/// Enters the guest, and says why it left.
pub(in crate::backend::kvm) fn run(
    vcpu: &mut VcpuFd,
    contract: Contract,
) -> Result<GuestExit<'_>, kvm_ioctls::Error> {
    match vcpu.run()? {
        // kvm-ioctls does not know it.
        VcpuExit::Unsupported(KVM_EXIT_RISCV_SBI) => {}
        VcpuExit::SystemEvent(kind, _) => return Ok(system_event(kind, contract)),
        exit => return Ok(GuestExit::common(exit)),
    }
    // SAFETY: the exit reason says that this member of the union was filled.
    let sbi = unsafe { &mut vcpu.get_kvm_run().__bindgen_anon_1.riscv_sbi };
    let call = Call {
        extension: sbi.extension_id,
        function: sbi.function_id,
        arguments: sbi.args,
    };
    // The next entry brings them to a0 and a1.
    sbi.ret = [0; 2];
    let answer = (&raw mut sbi.ret[1]).cast::<u8>();
    // SAFETY: the bytes of one word, borrowed as long as the vCPU is.
    let answer = unsafe { slice::from_raw_parts_mut(answer, size_of::<u64>()) };
    Ok(call.decode(answer, contract))
}

/// Program counter, for messages.
pub(in crate::backend::kvm) fn program_counter(vcpu: &VcpuFd) -> String {
    word(vcpu, Register::PC).map_or_else(|| "pc unknown".to_owned(), |pc| format!("pc {pc:#x}"))
}
