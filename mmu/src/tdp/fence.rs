//! The fence that a mapping which became valid owes the vCPU that faulted.
//!
//! Where the format says [`INSTALL_NEEDS_FENCE`](Format::INSTALL_NEEDS_FENCE), hardware may
//! remember that an entry was *invalid*, at whatever level, and fault again although it is valid by
//! now. What was remembered of an entry that is a leaf now goes with a fence by address. What was
//! remembered of one that points to a table now goes only with a fence of everything: a fence by
//! address orders accesses to leaves (RISC-V, `SFENCE.VMA`: "When software modifies a non-leaf PTE,
//! it should execute `SFENCE.VMA` with `rs1=x0`").
//!
//! So a vCPU remembers that a fault of its own changed an entry into one that points to a table, by
//! linking or by splitting ([`Vcpu::linked`]): written on those two paths alone and compiled into
//! no format without the constant. A page in a table that is there already, the usual case, pays
//! nothing here and one fence by address at the vCPU.
//!
//! # The other vCPUs
//!
//! What they remember is met when they fault on it. They may remember entries above the leaf that
//! *another* vCPU has linked, of which their own mark says nothing, so a *spurious* fault is
//! answered with a fence of everything: without it a vCPU could fault on one mapping for ever. If
//! the fault installed its leaf in a table that another vCPU had linked, it owes the leaf's range,
//! faults once more at worst, and is told that this was spurious. Mapping in advance owes nothing
//! at once for the same reason: whoever remembers that nothing was there takes one spurious fault.
//!
//! The same catches a table that is linked to hold an MMIO entry, which no format with the constant
//! has, so it sets no mark.
//!
//! A table that a huge leaf replaced is flushed everywhere by the MMU itself, so nothing of it is
//! left to remember.

use super::{mmu::TdpMmu, vcpu::Vcpu};
use crate::{
    addr::{Gfn, GfnRange},
    fault::FaultOutcome,
    flush::Flush,
    format::Format,
    table::memory::TableMemory,
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_install_fence(
        &self,
        vcpu: &mut Vcpu,
        gfn: Gfn,
        outcome: FaultOutcome,
    ) -> Flush {
        if !F::INSTALL_NEEDS_FENCE {
            return Flush::None;
        }
        let owed = match outcome {
            FaultOutcome::Fixed { level } if !vcpu.linked => {
                Flush::range(GfnRange::new(F::align_down(gfn, level), F::span(level)))
            }
            FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => Flush::All,
            // The mapping is not there yet: what was linked on the way is owed for when it is.
            _ => return Flush::None,
        };
        vcpu.linked = false;
        owed
    }
}
