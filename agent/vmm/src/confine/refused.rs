//! System calls that the filter refused.
//!
//! The kernel does not make such a call and signals its thread instead. The handler answers as a
//! kernel that lacks the call would (ENOSYS), which libraries are prepared for, and notes its
//! number. It does nothing else: what it interrupted may hold any lock. Whoever looks after the
//! process asks for what is new ([`new`]) and logs it.

use std::{
    io,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use super::arch;

/// Above every number there is; higher ones are counted together, as the last.
const NUMBERS: usize = 512;
/// `si_code` of a signal that a filter sent.
const SYS_SECCOMP: c_int = 1;

/// How often each was refused.
static REFUSED: [AtomicU32; NUMBERS] = [const { AtomicU32::new(0) }; NUMBERS];
/// How much of that [`new`] has told.
static TOLD: [AtomicU32; NUMBERS] = [const { AtomicU32::new(0) }; NUMBERS];

/// A system call that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// Its number on this architecture.
    pub(crate) number: usize,
    /// How often, since the process began.
    pub(crate) times: u32,
}

/// What the kernel fills in for SIGSYS, from the beginning of a `siginfo_t`.
#[repr(C)]
struct SigSys {
    signo: c_int,
    errno: c_int,
    code: c_int,
    address: *mut c_void,
    number: c_int,
    arch: u32,
}

extern "C" fn on_signal(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t, which is larger than SigSys and at least as aligned.
    let info = unsafe { &*info.cast::<SigSys>() };
    if info.code != SYS_SECCOMP {
        return;
    }
    let number = usize::try_from(info.number).unwrap_or(NUMBERS);
    REFUSED[number.min(NUMBERS - 1)].fetch_add(1, Relaxed);
    // SAFETY: the kernel passes the context of the thread that it interrupted.
    unsafe { arch::answer(context, -i64::from(libc::ENOSYS)) };
}

/// Has refused calls counted from now on.
pub(super) fn catch() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_signal)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Calls that were refused for the first time since this was last asked, or ten times as often as
/// when they were last told.
pub(crate) fn new() -> Vec<Refused> {
    let counts = REFUSED.iter().zip(&TOLD).enumerate();
    counts
        .filter_map(|(number, (times, told))| {
            let (times, before) = (times.load(Relaxed), told.load(Relaxed));
            if times == 0 || (before > 0 && times / 10 < before) {
                return None;
            }
            told.store(times, Relaxed);
            Some(Refused { number, times })
        })
        .collect()
}
