//! Which log a VM has in the kernel, and the call that empties one.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::super::{super::BackendError, ioctl::clear_dirty_log, refuse::failed, ring::Rings};
use crate::memory::DirtyError;

/// Words of a bitmap cleared at once: 64 Ki pages, some 2 ms under the kernel's MMU lock when all
/// are dirty.
pub(super) const CLEAR_WORDS: usize = 1024;

/// How the kernel tells which pages were written.
#[derive(Debug)]
pub(in super::super) enum Log {
    /// One bitmap a slot; `manual` where a harvest clears what it took by a call of its own. `full`
    /// where a log begins with every bit set and no page protected; only with `manual`.
    Bitmap {
        manual: bool,
        full: bool,
    },
    Rings(Rings),
}

impl Log {
    /// Bitmaps, with manual protection where the kernel has it and `manual` asks for it.
    pub(in super::super) fn bitmap(vm: &VmFd, manual: bool) -> Result<Self, BackendError> {
        const ALL: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        if !manual {
            return Ok(Self::Bitmap {
                manual,
                full: false,
            });
        }
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let flags = u32::try_from(offered).unwrap_or(0) & ALL;
        let manual = flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = flags.into();
            vm.enable_cap(&cap)
                .map_err(failed("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        }
        Ok(Self::Bitmap {
            manual,
            full: manual && flags & KVM_DIRTY_LOG_INITIALLY_SET != 0,
        })
    }
}

/// Clears pages `[first, first + pages)` of a slot's log, whatever is set.
pub(super) fn clear_all(vm: &VmFd, number: u32, first: u64, pages: u64) -> Result<(), DirtyError> {
    const ALL: [u64; CLEAR_WORDS] = [u64::MAX; CLEAR_WORDS];
    let mut at = first;
    while at < first + pages {
        // At most 64 Ki.
        let piece = (first + pages - at).min(CLEAR_WORDS as u64 * 64) as u32;
        clear_dirty_log(vm, number, at, piece, &ALL).map_err(|source| DirtyError::Kernel {
            slot: number,
            op: "KVM_CLEAR_DIRTY_LOG",
            source,
        })?;
        at += u64::from(piece);
    }
    Ok(())
}
