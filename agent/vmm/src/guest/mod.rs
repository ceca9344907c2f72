//! Guests: memstress and the raw image.
//!
//! [`install`] writes all a fresh VM needs into its memory. The layout of guest memory is a
//! function of the VM's size alone ([`Layout`]), so that a backend knows where to enter
//! ([`BootEntry`]) without being told, on the source and on the destination of a migration
//! alike. Memory images do not depend on the backend: machine code, and what it needs of its CPU,
//! are there on the software backend too, which executes the portable form of the same steps. They
//! do depend on the architecture, which a VM never leaves.
//!
//! # Guest-physical layout
//! | from | to | what |
//! |---|---|---|
//! | `0x0` | `0x1000` | nothing, zero |
//! | `0x1000` | `0x9000` | memstress' machine code |
//! | `0x10000` | `0x50000` | memstress' control pages, one a vCPU, 64 at most |
//! | `0x50000` | | memstress' count table, a `u32` for each working page |
//! | after it | | from the next page, the working pages |
//! | `0x0` | `0x200000` | raw image: stacks, 32 KiB a vCPU, vCPU 0's topmost |
//! | `0x200000` | | raw image: the image |
//! | end of slot 0 less the support | end of slot 0 | support: what the CPU needs beside code |
//!
//! The count table and the working pages run on above the hole at 4 GiB where memory does. What the
//! support is, [`arch`] says.

pub(crate) mod arch;
mod boot;
mod layout;
pub(crate) mod memstress;
mod put;
pub(crate) mod raw;

use slat_proto::model::{GuestSpec, VmSpec};

use self::put::put;
pub(crate) use self::{boot::BootEntry, layout::Layout, put::GuestError};
use crate::memory::SlotTable;

/// Writes everything a fresh VM of `spec` needs into its memory, which is all zero: support, code,
/// control pages, and the random fill with as many threads as there are processors (at most 8).
///
/// # Errors
/// When `memory` does not have the slots that `spec.memory_bytes` asks for, or the image does not
/// fit.
pub(crate) fn install(memory: &SlotTable, spec: &VmSpec) -> Result<(), GuestError> {
    let layout = Layout::new(spec.memory_bytes)?;
    put(
        memory,
        layout.support(),
        &arch::support(layout.slots(), layout.support()),
        "support",
    )?;
    match &spec.guest {
        GuestSpec::Memstress(memstress) => {
            put(memory, Layout::CODE, &arch::memstress(), "machine code")?;
            memstress::install(memory, &layout, spec.vcpus, memstress)
        }
        GuestSpec::RawImage(raw) => raw::install(memory, &layout, &raw.bytes),
    }
}
