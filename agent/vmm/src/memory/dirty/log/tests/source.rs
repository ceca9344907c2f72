//! A source for tests: its "guest" writes when the test says so, and every call can be made to
//! fail. It keeps what was written as a bitmap does, or as a small ring.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::memory::dirty::{
    bitmap::DirtyBitmap,
    source::{DirtyError, DirtySource, SlotBitmaps},
};

/// Entries that the ring holds.
const CAPACITY: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bitmap,
    /// Entries (slot, page). When it is full, what is in it goes into bitmaps that it holds back.
    Ring,
    /// A bitmap that can begin with nothing protected.
    Full,
}

#[derive(Debug)]
pub(super) struct FakeSlot {
    pub(super) logging: bool,
    /// Written since the last harvest: what is there is written without being told of again.
    dirty: BTreeSet<u64>,
    /// Of a ring: entries that did not fit.
    held_back: DirtyBitmap,
    /// Pages that are not protected: a write to them is not logged.
    pub(super) unprotected: DirtyBitmap,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) slots: BTreeMap<u32, FakeSlot>,
    ring: Vec<(u32, u64)>,
    /// Names of calls that fail: each entry fails the next such call, once.
    pub(super) fail: Vec<&'static str>,
}

impl State {
    fn drain(&mut self) {
        for (slot, page) in std::mem::take(&mut self.ring) {
            if let Some(slot) = self.slots.get_mut(&slot) {
                slot.held_back.set(page, 1);
            }
        }
    }

    fn fails(&mut self, call: &str) -> bool {
        let found = self.fail.iter().position(|fail| *fail == call);
        found.map(|at| self.fail.remove(at)).is_some()
    }
}

#[derive(Debug)]
pub(super) struct FakeSource {
    kind: Kind,
    state: Mutex<State>,
}

fn refused(slot: u32, message: &str) -> DirtyError {
    DirtyError::Refused {
        slot,
        message: message.to_owned(),
    }
}

impl FakeSource {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            state: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that does nothing but fail when it is told to.
    pub(super) fn call(&self, call: &str, slot: u32) -> Result<(), DirtyError> {
        if self.state().fails(call) {
            return Err(refused(slot, "told to fail"));
        }
        Ok(())
    }

    pub(super) fn add_slot(&self, slot: u32, pages: u64) -> Result<(), DirtyError> {
        self.call("add_slot", slot)?;
        let new = FakeSlot {
            logging: false,
            dirty: BTreeSet::new(),
            held_back: DirtyBitmap::new(pages),
            unprotected: DirtyBitmap::new(pages),
        };
        let before = self.state().slots.insert(slot, new);
        assert!(before.is_none(), "slot {slot} added twice");
        Ok(())
    }

    pub(super) fn remove_slot(&self, slot: u32) -> Result<(), DirtyError> {
        self.call("remove_slot", slot)?;
        let mut state = self.state();
        state.drain();
        let removed = state.slots.remove(&slot);
        removed.map(drop).ok_or(DirtyError::NoSuchSlot { slot })
    }

    /// The guest writes a page.
    pub(super) fn guest_writes(&self, slot: u32, page: u64) {
        let mut state = self.state();
        let found = state.slots.get_mut(&slot).expect("the slot exists");
        assert!(page < found.held_back.pages());
        let unprotected = found
            .unprotected
            .runs()
            .any(|(first, pages)| (first..first + pages).contains(&page));
        if unprotected || !found.logging || !found.dirty.insert(page) || self.kind != Kind::Ring {
            return;
        }
        if state.ring.len() == CAPACITY {
            // The vCPU left the guest; its thread empties the ring.
            state.drain();
        }
        state.ring.push((slot, page));
    }
}

impl DirtySource for FakeSource {
    fn set_dirty_logging(&self, slot: u32, on: bool) -> Result<(), DirtyError> {
        self.call(if on { "log_on" } else { "log_off" }, slot)?;
        let mut state = self.state();
        state.drain();
        let found = state.slots.get_mut(&slot);
        let found = found.ok_or(DirtyError::NoSuchSlot { slot })?;
        found.logging = on;
        found.dirty.clear();
        found.held_back.clear();
        found.unprotected.clear();
        Ok(())
    }

    fn begin_dirty_logging(&self, slot: u32) -> Result<bool, DirtyError> {
        self.set_dirty_logging(slot, true)?;
        if self.kind != Kind::Full {
            return Ok(false);
        }
        let mut state = self.state();
        let found = state.slots.get_mut(&slot).expect("set above");
        let pages = found.unprotected.pages();
        found.unprotected.set(0, pages);
        Ok(true)
    }

    fn protect(&self, slot: u32, first: u64, pages: u64) -> Result<(), DirtyError> {
        self.call("protect", slot)?;
        let mut state = self.state();
        let found = state.slots.get_mut(&slot);
        let found = found.ok_or(DirtyError::NoSuchSlot { slot })?;
        let rest = found.unprotected.split_off(first + pages);
        drop(found.unprotected.split_off(first));
        found.unprotected.unite(&rest);
        Ok(())
    }

    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
        let mut state = self.state();
        for (slot, bitmap) in &*into {
            assert!(bitmap.is_empty(), "a harvest fills empty bitmaps");
            let found = state.slots.get(slot);
            assert!(
                found.is_none_or(|slot| slot.unprotected.is_empty()),
                "a harvest comes when everything is protected"
            );
            if !found.is_some_and(|slot| slot.logging) {
                return Err(refused(*slot, "harvest of a slot that does not log"));
            }
        }
        // Some are taken before the call fails, as a kernel that fails in the middle of CLEAR.
        let failing = state.fails("harvest");
        let share = |all: usize| if failing { all / 2 } else { all };
        match self.kind {
            Kind::Bitmap | Kind::Full => {
                for (slot, bitmap) in into {
                    let found = state.slots.get_mut(slot).expect("looked at above");
                    let take = share(found.dirty.len());
                    for page in found.dirty.iter().take(take) {
                        bitmap.set(*page, 1);
                    }
                    found.dirty = found.dirty.iter().skip(take).copied().collect();
                    if failing {
                        return Err(refused(*slot, "told to fail"));
                    }
                }
            }
            Kind::Ring => {
                let take = share(state.ring.len());
                for (slot, page) in state.ring.drain(..take).collect::<Vec<_>>() {
                    let (Some(bitmap), Some(found)) =
                        (into.get_mut(&slot), state.slots.get_mut(&slot))
                    else {
                        continue;
                    };
                    bitmap.set(page, 1);
                    found.dirty.remove(&page);
                }
                if failing {
                    return Err(refused(0, "told to fail"));
                }
                for (slot, bitmap) in into {
                    let found = state.slots.get_mut(slot).expect("looked at above");
                    bitmap.unite(&found.held_back);
                    for (first, len) in found.held_back.runs() {
                        found
                            .dirty
                            .retain(|page| !(first..first + len).contains(page));
                    }
                    found.held_back.clear();
                }
            }
        }
        Ok(())
    }
}
