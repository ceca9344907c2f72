//! The dirty log of a VM: the only reader of a [`DirtySource`], with a cursor for each reader of
//! its own, so that a backup and a migration each see every page written since their last
//! acknowledged harvest.
//!
//! # Protocol of a reader
//! `attach` (logging goes on in every slot with the first reader), then `harvest` and `acknowledge`
//! in turn, then `detach` (logging goes off with the last). Bits that were delivered but not
//! acknowledged come back with the next harvest. A reader that detaches without acknowledging
//! leaves nothing behind and takes nothing from the others.
//!
//! # Whose reader
//! The process's own readers (a migration) and those of API callers live in two name spaces, each
//! of at most [`MAX_CURSORS`], so that no caller can end a migration's cursor or take its place.
//! API cursors that nobody used for [`API_CURSOR_IDLE`] are removed by [`DirtyLog::expire_idle`],
//! which the process calls on a timer: dirty logging splits huge pages and must not stay on because
//! a client went away. Its next harvest finds the cursor new (`created`) and must copy everything.
//!
//! # Numbers of batches
//! A cursor numbers its batches above those of every cursor before it, also of those that the VM
//! had in another process. So a reader whose cursor expired, or stayed behind in a migration, can
//! not acknowledge what another made under the same name was told: NO_SUCH_CURSOR says that it has
//! to begin anew.
//!
//! # Slots
//! Every change of a slot goes through here, under the same lock as a harvest; what changes the
//! slot itself is given along. A slot that is added or moved is dirty as a whole for every reader:
//! all of its frames have other contents than a reader saw there before.
//!
//! # Bitmaps
//! A harvest fills one bitmap a slot. It goes to the last cursor as it is and is united with those
//! of the others; cursors hand theirs on to batches. A bitmap comes back when its batch was
//! acknowledged or became part of a newer one, and is used again: the memory of a large slot's is
//! not fetched anew during a switchover.
//!
//! # Locking
//! One mutex over cursors, slots and every call of the source. It is taken after the machine's
//! control lock and before any lock of a backend; nothing is called back from under it.
//! [`DirtyLog::enabled`] and the counters are atomics: reading them never waits.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{CursorName, SlotSpec},
};

use super::{
    batch::{ApiHarvest, DirtyBatch},
    bitmap::DirtyBitmap,
    cursor::{Cursor, Retired},
    source::{DirtyError, DirtySource, SlotBitmaps},
};

/// Most cursors of the process, and most cursors of API callers.
pub(crate) const MAX_CURSORS: usize = 16;
/// An API cursor that was not used for this long is removed.
pub(crate) const API_CURSOR_IDLE: Duration = Duration::from_secs(600);

/// Bitmaps of a slot that are kept to be used again: what a harvest fills while the last batch is
/// still in use, and one more for a second reader.
const SPARES: usize = 2;

/// Whose cursor.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reader {
    Process(CursorName),
    Api(CursorName),
}

impl Reader {
    fn name(&self) -> &CursorName {
        match self {
            Self::Process(name) | Self::Api(name) => name,
        }
    }
}

/// A slot as the log sees it.
#[derive(Debug)]
struct SlotLog {
    base_gfn: u64,
    pages: u64,
    logging: bool,
    /// Bitmaps to be used again, once their last reader has let go.
    spares: Vec<Arc<DirtyBitmap>>,
}

impl SlotLog {
    /// An empty bitmap.
    fn blank(&mut self) -> DirtyBitmap {
        let free = |spare: &mut Arc<DirtyBitmap>| Arc::get_mut(spare).is_some();
        let found = self.spares.iter_mut().position(free);
        let spare = found.and_then(|at| Arc::into_inner(self.spares.swap_remove(at)));
        match spare {
            Some(mut bitmap) => {
                bitmap.clear();
                bitmap
            }
            None => DirtyBitmap::new(self.pages),
        }
    }

    fn retire(&mut self, mut bitmap: Arc<DirtyBitmap>) {
        if self.spares.len() < SPARES {
            // Now, not in the next harvest, which may be the blackout's.
            if let Some(bitmap) = Arc::get_mut(&mut bitmap) {
                bitmap.clear();
            }
            self.spares.push(bitmap);
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    source: Option<Arc<dyn DirtySource>>,
    slots: BTreeMap<u32, SlotLog>,
    cursors: BTreeMap<Reader, Cursor>,
    /// The highest number of a batch that a cursor which is gone can have delivered.
    batches: u64,
}

/// The dirty log of one VM. See the module.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    inner: Mutex<Inner>,
    enabled: AtomicBool,
    harvested: AtomicU64,
}

impl DirtyLog {
    /// A log without a source; every call of a reader is NO_SUCH_VM until `bind`.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Begins to read `source`, which has no slots yet.
    pub(crate) fn bind(&self, source: Arc<dyn DirtySource>) {
        *self.lock() = Inner {
            source: Some(source),
            ..Inner::default()
        };
    }

