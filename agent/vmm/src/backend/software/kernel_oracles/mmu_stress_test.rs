//! `mmu_stress_test`: vCPUs write through several slots over one memory while the host resets the
//! MMU, protects the memory and allows it again.
//!
//! Protecting is what `mprotect` does to KVM: invalidate begins, the host's own mapping becomes
//! read-only, invalidate ends. From then until it is writable again *every* write fails, by every
//! vCPU; after, every write succeeds. A write that began and ended in one state is judged by it.

use slat_mmu::{Access, Level};

use super::*;

const SLOTS: u16 = 4;
const PAGES: u64 = 1024;
const BASE: u64 = 1 << 19;
const ALL: u64 = SLOTS as u64 * PAGES;

#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    refused: AtomicU64,
}

fn oracle(stage: GuestStage, sabotage: Option<Sabotage>) -> Outcome {
    let machine =
        OracleVm::new("mmu_stress_test", stage, 3, MmuConfig::default()).prepare(sabotage);
    let memory = Region::new("aliased", PAGES).unwrap();
    let at = |slot: u16| BASE + u64::from(slot) * PAGES;
    let slots: Vec<_> = (0..SLOTS)
        .map(|id| machine.plug_in(id, at(id), memory.clone()))
        .collect();
    let protected = Arc::new(AtomicBool::new(false));
    let pager: Pager = {
        let protected = Arc::clone(&protected);
        Box::new(move |mmu, fault| {
            let seq = mmu.invalidate_seq();
            let refused = fault.access == Access::Write && protected.load(Relaxed);
            (!refused).then(|| fault.with_seq(seq))
        })
    };
    assert!(machine.hooks.pager.set(pager).is_ok());
    let version = Version::default();
    let counts: Vec<Counts> = (0..3).map(|_| Counts::default()).collect();
    let program = |cpu: &mut Cpu<'_>| {
        let counts = &counts[cpu.number as usize];
        for _ in 0..64 {
            let gfn = BASE + cpu.random.below(ALL);
            let before = version.now();
            let writable = !protected.load(Relaxed);
            let wrote = cpu.write(gfn, gfn);
            let stable = before % 2 == 0 && version.now() == before;
            match wrote {
                Ok(()) => {
                    counts.done.fetch_add(1, Relaxed);
                    check(!stable || writable, || {
                        format!("frame {gfn:#x} was written while it was protected")
                    })?;
                }
                Err(AccessError::NoFrame { .. }) => {
                    counts.refused.fetch_add(1, Relaxed);
                    check(!stable || !writable, || {
                        format!("frame {gfn:#x} was refused while it was writable")
                    })?;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    };
    let more = |field: fn(&Counts) -> &AtomicU64, number: u64| {
        let goals: Vec<u64> = counts
            .iter()
            .map(|counts| field(counts).load(Relaxed) + number)
            .collect();
        machine.until(|| {
            counts
                .iter()
                .zip(&goals)
                .all(|(counts, goal)| field(counts).load(Relaxed) >= *goal)
        })
    };
    let owner = || {
        machine.run()?;
        more(|counts| &counts.done, 500)?;
        machine.sabotage(sabotage);
        // The MMU is reset under running vCPUs: each loads another root and goes on.
        for _ in 0..5 {
            machine.mmu().zap_all();
            more(|counts| &counts.done, 50)?;
        }
        for _ in 0..6 {
            let everything = GfnRange::new(Gfn(BASE), ALL);
            version.change(|| {
                let begun = machine.mmu().space(0).invalidate_begin(everything, true);
                protected.store(true, Relaxed);
                machine.mmu().invalidate_end(begun).unwrap();
            });
            more(|counts| &counts.refused, 50)?;
            version.change(|| protected.store(false, Relaxed));
            more(|counts| &counts.done, 200)?;
        }
        write_protect(&machine, &counts)?;
        // Every second slot goes; the rest is left to the end of the VM.
        machine.pause()?;
        slots
            .iter()
            .step_by(2)
            .for_each(|slot| machine.unplug(slot));
        let lost = machine.mmu().space(0).translate(slots[0].range().start);
        check(lost.is_none(), || {
            format!("a deleted slot is still mapped: {lost:?}")
        })
    };
    machine.with_vcpus(program, owner)
}

/// Protects in the tables only: each huge mapping's next write faults, once, and succeeds.
fn write_protect(machine: &OracleVm, counts: &[Counts]) -> Outcome {
    machine.pause()?;
    let mut taken = 0;
    for gfn in (BASE..BASE + ALL).step_by(512) {
        taken += u64::from(
            machine
                .mmu()
                .space(0)
                .write_protect_gfn(Gfn(gfn), Level::SIZE_2M),
        );
    }
    check(taken == ALL / 512, || {
        format!("{taken} huge mappings protected")
    })?;
    let before = machine.mmu().stats().faults_taken;
    let goal: u64 = counts
        .iter()
        .map(|counts| counts.done.load(Relaxed))
        .sum::<u64>()
        + 2000;
    machine.run()?;
    machine.until(|| {
        counts
            .iter()
            .map(|counts| counts.done.load(Relaxed))
            .sum::<u64>()
            >= goal
    })?;
    machine.pause()?;
    let faults = machine.mmu().stats().faults_taken - before;
    check(faults >= taken, || {
        format!("{faults} faults after {taken} mappings were protected")
    })?;
    machine.run()
}

#[test]
fn a_protected_page_is_never_written_and_a_writable_one_never_refused() {
    for stage in stages() {
        accepts(oracle(stage, None));
    }
}

#[test]
fn it_objects_to_vcpus_that_do_not_flush() {
    for stage in stages() {
        objects(
            oracle(stage, Some(Sabotage::Deaf)),
            "while it was protected",
        );
    }
}
