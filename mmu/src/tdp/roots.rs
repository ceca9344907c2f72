//! Roots: made, withdrawn, zapped, given back.
//!
//! # Life
//!
//! 1. *Made* when a vCPU of an address space first needs it, with two references: that vCPU's and
//!    the MMU's own. So a valid root's count never falls to nothing, whatever vCPUs come and go.
//! 2. *Withdrawn*: marked invalid under the exclusive lock, with a full flush in the same section,
//!    so no fault maps anything under it any more, and vCPUs load another.
//! 3. *Zapped*: under the shared lock, with yields, while unmapping still visits it, because a
//!    vCPU's translations are only gone because of the flush, and its memory may be taken back
//!    meanwhile.
//! 4. The MMU gives its reference up; who gives up the last one takes the root off the list and
//!    hands it to the grace period.
//!
//! # Counting leaves
//!
//! Leaves under valid roots are counted by who installs and removes them, in cells. When roots are
//! withdrawn, all that is counted there is theirs: the sum moves to a count of its own
//! ([`SeparateCount`]), from which unmapping subtracts, and which vanishes when the last of them is
//! zapped. So zapping need not look at a single leaf. Mirrors have such a count from the beginning.
//!
//! A mirror is withdrawn only when its owner's view was replaced as a whole (`mirror`): then its
//! leaves stand for nothing, and are counted no more.
//!
//! *Locking*: the list has its own lock (`locks`). Roots are added under the shared MMU
//! lock.

use alloc::{sync::Arc, vec::Vec};

