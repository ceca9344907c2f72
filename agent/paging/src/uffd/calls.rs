//! The ioctls. Lengths and addresses are bytes, multiples of a page.
//!
//! `EAGAIN` with nothing done means that the address space is changing at this moment; such a call
//! is made again here, a bounded number of times.

use std::io;

use bitflags::bitflags;
use linux_raw_sys::{
    general::{
        uffdio_continue, uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
    },
    ioctl::{
        UFFDIO_CONTINUE, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
        UFFDIO_ZEROPAGE,
    },
};

use super::descriptor::Uffd;

/// Flags of CONTINUE: do not wake; map protected.
const CONTINUE_DONTWAKE: u64 = 1;
const CONTINUE_WP: u64 = 2;
/// Flags of WRITEPROTECT: protect; do not wake.
const PROTECT_WP: u64 = 1;
const PROTECT_DONTWAKE: u64 = 2;
/// How often a call is made again that met a change of the address space.
const AGAIN: u32 = 100;

bitflags! {
    /// Which faults of a range are told.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Watch: u64 {
        /// Of pages that are not in the file.
        const MISSING = 1;
        /// Writes to protected pages.
        const PROTECTED = 2;
        /// Of pages that are in the file and not mapped.
        const MINOR = 4;
    }
}

/// What came of a call over several pages.
#[derive(Debug)]
pub struct Done {
    /// Bytes from the start for which it was done.
    pub bytes: u64,
    /// Why it went no further.
    pub error: Option<io::Error>,
}

impl Done {
    fn of(result: io::Result<()>, told: i64, len: u64) -> Self {
        match result {
            Ok(()) => Self {
                bytes: len,
                error: None,
            },
            // The kernel says how far it came, or the error again.
            Err(error) => Self {
                bytes: u64::try_from(told).unwrap_or(0),
                error: Some(error),
            },
        }
    }
}

impl Uffd {
    /// Has faults of `[start, start + len)` told, which must be mappings of shared memory files.
    /// From then on whoever touches a page of it that is not there waits for a call here.
    ///
    /// # Errors
    /// `EINVAL` for other memory or what the kernel does not offer; `EBUSY` when another descriptor
    /// has it.
    pub fn register(&self, start: u64, len: u64, watch: Watch) -> io::Result<()> {
        let mut register = uffdio_register {
            range: uffdio_range { start, len },
            mode: watch.bits(),
            ioctls: 0,
        };
        self.call(UFFDIO_REGISTER, &mut register)
    }

    /// Ends that. Who waits goes on, and the kernel resolves its fault.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_UNREGISTER, &mut uffdio_range { start, len })
    }

    /// Lets whoever waits in the range try again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_WAKE, &mut uffdio_range { start, len })
    }

    /// Maps pages that are in the file, protected from writes or not, and wakes who waits for them.
    /// `EEXIST` where one is mapped, `EFAULT` where none is in the file, `ESRCH` when the address
    /// space is gone.
    pub fn map(&self, start: u64, len: u64, protected: bool, wake: bool) -> Done {
        let mut at = 0;
        self.repeat(len, &mut at, |uffd, at| {
            let mut call = uffdio_continue {
                range: uffdio_range {
                    start: start + at,
                    len: len - at,
                },
                mode: if protected { CONTINUE_WP } else { 0 }
                    | if wake { 0 } else { CONTINUE_DONTWAKE },
                mapped: 0,
            };
            let result = uffd.call(UFFDIO_CONTINUE, &mut call);
            (result, call.mapped)
        })
    }

    /// Maps pages of zeroes that are not in the file, which makes them, and wakes who waits.
    pub fn zero(&self, start: u64, len: u64) -> Done {
        let mut at = 0;
        self.repeat(len, &mut at, |uffd, at| {
            let mut call = uffdio_zeropage {
                range: uffdio_range {
                    start: start + at,
                    len: len - at,
                },
                mode: 0,
                zeropage: 0,
            };
            let result = uffd.call(UFFDIO_ZEROPAGE, &mut call);
            (result, call.zeropage)
        })
    }

    /// Protects mapped pages from writes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn protect(&self, start: u64, len: u64) -> io::Result<()> {
        self.write_protect(start, len, PROTECT_WP)
    }

    /// Allows writes again, and wakes who waits for that if `wake`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unprotect(&self, start: u64, len: u64, wake: bool) -> io::Result<()> {
        self.write_protect(start, len, if wake { 0 } else { PROTECT_DONTWAKE })
    }

    fn write_protect(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        for _ in 0..AGAIN {
            let mut call = uffdio_writeprotect {
                range: uffdio_range { start, len },
                mode,
            };
            match self.call(UFFDIO_WRITEPROTECT, &mut call) {
                Err(error) if is_again(&error) => std::thread::yield_now(),
                result => return result,
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Calls until all is done, or an error that is not "again".
    fn repeat(
        &self,
        len: u64,
        at: &mut u64,
        call: impl Fn(&Self, u64) -> (io::Result<()>, i64),
    ) -> Done {
        for _ in 0..AGAIN {
            let (result, told) = call(self, *at);
            let done = Done::of(result, told, len - *at);
            *at += done.bytes;
            match done.error {
                Some(error) if is_again(&error) => std::thread::yield_now(),
                error => return Done { bytes: *at, error },
            }
        }
        Done {
            bytes: *at,
            error: Some(io::ErrorKind::WouldBlock.into()),
        }
    }
}

fn is_again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
