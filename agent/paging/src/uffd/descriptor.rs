//! The descriptor: where it comes from, and what the kernel offers with it.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use linux_raw_sys::{
    general::{
        UFFD_API, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM,
        UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
        UFFD_FEATURE_WP_UNPOPULATED, uffdio_api,
    },
    ioctl::UFFDIO_API,
};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

/// Where descriptors come from that see all faults.
const DEVICE: &str = "/dev/userfaultfd";
/// `USERFAULTFD_IOC_NEW`: `_IO(0xAA, 0)`.
const NEW: u64 = 0xaa00;
/// Faults of shared memory.
const NEEDED: u64 = (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM) as u64;
/// Protecting shared memory, pages that are not mapped too.
const PROTECT: u64 = (UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED) as u64;

/// What the kernel's userfaultfd can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Pages can be protected from writes.
    pub protect: bool,
    /// A fault says which thread it is of.
    pub thread: bool,
}

/// Why faults cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither the device nor the call gives one that sees the kernel's faults.
    #[error(
        "no userfaultfd for the kernel's faults: {DEVICE}: {device}; userfaultfd(2): {call}; give \
         the user access to {DEVICE}, or set vm.unprivileged_userfaultfd to 1"
    )]
    Denied {
        /// What the device said.
        device: io::Error,
        /// What the call said.
        call: io::Error,
    },
    /// The kernel has userfaultfd, and not for shared memory.
    #[error("this kernel's userfaultfd lacks {0} for shared memory")]
    Lacks(&'static str),
    /// The handshake failed.
    #[error("userfaultfd: {0}")]
    Io(#[from] io::Error),
}

/// A descriptor. See the module.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// A new one for the calling process's address space. Reading it never blocks; `poll` waits.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open() -> Result<(Self, Offer), OpenError> {
        let offer = Self::offer()?;
        let uffd = Self(fresh()?);
        let mut features = NEEDED;
        for (has, more) in [
            (offer.protect, PROTECT),
            (offer.thread, UFFD_FEATURE_THREAD_ID.into()),
        ] {
            features |= if has { more } else { 0 };
        }
        uffd.handshake(features)?;
        Ok((uffd, offer))
    }

    /// What one that is opened here could do.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn offer() -> Result<Offer, OpenError> {
        // Features are asked for once: one descriptor to look, another to use.
        let has = Self(fresh()?).handshake(0)?;
        if has & NEEDED != NEEDED {
            let missing = has & u64::from(UFFD_FEATURE_MISSING_SHMEM) == 0;
            let what = if missing {
                "missing faults"
            } else {
                "minor faults"
            };
            return Err(OpenError::Lacks(what));
        }
        Ok(Offer {
            protect: has & PROTECT == PROTECT,
            thread: has & u64::from(UFFD_FEATURE_THREAD_ID) != 0,
        })
    }

    /// One that another process made and opened.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    fn handshake(&self, features: u64) -> io::Result<u64> {
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features,
            ioctls: 0,
        };
        self.call(UFFDIO_API, &mut api)?;
        Ok(api.features)
    }

    /// One ioctl.
    pub(super) fn call<T>(&self, number: u32, argument: &mut T) -> io::Result<()> {
        let fd = self.0.as_raw_fd();
        // SAFETY: each number here is of a call that reads and writes the structure that it is
        // given, all of whose fields are initialised integers. Addresses in it are of
        // registered shared mappings, which the kernel checks.
        let result = unsafe { libc_ioctl(fd, number.into(), std::ptr::from_mut(argument).cast()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A descriptor that blocks cannot be waited for by `poll`.
fn flags() -> UserfaultfdFlags {
    UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK
}

/// From the device, or from the call where that sees the kernel's faults.
fn fresh() -> Result<OwnedFd, OpenError> {
    let device = match from_device() {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    // SAFETY: no view is registered with it yet; what registers one says what that asks of others.
    let call = unsafe { userfaultfd(flags()) };
    call.map_err(|call| OpenError::Denied {
        device,
        call: call.into(),
    })
}

fn from_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::CLOEXEC.bits().cast_signed())
        .open(DEVICE)?;
    new_from(device.as_raw_fd(), NEW, flags().bits())
}

/// A new descriptor from the device.
fn new_from(device: RawFd, number: u64, flags: u32) -> io::Result<OwnedFd> {
    let flags = std::ptr::without_provenance_mut(flags as usize);
    // SAFETY: the device's one call takes its argument by value.
    let fd = unsafe { libc_ioctl(device, number, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

unsafe fn libc_ioctl(fd: RawFd, number: u64, argument: *mut std::ffi::c_void) -> i32 {
    // SAFETY: the caller's.
    unsafe { libc::ioctl(fd, number as _, argument) }
}
