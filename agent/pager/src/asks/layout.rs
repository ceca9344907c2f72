//! Requests that change where memories are: remove and move.
//!
//! Each holds the layout's lock for writing: no fault is resolved meanwhile.

use slat_mmu::Gfn;

use super::thread::no;
use crate::{error::Trouble, mirror::slot_id, shared::Shared, sync::write};

impl Shared {
    pub(super) fn remove(&self, memory: u32) -> Result<(), Trouble> {
        {
            let mut layout = write(&self.layout);
            let place = layout.remove(memory).ok_or_else(|| none(memory))?;
            if let Some(mirror) = &self.mirror {
                mirror.remove(&place.memory);
            }
        }
        self.wake_strays();
        self.tell_if_loaded();
        Ok(())
    }

    pub(super) fn move_to(&self, memory: u32, base_gfn: u64) -> Result<(), Trouble> {
        let mut layout = write(&self.layout);
        let place = layout.get_mut(memory).ok_or_else(|| none(memory))?;
        if let Some(mirror) = &self.mirror {
            let slot = slot_id(&place.memory).map_err(|error| no(error.to_string()))?;
            let moved = mirror.space().move_slot(slot, Gfn(base_gfn));
            moved.map_err(|error| no(format!("moving memory {memory}: {error}")))?;
        }
        place.base_gfn = base_gfn;
        layout.index();
        Ok(())
    }
}

fn none(memory: u32) -> Trouble {
    no(format!("there is no memory {memory}"))
}
