//! Reading pages from the source: what loaders do.
//!
//! A claim is read into a buffer with no lock held, stored where pages are not there yet, and said
//! to be there; then the source is told, and whoever waits for one of the pages is served. A read
//! that fails leaves them waiting, and says what is wrong.

use std::ops::Range;

use slat_mmu::Vcpu;
use slat_paging::wire::ProblemKind;

use crate::{error::Trouble, memory::Memory, queue::Claim, shared::Shared, source::Contents};

/// Pages that are read ahead of a guest that goes through a source's pages one after the other.
const AHEAD: u64 = 64;

/// A loader's thread.
pub(crate) fn load(shared: &Shared, loader: usize) {
    let mut vcpu = shared.mirror.as_ref().map(|mirror| mirror.mmu.vcpu());
    let mut contents = Contents::new();
    let together = |memory: &Memory, page: u64| together(shared, memory, page);
    while !shared.is_over() {
        let Some(claim) = shared.queue.take_load(&together) else {
            continue;
        };
        if claim.is_of_the_guest() && goes_on(&claim) {
            let next = claim.pages.end;
            shared.queue.ahead(&claim.memory, next..next + AHEAD);
        }
        let mut result = shared.bring(loader, &claim, claim.pages.clone(), &mut contents);
        let mut failed = Vec::new();
        if result.is_err() && claim.pages.end - claim.pages.start > 1 {
            // It may be a neighbour that cannot be read: what is waited for is tried alone.
            for page in shared.queue.wanted(&claim) {
                let alone = shared.bring(loader, &claim, page..page + 1, &mut contents);
                if alone.is_err() {
                    failed.push(page);
                    result = alone;
                }
            }
        }
        if shared.is_over() {
            return;
        }
        match result {
            Ok(()) => {
                serve(shared, vcpu.as_mut(), &claim);
                shared.tell_if_loaded();
            }
            Err(trouble) => {
                if shared.queue.failed(&claim, &failed, &trouble) {
                    shared.problems.set(trouble, claim.retries, &shared.bell);
                }
            }
        }
    }
}

/// Whether the guest goes from page to page.
fn goes_on(claim: &Claim) -> bool {
    let windows = &claim.memory.windows;
    claim.pages.clone().any(|page| windows.goes_on(page))
}

/// What is best read with a page that is waited for.
fn together(shared: &Shared, memory: &Memory, page: u64) -> Range<u64> {
    match (shared.source(), memory.origin) {
        (Some(source), Some(origin)) => source.together(origin, page),
        _ => page..page + 1,
    }
}

fn serve(shared: &Shared, vcpu: Option<&mut Vcpu>, claim: &Claim) {
    let waits = shared.queue.done(claim);
    if let Some(vcpu) = vcpu {
        for mut wait in waits {
            // What the kernel said of the page was before it was read.
            wait.waiter.kind = None;
            shared.serve(vcpu, wait);
        }
    }
}

impl Shared {
    /// Reads pages that were claimed, and stores them.
    fn bring(
        &self,
        loader: usize,
        claim: &Claim,
        pages: Range<u64>,
        contents: &mut Contents,
    ) -> Result<(), Trouble> {
        let memory = &claim.memory;
        let (Some(source), Some(origin)) = (self.source(), memory.origin) else {
            let what = format!("memory {} lacks pages and has no source", memory.id);
            return Err(Trouble::new(ProblemKind::SourceGone, what));
        };
        contents.clear();
        let what = format!(
            "pages {} to {} of memory {origin}",
            pages.start,
            pages.end - 1
        );
        self.problems.begin(loader, what);
        let read = source.read(origin, pages.clone(), contents);
        self.problems.end(loader);
        read?;
        if self.is_over() {
            return Ok(());
        }
        memory.store(contents)?;
        // A source that gave less than it was asked for.
        let end = memory.there_until(pages.clone());
        if end < pages.end {
            let what = format!("page {end} of memory {origin} did not come");
            return Err(Trouble::new(ProblemKind::SourceTruncated, what));
        }
        source.taken(origin, pages);
        Ok(())
    }
}