    /// Lets go of the source, every slot and cursor with it.
    pub(crate) fn unbind(&self) {
        *self.lock() = Inner::default();
        self.enabled.store(false, Ordering::Relaxed);
    }

    /// Cursors made from now on number their batches above `used`.
    pub(crate) fn number_batches_above(&self, used: u64) {
        let mut inner = self.lock();
        inner.batches = inner.batches.max(used);
    }

    /// Makes a reader of this process. True when it is new; its first harvest then has the pages
    /// written from now on.
    ///
    /// # Errors
    /// LIMIT_REACHED, NO_SUCH_VM, or the source's when logging cannot be turned on; nothing has
    /// changed then.
    pub(crate) fn attach(&self, cursor: &CursorName) -> Result<bool, ApiError> {
        let mut inner = self.lock();
        self.attach_reader(&mut inner, Reader::Process(cursor.clone()))
    }

    /// Every page written since the cursor's last acknowledged harvest.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR, or the source's; then nothing is lost: what was taken comes with the next
    /// harvest.
    pub(crate) fn harvest(&self, cursor: &CursorName) -> Result<DirtyBatch, ApiError> {
        let reader = Reader::Process(cursor.clone());
        let mut inner = self.lock();
        inner.cursor(&reader)?;
        self.pull(&mut inner)?;
        let mut retired = Vec::new();
        let batch = inner.cursor(&reader)?.deliver(&mut retired);
        inner.retire(retired);
        Ok(batch)
    }

    /// Forgets what the cursor's last batch delivered.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR; BAD_PARAMETER when `batch` is not the last one.
    pub(crate) fn acknowledge(&self, cursor: &CursorName, batch: u64) -> Result<(), ApiError> {
        let reader = Reader::Process(cursor.clone());
        self.lock().acknowledge(&reader, batch)
    }

    /// Ends a reader. Logging goes off in every slot with the last one.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR; the source's when logging of a slot cannot be turned off. The reader is gone
    /// all the same, and [`DirtyLog::enabled`] says whether a slot still logs.
    pub(crate) fn detach(&self, cursor: &CursorName) -> Result<(), ApiError> {
        let mut inner = self.lock();
        self.detach_reader(&mut inner, &Reader::Process(cursor.clone()))
    }

    /// Whether any slot has dirty logging on. Never waits.
    #[must_use]
    pub(crate) fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Whether this slot has dirty logging on.
    #[must_use]
    pub(crate) fn slot_enabled(&self, slot: u32) -> bool {
        self.lock().slots.get(&slot).is_some_and(|log| log.logging)
    }

    /// Pages taken from the source's log so far. Never waits.
    #[must_use]
    pub(crate) fn pages_harvested(&self) -> u64 {
        self.harvested.load(Ordering::Relaxed)
    }

    /// One call of an API reader: acknowledges `acknowledge` unless it is 0, makes the cursor when
    /// there is none, and delivers at most `max_ranges` runs of pages within slots; what is left
    /// comes with the next call.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR when a batch of a cursor that is gone is acknowledged, even if there is a new
    /// one of its name; BAD_PARAMETER when it is not the last batch; LIMIT_REACHED, NO_SUCH_VM, the
    /// source's.
    pub(crate) fn read_api(
        &self,
        cursor: &CursorName,
        acknowledge: u64,
        max_ranges: usize,
    ) -> Result<ApiHarvest, ApiError> {
        let reader = Reader::Api(cursor.clone());
        let mut inner = self.lock();
        if acknowledge != 0 {
            inner.acknowledge(&reader, acknowledge)?;
        }
        let created = self.attach_reader(&mut inner, reader.clone())?;
        if !created {
            self.pull(&mut inner)?;
        }
        let order = inner.order();
        let mut retired = Vec::new();
        let cursor = inner.cursor(&reader)?;
        let batch = cursor.deliver_some(&order, max_ranges, &mut retired);
        inner.retire(retired);
        Ok(ApiHarvest {
            batch: batch.batch,
            ranges: inner.frames(&batch),
            pages: batch.pages,
            created,
        })
    }

    /// Ends an API reader.
    ///
    /// # Errors
    /// As [`DirtyLog::detach`].
    pub(crate) fn detach_api(&self, cursor: &CursorName) -> Result<(), ApiError> {
        let mut inner = self.lock();
        self.detach_reader(&mut inner, &Reader::Api(cursor.clone()))
    }

