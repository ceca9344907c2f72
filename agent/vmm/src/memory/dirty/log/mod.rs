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
//! The process's own readers (a migration), those of API callers and measurements live in name
//! spaces of their own, with limits of their own ([`MAX_CURSORS`], [`MAX_MEASUREMENTS`]), so that
//! no caller can end a migration's cursor or take its place.
//! API cursors that nobody used for [`API_CURSOR_IDLE`] are removed by [`DirtyLog::expire_idle`],
//! which the process calls on a timer: dirty logging splits huge pages and must not stay on because
//! a client went away. Its next harvest finds the cursor new (`created`) and must copy everything;
//! an acknowledgement is told that the cursor was dropped (the last 64 are remembered).
//!
//! # Numbers of batches
//! A cursor numbers its batches above those of every cursor before it, also of those that the VM
//! had in another process. So a reader whose cursor expired, or stayed behind in a migration, can
//! not acknowledge what another made under the same name was told: NO_SUCH_CURSOR says that it has
//! to begin anew.
//!
//! # Readers that come together
//! A harvest protects pages again, which costs the guest a fault each. Calls that wait while
//! another reader's harvest goes on share the next one: what was written before they came is in it.
//! So readers that look at the same moments cost little more than one.
//!
//! # Slots
//! Every change of a slot goes through here, under the same lock as a harvest; what changes the
//! slot itself is given along. A slot that is added or moved is dirty as a whole for every reader:
//! all of its frames have other contents than a reader saw there before. One that is made anew with
//! the same contents is harvested first; pages that the host itself changes are marked (`changes`).
//!
//! # All memory, once
//! A migration reads all memory before it harvests. Where the source can begin a log without
//! protecting anything (KVM's INITIALLY_SET), pages are protected in windows of 256 MiB, each just
//! before its first page is read. Until then what the guest writes there is in no log, and is read
//! with the page. That holds for one reader alone: when another comes, or a harvest, the rest is
//! protected first.
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
//!
//! | file | what |
//! |---|---|
//! | `reader` | who reads, and what a reader whose cursor is gone is told |
//! | `slot` | a slot: bitmaps to be used again, what is not protected yet |
//! | `changes` | slots that come, go and move |
//! | `api` | what callers do |
//! | `measure` | a reader that measures |

mod api;
mod changes;
mod measure;
mod reader;
mod slot;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use slat_proto::{
    ApiError, Reason,
    model::{CursorName, SlotSpec},
};

pub(crate) use self::slot::WINDOW;
use self::{
    reader::{API_CURSOR_IDLE, Dropped, MAX_CURSORS, Reader},
    slot::SlotLog,
};
use super::{
    batch::DirtyBatch,
    bitmap::DirtyBitmap,
    cursor::{Cursor, Retired},
    source::{DirtySource, SlotBitmaps},
};

#[derive(Debug, Default)]
struct Inner {
    source: Option<Arc<dyn DirtySource>>,
    slots: BTreeMap<u32, SlotLog>,
    cursors: BTreeMap<Reader, Cursor>,
    /// The highest number of a batch that a cursor which is gone can have delivered.
    batches: u64,
    dropped: Dropped,
    /// Of the last measurement.
    measurements: u64,
    /// Calls that came before the last pull began have numbers below this.
    covered: u64,
}

