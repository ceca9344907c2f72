//! `dirty_log_test`: the guest writes the iteration's number to random pages, the host takes the
//! log while it runs.
//!
//! After each iteration the vCPUs rest and each page is judged: a *set* bit means that the page
//! holds this or the last iteration's number; a *clear* one that it holds an older number, or this
//! one's and the bit is set next time (it was written after the log was taken). The slot's length
//! and base are no multiples of 64, and it ends at the last frame that the format translates. In
//! odd iterations memory is also aged and taken back piecemeal meanwhile, which must not touch the
//! log.

use slat_mmu::DirtyLogStart;

use super::*;

/// The selftest's 1 GiB and 16 pages, scaled down; larger than a huge page.
const PAGES: u64 = 4096 + 16;
const ITERATIONS: u64 = 14;
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// The log is taken and pages are protected in one call.
    DirtyLog,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with the log initially set: read, then cleared in
    /// pieces.
    ClearLog,
}

fn oracle(stage: GuestStage, mode: Mode, sabotage: Option<Sabotage>) -> Outcome {
    let start = match mode {
        Mode::DirtyLog => DirtyLogStart::Protected,
        Mode::ClearLog => DirtyLogStart::InitiallySet,
    };
    let config = MmuConfig::default().with_dirty_log_start(start);
    let machine =
        OracleVm::new(&format!("dirty_log_test {mode:?}"), stage, 2, config).prepare(sabotage);
    let base = stage.info().max_gfn.0 - PAGES;
    let slot = machine.plug(0, base, PAGES);
    let (iteration, written) = (AtomicU64::new(0), AtomicU64::new(0));
    // Writes that vCPUs may do yet. Without a bound a fast guest writes every page in every
    // iteration, and hides losses.
    let allowed = AtomicU64::new(0);
    let program = |cpu: &mut Cpu<'_>| {
        let go = allowed.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if go.is_err() {
            cpu.idle();
            return Ok(());
        }
        // Some of the pages written were read before, and may be cached without leave to write.
        let page = cpu.random.below(PAGES);
        if cpu.random.below(2) == 0 {
            cpu.read(base + page).map_err(|error| error.to_string())?;
        }
        let value = iteration.load(Relaxed);
        cpu.write(base + page, value)
            .map_err(|error| error.to_string())?;
        written.fetch_add(1, Relaxed);
        Ok(())
    };
    let owner = || {
        let until_written = |more| {
            allowed.fetch_add(more, Relaxed);
            machine.until(|| allowed.load(Relaxed) == 0)
        };
        machine.run()?;
        until_written(500)?;
        let huge = machine.mmu().stats().pages_at(slat_mmu::Level::SIZE_2M);
        check(huge > 0, || "no huge page to begin with".to_owned())?;
        machine.log(&slot, true);
        machine.sabotage(sabotage);
        let mut random = machine.random(99);
        let mut next = vec![false; PAGES as usize];
        let (mut set, mut tracked) = (0, 0);
        for number in 1..=ITERATIONS {
            iteration.store(number, Relaxed);
            machine.run()?;
            until_written(300)?;
            if number % 2 == 1 {
                let piece = GfnRange::new(Gfn(base + random.below(PAGES)), 1 + random.below(700));
                machine.mmu().space(0).age(piece);
                let begun = machine.mmu().space(0).invalidate_begin(piece, true);
                machine.mmu().invalidate_end(begun).unwrap();
            }
            // These while the log is taken.
            allowed.fetch_add(100, Relaxed);
            let log = take(&machine, mode, sabotage, &until_written)?;
            // What is written from here on is in the next log.
            until_written(100)?;
            machine.pause()?;
            let total = written.load(Relaxed);
            check(total >= 500 * number, || format!("only {total} writes"))?;
            for page in 0..PAGES {
                let bit = log[(page / 64) as usize] >> (page % 64) & 1 == 1;
                let value = slot.value(page);
                let expected = std::mem::take(&mut next[page as usize]);
                check(bit || !expected, || {
                    format!(
                        "page {page} lost: written after log {}, not in log {number}",
                        number - 1
                    )
                })?;
                if bit {
                    set += 1;
                    check(
                        value == number || value + 1 == number || (number == 1 && value == 0),
                        || format!("page {page} is in log {number} and holds {value}"),
                    )?;
                } else if value == number {
                    tracked += 1;
                    next[page as usize] = true;
                } else {
                    check(value < number, || {
                        format!("page {page} holds {value} in iteration {number}")
                    })?;
                }
            }
        }
        check(set > PAGES / 4 && tracked > ITERATIONS, || {
            format!("{set} bits set, {tracked} pages written after a log: too few to tell")
        })
    };
    machine.with_vcpus(program, owner)
}

