//! Memory goes: for a moment, and for good.

use slat_mmu::{Access, FaultOutcome, Gfn, GfnRange, SecondStage};

use super::guest::{Failed, Guest, HUGE, ODD, ODD_GFN, RAM, RAM_GFN, ROM, check, same};
use crate::{
    hardware::{Manual, Trap},
    vcpu::Exit,
};

/// The host takes memory back: between begin and end nothing is mapped and faults are held off.
pub(super) fn take_back<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let (gfn, outside) = (Gfn(5), Gfn(600));
    guest.read(gfn)?;
    let before = guest.machine.flushes();
    let seq = guest.mmu.invalidate_seq();
    let taken = guest
        .mmu
        .space(0)
        .invalidate_begin(GfnRange::new(RAM_GFN, HUGE), true);
    check!(
        guest.machine.flushes() > before,
        "no flush: TLBs hold the memory"
    );
    same!(guest.walk(gfn).err().map(Trap::is_absent), Some(true));
    let retry = Some(Exit::Fault(FaultOutcome::Retry));
    same!(guest.exit(gfn, Access::Read), retry);
    same!(guest.read(outside)?, 600);

    // Here the host moves the memory, or puts other frames into the slot.
    let ended = guest.mmu.invalidate_end(taken);
    check!(ended.is_ok(), "ended where it was begun: {ended:?}");
    check!(
        guest.mmu.invalidate_seq() != seq,
        "older look-ups go unnoticed"
    );
    same!(guest.read(gfn)?, 0x5555);
    let found = guest.found(gfn)?;
    same!(found.pages, HUGE);
    guest.say(format_args!(
        "memory taken back under the guest, and given again"
    ));
    Ok(())
}

/// Everything goes at once; the vCPU loads another root and goes on.
pub(super) fn withdraw<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let old = guest.mmu.space(0).root().map(|root| root.generation);
    guest.mmu.zap_all();
    same!(guest.read(Gfn(64))?, 0x6464);
    let new = guest.mmu.space(0).root().map(|root| root.generation);
    check!(
        new.is_some() && new != old,
        "the vCPU runs on a withdrawn root"
    );
    guest.say(format_args!(
        "all roots withdrawn; the vCPU went on with another"
    ));
    Ok(())
}

/// When deletion returns, nothing maps the slot's memory: it may be used for something else at
/// once.
pub(super) fn delete<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    guest.read(Gfn(5))?;
    guest.read(ODD_GFN)?;
    same!(guest.mmu.space(0).delete_slot(RAM), Ok(()));
    same!(guest.walk(Gfn(5)).err().map(Trap::is_absent), Some(true));
    let no_slot = Some(Exit::Fault(FaultOutcome::NoSlot));
    same!(guest.exit(Gfn(5), Access::Read), no_slot);
    same!(guest.read(ODD_GFN)?, 0x100);
    same!(guest.mmu.space(0).delete_slot(ODD), Ok(()));
    same!(guest.mmu.space(0).delete_slot(ROM), Ok(()));
    same!(guest.walk(ODD_GFN).err().map(Trap::is_absent), Some(true));
    same!(guest.mmu.stats().pages, [0; _]);
    guest.say(format_args!("slots deleted: nothing maps their memory"));
    Ok(())
}
