//! A guest's life, from its first fault to its last table, told for one format.
//!
//! | chapter | what |
//! |---|---|
//! | `faults` | slots; faults that map huge and 4 KiB pages, and those that are not the MMU's |
//! | `guest` | the guest, its memory, and how a step is checked |
//! | `dump` | what is mapped, entry by entry |
//! | `logging` | dirty logging and ageing |
//! | `ending` | memory taken back, slots deleted |
//!
//! Each step is checked three times over: what the MMU says, what the processor's walker sees, and
//! what is in the guest's memory.

mod dump;
mod ending;
mod faults;
mod guest;
mod logging;

use alloc::sync::Arc;

use slat_mmu::{MmuConfig, SecondStage, TdpMmu};

pub(crate) use self::guest::Failed;
use self::guest::{Guest, same};
use crate::{
    console::say,
    frames::Frames,
    hardware::Manual,
    heap,
    host::BareHost,
    ram,
    vcpu::{Mmu, VirtualCpu},
};

/// Tells it all.
pub(crate) fn tell<M: Manual>(frames: &Arc<Frames>) -> Result<(), Failed> {
    ram::clear();
    let heap_before = heap::used();
    let machine = Arc::new(BareHost::new());
    // The defaults are KVM's. A slot's number costs a place in a table, so say how many there will
    // be.
    let config = MmuConfig::default().with_max_slots(4);
    let mmu: Mmu<M> = TdpMmu::new(Arc::clone(frames), Arc::clone(&machine), config);
    {
        let mut guest = Guest {
            mmu: &mmu,
            machine: &machine,
            cpu: VirtualCpu::new(&mmu, &machine, frames),
        };
        faults::create(&mut guest)?;
        faults::huge(&mut guest)?;
        faults::small(&mut guest)?;
        faults::not_ours(&mut guest)?;
        dump::dump(&guest)?;
        logging::switch_on(&mut guest)?;
        logging::harvest(&mut guest)?;
        logging::switch_off(&mut guest)?;
        logging::age(&mut guest)?;
        ending::take_back(&mut guest)?;
        ending::withdraw(&mut guest)?;
        ending::delete(&mut guest)?;
    }
    // The vCPU is gone; its cached tables are given back when somebody asks, or with the MMU.
    mmu.reclaim();
    let stats = mmu.stats();
    say!(
        "{:<12} {} faults, {} of them without the lock; {} splits, {} recoveries, {} flushes",
        M::NAME,
        stats.faults_taken,
        stats.faults_fast,
        stats.splits,
        stats.recovered,
        machine.flushes(),
    );
    drop(mmu);
    drop(machine);
    same!(frames.used(), 0);
    same!(heap::used(), heap_before);
    say!(
        "{:<12} gone: no table frame and no byte of the heap is left in use",
        M::NAME
    );
    Ok(())
}
