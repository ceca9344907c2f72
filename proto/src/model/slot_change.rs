//! Changes of the slot table, checked one by one against a table that follows them.
//!
//! A table of as many slots as a kernel takes is checked in a time that grows with the changes, not
//! with changes times slots.

use std::collections::BTreeMap;

use super::slot::{SlotSpec, bad};
use crate::{ApiError, Reason, v1};

/// Most changes in one UpdateSlots.
pub const MAX_SLOT_CHANGES: usize = 1024;

/// One checked change of the slot table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotChange {
    /// Add a slot.
    Create(SlotSpec),
    /// Remove one.
    Delete {
        /// Its number.
        slot: u32,
    },
    /// Move one.
    Move {
        /// Its number.
        slot: u32,
        /// Its new first frame.
        base_gfn: u64,
    },
    /// Change what the guest may do with one.
    SetFlags {
        /// Its number.
        slot: u32,
        /// Guest writes are dropped.
        read_only: bool,
    },
}

impl SlotChange {
    /// From a message.
    ///
    /// # Errors
    /// BAD_PARAMETER when nothing is asked, BAD_SLOT_TABLE as [`SlotSpec::new`].
    pub fn from_message(change: &v1::SlotChange) -> Result<Self, ApiError> {
        use v1::slot_change::Change;
        match &change.change {
            None => Err(ApiError::bad_parameter(
                "changes",
                "a change says create, delete, move or set_flags",
            )),
            Some(Change::Create(create)) => match &create.slot {
                None => Err(ApiError::bad_parameter("changes.create.slot", "is missing")),
                Some(slot) => SlotSpec::from_message(slot).map(Self::Create),
            },
            Some(Change::Delete(delete)) => Ok(Self::Delete { slot: delete.slot }),
            Some(Change::Move(moved)) => Ok(Self::Move {
                slot: moved.slot,
                base_gfn: moved.base_gfn,
            }),
            Some(Change::SetFlags(flags)) => Ok(Self::SetFlags {
                slot: flags.slot,
                read_only: flags.read_only,
            }),
        }
    }

    /// All of a request, in order.
    ///
    /// # Errors
    /// BAD_PARAMETER when there are none or more than [`MAX_SLOT_CHANGES`]; as
    /// [`SlotChange::from_message`], with the `change` at fault (from 0).
    pub fn from_messages(changes: &[v1::SlotChange]) -> Result<Vec<Self>, ApiError> {
        if !(1..=MAX_SLOT_CHANGES).contains(&changes.len()) {
            return Err(ApiError::bad_parameter(
                "changes",
                format_args!("has {} entries; 1 to {MAX_SLOT_CHANGES}", changes.len()),
            )
            .with("value", changes.len())
            .with("limit", MAX_SLOT_CHANGES));
        }
        let numbered = changes.iter().enumerate();
        numbered
            .map(|(index, change)| {
                Self::from_message(change).map_err(|error| error.with("change", index))
            })
            .collect()
    }

    /// The slot it is about.
    #[must_use]
    pub fn slot(&self) -> u32 {
        match *self {
            Self::Create(spec) => spec.slot,
            Self::Delete { slot } | Self::Move { slot, .. } | Self::SetFlags { slot, .. } => slot,
        }
    }

    /// The table after this change, by base.
    ///
    /// # Errors
    /// As [`SlotPlan::apply`].
    pub fn apply(&self, slots: &[SlotSpec]) -> Result<Vec<SlotSpec>, ApiError> {
        let mut plan = SlotPlan::new(slots.iter().copied());
        plan.apply(self)?;
        Ok(plan.specs().collect())
    }
}

/// A valid slot table that follows changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotPlan {
    slots: BTreeMap<u32, SlotSpec>,
    /// Numbers by first frame.
    bases: BTreeMap<u64, u32>,
}

impl SlotPlan {
    /// Of a table that is valid.
    pub fn new(slots: impl Iterator<Item = SlotSpec>) -> Self {
        let mut plan = Self::default();
        slots.for_each(|spec| plan.put(spec));
        plan
    }

    /// How many slots there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The slots, by base.
    pub fn specs(&self) -> impl Iterator<Item = SlotSpec> {
        self.bases.values().map(|number| self.slots[number])
    }

    /// The slot of that number.
    ///
    /// # Errors
    /// NO_SUCH_SLOT.
    pub fn get(&self, slot: u32) -> Result<SlotSpec, ApiError> {
        self.slots.get(&slot).copied().ok_or_else(|| {
            ApiError::new(Reason::NoSuchSlot, format!("no slot {slot}")).with("slot", slot)
        })
    }

