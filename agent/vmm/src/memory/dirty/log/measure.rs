//! A reader that measures how fast pages are written: it looks at what was written since its last
//! look and keeps nothing.

use std::collections::BTreeMap;

use slat_proto::ApiError;

use super::{DirtyLog, reader::Reader};
use crate::memory::dirty::{bitmap::DirtyBitmap, source::SlotBitmaps};

/// A reader of the log until it is dropped.
#[derive(Debug)]
pub(crate) struct Measurement<'a> {
    log: &'a DirtyLog,
    reader: Reader,
    halves: [SlotBitmaps; 2],
}

impl DirtyLog {
    /// Begins a measurement: from now on what is written is found by its looks.
    ///
    /// # Errors
    /// LIMIT_REACHED, NO_SUCH_VM, the source's.
    pub(crate) fn measure(&self) -> Result<Measurement<'_>, ApiError> {
        let mut inner = self.lock();
        inner.measurements += 1;
        let reader = Reader::Measurement(inner.measurements);
        self.attach_reader(&mut inner, reader.clone(), false)?;
        Ok(Measurement {
            log: self,
            reader,
            halves: [BTreeMap::new(), BTreeMap::new()],
        })
    }
}

impl Measurement<'_> {
    /// Pages written since the last look. They count as written in the first half of the time, or
    /// in the second.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR when the VM went away; the source's.
    pub(crate) fn look(&mut self, second_half: bool) -> Result<u64, ApiError> {
        let mut retired = Vec::new();
        let call = self.log.call();
        let mut inner = self.log.lock();
        self.log.pull_for(&mut inner, call)?;
        let cursor = inner.cursor(&self.reader)?;
        let batch = cursor.deliver(&mut retired);
        cursor.acknowledge(batch.batch, &mut retired)?;
        let half = &mut self.halves[usize::from(second_half)];
        for (slot, bitmap) in &batch.slots {
            let seen = half
                .entry(*slot)
                .or_insert_with(|| DirtyBitmap::new(bitmap.pages()));
            if seen.pages() != bitmap.pages() {
                // Another slot of that number.
                *seen = DirtyBitmap::new(bitmap.pages());
            }
            seen.unite(bitmap);
        }
        let pages = batch.pages;
        drop(batch);
        inner.retire(retired);
        Ok(pages)
    }

    /// Distinct pages found so far: in the first half, in the second, and in either.
    pub(crate) fn distinct(&mut self) -> (u64, u64, u64) {
        let count = |half: &SlotBitmaps| half.values().map(DirtyBitmap::count).sum::<u64>();
        let (first, second) = (count(&self.halves[0]), count(&self.halves[1]));
        let [all, rest] = &mut self.halves;
        for (slot, bitmap) in rest {
            match all.get_mut(slot) {
                Some(seen) if seen.pages() == bitmap.pages() => seen.unite(bitmap),
                _ => {
                    all.insert(*slot, std::mem::replace(bitmap, DirtyBitmap::new(0)));
                }
            }
        }
        (first, second, count(all))
    }
}

impl Drop for Measurement<'_> {
    fn drop(&mut self) {
        let mut inner = self.log.lock();
        // Without a cursor the VM went away, and its logging with it.
        if inner.cursors.contains_key(&self.reader)
            && let Err(error) = self.log.detach_reader(&mut inner, &self.reader)
        {
            tracing::error!(%error, "dirty logging stays on after a measurement");
        }
    }
}
