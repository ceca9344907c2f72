//! Asking a source for its working set, and having that read first.

use std::sync::Arc;

use crate::{queue::EarlyRuns, shared::Shared, sync::read};

impl Shared {
    /// Has the pages read first that the source names, of memories that begin in it. They were told
    /// before.
    pub(crate) fn read_working_set(&self) {
        let Some(source) = self.source() else { return };
        let layout = read(&self.layout);
        let mut runs: EarlyRuns = Vec::new();
        for (origin, pages) in source.first() {
            let mut places = layout.places();
            let place = places.find(|place| place.memory.origin == Some(origin));
            let Some(place) = place else { continue };
            let pages = pages.start..pages.end.min(place.memory.pages);
            if !pages.is_empty() {
                runs.push((Arc::clone(&place.memory), pages));
            }
        }
        drop(layout);
        if !runs.is_empty() {
            self.queue.read_first(runs);
        }
    }
}
