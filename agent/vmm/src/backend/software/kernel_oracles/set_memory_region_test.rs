//! `set_memory_region_test`: slots move, go and come under a guest that reads them all the time.
//!
//! Each page of the slot's memory holds its index and the memory's generation. A read that began
//! and ended while nothing changed sees exactly what is at that place now, or a device's place; one
//! that overlaps a change may see the gap or either side of it, but never memory of another place.

use super::*;

const PAGES: u64 = 1024;
/// Where it may be: aligned for huge pages, off by one page, far away, and at the edge of another
/// table.
const PLACES: [u64; 4] = [1 << 19, (1 << 19) + 1, (1 << 19) + 4096, (1 << 19) - 700];
const NOWHERE: u64 = u64::MAX;

fn value(generation: u64, page: u64) -> u64 {
    generation << 32 | (page + 1)
}

fn fill(slot: &Region, generation: u64) {
    for page in 0..PAGES {
        slot.host()
            .store((page * PAGE_SIZE) as usize, value(generation, page));
    }
}

fn oracle(stage: GuestStage, sabotage: Option<Sabotage>) -> Outcome {
    let machine =
        OracleVm::new("set_memory_region_test", stage, 2, MmuConfig::default()).prepare(sabotage);
    let (version, reads) = (Version::default(), AtomicU64::new(0));
    let (place, generation) = (AtomicU64::new(NOWHERE), AtomicU64::new(0));
    let gaps = AtomicU64::new(0);
    let program = |cpu: &mut Cpu<'_>| {
        for _ in 0..32 {
            let gfn = PLACES[cpu.random.below(4) as usize] + cpu.random.below(PAGES + 16) - 8;
            let before = version.now();
            let (at, of) = (place.load(Relaxed), generation.load(Relaxed));
            let seen = cpu.read(gfn);
            let stable = before % 2 == 0 && version.now() == before;
            reads.fetch_add(1, Relaxed);
            let page = |at: u64| gfn.checked_sub(at).filter(|page| *page < PAGES);
            match seen {
                Ok(seen) if stable => {
                    let wanted = page(at).map(|page| value(of, page));
                    check(wanted == Some(seen), || {
                        format!(
                            "frame {gfn:#x} shows {seen:#x}, not {wanted:x?}, with the slot at {at:#x}"
                        )
                    })?;
                }
                Ok(seen) => {
                    let possible = PLACES
                        .into_iter()
                        .filter_map(page)
                        .any(|page| page + 1 == seen & 0xffff_ffff);
                    check(possible, || {
                        format!("frame {gfn:#x} shows {seen:#x}, of no place")
                    })?;
                }
                seen if is_mmio(&seen) => {
                    gaps.fetch_add(1, Relaxed);
                    check(!stable || page(at).is_none(), || {
                        format!("frame {gfn:#x} is a device's, with the slot at {at:#x}")
                    })?;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    };
    let owner = || {
        machine.run()?;
        let read = || {
            let goal = reads.load(Relaxed) + 150;
            machine.until(|| reads.load(Relaxed) >= goal)
        };
        let mut random = machine.random(99);
        for round in 1..=12 {
            let base = PLACES[0];
            let memory = Region::new("moving", PAGES).unwrap();
            fill(&memory, round);
            let slot = version.change(|| {
                let slot = machine.plug_in(3, base, memory.clone());
                place.store(base, Relaxed);
                generation.store(round, Relaxed);
                slot
            });
            read()?;
            if round == 1 {
                machine.sabotage(sabotage);
            }
            for _ in 0..8 {
                let to = PLACES[random.below(4) as usize];
                let moved = version.change(|| {
                    place.store(to, Relaxed);
                    machine.mmu().space(0).move_slot(slot.id, Gfn(to))
                });
                check(moved.is_ok(), || format!("{moved:?}"))?;
                read()?;
            }
            version.change(|| {
                machine.unplug(&slot);
                place.store(NOWHERE, Relaxed);
            });
            check(
                machine.mmu().stats().pages.iter().all(|pages| *pages == 0),
                || "a deleted slot is still mapped".to_owned(),
            )?;
            read()?;
        }
        check(gaps.load(Relaxed) > 100, || {
            "the guest never saw a gap".to_owned()
        })
    };
    machine.with_vcpus(program, owner)
}

#[test]
fn a_moving_slot_never_shows_the_wrong_place() {
    for stage in stages() {
        accepts(oracle(stage, None));
    }
}

#[test]
fn it_objects_to_vcpus_that_do_not_flush() {
    for stage in stages() {
        objects(oracle(stage, Some(Sabotage::Deaf)), "shows");
    }
}

#[test]
fn as_many_slots_as_there_may_be_and_no_more() {
    for stage in stages() {
        let config = MmuConfig::default().with_max_slots(40);
        let machine = OracleVm::new("set_memory_region_test", stage, 1, config);
        let plugs: Vec<_> = (0..40)
            .map(|id| machine.plug(id, u64::from(id) * 700, 700))
            .collect();
        let add = |id, base| {
            machine
                .mmu()
                .create_slot(SlotSpec::new(id, Gfn(base), 1, Pfn(1 << 20)))
        };
        assert!(add(40, 40 * 700).is_err(), "one more");
        assert!(add(39, 40 * 700).is_err(), "a number twice");
        machine.unplug(&plugs[39]);
        assert!(add(39, 39 * 700 - 1).is_err(), "over another");
        assert!(
            add(39, stage.info().max_gfn.0).is_err(),
            "beyond the format"
        );
        let read = |gfn| machine.alone(|cpu| cpu.read(gfn));
        assert!(is_mmio(&read(39 * 700)));
        plugs[..39]
            .iter()
            .for_each(|plug| plug.set(699, u64::from(plug.id)));
        for plug in &plugs[..39] {
            assert_eq!(read(plug.base + 699).unwrap(), u64::from(plug.id));
        }
    }
}
