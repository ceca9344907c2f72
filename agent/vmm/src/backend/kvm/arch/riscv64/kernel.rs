//! The registers of a vCPU in the kernel: KVM_GET_REG_LIST, KVM_GET_ONE_REG, KVM_SET_ONE_REG. And
//! the one call of the system that RISC-V alone has.

use std::{io, mem::offset_of};

use kvm_bindings::{
    __riscv_v_ext_state, KVM_REG_RISCV, KVM_REG_RISCV_CONFIG, KVM_REG_RISCV_CORE,
    KVM_REG_RISCV_CSR, KVM_REG_RISCV_SBI_EXT, KVM_REG_RISCV_TIMER, KVM_REG_RISCV_VECTOR,
    KVM_REG_SIZE_U64, KVM_RISCV_SBI_EXT_ID_KVM_RISCV_SBI_EXT_DBCN, KVMIO, kvm_mp_state,
    kvm_riscv_config, kvm_riscv_core, kvm_riscv_csr, kvm_riscv_timer, user_regs_struct,
};
use kvm_ioctls::{Error, VcpuFd};
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref},
    ioctl_iowr_nr,
};

use super::{register::Register, transfer::RegisterFile};
use crate::backend::{
    BackendError,
    kvm::{device::uninterrupted, vcpu_error},
};

ioctl_iowr_nr!(KVM_GET_REG_LIST, KVMIO, 0xb0, u64);

/// riscv_flush_icache, which libc does not name: 15 of the calls that are an architecture's own.
const SYS_RISCV_FLUSH_ICACHE: libc::c_long = 244 + 15;
/// More than this is not what a kernel says.
const MOST: u64 = 4096;

// The numbers of `register` are the kernel's, whose structures give the order of registers.
const _: () = {
    const fn id(kind: u32, offset: usize) -> u64 {
        KVM_REG_RISCV as u64 | KVM_REG_SIZE_U64 | kind as u64 | (offset / 8) as u64
    }
    macro_rules! same {
        ($($register:ident = $kind:ident + $structure:ident.$field:ident;)*) => {
            $(assert!(
                Register::$register.id() == id($kind, offset_of!($structure, $field))
            );)*
        };
    }
    same! {
        ZICBOM_BYTES = KVM_REG_RISCV_CONFIG + kvm_riscv_config.zicbom_block_size;
        ZICBOZ_BYTES = KVM_REG_RISCV_CONFIG + kvm_riscv_config.zicboz_block_size;
        SATP_MODE = KVM_REG_RISCV_CONFIG + kvm_riscv_config.satp_mode;
        PC = KVM_REG_RISCV_CORE + user_regs_struct.pc;
        SP = KVM_REG_RISCV_CORE + user_regs_struct.sp;
        A0 = KVM_REG_RISCV_CORE + user_regs_struct.a0;
        STVEC = KVM_REG_RISCV_CSR + kvm_riscv_csr.stvec;
        SATP = KVM_REG_RISCV_CSR + kvm_riscv_csr.satp;
        SENVCFG = KVM_REG_RISCV_CSR + kvm_riscv_csr.senvcfg;
        TIMER_FREQUENCY = KVM_REG_RISCV_TIMER + kvm_riscv_timer.frequency;
        VLENB = KVM_REG_RISCV_VECTOR + __riscv_v_ext_state.vlenb;
    }
    assert!(offset_of!(kvm_riscv_core, regs) == 0);
    let dbcn = KVM_RISCV_SBI_EXT_ID_KVM_RISCV_SBI_EXT_DBCN as usize;
    assert!(Register::SBI_DBCN.id() == id(KVM_REG_RISCV_SBI_EXT, dbcn * 8));
};

/// The value of a register of 64 bits; `None` when this kernel or this CPU does not have it.
pub(super) fn word(vcpu: &VcpuFd, register: Register) -> Option<u64> {
    let mut value = [0; 8];
    match uninterrupted(|| vcpu.get_one_reg(register.id(), &mut value)) {
        Ok(_) => Some(u64::from_le_bytes(value)),
        Err(error) => {
            // Kernels say it by different numbers, and api.rst asks not to rely on one.
            if !matches!(
                error.errno(),
                libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP
            ) {
                tracing::warn!(%register, %error, "a register cannot be asked for");
            }
            None
        }
    }
}

/// Sets a register of 64 bits of a new vCPU.
///
/// # Errors
/// `VcpuCall`, naming it.
pub(super) fn set_word(vcpu: &VcpuFd, register: Register, value: u64) -> Result<(), BackendError> {
    vcpu_error::set("KVM_SET_ONE_REG", register, || {
        vcpu.set_one_reg(register.id(), &value.to_le_bytes())
    })?;
    Ok(())
}

/// Guest code was written by our threads, and a hart's instruction cache does not follow stores:
/// every hart that runs a thread of this process fetches anew.
pub(in crate::backend::kvm) fn flush_instruction_caches() -> Result<(), BackendError> {
    // SAFETY: takes two addresses, which the kernel does not look at, and flags; touches no memory.
    if unsafe { libc::syscall(SYS_RISCV_FLUSH_ICACHE, 0, 0, 0) } < 0 {
        return Err(BackendError::Ioctl {
            op: "riscv_flush_icache",
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// The list's numbers. A list of no room asks how many there are; kvm-bindings' own list has room
/// for 200, which vector registers fill.
fn numbers(vcpu: &VcpuFd) -> Result<Vec<u64>, Error> {
    let mut count = 0u64;
    // SAFETY: without room the kernel writes the count alone.
    let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_REG_LIST(), &mut count) };
    let error = Error::last();
    if result < 0 && error.errno() != libc::E2BIG {
        return Err(error);
    }
    if count > MOST {
        return Err(Error::new(libc::E2BIG));
    }
    // The count, then the numbers.
    let mut list = vec![0; 1 + count as usize];
    list[0] = count;
    // SAFETY: the kernel writes at most as many numbers as the first word says there is room for.
    if unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_REG_LIST(), list.as_mut_ptr()) } < 0 {
        return Err(Error::last());
    }
    let filled = list[0].min(count) as usize;
    list.truncate(1 + filled);
    list.remove(0);
    Ok(list)
}

impl RegisterFile for VcpuFd {
    fn get_list(&self) -> Result<Vec<u64>, Error> {
        numbers(self)
    }

    fn get(&self, register: Register) -> Result<Vec<u8>, Error> {
        let mut value = vec![0; register.bytes()];
        self.get_one_reg(register.id(), &mut value)?;
        Ok(value)
    }

    fn set(&self, register: Register, value: &[u8]) -> Result<(), Error> {
        self.set_one_reg(register.id(), value)?;
        Ok(())
    }

    fn get_mp_state(&self) -> Result<u32, Error> {
        Ok(self.get_mp_state()?.mp_state)
    }

    fn set_mp_state(&self, mp_state: u32) -> Result<(), Error> {
        self.set_mp_state(kvm_mp_state { mp_state })
    }
}
