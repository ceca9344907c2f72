//! Memory slots: which guest frames have memory, and where it is.
//!
//! A slot maps `npages` guest frames from `base_gfn` on to as many contiguous host frames. The
//! rules of creation and change are those of `KVM_SET_USER_MEMORY_REGION`
//! (Documentation/virt/kvm/api.rst, 4.35), with an error of its own for each.
//!
//! *Locking*: the sets are double-buffered (`rcu::buffer`): faults look them up without a lock,
//! inside; changes hold the slots lock. A [`Memslot`] is immutable and shared:
//! changing one puts a new value into the set. Its dirty bitmap and its huge-page permissions are
//! atomic or locked by themselves, and survive changes of flags.
//!
//! *Going away.* A slot that is to be deleted or moved is first made *invalid*: faults on it retry.
//! When no fault can hold the valid slot any more, its mappings are removed, and only then does the
//! slot go.
//!
//! | file | what |
//! |---|---|
//! | `spec` | what a caller says about a slot, and why it may be refused |
//! | `bitmap` | a slot's dirty bitmap |
//! | `huge` | where huge mappings are forbidden |
//! | `memslot` | a slot as the MMU uses it |
//! | `set` | the slots of an address space |
//!
//! A file uses only files above it.

mod bitmap;
mod huge;
mod memslot;
mod set;
mod spec;

pub use self::spec::{DEFAULT_MAX_SLOTS, MAX_SLOT_PAGES, SlotError, SlotFlags, SlotId, SlotSpec};
pub(crate) use self::{
    bitmap::DirtyBitmap,
    memslot::Memslot,
    set::{Limits, SlotSet},
};
