//! Dropping the mappings that the mirror does not know: the kernel's, from before a view was
//! watched, or a dead pager's.
//!
//! It goes block by block, beside the guest: an invalidation holds faults of the block off, the
//! mirror's own mappings are taken away, then the VM process drops all of them; then whoever waits
//! in the block is woken, and faults again.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use slat_mmu::{Gfn, GfnRange, Refused};
use slat_paging::{PAGE, wire::ProblemKind};

use crate::{error::Trouble, memory::Memory, mirror::Mirror, shared::Shared, sync::read};

/// Pages of a block: 32 MiB, for which faults wait a few milliseconds.
const BLOCK: u64 = 8192;
/// How long a request waits for the sweep: a terabyte's worth.
const BOUND: Duration = Duration::from_secs(30);
/// Before a block is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// The sweeper's thread.
pub(crate) fn sweep(shared: &Shared, mirror: &Mirror) {
    if !shared.swept.load(Ordering::Acquire) {
        let memories: Vec<Arc<Memory>> = {
            let layout = read(&shared.layout);
            layout
                .places()
                .map(|place| Arc::clone(&place.memory))
                .collect()
        };
        for memory in memories {
            for page in (0..memory.pages).step_by(BLOCK as usize) {
                let pages = BLOCK.min(memory.pages - page);
                loop {
                    let began = shared.queue.retries();
                    let Err(why) = block(shared, mirror, &memory, page, pages) else {
                        break;
                    };
                    if shared.is_over() {
                        return;
                    }
                    let what = format!("dropping mappings of memory {}: {why}", memory.id);
                    let trouble = Trouble::new(ProblemKind::Kernel, what);
                    shared.problems.set(trouble, began, &shared.bell);
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
    shared.swept.store(true, Ordering::Release);
}

fn block(
    shared: &Shared,
    mirror: &Mirror,
    memory: &Memory,
    page: u64,
    pages: u64,
) -> Result<(), Refused> {
    let layout = read(&shared.layout);
    let Some(place) = layout.get(memory.id) else {
        return Ok(());
    };
    let range = GfnRange::new(Gfn(place.base_gfn + page), pages);
    let token = mirror.space().invalidate_begin(range, true);
    let dropped = shared.drops.ask(memory.id, page, pages);
    let dropped = dropped.and_then(|request| shared.drops.wait(request));
    // It was begun at this mirror.
    let ended = mirror.mmu.invalidate_end(token);
    debug_assert!(ended.is_ok());
    let address = place.view + page * PAGE as u64;
    // A view that is gone has nobody who waits.
    let _ = mirror.uffd.wake(address, pages * PAGE as u64);
    dropped
}

impl Shared {
    /// Waits until nothing is mapped that the mirror does not know.
    pub(crate) fn wait_until_swept(&self) -> Result<(), Trouble> {
        let end = Instant::now() + BOUND;
        while !self.swept.load(Ordering::Acquire) {
            if self.is_over() || Instant::now() >= end {
                let what = "mappings that the pager does not know are still being dropped";
                return Err(Trouble::new(ProblemKind::Kernel, what));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
