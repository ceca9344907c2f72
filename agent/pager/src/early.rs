//! Asking a source for its working set, and having that read first.

use std::{collections::HashMap, sync::Arc};

use crate::{memory::Memory, queue::EarlyRuns, shared::Shared, sync::read};

impl Shared {
    /// Has the pages read first that the source names, of memories that begin in it. They were told
    /// before.
    pub(crate) fn read_working_set(&self) {
        let Some(source) = self.source() else { return };
        let layout = read(&self.layout);
        let mut runs: EarlyRuns = Vec::new();
        let memories = layout.places().map(|place| &place.memory);
        let by_origin: HashMap<u32, &Arc<Memory>> = memories
            .filter_map(|memory| Some((memory.origin?, memory)))
            .collect();
        for (origin, pages) in source.first() {
            let Some(memory) = by_origin.get(&origin) else {
                continue;
            };
            let pages = pages.start..pages.end.min(memory.pages);
            if !pages.is_empty() {
                runs.push((Arc::clone(memory), pages));
            }
        }
        drop(by_origin);
        drop(layout);
        if !runs.is_empty() {
            self.queue.read_first(runs);
        }
    }
}
