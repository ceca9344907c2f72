//! Numbers that callers hold and give back: the slot table's generation, and the numbers of dirty
//! cursors' batches. A number that came again would let a caller change a table that it has never
//! seen, or acknowledge pages that it was never told of. So they grow as long as the VM lives,
//! whichever process has it.
//!
//! * The generation comes from the source with the VM's state. A source whose version does not say
//!   it leaves its callers with numbers that are not known here; counting then goes on above all
//!   that they can hold: a stale number is refused, and so is the present one, until the table is
//!   listed again.
//! * Cursors stay behind. Those made here number their batches above all that the source can have
//!   delivered.
//!
//! What "above all" means comes from the epoch, which grows at every handover: each epoch has 2^32
//! numbers of its own.

use super::Machine;

/// Numbers of one epoch, as a power of two.
const EPOCH_BITS: u32 = 32;
/// Later epochs share their numbers. No VM lives to see one.
const LAST_EPOCH: u64 = (1 << 31) - 1;

/// The last number that epochs up to this one can have used.
fn used_until(epoch: u64) -> u64 {
    epoch.min(LAST_EPOCH) << EPOCH_BITS
}

impl Machine {
    /// Where the VM comes from another process, before it runs: numbers go on where that one's
    /// ended. `generation` is its slot table's, if it says it.
    pub(crate) fn go_on_counting(&self, generation: Option<u64>) {
        let used = used_until(self.shared.view().epoch);
        self.memory.raise_generation(generation.unwrap_or(used + 1));
        self.dirty.number_batches_above(used);
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::{Reason, model::SlotChange};

    use super::*;
    use crate::fake;

    #[test]
    fn what_a_source_of_before_did_not_say_makes_every_number_stale() {
        let vm = fake::created();
        let generation = || vm.machine.list_slots().unwrap().generation;
        let stale = generation();
        vm.machine.go_on_counting(None);
        assert!(generation() > stale + (1 << 31));
        let change = [SlotChange::Delete { slot: 9 }];
        let error = vm.machine.update_slots(&change, stale).unwrap_err();
        assert_eq!(error.reason, Reason::StaleGeneration);
        // Whoever lists the table again may change it.
        let error = vm.machine.update_slots(&change, generation()).unwrap_err();
        assert_eq!(error.reason, Reason::NoSuchSlot);
    }

    #[test]
    fn epochs_have_numbers_of_their_own() {
        assert_eq!(used_until(1), 1 << 32);
        assert!(used_until(2) > used_until(1) + u64::from(u32::MAX));
        for far in [LAST_EPOCH, u64::MAX] {
            assert!(i64::try_from(used_until(far) + 1).is_ok());
        }
    }
}
