//! The operations on an address space's mirror, as users call them.
//!
//! *Locking*: each asks the owner in batches, with the MMU lock let go of (`batch`). None takes the
//! slots lock, so none waits for a slot that is going.

use super::{
    leaves::LeafBatch,
    list::Leaves,
    mirror_range::{Aged, Aim, MirrorChange},
    space::AddressSpace,
};
use crate::{addr::GfnRange, flush::FlushCause};

impl<'m> AddressSpace<'m> {
    /// Unmaps the mirror's leaves over `range`, and nothing of the guest's own tables;
    /// [`zap_gfn_range`](Self::zap_gfn_range) does both.
    ///
    /// It waits for batches that others have under way in the range. When it returns, nothing is
    /// mapped there but what the owner refused to unmap ([`MirrorChange::kept`]), and what faults
    /// mapped that had not returned when it was called.
    pub fn zap_mirror(self, range: GfnRange) -> MirrorChange {
        let cause = FlushCause::Unmap;
        self.operations()
            .change_mirror(self.as_id(), range, Aim::Unmap, cause)
    }

    /// Takes the leave to write from the mirror's leaves over `range`: the next write to each is a
    /// fault and is judged anew. What is not mapped, or not writable, is left alone.
    ///
    /// It waits for batches as [`zap_mirror`](Self::zap_mirror) does, and a fault that had not
    /// returned when it was called may make a page writable. So what is to be asked at such a fault
    /// from now on must be known to handlers before this is called.
    pub fn write_protect_mirror(self, range: GfnRange) -> MirrorChange {
        let cause = FlushCause::WriteProtect;
        self.operations()
            .change_mirror(self.as_id(), range, Aim::WriteProtect, cause)
    }

    /// Finds out which pages of the mirror were used: unmaps the first that are mapped over `range`
    /// and says which they were. A page that is used is mapped again by its next fault; one that is
    /// not mapped when its range is aged the next time was not used in between.
    ///
    /// At most 4,096 pages a call; [`Aged::rest`] is what was not looked at. Each page that is used
    /// again costs a fault.
    ///
    /// It waits for batches as [`zap_mirror`](Self::zap_mirror) does.
    pub fn age_mirror(self, range: GfnRange) -> Aged {
        self.operations().age_mirror(self.as_id(), range)
    }

    /// As [`leaf_batch`](Self::leaf_batch), of the mirror.
    pub fn mirror_leaf_batch(self, range: GfnRange) -> LeafBatch {
        self.batch_of(range, true)
    }

    /// The mirror's leaves over `range`, by guest frame: what the owner has mapped, as far as the
    /// mirror knows. A leaf that the owner is just asked about is left out. Takes no lock and
    /// changes nothing.
    pub fn mirror_leaves(self, range: GfnRange) -> Leaves<'m> {
        Leaves::new(self, range, true)
    }

    /// The owner's view was replaced, as a whole, by one in which nothing is mapped: forgets what
    /// the mirror says, without asking the owner for anything. The next fault begins a new mirror.
    ///
    /// The time that it takes does not depend on how much is mapped. Tables are given back by
    /// [`zap_invalidated_roots`](crate::SecondStage::zap_invalidated_roots), without the owner;
    /// pages are not [counted](crate::MmuStats::pages) from now on.
    ///
    /// A batch that is under way ends without effect on the mirror: its fault is told to try again.
    /// It must not have an effect on the *new* view either. So this returns a number: a batch whose
    /// [generation](crate::Batch::generation) is below it is of the old view, and the owner refuses
    /// it, or carries it out there. Whoever replaces the view does so, calls this and notes the
    /// number while no batch looks at the note.
    pub fn withdraw_mirrors(self) -> u64 {
        self.operations().withdraw_mirrors(self.as_id())
    }
}
