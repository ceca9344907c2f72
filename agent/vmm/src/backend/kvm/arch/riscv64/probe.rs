//! Finds out what no register tells: which bits of a register the hardware keeps.
//!
//! A vCPU of a VM that is made for this enters the guest, and so its registers go through the
//! hardware. It fetches one call of the SBI and is back. Its one page holds the calls, one an
//! entry, and a page table that maps the page to itself, for values that switch translation on.

use kvm_bindings::{KVM_EXIT_RISCV_SBI, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use slat_proto::model::SlotSpec;

use super::{
    kernel::{flush_instruction_caches, set_word, word},
    register::{Kind, Register},
};
use crate::{
    backend::{
        BackendError,
        kvm::{
            device::{create_vm, uninterrupted},
            refuse::failed,
            vcpu_error::set,
        },
    },
    guest::arch::riscv64::EXTENSION,
    memory::{Mode, SlotMemory},
};

const PAGE: usize = 4096;
/// The upper half of the page; the lower is the table's.
const CODE: usize = PAGE / 2;
const ECALL: u32 = 0x73;
/// A leaf of 1 GiB at 0: valid, readable, writable, executable, accessed, dirty.
const LEAF: u64 = 0xcf;

/// The VM.
#[derive(Debug)]
pub(super) struct Probe {
    // Fields go in this order: memory must outlive the VM.
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: SlotMemory,
}

impl Probe {
    /// Nothing has run yet.
    pub(super) fn new(kvm: &Kvm) -> Result<Self, BackendError> {
        let memory = SlotSpec::new(0, 0, 1, false)
            .map_err(std::io::Error::other)
            .and_then(|spec| SlotMemory::with(spec, Mode::default()))
            .map_err(|source| BackendError::Ioctl {
                op: "memory to ask the CPU with",
                source,
            })?;
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&LEAF.to_le_bytes());
        for word in page[CODE..].as_chunks_mut::<4>().0 {
            *word = ECALL.to_le_bytes();
        }
        memory.host().write(0, &page);
        let vm = create_vm(kvm)?;
        let region = kvm_userspace_memory_region {
            memory_size: PAGE as u64,
            userspace_addr: memory.guest().address(),
            ..Default::default()
        };
        // SAFETY: the range is a mapping of one page, which is kept until the VM is gone; nothing
        // in this process holds references into it.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = set("KVM_CREATE_VCPU", "a new one", || vm.create_vcpu(0))?;
        let a7 = Register::word(Kind::Core, 17);
        for (register, value) in [(Register::PC, CODE as u64), (a7, EXTENSION)] {
            set_word(&vcpu, register, value)?;
        }
        flush_instruction_caches()?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Its vCPU, to be asked for registers.
    pub(super) fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// What the hardware makes of `value`; `None` where it cannot be asked. The register is 0 again
    /// afterwards.
    pub(super) fn kept(&mut self, register: Register, value: u64) -> Option<u64> {
        set_word(&self.vcpu, register, value).ok()?;
        let called = uninterrupted(|| {
            let exit = self.vcpu.run()?;
            Ok(matches!(exit, VcpuExit::Unsupported(KVM_EXIT_RISCV_SBI)))
        });
        let kept = word(&self.vcpu, register);
        set_word(&self.vcpu, register, 0).ok()?;
        kept.filter(|_| called == Ok(true))
    }
}