    /// Removes API cursors that were last used [`API_CURSOR_IDLE`] or longer before `now`; returns
    /// how many.
    pub(crate) fn expire_idle(&self, now: Instant) -> usize {
        let mut inner = self.lock();
        let idle: Vec<Reader> = inner
            .cursors
            .iter()
            .filter(|(reader, cursor)| {
                matches!(reader, Reader::Api(_))
                    && now.saturating_duration_since(cursor.last_used) >= API_CURSOR_IDLE
            })
            .map(|(reader, _)| reader.clone())
            .collect();
        for reader in &idle {
            tracing::warn!(
                cursor = reader.name().id(),
                idle_seconds = API_CURSOR_IDLE.as_secs(),
                "removing a dirty cursor that nobody uses"
            );
            if let Err(error) = self.detach_reader(&mut inner, reader) {
                tracing::error!(%error, "dirty logging stays on in a slot");
            }
        }
        idle.len()
    }

    /// Adds a slot by `add`, with logging when there are readers; `remove` takes it back when it
    /// cannot be logged.
    ///
    /// # Errors
    /// Theirs, or the source's; the slot is then not there.
    pub(crate) fn add_slot<E: From<DirtyError> + std::fmt::Display>(
        &self,
        spec: SlotSpec,
        add: impl FnOnce() -> Result<(), E>,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        add()?;
        let source = inner.source.clone();
        let source = source.filter(|_| !inner.cursors.is_empty());
        if let Some(Err(error)) = source
            .as_ref()
            .map(|source| source.set_dirty_logging(spec.slot, true))
        {
            if let Err(error) = remove() {
                tracing::error!(%error, slot = spec.slot, "a slot that could not be logged stays");
            }
            return Err(error.into());
        }
        inner.slots.insert(
            spec.slot,
            SlotLog {
                base_gfn: spec.base_gfn,
                pages: spec.pages,
                logging: source.is_some(),
                spares: Vec::new(),
            },
        );
        inner.all_dirty(spec);
        self.note_enabled(&inner);
        Ok(())
    }

    /// Takes a slot away by `remove`, and from every cursor.
    ///
    /// # Errors
    /// Those of `remove`; the slot is then still there.
    pub(crate) fn remove_slot<E>(
        &self,
        slot: u32,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        remove()?;
        inner.slots.remove(&slot);
        for cursor in inner.cursors.values_mut() {
            cursor.forget(slot);
        }
        self.note_enabled(&inner);
        Ok(())
    }

    /// Moves a slot by `move_there`; its frames at the new place are dirty for every cursor.
    ///
    /// # Errors
    /// Those of `move_there`; the slot is then where it was.
    pub(crate) fn move_slot<E>(
        &self,
        spec: SlotSpec,
        move_there: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        move_there()?;
        if let Some(log) = inner.slots.get_mut(&spec.slot) {
            log.base_gfn = spec.base_gfn;
        }
        inner.all_dirty(spec);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_enabled(&self, inner: &Inner) {
        let on = inner.slots.values().any(|log| log.logging);
        self.enabled.store(on, Ordering::Relaxed);
    }

    fn attach_reader(&self, inner: &mut Inner, reader: Reader) -> Result<bool, ApiError> {
        let now = Instant::now();
        if let Some(cursor) = inner.cursors.get_mut(&reader) {
            cursor.last_used = now;
            return Ok(false);
        }
        let source = inner.bound()?;
        let api = matches!(reader, Reader::Api(_));
        let same_kind = |other: &&Reader| matches!(other, Reader::Api(_)) == api;
        if inner.cursors.keys().filter(same_kind).count() >= MAX_CURSORS {
            return Err(ApiError::new(
                Reason::LimitReached,
                format!("the VM has {MAX_CURSORS} dirty cursors"),
            )
            .with("limit", MAX_CURSORS)
            .with("advice", "delete a cursor that is no longer used"));
        }
        // What was written until now is the other readers', not the new one's. A slot whose logging
        // could not be turned off before is emptied here too.
        self.pull(inner)?;
        let mut turned_on = Vec::new();
        let mut failed = None;
        for (slot, log) in inner.slots.iter_mut().filter(|(_, log)| !log.logging) {
            if let Err(error) = source.set_dirty_logging(*slot, true) {
                failed = Some(error);
                break;
            }
            log.logging = true;
            turned_on.push(*slot);
        }
        if let Some(error) = failed {
            for slot in turned_on {
                if let Err(error) = inner.log_off(&*source, slot) {
                    tracing::error!(%error, slot, "dirty logging stays on");
                }
            }
            self.note_enabled(inner);
            return Err(error.into());
        }
        let cursor = Cursor::new(now, inner.batches);
        inner.cursors.insert(reader, cursor);
        self.note_enabled(inner);
        Ok(true)
    }

    fn detach_reader(&self, inner: &mut Inner, reader: &Reader) -> Result<(), ApiError> {
        let Some(cursor) = inner.cursors.remove(reader) else {
            return Err(no_such_cursor(reader));
        };
        inner.batches = inner.batches.max(cursor.last_batch());
        if !inner.cursors.is_empty() {
            return Ok(());
        }
        let source = inner.bound()?;
        let on: Vec<u32> = inner
            .slots
            .iter()
            .filter(|(_, log)| log.logging)
            .map(|(slot, _)| *slot)
            .collect();
        let mut result = Ok(());
        for slot in on {
            if let Err(error) = inner.log_off(&*source, slot) {
                result = Err(ApiError::from(error).with("slot", slot));
            }
        }
        self.note_enabled(inner);
        result
    }

    /// Takes everything from the source and gives it to every cursor. What was taken before an
    /// error is kept.
    fn pull(&self, inner: &mut Inner) -> Result<(), ApiError> {
        let source = inner.bound()?;
        let Inner { slots, cursors, .. } = inner;
        let logging = slots.iter_mut().filter(|(_, log)| log.logging);
        let mut taken: SlotBitmaps = logging.map(|(slot, log)| (*slot, log.blank())).collect();
        if taken.is_empty() {
            return Ok(());
        }
        let result = source.harvest_dirty(&mut taken);
        for (slot, bitmap) in taken {
            self.harvested.fetch_add(bitmap.count(), Ordering::Relaxed);
            let mut readers = cursors.values_mut();
            let last = readers.next_back().filter(|_| !bitmap.is_empty());
            let left = match last {
                Some(last) => {
                    readers.for_each(|cursor| cursor.add(slot, &bitmap));
                    last.give(slot, bitmap)
                }
                None => Some(bitmap),
            };
            if let (Some(log), Some(bitmap)) = (slots.get_mut(&slot), left) {
                log.retire(Arc::new(bitmap));
            }
        }
        Ok(result?)
    }
}

impl Inner {
    fn bound(&self) -> Result<Arc<dyn DirtySource>, ApiError> {
        self.source
            .clone()
            .ok_or_else(|| ApiError::new(Reason::NoSuchVm, "the VM is not built yet"))
    }

