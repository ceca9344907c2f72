//! The global allocator: what `alloc` needs, over a static pool.
//!
//! The MMU keeps its slots, dirty bitmaps and its own bookkeeping here; page tables never
//! ([`crate::frames`]). Sizes are rounded up to powers of two; a block that was given back waits in
//! the list of its size. O(1), no merging: enough for a handful of sizes.
//!
//! *Locking*: one lock for all. *Invariant*: a block is in use, in exactly one list, or in the
//! untouched rest.

use core::{
    alloc::{GlobalAlloc, Layout},
    cell::UnsafeCell,
    fmt, ptr,
};

use crate::lock::Lock;

const POOL_BYTES: usize = 1 << 20;
/// The largest alignment served.
const POOL_ALIGN: usize = 4096;
/// The smallest block: space for the link of a list.
const SMALLEST: usize = 16;
const LISTS: usize = usize::BITS as usize;

#[repr(align(4096))]
struct Pool(UnsafeCell<[u8; POOL_BYTES]>);

// SAFETY: only `Heap` touches it, under its lock, and hands out each byte to one owner at a time.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([0; POOL_BYTES]));

#[global_allocator]
static HEAP: Heap = Heap(Lock::new(State {
    free: [ptr::null_mut(); LISTS],
    next: 0,
    used: 0,
}));

/// The allocator.
pub(crate) struct Heap(Lock<State>);

struct State {
    /// Free blocks by log2 of their size; each begins with the address of the next.
    free: [*mut u8; LISTS],
    /// First byte of the pool that was never given out.
    next: usize,
    used: usize,
}

// SAFETY: the pointers lead into the pool, which no CPU owns more than another.
unsafe impl Send for State {}

/// Bytes that are in use now.
pub(crate) fn used() -> usize {
    HEAP.0.with(|state| state.used)
}

fn block_size(layout: Layout) -> Option<usize> {
    let least = layout.size().max(layout.align()).max(SMALLEST);
    least.checked_next_power_of_two()
}

impl State {
    fn take(&mut self, size: usize) -> *mut u8 {
        let list = size.trailing_zeros() as usize;
        let head = self.free[list];
        if !head.is_null() {
            // SAFETY: a block in a list begins with the address of the next, written when it was
            // given back.
            self.free[list] = unsafe { head.cast::<*mut u8>().read() };
            self.used += size;
            return head;
        }
        let start = self.next.next_multiple_of(size.min(POOL_ALIGN));
        match start.checked_add(size) {
            Some(end) if end <= POOL_BYTES => {
                self.next = end;
                self.used += size;
                // SAFETY: `start` lies in the pool.
                unsafe { POOL.0.get().cast::<u8>().add(start) }
            }
            _ => ptr::null_mut(),
        }
    }

    /// # Safety
    /// `block` came from `take(size)` and is used no more.
    unsafe fn give(&mut self, block: *mut u8, size: usize) {
        let list = size.trailing_zeros() as usize;
        // SAFETY: the block is ours again, and long and aligned enough for an address.
        unsafe { block.cast::<*mut u8>().write(self.free[list]) };
        self.free[list] = block;
        self.used -= size;
    }
}

// SAFETY: a block is as long and as aligned as asked for (sizes and alignments are powers of two,
// the pool is aligned to the largest alignment served), and nobody else's until it is given back.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match block_size(layout) {
            Some(size) if layout.align() <= POOL_ALIGN => self.0.with(|state| state.take(size)),
            _ => ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(size) = block_size(layout) {
            // SAFETY: the caller gives back what `alloc` gave out for the same layout.
            self.0.with(|state| unsafe { state.give(block, size) });
        }
    }
}

impl fmt::Debug for Heap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap").finish_non_exhaustive()
    }
}