/// The dirty log of one VM. See the module.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    inner: Mutex<Inner>,
    enabled: AtomicBool,
    harvested: AtomicU64,
    readers: AtomicU32,
    dropped: AtomicU64,
    /// Calls that came so far.
    calls: AtomicU64,
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
        let mut inner = self.lock();
        *inner = Inner::default();
        self.note(&inner);
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
    #[cfg(test)]
    pub(crate) fn attach(&self, cursor: &CursorName) -> Result<bool, ApiError> {
        let mut inner = self.lock();
        self.attach_reader(&mut inner, Reader::Process(cursor.clone()), false)
    }

    /// As [`DirtyLog::attach`], for a reader that goes over all memory once, before its first
    /// harvest, and says of each page that it is about to be read ([`DirtyLog::protect`]). Where
    /// the source can, logging costs nothing at first: a page is protected just before it is read,
    /// so that what the guest wrote to it until then is not read twice. When there is another
    /// reader already, or one comes, everything is protected at once.
    ///
    /// # Errors
    /// As [`DirtyLog::attach`].
    pub(crate) fn attach_whole(&self, cursor: &CursorName) -> Result<bool, ApiError> {
        let mut inner = self.lock();
        self.attach_reader(&mut inner, Reader::Process(cursor.clone()), true)
    }

    /// Pages `[first, first + pages)` of a slot are about to be read, by a reader that goes over
    /// all memory: from the return on, a write to them is logged.
    ///
    /// # Errors
    /// The source's. The next harvest fails with the same, so that nobody relies on what was read.
    pub(crate) fn protect(&self, slot: u32, first: u64, pages: u64) -> Result<(), ApiError> {
        let mut inner = self.lock();
        let source = inner.bound()?;
        match inner.slots.get_mut(&slot) {
            Some(log) => log.protect(&*source, slot, first, pages),
            None => Ok(()),
        }
    }

    /// Every page written since the cursor's last acknowledged harvest.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR, or the source's; then nothing is lost: what was taken comes with the next
    /// harvest.
    pub(crate) fn harvest(&self, cursor: &CursorName) -> Result<DirtyBatch, ApiError> {
        let reader = Reader::Process(cursor.clone());
        let call = self.call();
        let mut inner = self.lock();
        inner.cursor(&reader)?;
        self.pull_for(&mut inner, call)?;
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

    /// Readers there are. Never waits.
    #[must_use]
    pub(crate) fn readers(&self) -> u32 {
        self.readers.load(Ordering::Relaxed)
    }

    /// Readers that were removed because nobody used them. Never waits.
    #[must_use]
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn note_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
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

    /// Whether nobody reads now, comes or goes. Never waits.
    #[must_use]
    pub(crate) fn is_idle(&self) -> bool {
        let inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        inner.cursors.is_empty() && inner.slots.values().all(|log| !log.logging)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings up to date what is shown without the lock.
    fn note(&self, inner: &Inner) {
        let on = inner.slots.values().any(|log| log.logging);
        self.enabled.store(on, Ordering::Relaxed);
        let readers = u32::try_from(inner.cursors.len()).unwrap_or(u32::MAX);
        self.readers.store(readers, Ordering::Relaxed);
    }

    fn attach_reader(
        &self,
        inner: &mut Inner,
        reader: Reader,
        whole: bool,
    ) -> Result<bool, ApiError> {
        let now = Instant::now();
        if let Some(cursor) = inner.cursors.get_mut(&reader) {
            cursor.last_used = now;
            return Ok(false);
        }
        let source = inner.bound()?;
        let same_kind = |other: &&Reader| other.owner() == reader.owner();
        let limit = reader.limit();
        if inner.cursors.keys().filter(same_kind).count() >= limit {
            let what = match reader {
                Reader::Process(_) | Reader::Api(_) => "dirty cursors",
                Reader::Measurement(_) => "measurements of its dirty rate",
            };
            return Err(
                ApiError::new(Reason::LimitReached, format!("the VM has {limit} {what}"))
                    .with("limit", limit)
                    .with("advice", "end one that is no longer used"),
            );
        }
        // What was written until now is the other readers', not the new one's. A slot whose logging
        // could not be turned off before is emptied here too.
        self.pull(inner)?;
        let mut turned_on = Vec::new();
        let mut failed = None;
        for (slot, log) in inner.slots.iter_mut().filter(|(_, log)| !log.logging) {
            if let Err(error) = log.log_on(&*source, *slot, whole) {
                failed = Some(error);
                break;
            }
            turned_on.push(*slot);
        }
        if let Some(error) = failed {
            for slot in turned_on {
                if let Err(error) = inner.log_off(&*source, slot) {
                    tracing::error!(%error, slot, "dirty logging stays on");
                }
            }
            self.note(inner);
            return Err(error.into());
        }
        let cursor = Cursor::new(now, inner.batches);
        inner.cursors.insert(reader, cursor);
        self.note(inner);
        Ok(true)
    }

    fn detach_reader(&self, inner: &mut Inner, reader: &Reader) -> Result<(), ApiError> {
        let Some(cursor) = inner.cursors.remove(reader) else {
            return Err(inner.dropped.no_such_cursor(reader));
        };
        inner.batches = inner.batches.max(cursor.last_batch());
        self.note(inner);
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
        self.note(inner);
        result
    }

    /// The number of a call that comes now, before it takes the lock.
    fn call(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::SeqCst)
    }

    /// As [`DirtyLog::pull`], unless another reader's has begun since that call came: then it took
    /// all that this one must be told of.
    fn pull_for(&self, inner: &mut Inner, call: u64) -> Result<(), ApiError> {
        if call < inner.covered {
            return Ok(());
        }
        self.pull(inner)
    }

    /// Takes everything from the source and gives it to every cursor. What was taken before an
    /// error is kept. A reader that goes over all memory is done by now, or another reader comes:
    /// what is not protected yet is first, without a word to anybody.
    fn pull(&self, inner: &mut Inner) -> Result<(), ApiError> {
        let source = inner.bound()?;
        let came = self.calls.load(Ordering::SeqCst);
        for (slot, log) in &mut inner.slots {
            log.protect(&*source, *slot, 0, log.pages)?;
        }
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
        result?;
        inner.covered = came;
        Ok(())
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
            .ok_or_else(|| self.dropped.no_such_cursor(reader))?;
        cursor.last_used = Instant::now();
        Ok(cursor)
    }

    fn acknowledge(&mut self, reader: &Reader, batch: u64) -> Result<(), ApiError> {
        let mut retired = Vec::new();
        if self.cursor(reader)?.is_from_before(batch) {
            let error = format!(
                "batch {batch} is of an older dirty cursor \"{}\" than this one",
                reader.name()
            );
            return Err(ApiError::new(Reason::NoSuchCursor, error)
                .with("cursor", reader.name())
                .with("batch", batch)
                .with(
                    "advice",
                    "harvest without acknowledging to begin anew, and copy everything; a cursor's \
                     first batch is above those of all cursors before it",
                ));
        }
        self.cursor(reader)?.acknowledge(batch, &mut retired)?;
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

    fn log_off(
        &mut self,
        source: &dyn DirtySource,
        slot: u32,
    ) -> Result<(), super::source::DirtyError> {
        match self.slots.get_mut(&slot) {
            Some(log) => log.log_off(source, slot),
            None => Ok(()),
        }
    }

    /// Slots in the order of their frames.
    fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> = self.slots.keys().copied().collect();
        order.sort_unstable_by_key(|slot| self.slots[slot].base_gfn);
        order
    }

    /// The bitmaps of a batch, each with its slot's first frame, ascending.
    fn by_frame<'a>(&self, batch: &'a DirtyBatch) -> Vec<(u64, &'a DirtyBitmap)> {
        let base = |slot: &u32| self.slots.get(slot).map(|log| log.base_gfn);
        let mut order: Vec<(u64, &DirtyBitmap)> = batch
            .slots
            .iter()
            .filter_map(|(slot, bitmap)| Some((base(slot)?, &**bitmap)))
            .collect();
        order.sort_unstable_by_key(|(base, _)| *base);
        order
    }
}