use super::{
    mmu::TdpMmu,
    root::{Root, RootPage, SeparateCount},
    vcpu::Vcpu,
};
use crate::{
    addr::MAX_LEVELS,
    flush::{Flush, FlushCause},
    format::Format,
    rcu::cell::Cell,
    sync::{AcqRel, AtomicBool, AtomicU64, Counted, Mutex, Relaxed, Release},
    table::{hint::Hint, memory::TableMemory},
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Whether the vCPU has a valid root loaded, after loading one if need be.
    #[inline(always)]
    pub(super) fn load_root(&self, vcpu: &mut Vcpu, mirror: bool) -> bool {
        let loaded = if mirror { &vcpu.mirror } else { &vcpu.root };
        match loaded {
            Some(root) if !root.is_invalid() => true,
            _ => self.load_new_root(vcpu, mirror),
        }
    }

    #[cold]
    fn load_new_root(&self, vcpu: &mut Vcpu, mirror: bool) -> bool {
        vcpu.hint = Hint::default();
        let slot = |vcpu: &mut Vcpu| {
            if mirror {
                vcpu.mirror.take()
            } else {
                vcpu.root.take()
            }
        };
        if let Some(old) = slot(vcpu) {
            self.put_root(old);
            self.tables.reclaim();
        }
        let Some(root) = self.get_root(&vcpu.reader, vcpu.as_id, mirror) else {
            return false;
        };
        if mirror {
            vcpu.mirror = Some(root);
        } else {
            vcpu.root = Some(root);
        }
        true
    }

    /// As [`load_root`](Self::load_root) for the guest's own tables, but makes no root: that takes
    /// the MMU lock, whose holder may be waiting for this very vCPU to obey a flush.
    #[inline(always)]
    pub(super) fn load_root_if_any(&self, vcpu: &mut Vcpu) -> bool {
        match &vcpu.root {
            Some(root) if !root.is_invalid() => true,
            _ => self.find_new_root(vcpu),
        }
    }

    #[cold]
    fn find_new_root(&self, vcpu: &mut Vcpu) -> bool {
        let Some(found) = self.find_root(&self.roots.lock(), vcpu.as_id, false) else {
            return false;
        };
        vcpu.hint = Hint::default();
        if let Some(old) = vcpu.root.replace(found) {
            self.put_root(old);
        }
        true
    }

    /// Whether there can be a root for this.
    pub(super) fn can_have_root(&self, as_id: u8, mirror: bool) -> bool {
        usize::from(as_id) < self.spaces.len() && (!mirror || self.host.external().is_some())
    }

    /// The valid root of an address space, with a reference; made if there is none. `None` without
    /// memory, or if there can be none.
    pub(super) fn get_root(
        &self,
        cell: &Cell,
        as_id: u8,
        mirror: bool,
    ) -> Option<Counted<RootPage>> {
        if !self.can_have_root(as_id, mirror) {
            return None;
        }
        if let Some(root) = self.find_root(&self.roots.lock(), as_id, mirror) {
            return Some(root);
        }
        let table = self.tables.root(as_id, mirror)?;
        // Shared, so that who withdraws roots meets it or comes before it.
        let _shared = self.lock.shared(cell);
        let mut roots = self.roots.lock();
        if let Some(root) = self.find_root(&roots, as_id, mirror) {
            drop(roots);
            self.tables.retire_root(table);
            return Some(root);
        }
        let count = mirror.then(|| Arc::new(SeparateCount::new([0; MAX_LEVELS], 1)));
        self.separate_counts.lock().extend(count.clone());
        let root = Counted::new(RootPage {
            counted_in: Mutex::new(count),
            table,
            as_id,
            mirror,
            generation: self.root_generation.fetch_add(1, Relaxed) + 1,
            references: AtomicU64::new(2),
            invalid: AtomicBool::new(false),
            to_zap: AtomicBool::new(false),
            batches_over: AtomicU64::new(0),
        });
        roots.push(Counted::clone(&root));
        Some(root)
    }

    fn find_root(
        &self,
        roots: &[Counted<RootPage>],
        as_id: u8,
        mirror: bool,
    ) -> Option<Counted<RootPage>> {
        let root = roots
            .iter()
            .find(|root| root.as_id == as_id && root.mirror == mirror && !root.is_invalid())?;
        root.references.fetch_add(1, Relaxed);
        Some(Counted::clone(root))
    }

    /// Gives a reference up.
    pub(super) fn put_root(&self, root: Counted<RootPage>) {
        if root.references.fetch_sub(1, AcqRel) != 1 {
            return;
        }
        debug_assert!(root.is_invalid(), "the MMU's own reference was given up");
        self.roots
            .lock()
            .retain(|listed| !Counted::ptr_eq(listed, &root));
        self.tables.retire_root(Counted::clone(&root.table));
    }

    /// Roots of an address space that `filter` selects. They cannot go while they are held,
    /// whatever locks do.
    pub(super) fn roots_of(
        &self,
        as_id: u8,
        filter: impl Fn(&RootPage) -> bool,
    ) -> Vec<Counted<RootPage>> {
        let roots = self.roots.lock();
        roots
            .iter()
            .filter(|root| root.as_id == as_id && filter(root))
            .map(Counted::clone)
            .collect()
    }

    /// The valid root that the guest's own accesses use, or the mirror, if there is one.
    pub(super) fn valid_root(&self, as_id: u8, mirror: bool) -> Option<Counted<RootPage>> {
        let roots = self.roots.lock();
        let mut valid = roots
            .iter()
            .filter(|root| root.as_id == as_id && root.mirror == mirror && !root.is_invalid());
        valid.next().map(Counted::clone)
    }

    pub(super) fn do_root(&self, as_id: u8) -> Option<Root> {
        let reader = self.participants.reader_slot();
        let root = self.get_root(&reader, as_id, false)?;
        let shown = root.root();
        self.put_root(root);
        Some(shown)
    }

    /// Withdraws all valid roots but mirrors.
    pub(super) fn do_invalidate_roots(&self) {
        let reader = self.participants.reader_slot();
        let exclusive = self.lock.exclusive();
        let inside = self.participants.pin(&reader);
        let mut withdrawn = Vec::new();
        for root in self.roots.lock().iter() {
            if !root.is_invalid() && !root.mirror {
                root.invalid.store(true, Release);
                root.to_zap.store(true, Relaxed);
                self.tables.header(root.table.pfn()).invalidate();
                withdrawn.push(Counted::clone(root));
            }
        }
        // Nobody maps anything: what is counted in cells is what is mapped under these roots.
        let pages = core::array::from_fn(|level| self.participants.sum(|cell| cell.pages(level)));
        let count = Arc::new(SeparateCount::new(pages, withdrawn.len() as u64));
        for root in &withdrawn {
            *root.counted_in.lock() = Some(Arc::clone(&count));
        }
        if !withdrawn.is_empty() {
            for (level, pages) in pages.into_iter().enumerate() {
                reader.add_pages(level, (pages as i64).wrapping_neg());
            }
            self.separate_counts.lock().push(count);
            // In the same section: no fault can map under a root that a vCPU will never leave.
            self.flush(Flush::All, FlushCause::Roots, 0);
        }
        drop(inside);
        drop(exclusive);
    }

    /// Zaps what was withdrawn, and gives the MMU's references up.
    pub(super) fn do_zap_invalidated_roots(&self) {
        loop {
            let next = self
                .roots
                .lock()
                .iter()
                .find(|root| root.to_zap.load(Relaxed))
                .map(Counted::clone);
            let Some(root) = next else { break };
            // Whoever clears the mark zaps.
            if root.to_zap.swap(false, AcqRel) {
                self.zap_withdrawn_root(&root);
                self.forget_count(&root);
                self.put_root(root);
            }
        }
        self.tidy();
    }

    /// The root is empty.
    fn forget_count(&self, root: &RootPage) {
        if let Some(count) = root.counted_in.lock().take()
            && count.roots.fetch_sub(1, AcqRel) == 1
        {
            self.separate_counts
                .lock()
                .retain(|other| !Arc::ptr_eq(other, &count));
        }
    }

    pub(super) fn do_zap_all(&self) {
        self.do_invalidate_roots();
        self.do_zap_invalidated_roots();
    }

    /// Marks every root invalid, mirrors too: the end of the MMU.
    pub(super) fn withdraw_for_good(&self) -> Vec<Counted<RootPage>> {
        let roots: Vec<_> = self.roots.lock().iter().map(Counted::clone).collect();
        for root in &roots {
            root.invalid.store(true, Release);
            root.to_zap.store(false, Relaxed);
        }
        roots
    }

    /// Drops every reference at once, when no vCPU is left.
    pub(super) fn forget_roots(&self) {
        for root in core::mem::take(&mut *self.roots.lock()) {
            self.tables.retire_root(Counted::clone(&root.table));
        }
    }
}
