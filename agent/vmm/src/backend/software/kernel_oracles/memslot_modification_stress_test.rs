//! `memslot_modification_stress_test`: vCPUs write and check their memory while slots just below
//! and above it come and go.
//!
//! No access fails, nothing is lost, and the guest's own huge mappings stay: what happens beside a
//! slot is no business of its.

use slat_mmu::Level;

use super::*;

const BASE: u64 = 1 << 19;
const PAGES: u64 = 2048;
const ITERATIONS: u64 = 40;

fn oracle(stage: GuestStage, sabotage: Option<Sabotage>) -> Outcome {
    let machine = OracleVm::new(
        "memslot_modification_stress_test",
        stage,
        3,
        MmuConfig::default(),
    );
    let memory = machine.plug(5, BASE, PAGES);
    let written = AtomicU64::new(0);
    let last: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let program = |cpu: &mut Cpu<'_>| {
        for _ in 0..64 {
            // Each page has one writer.
            let page = cpu.random.below(PAGES / 3) * 3 + cpu.number;
            let page = if page < PAGES { page } else { cpu.number };
            let wanted = last[page as usize].load(Relaxed);
            let seen = cpu.read(BASE + page).map_err(|error| error.to_string())?;
            check(seen == wanted, || {
                format!("page {page} holds {seen}, not {wanted}")
            })?;
            cpu.write(BASE + page, wanted + 1)
                .map_err(|error| error.to_string())?;
            last[page as usize].store(wanted + 1, Relaxed);
            written.fetch_add(1, Relaxed);
        }
        Ok(())
    };
    let owner = || {
        machine.run()?;
        let huge = |wanted: i64| {
            let pages = machine.mmu().stats().pages_at(Level::SIZE_2M);
            check(pages == wanted, || {
                format!("{pages} huge mappings, not {wanted}")
            })
        };
        machine.until(|| written.load(Relaxed) > 2000)?;
        huge(4)?;
        let mut random = machine.random(99);
        for iteration in 0..ITERATIONS {
            let pages = 1 + random.below(600);
            let base = if iteration % 2 == 0 {
                BASE - pages
            } else {
                BASE + PAGES
            };
            let dummy = machine.plug(6, base, pages);
            let mut vcpu = machine.mmu().vcpu();
            let mapped = machine
                .mmu()
                .prefault(&mut vcpu, dummy.range(), Level::SIZE_1G);
            check(mapped == Ok(pages), || format!("prefault: {mapped:?}"))?;
            if iteration % 2 == 0 {
                let goal = written.load(Relaxed) + 20;
                machine.until(|| written.load(Relaxed) >= goal)?;
            }
            machine.unplug(if sabotage.is_some() { &memory } else { &dummy });
            if sabotage.is_some() {
                machine.until(|| false)?;
            }
        }
        machine.pause()?;
        huge(4)
    };
    machine.with_vcpus(program, owner)
}

#[test]
fn what_happens_beside_a_slot_is_not_noticed_in_it() {
    for stage in stages() {
        accepts(oracle(stage, None));
    }
}

#[test]
fn it_objects_when_the_guests_own_slot_goes() {
    for stage in stages() {
        objects(oracle(stage, Some(Sabotage::Own)), "no memory");
    }
}
