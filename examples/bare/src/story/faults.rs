//! Slots, and the faults that map them.

use slat_mmu::{
    Access, FaultOutcome, Gfn, Level, MemoryType, Pfn, SecondStage, SlotError, SlotFlags, SlotSpec,
};

use super::guest::{
    DEVICE_GFN, Failed, Guest, HUGE, ODD, ODD_GFN, ODD_PAGES, ODD_PFN, RAM, RAM_GFN, RAM_PAGES,
    ROM, ROM_GFN, ROM_PAGES, ROM_PFN, SMALL, check, same,
};
use crate::{
    hardware::{Manual, Trap},
    ram,
    vcpu::Exit,
};

/// Creating a slot maps nothing: the guest faults its memory in.
pub(super) fn create<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let slots = [
        SlotSpec::new(RAM, RAM_GFN, RAM_PAGES, ram::BASE),
        SlotSpec::new(ODD, ODD_GFN, ODD_PAGES, ODD_PFN),
        SlotSpec::new(ROM, ROM_GFN, ROM_PAGES, ROM_PFN).with_flags(SlotFlags::READONLY),
    ];
    // Where memory is placed decides whether pages can be huge.
    same!(
        slots.map(|slot| slot.fits_leaf(slot.base_gfn, HUGE)),
        [true, false, false]
    );
    for slot in slots {
        let created = guest.mmu.create_slot(slot);
        check!(created.is_ok(), "slot {}: {created:?}", slot.id);
    }
    // A memory type that the processor need not know is refused, not mapped to fault for ever.
    let (id, memory) = (3, MemoryType::Device);
    let device = SlotSpec::new(id, DEVICE_GFN, 1, ram::BASE).with_memory(memory);
    if M::OPTIONAL_MEMORY_TYPES {
        let refused = Err(SlotError::MemoryType { id, memory });
        same!(guest.mmu.create_slot(device), refused);
    }
    same!(guest.walk(RAM_GFN).err().map(Trap::is_absent), Some(true));
    guest.say(format_args!("three slots, nothing mapped"));
    Ok(())
}

/// One write maps 2 MiB, because the slot is congruent on both sides.
pub(super) fn huge<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let gfn = Gfn(5);
    let pfn = guest.write(gfn, 0x5555)?;
    same!(pfn, Pfn(ram::BASE.0 + 5));
    let found = guest.found(gfn)?;
    same!((found.pfn, found.pages), (pfn, HUGE));
    check!(found.write && found.execute, "{found:?}");
    same!(guest.read(gfn)?, 0x5555);

    let fetched = guest.touch(Gfn(511), Access::Execute)?;
    same!(fetched, Pfn(ram::BASE.0 + 511));
    same!(guest.mmu.stats().faults_taken, 1);
    guest.read(Gfn(600))?;
    same!(guest.mmu.stats().pages_at(Level::SIZE_2M), 2);

    // What a dump of the tables shows: each is known by any of its frames.
    let root = guest.mmu.space(0).root().map(|root| root.pfn);
    let last = Pfn(root.map_or(0, |root| root.0) + M::info().root_size as u64 / 4096 - 1);
    let header = guest.mmu.page_header(last);
    same!(header.map(|header| header.pfn), root);
    guest.say(format_args!(
        "a write, a read and a fetch in one 2 MiB page, for one fault"
    ));
    Ok(())
}

/// Memory that is not congruent is mapped in 4 KiB pages.
pub(super) fn small<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    for page in [0, 1, ODD_PAGES - 1] {
        let gfn = Gfn(ODD_GFN.0 + page);
        let pfn = guest.write(gfn, 0x100 + page)?;
        same!(pfn, Pfn(ODD_PFN.0 + page));
        let found = guest.found(gfn)?;
        same!((found.pfn, found.pages), (pfn, SMALL));
        same!(guest.read(gfn)?, 0x100 + page);
    }
    guest.say(format_args!("4 KiB pages where nothing larger fits"));
    Ok(())
}

/// Faults that the MMU does not resolve are the device model's.
pub(super) fn not_ours<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let no_slot = Some(Exit::Fault(FaultOutcome::NoSlot));
    same!(guest.exit(DEVICE_GFN, Access::Write), no_slot);
    same!(guest.touch(ROM_GFN, Access::Execute)?, ROM_PFN);
    let found = guest.found(ROM_GFN)?;
    check!(
        !found.write,
        "the processor may write read-only memory: {found:?}"
    );
    let read_only = Some(Exit::Fault(FaultOutcome::ReadOnly));
    same!(guest.exit(ROM_GFN, Access::Write), read_only);
    let beyond = Some(Exit::Fault(FaultOutcome::OutOfRange));
    same!(guest.exit(M::MAX_GFN, Access::Read), beyond);
    guest.say(format_args!(
        "a device access, a write to ROM and one beyond the format left the guest"
    ));
    Ok(())
}
