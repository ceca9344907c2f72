//! Kernel calls that kvm-ioctls lacks, or that it makes with an allocation a call.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd as _},
};

use super::device::uninterrupted;
use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1,
};
use vmm_sys_util::{
    ioctl::{ioctl, ioctl_with_ref},
    ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr,
};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Copies a slot's dirty log, `pages` bits rounded up to whole words. Without manual protection it
/// also clears it.
///
/// # Panics
/// When `bitmap` is shorter: the kernel would write past it.
pub(super) fn get_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    pages: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    assert!(bitmap.len() as u64 >= pages.div_ceil(64));
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_mut_ptr().cast(),
        },
    };
    // SAFETY: `vm` is a VM descriptor; the kernel writes at most the words just asserted.
    repeated(|| unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) })?;
    Ok(())
}

/// Clears the bits of `bitmap` in a slot's dirty log, protects those pages again and flushes.
/// `first` is a multiple of 64; `pages` is too, unless the range ends with the slot.
///
/// # Panics
/// When `bitmap` is shorter than `pages`: the kernel would read past it.
pub(super) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(bitmap.len() as u64 >= u64::from(pages).div_ceil(64));
    let clear = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: `vm` is a VM descriptor; the kernel only reads the bitmap, at most the words just
    // asserted.
    repeated(|| unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) })?;
    Ok(())
}

/// Frees the entries of all dirty rings that were handed back, protects their pages and flushes.
/// Returns how many; fewer than there are when a signal came.
pub(super) fn reset_dirty_rings(vm: &impl AsRawFd) -> io::Result<u64> {
    // SAFETY: `vm` is a VM descriptor; takes no argument.
    let freed = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u64::try_from(freed).map_err(|_| io::Error::last_os_error())
}

/// The statistics file of a VM or a vCPU.
pub(super) fn stats_file(of: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: takes no argument; returns a new descriptor or an error.
    let fd = repeated(|| unsafe { ioctl(of, KVM_GET_STATS_FD()) })?;
    // SAFETY: the kernel just made it for us and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes a call, again and within a bound when a signal interrupted it.
fn repeated(mut call: impl FnMut() -> i32) -> io::Result<i32> {
    uninterrupted(|| match call() {
        result if result < 0 => Err(kvm_ioctls::Error::last()),
        result => Ok(result),
    })
    .map_err(Into::into)
}
