//! The raw image: flat code, memory mapped one to one.
//!
//! Loaded and entered at [`LOAD`] by every vCPU. The stack grows down from [`stack`]. There is no
//! interrupt, and an exception that the image does not handle fails the VM.
//!
//! # Contract on x86-64
//! 64-bit mode at CPL 3 with IOPL 3, the vCPU's number in `rdi`. `out` of a byte to port 0xe9
//! prints it to the VM's console file, `out` to port 0xf4 ends the guest; any other port fails it.
//! An exception is a triple fault.
//!
//! # Contract on RISC-V
//! VS-mode without translation (`satp` is 0), the vCPU's number in `a0`. The SBI's debug console
//! prints a byte (function 2 of extension DBCN), its system reset (SRST) to shut down ends the
//! guest. Calls that the kernel answers by itself work; one that it hands on and that is not among
//! these fails the VM. `stvec` points at a handler that fails it with the exception's cause, and
//! may be set to one of the image's own.

use slat_proto::model::PAGE_SIZE;

use super::{
    layout::Layout,
    put::{GuestError, put},
};
use crate::memory::SlotTable;

/// Where the image is loaded and entered.
pub(crate) const LOAD: u64 = 0x20_0000;

const STACK_BYTES: u64 = 8 * PAGE_SIZE;

/// Top of a vCPU's stack. 64 stacks fill what is below [`LOAD`].
#[must_use]
pub(crate) fn stack(vcpu: u32) -> u64 {
    LOAD - u64::from(vcpu.min(63)) * STACK_BYTES
}

pub(super) fn install(memory: &SlotTable, layout: &Layout, image: &[u8]) -> Result<(), GuestError> {
    let limit = layout.low_limit().saturating_sub(LOAD);
    if image.len() as u64 > limit {
        return Err(GuestError::ImageTooLarge {
            bytes: image.len() as u64,
            limit,
        });
    }
    put(memory, LOAD, image, "image")
}