    /// Makes a change.
    ///
    /// # Errors
    /// NO_SUCH_SLOT, or BAD_SLOT_TABLE when the result is no valid table: a number that is taken,
    /// frames of another slot (`other_slot`), frames beyond the end. Nothing has changed then.
    pub fn apply(&mut self, change: &SlotChange) -> Result<(), ApiError> {
        match *change {
            SlotChange::Create(spec) => {
                if self.slots.contains_key(&spec.slot) {
                    return Err(bad(spec.slot, "the number is taken"));
                }
                self.check_free(spec)?;
                self.put(spec);
            }
            SlotChange::Delete { slot } => {
                self.take(self.get(slot)?);
            }
            SlotChange::Move { slot, base_gfn } => {
                let old = self.get(slot)?;
                let new = SlotSpec::new(slot, base_gfn, old.pages, old.read_only)?;
                self.take(old);
                if let Err(error) = self.check_free(new) {
                    self.put(old);
                    return Err(error);
                }
                self.put(new);
            }
            SlotChange::SetFlags { slot, read_only } => {
                let old = self.get(slot)?;
                self.put(SlotSpec { read_only, ..old });
            }
        }
        Ok(())
    }

    fn put(&mut self, spec: SlotSpec) {
        self.bases.insert(spec.base_gfn, spec.slot);
        self.slots.insert(spec.slot, spec);
    }

    fn take(&mut self, spec: SlotSpec) {
        self.bases.remove(&spec.base_gfn);
        self.slots.remove(&spec.slot);
    }

    /// The last slot that has frames of `spec`.
    fn over(&self, spec: SlotSpec) -> Option<SlotSpec> {
        let (_, number) = self.bases.range(..spec.end_gfn()).next_back()?;
        let last = self.slots[number];
        (last.end_gfn() > spec.base_gfn).then_some(last)
    }

    fn check_free(&self, spec: SlotSpec) -> Result<(), ApiError> {
        let Some(other) = self.over(spec) else {
            return Ok(());
        };
        Err(bad(
            spec.slot,
            format_args!(
                "frames [{:#x}, {:#x}) overlap slot {} [{:#x}, {:#x})",
                spec.base_gfn,
                spec.end_gfn(),
                other.slot,
                other.base_gfn,
                other.end_gfn()
            ),
        )
        .with("other_slot", other.slot)
        .with("gfn", spec.base_gfn)
        .with("pages", spec.pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::slots_for_memory;

    fn spec(slot: u32, base: u64, pages: u64) -> SlotSpec {
        SlotSpec::new(slot, base, pages, false).unwrap()
    }

    #[test]
    fn overlap_and_reuse_are_named() {
        let slots = slots_for_memory(64 << 20).unwrap();
        let error = SlotChange::Create(spec(5, 100, 10)).apply(&slots);
        let error = error.unwrap_err();
        assert_eq!(error.reason, Reason::BadSlotTable);
        assert!(error.message.contains("slot 0"), "{error}");
        assert_eq!(error.metadata["other_slot"], "0");
        let reuse = SlotChange::Create(spec(0, 1 << 30, 10));
        assert!(reuse.apply(&slots).is_err());
        let gone = SlotChange::Delete { slot: 9 }.apply(&slots).unwrap_err();
        assert_eq!(gone.reason, Reason::NoSuchSlot);
    }

    #[test]
    fn neighbours_do_not_overlap_and_a_slot_may_move_over_itself() {
        let mut plan = SlotPlan::new([spec(1, 100, 10), spec(2, 120, 10)].into_iter());
        plan.apply(&SlotChange::Create(spec(3, 110, 10))).unwrap();
        let before = plan.clone();
        for (base, other) in [(101, "2"), (129, "2"), (91, "1")] {
            let moved = SlotChange::Move {
                slot: 3,
                base_gfn: base,
            };
            let error = plan.apply(&moved).unwrap_err();
            assert_eq!(error.metadata["slot"], "3");
            assert!(
                ["1", "2"].contains(&error.metadata["other_slot"].as_str()),
                "{other}"
            );
            assert_eq!(plan, before);
        }
        plan.apply(&SlotChange::Delete { slot: 2 }).unwrap();
        plan.apply(&SlotChange::Move {
            slot: 3,
            base_gfn: 113,
        })
        .unwrap();
        let bases: Vec<u64> = plan.specs().map(|spec| spec.base_gfn).collect();
        assert_eq!(bases, [100, 113]);
        plan.apply(&SlotChange::SetFlags {
            slot: 3,
            read_only: true,
        })
        .unwrap();
        assert!(plan.get(3).unwrap().read_only && !plan.get(1).unwrap().read_only);
        let far = SlotChange::Move {
            slot: 3,
            base_gfn: u64::MAX,
        };
        assert_eq!(plan.apply(&far).unwrap_err().reason, Reason::BadSlotTable);
    }

    #[test]
    fn a_request_has_some_changes_and_not_too_many() {
        let change = v1::SlotChange {
            change: Some(v1::slot_change::Change::Delete(v1::slot_change::Delete {
                slot: 1,
            })),
        };
        let most = vec![change; MAX_SLOT_CHANGES];
        assert_eq!(
            SlotChange::from_messages(&most).unwrap().len(),
            MAX_SLOT_CHANGES
        );
        let more = [most, vec![change]].concat();
        for wrong in [&more[..], &[]] {
            let error = SlotChange::from_messages(wrong).unwrap_err();
            assert_eq!(error.reason, Reason::BadParameter);
        }
        let empty = [change, v1::SlotChange::default()];
        let error = SlotChange::from_messages(&empty).unwrap_err();
        assert_eq!(error.metadata["change"], "1");
    }
}
