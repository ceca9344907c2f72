//! Where a vCPU enters the guest.

use slat_proto::model::{GuestSpec, VmSpec};

use super::{layout::Layout, memstress, raw};

/// Where and with what a vCPU starts. All other registers are zero, or what the architecture's
/// mode for the guest asks for (see [`super`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootEntry {
    /// Program counter.
    pub pc: u64,
    /// Stack pointer.
    pub sp: u64,
    /// First argument: memstress' control page, or a raw image's vCPU number.
    pub argument: u64,
    /// Of what the architecture's CPU needs beside the code: guest page tables on x86-64, the
    /// exception handler on RISC-V.
    pub support: u64,
}

impl BootEntry {
    /// How vCPU `vcpu` of a VM of `spec` starts.
    #[must_use]
    pub(crate) fn new(spec: &VmSpec, layout: &Layout, vcpu: u32) -> Self {
        let support = layout.support();
        match spec.guest {
            GuestSpec::Memstress(_) => Self {
                pc: Layout::CODE,
                sp: 0,
                argument: memstress::control_page(vcpu),
                support,
            },
            GuestSpec::RawImage(_) => Self {
                pc: raw::LOAD,
                sp: raw::stack(vcpu),
                argument: u64::from(vcpu),
                support,
            },
        }
    }
}
