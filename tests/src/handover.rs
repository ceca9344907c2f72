//! A target process that dies between the source's commit and its own answer to it, and a source
//! that is stopped before its commit is on its way.
//!
//! The moment is a few milliseconds long, too short for a timer. The journals show it: from its
//! `prepared` on the target runs in slices far shorter than the syncs that follow, and between
//! slices the source has time to journal `relinquished`. Then the target is killed. Under load a
//! slice may still last too long; the migration's end shows it.

use std::{
    io,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::bail;

use crate::{process::VmProcess, wait::PATIENCE};

/// The first slice; each later one is longer by as much, so that a slow machine gets on.
const SLICE: Duration = Duration::from_micros(200);
/// What the source needs at most to journal its commit once it may.
const CHANCE: Duration = Duration::from_millis(200);
/// Between two looks at a journal.
const LOOK: Duration = Duration::from_micros(50);

/// Waits for `target` to be prepared, and kills it as soon as the source has relinquished.
/// Directories are the VM's on the two hosts. Blocks.
///
/// # Errors
/// When the handover does not get there in time, or a journal cannot be read.
pub fn kill_after_commit(source: &Path, target: &Path, process: &VmProcess) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !says(target, "prepared")? {
        if Instant::now() > deadline {
            bail!("never prepared: {}", target.display());
        }
        sleep(LOOK);
    }
    let mut slice = SLICE;
    while Instant::now() < deadline {
        process.suspend()?;
        let chance = Instant::now() + CHANCE;
        while Instant::now() < chance {
            if says(source, "relinquished")? {
                return process.kill();
            }
            sleep(LOOK);
        }
        process.resume()?;
        sleep(slice);
        slice += SLICE;
    }
    process.resume()?;
    bail!("never relinquished: {}", source.display());
}

/// Waits for `target` to be prepared, and stops `source` as soon as it has relinquished, before
/// its COMMIT is read if the moment is met. Directories are the VM's on the two hosts. Both
/// processes run again, or not: the source is left stopped, the target running. Blocks.
///
/// # Errors
/// When the handover does not get there in time, or a journal cannot be read.
pub fn stop_before_commit(
    dirs: [&Path; 2],
    source: &VmProcess,
    target: &VmProcess,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !says(dirs[1], "prepared")? {
        if Instant::now() > deadline {
            bail!("never prepared: {}", dirs[1].display());
        }
        sleep(LOOK);
    }
    let mut slice = SLICE;
    while Instant::now() < deadline {
        target.suspend()?;
        let chance = Instant::now() + CHANCE;
        while Instant::now() < chance {
            if says(dirs[0], "relinquished")? {
                source.suspend()?;
                return target.resume();
            }
        }
        target.resume()?;
        sleep(slice);
        slice += SLICE;
    }
    bail!("never relinquished: {}", dirs[0].display());
}

/// Stops `source` as soon as `target` is prepared: it has not heard that, and has not relinquished,
/// if the moment is met. `dir`: the target's. Blocks.
///
/// # Errors
/// When the handover does not get there in time, or a journal cannot be read.
pub fn stop_before_relinquished(
    dir: &Path,
    source: &VmProcess,
    target: &VmProcess,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !says(dir, "prepared")? {
        if Instant::now() > deadline {
            bail!("never prepared: {}", dir.display());
        }
    }
    // READY follows a sync: the source is mostly stopped before it is said.
    target.suspend()?;
    source.suspend()?;
    target.resume()
}

/// Whether a VM's journal has an entry of that kind, on disk or on its way there.
///
/// # Errors
/// When it is there and cannot be read.
pub fn has_entry(dir: &Path, entry: &str) -> io::Result<bool> {
    says(dir, entry)
}

/// Whether a VM's journal has an entry of that kind. A directory that is gone has none.
fn says(dir: &Path, entry: &str) -> io::Result<bool> {
    match std::fs::read_to_string(dir.join("journal")) {
        Ok(journal) => Ok(journal.contains(&format!("\"entry\":\"{entry}\""))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
