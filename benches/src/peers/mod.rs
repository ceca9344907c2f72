//! The peers, and the memory that all of them take their tables from.
//!
//! No peer is handicapped: a frame comes from a stack of free frames or the next untouched one in a
//! few instructions, all frames were written before the measuring, and physical addresses *are*
//! virtual ones, so that following a pointer costs nothing. TLB flushes are left out altogether, in
//! whatever way the crate offers.
//!
//! *Locking*: none. A pool belongs to the thread that made it; a row keeps one peer per thread.

mod generic;
#[cfg(target_arch = "x86_64")]
mod multiarch;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::{cell::Cell, ptr};

pub(crate) use self::generic::Generic;
#[cfg(target_arch = "x86_64")]
pub(crate) use self::{multiarch::Multiarch, x86::X86};

const FRAME: usize = 4096;

#[repr(align(4096))]
#[expect(dead_code, reason = "read and written through addresses only")]
struct Frame([u8; FRAME]);

/// Frames for page tables.
struct Pool {
    frames: *mut [Frame],
    next: usize,
    free: Vec<usize>,
}

thread_local! {
    /// This thread's pool: some crates ask for frames through functions without `self`.
    static POOL: Cell<*mut Pool> = const { Cell::new(ptr::null_mut()) };
}

/// Keeps this thread's pool alive.
struct PoolOwner(*mut Pool);

impl PoolOwner {
    /// A pool for a four-level table over `pages` pages.
    fn new(pages: u64) -> Self {
        let leaves = pages.div_ceil(512) as usize;
        let count = leaves + leaves.div_ceil(512) + leaves.div_ceil(512 * 512) + 8;
        // 0xff and not 0: memory that is zero might not be there yet.
        let frames: Box<[Frame]> = (0..count).map(|_| Frame([0xff; FRAME])).collect();
        let pool = Box::into_raw(Box::new(Pool {
            frames: Box::into_raw(frames),
            next: 0,
            free: Vec::with_capacity(count),
        }));
        assert!(POOL.get().is_null(), "one pool a thread");
        POOL.set(pool);
        Self(pool)
    }
}

impl Drop for PoolOwner {
    fn drop(&mut self) {
        POOL.set(ptr::null_mut());
        // SAFETY: both came from `Box::into_raw` in `new`; the thread's handle to them is gone.
        unsafe {
            let pool = Box::from_raw(self.0);
            drop(Box::from_raw(pool.frames));
        }
    }
}

/// The address of a frame with anything in it.
fn allocate() -> Option<usize> {
    // SAFETY: the pool outlives every table of this thread, which alone uses it; no reference is
    // kept.
    let pool = unsafe { &mut *POOL.get() };
    if let Some(address) = pool.free.pop() {
        return Some(address);
    }
    if pool.next == pool.frames.len() {
        return None;
    }
    // SAFETY: `next` is within the frames.
    let frame = unsafe { pool.frames.cast::<Frame>().add(pool.next) };
    pool.next += 1;
    Some(frame.expose_provenance())
}

/// Takes a frame back.
fn free(address: usize) {
    // SAFETY: as in `allocate`.
    let pool = unsafe { &mut *POOL.get() };
    pool.free.push(address);
}

/// Takes all frames back at once, for a table that is forgotten.
#[cfg(target_arch = "x86_64")]
fn refill() {
    // SAFETY: as in `allocate`.
    let pool = unsafe { &mut *POOL.get() };
    pool.next = 0;
    pool.free.clear();
}
