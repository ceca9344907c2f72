//! Holding the MMU lock for a long operation.
//!
//! A session holds the lock in one mode, is inside, and gathers the flush it owes.
//! It yields by value: what was borrowed from it (every node) is gone before the lock is, so
//! nothing can be written through a stale position.

use super::mmu::TdpMmu;
use crate::{
    flush::{Flush, FlushCause},
    format::Format,
    rcu::{
        cell::{Cell, Counter},
        lock::Exclusive,
    },
    sync::give_way,
    table::{guard::Guard, memory::TableMemory},
};

/// How the MMU lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Shared,
    Exclusive,
}

#[must_use = "a session ends with `finish`, which pays the flush it owes"]
pub(super) struct Session<'a, F: Format, H: TableMemory> {
    pub(super) mmu: &'a TdpMmu<F, H>,
    // Dropped in this order: out of the read section, then out of the lock.
    pub(super) guard: Guard<'a, F, H>,
    exclusive: Option<Exclusive<'a>>,
    pub(super) cell: &'a Cell,
    owed: Flush,
    cause: FlushCause,
    as_id: u8,
    /// Flushed by this session already, yields included.
    changed: bool,
}

impl<'a, F: Format, H: TableMemory> Session<'a, F, H> {
    pub(super) fn begin(
        mmu: &'a TdpMmu<F, H>,
        cell: &'a Cell,
        mode: Mode,
        cause: FlushCause,
        as_id: u8,
    ) -> Self {
        let (exclusive, inside) = match mode {
            Mode::Shared => (None, mmu.lock.shared(cell)),
            Mode::Exclusive => {
                let exclusive = mmu.lock.exclusive();
                (Some(exclusive), mmu.participants.pin(cell))
            }
        };
        Self {
            mmu,
            guard: Guard::new(&mmu.tables, inside),
            exclusive,
            cell,
            owed: Flush::None,
            cause,
            as_id,
            changed: false,
        }
    }

    pub(super) fn mode(&self) -> Mode {
        match self.exclusive {
            Some(_) => Mode::Exclusive,
            None => Mode::Shared,
        }
    }

    /// Whether someone waits for this session to let go.
    #[inline(always)]
    pub(super) fn is_contended(&self) -> bool {
        match self.exclusive {
            Some(_) => self.mmu.lock.exclusive_is_contended(),
            None => self.mmu.lock.shared_is_contended(),
        }
    }

    pub(super) fn owe(&mut self, flush: Flush) {
        self.owed = self.owed.merge(flush);
    }

    fn pay(&mut self) {
        self.changed |= !self.owed.is_none();
        self.mmu
            .flush(core::mem::take(&mut self.owed), self.cause, self.as_id);
    }

    /// Pays, lets others have the lock, and takes it again. `between` runs while it is not held.
    pub(super) fn yielded(mut self, between: impl FnOnce()) -> Self {
        self.pay();
        self.cell.count(Counter::Yields, 1);
        let (mmu, cell, mode) = (self.mmu, self.cell, self.mode());
        let (cause, as_id, changed) = (self.cause, self.as_id, self.changed);
        drop(self.guard);
        drop(self.exclusive);
        give_way();
        between();
        Self {
            changed,
            ..Self::begin(mmu, cell, mode, cause, as_id)
        }
    }

    /// Pays, and lets go of the lock. Whether anything was flushed from beginning to end.
    pub(super) fn finish(mut self) -> bool {
        self.pay();
        self.changed
    }
}
