//! The mirror beside what the kernel has mapped.

use slat_paging::wire::{Answer, Ask};

use crate::vm::Vm;

impl Vm {
    /// The mirror's listing is what the kernel has mapped.
    pub(crate) fn assert_mirrored(&self) {
        let gfns: Vec<u64> = self.memories.iter().map(|mem| mem.base_gfn).collect();
        self.assert_mirrored_at(&gfns);
    }

    /// The same, with memories that have moved.
    pub(crate) fn assert_mirrored_at(&self, gfns: &[u64]) {
        // Answered when what a pager before this one had mapped is gone.
        self.ask(Ask::Mapped { gfn: 0, pages: 1 }).unwrap();
        self.settled();
        for (mem, &base_gfn) in self.memories.iter().zip(gfns) {
            let kernel = mem.view.pagemap();
            let mut mirror = vec![(false, false); kernel.len()];
            let (mut gfn, end) = (base_gfn, base_gfn + mem.pages);
            while gfn < end {
                let pages = end - gfn;
                let Ok(Answer::Mapped { runs, next }) = self.ask(Ask::Mapped { gfn, pages }) else {
                    panic!("no listing");
                };
                for run in runs {
                    for gfn in run.gfn..run.gfn + run.pages {
                        mirror[(gfn - base_gfn) as usize] = (true, !run.writable);
                    }
                }
                gfn = next;
            }
            for (page, (kernel, mirror)) in kernel.iter().zip(&mirror).enumerate() {
                assert_eq!(
                    kernel.0, mirror.0,
                    "page {page}: mapped by the kernel, by the mirror"
                );
                if self.can_protect && kernel.0 {
                    assert_eq!(kernel.1, mirror.1, "page {page}: protected");
                }
            }
        }
    }
}