    fn cursor(&mut self, reader: &Reader) -> Result<&mut Cursor, ApiError> {
        let cursor = self
            .cursors
            .get_mut(reader)
            .ok_or_else(|| no_such_cursor(reader))?;
        cursor.last_used = Instant::now();
        Ok(cursor)
    }

    fn acknowledge(&mut self, reader: &Reader, batch: u64) -> Result<(), ApiError> {
        let mut retired = Vec::new();
        let cursor = self.cursor(reader)?;
        if cursor.is_from_before(batch) {
            return Err(no_such_cursor(reader).with("batch", batch));
        }
        cursor.acknowledge(batch, &mut retired)?;
        self.retire(retired);
        Ok(())
    }

    fn retire(&mut self, retired: Vec<Retired>) {
        for (slot, bitmap) in retired {
            if let Some(log) = self.slots.get_mut(&slot) {
                log.retire(bitmap);
            }
        }
    }

    fn all_dirty(&mut self, spec: SlotSpec) {
        for cursor in self.cursors.values_mut() {
            cursor.mark_all(spec.slot, spec.pages);
        }
    }

    fn log_off(&mut self, source: &dyn DirtySource, slot: u32) -> Result<(), DirtyError> {
        source.set_dirty_logging(slot, false)?;
        if let Some(log) = self.slots.get_mut(&slot) {
            log.logging = false;
            log.spares.clear();
        }
        Ok(())
    }

    /// Slots in the order of their frames.
    fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> = self.slots.keys().copied().collect();
        order.sort_unstable_by_key(|slot| self.slots[slot].base_gfn);
        order
    }

    /// A batch as guest frames, ascending, adjacent ranges joined.
    fn frames(&self, batch: &DirtyBatch) -> Vec<(u64, u64)> {
        let base = |slot: &u32| self.slots.get(slot).map(|log| log.base_gfn);
        let mut order: Vec<(u64, &DirtyBitmap)> = batch
            .slots
            .iter()
            .filter_map(|(slot, bitmap)| Some((base(slot)?, &**bitmap)))
            .collect();
        order.sort_unstable_by_key(|(base, _)| *base);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (base, bitmap) in order {
            for (first, pages) in bitmap.runs() {
                let gfn = base + first;
                match ranges.last_mut() {
                    Some((last, len)) if *last + *len == gfn => *len += pages,
                    _ => ranges.push((gfn, pages)),
                }
            }
        }
        ranges
    }
}

fn no_such_cursor(reader: &Reader) -> ApiError {
    let name = reader.name().id();
    ApiError::new(Reason::NoSuchCursor, format!("no dirty cursor \"{name}\""))
        .with("cursor", name)
        .with(
            "advice",
            "it was deleted, unused for 10 minutes, or left behind when the VM was migrated: harvest without acknowledging to begin anew, and copy everything",
        )
}