/// The log as the mode takes it.
fn take(
    machine: &OracleVm,
    mode: Mode,
    sabotage: Option<Sabotage>,
    until_written: &dyn Fn(u64) -> Outcome,
) -> Result<Vec<u64>, String> {
    let mmu = machine.mmu();
    let words = PAGES.div_ceil(64) as usize;
    let mut log = vec![0; words];
    match mode {
        Mode::DirtyLog => {
            // Twice: the second adds to the first and takes nothing back.
            for _ in 0..2 {
                mmu.space(0)
                    .harvest_dirty_log(0, &mut log)
                    .map_err(|error| error.to_string())?;
            }
        }
        Mode::ClearLog => {
            mmu.space(0)
                .get_dirty_log(0, &mut log)
                .map_err(|error| error.to_string())?;
            let lossy = sabotage == Some(Sabotage::Own);
            if lossy {
                until_written(100)?;
            }
            for (piece, bits) in log.chunks(7).enumerate() {
                let first = piece as u64 * 7 * 64;
                let pages = (bits.len() as u64 * 64).min(PAGES - first);
                // Clearing more than was read loses what was written in between.
                let all = vec![u64::MAX; bits.len()];
                let bits = if lossy { &all } else { bits };
                mmu.space(0)
                    .clear_dirty_log(0, first, pages, bits)
                    .map_err(|error| error.to_string())?;
            }
        }
    }
    Ok(log)
}

#[test]
fn a_write_through_a_translation_that_was_only_read_is_logged() {
    for stage in GuestStage::ALL {
        let machine = OracleVm::new("dirty_log_test, read first", stage, 1, MmuConfig::default());
        let slot = machine.plug(0, 512, 64);
        machine.log(&slot, true);
        let mmu = machine.mmu();
        machine.alone(|cpu| {
            for page in 512..512 + 64 {
                cpu.read(page).unwrap();
            }
            let mut log = [0];
            let none = cpu.outside(|_| mmu.space(0).harvest_dirty_log(0, &mut log));
            assert_eq!(none, Ok(0), "{stage}");
            let before = mmu.stats().faults_taken;
            for page in (512..512 + 64).step_by(4) {
                // The second write needs nothing any more.
                cpu.write(page, 1).unwrap();
                cpu.write(page, 2).unwrap();
            }
            // Hardware that logs by Dirty bits takes no fault for it.
            let faults = match stage.info().dirty_log {
                slat_mmu::DirtyLogPolicy::DirtyBit => 0,
                slat_mmu::DirtyLogPolicy::WriteProtect => 16,
            };
            assert_eq!(mmu.stats().faults_taken - before, faults, "{stage}");
            let taken = cpu.outside(|_| mmu.space(0).harvest_dirty_log(0, &mut log));
            assert_eq!(taken, Ok(16), "{stage}");
            assert_eq!(log[0], 0x1111_1111_1111_1111, "{stage}");
            // Taken and protected: the same translation does not write on.
            cpu.write(512, 3).unwrap();
            assert_eq!(mmu.space(0).dirty_pages(0), Ok(1), "{stage}");
        });
    }
}

#[test]
fn dirty_log() {
    for stage in stages() {
        accepts(oracle(stage, Mode::DirtyLog, None));
    }
}

#[test]
fn clear_log() {
    for stage in stages() {
        accepts(oracle(stage, Mode::ClearLog, None));
    }
}

#[test]
fn it_objects_to_vcpus_that_do_not_flush() {
    for stage in stages() {
        objects(oracle(stage, Mode::DirtyLog, Some(Sabotage::Deaf)), "lost");
        objects(oracle(stage, Mode::ClearLog, Some(Sabotage::Deaf)), "page");
    }
}

#[test]
fn it_objects_to_bits_cleared_that_nobody_saw() {
    for stage in stages() {
        objects(oracle(stage, Mode::ClearLog, Some(Sabotage::Own)), "page");
    }
}
