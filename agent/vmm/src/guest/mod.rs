//! Guests: memstress and the raw image.
//!
//! [`install`] writes all a fresh VM needs into its memory. The layout of guest memory is a
//! function of the VM's size alone ([`Layout`]), so that a backend knows where to enter
//! ([`BootEntry`]) without being told, on the source and on the destination of a migration
//! alike. Memory images do not depend on the backend: a guest's page tables and machine code are
//! there on the software backend too, which executes the portable form of the same steps.
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
//! | end of slot 0 less the tables | end of slot 0 | guest page tables |
//!
//! The count table and the working pages run on above the hole at 4 GiB where memory does. The
//! guest page tables, in the format of x86-64, map every slot one to one by 2 MiB pages: user,
//! writable, executable. Accessed and dirty bits are set beforehand, so running the guest does not
//! write them.

pub(crate) mod arch;
mod boot;
mod layout;
pub(crate) mod memstress;
mod put;
pub(crate) mod raw;
mod tables;

use slat_proto::model::{GuestSpec, VmSpec};

use self::put::put;
pub(crate) use self::{boot::BootEntry, layout::Layout, put::GuestError};
use crate::memory::SlotTable;

/// Writes everything a fresh VM of `spec` needs into its memory, which is all zero: guest page
/// tables, code, control pages, and the random fill with as many threads as there are processors
/// (at most 8).
///
/// # Errors
/// When `memory` does not have the slots that `spec.memory_bytes` asks for, or the image does not
/// fit.
pub(crate) fn install(memory: &SlotTable, spec: &VmSpec) -> Result<(), GuestError> {
    let layout = Layout::new(spec.memory_bytes)?;
    put(
        memory,
        layout.page_tables(),
        &tables::identity(layout.slots(), layout.page_tables()),
        "page tables",
    )?;
    match &spec.guest {
        GuestSpec::Memstress(memstress) => {
            put(memory, Layout::CODE, arch::memstress(), "machine code")?;
            memstress::install(memory, &layout, spec.vcpus, memstress)
        }
        GuestSpec::RawImage(raw) => raw::install(memory, &layout, &raw.bytes),
    }
}
