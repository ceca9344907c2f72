//! How a vCPU thread is got out of the guest.
//!
//! Two things together lose no request: the immediate-exit flag in the vCPU's shared page makes the next KVM_RUN return at
//! once, and a signal interrupts one that already runs. The flag stays set until the thread itself clears it, so it does not
//! matter when the signal arrives. The handler does nothing; it is there so that the signal is not ignored or fatal.

use std::{
    io,
    mem::offset_of,
    os::fd::AsRawFd,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_bindings::kvm_run;

/// Added to SIGRTMIN; low ones are taken by debuggers and profilers.
const OFFSET: i32 = 5;

fn signal() -> i32 {
    libc::SIGRTMIN() + OFFSET
}

extern "C" fn nothing(_: i32) {}

/// Installs the handler, once a process.
pub(super) fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            // SAFETY: all zero is a valid sigaction; its handler is set below.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
            // SAFETY: `action` is valid, its handler does nothing and so is safe at any point of any thread.
            if unsafe { libc::sigaction(signal(), &action, ptr::null_mut()) } == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
            }
        })
        .map_err(io::Error::from_raw_os_error)
}

/// Lets this thread be kicked, whatever mask it inherited.
pub(super) fn unblock() {
    // SAFETY: all zero is a valid set, and it is emptied at once; the calls only touch this thread's mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}

/// A thread that can be kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target(libc::pthread_t);

impl Target {
    /// The calling thread.
    pub(super) fn current() -> Self {
        // SAFETY: no preconditions.
        Self(unsafe { libc::pthread_self() })
    }

    /// Signals it.
    ///
    /// # Safety
    /// The thread has not ended.
    pub(super) unsafe fn kick(self) {
        // SAFETY: the thread lives, says the caller; the signal's handler does nothing.
        unsafe { libc::pthread_kill(self.0, signal()) };
    }
}

/// A vCPU's immediate-exit flag, through a mapping of its own: the one inside kvm-ioctls belongs to the vCPU's thread.
#[derive(Debug)]
pub(super) struct ExitFlag {
    page: ptr::NonNull<u8>,
    len: usize,
}

// SAFETY: the page is shared with the kernel anyway, lives as long as the value, and only one byte of it is accessed,
// atomically.
unsafe impl Send for ExitFlag {}
// SAFETY: as above.
unsafe impl Sync for ExitFlag {}

impl ExitFlag {
    pub(super) fn map(vcpu: &impl AsRawFd, len: usize) -> io::Result<Self> {
        assert!(len >= size_of::<kvm_run>());
        // SAFETY: a new shared mapping of the vCPU's descriptor at an address the kernel chooses.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = ptr::NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { page, len })
    }

    pub(super) fn set(&self, exit: bool) {
        // SAFETY: the field lies within the mapping, whose length was checked, and lives as long as `self`.
        let flag = unsafe {
            AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit)))
        };
        flag.store(exit.into(), Ordering::SeqCst);
    }
}

impl Drop for ExitFlag {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.len) };
    }
}
