//! The functions that compilers call without being asked. A C library has them, and so have Rust's
//! bare-metal targets; a Linux program without a C library must bring its own.
//!
//! Plain loops: a hypervisor that copies much would use its machine's instructions. Volatile,
//! because an optimiser that sees a copying loop in `memcpy` replaces it by a call to `memcpy`.

use core::ptr::{read_volatile, write_volatile};

/// Copies, upwards.
// SAFETY (of the name): it is C's function; no library is linked that has another.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    for at in 0..count {
        // SAFETY: the caller owns `count` bytes at both.
        unsafe { write_volatile(to.add(at), read_volatile(from.add(at))) };
    }
    to
}

/// Copies where the two may overlap.
// SAFETY (of the name): as for memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.cast_const() <= from {
        // SAFETY: the caller's promise; upwards reads each byte before it is overwritten.
        return unsafe { memcpy(to, from, count) };
    }
    for at in (0..count).rev() {
        // SAFETY: the caller owns `count` bytes at both.
        unsafe { write_volatile(to.add(at), read_volatile(from.add(at))) };
    }
    to
}

/// Fills.
// SAFETY (of the name): as for memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    for at in 0..count {
        // SAFETY: the caller owns `count` bytes.
        unsafe { write_volatile(to.add(at), value as u8) };
    }
    to
}

/// Compares.
// SAFETY (of the name): as for memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller owns `count` bytes at both.
        let (left, right) = unsafe { (read_volatile(left.add(at)), read_volatile(right.add(at))) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// Compares for equality.
// SAFETY (of the name): as for memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(left, right, count) }
}
