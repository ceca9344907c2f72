//! Where threads run while they are measured.
//!
//! KVM's change of a slot waits for the readers of its tables (SRCU), and what it waits for is work
//! of one processor. On that processor the ioctl takes 11 to 30 us, on another one that sleeps 50
//! to 130. Two threads that are compared are therefore kept on one and the same.

use std::fs;

use anyhow::{Context as _, ensure};
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

/// The first processor that this thread may use.
///
/// # Errors
/// When the kernel does not say.
pub fn first() -> anyhow::Result<CpuSet> {
    let allowed = allowed()?;
    let cpu = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(cpu.context("no processor may be used")?);
    Ok(one)
}

/// All the others that it may use; the same one where there is no other.
///
/// # Errors
/// When the kernel does not say.
pub fn others() -> anyhow::Result<CpuSet> {
    let (mut others, first) = (allowed()?, first()?);
    if others == first {
        return Ok(first);
    }
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| first.is_set(*cpu)) {
        others.unset(cpu);
    }
    Ok(others)
}

/// All processors that this thread may use.
///
/// # Errors
/// When the kernel does not say.
pub fn allowed() -> anyhow::Result<CpuSet> {
    Ok(sched_getaffinity(None)?)
}

/// Keeps this thread on these processors.
///
/// # Errors
/// When the kernel refuses.
pub fn keep(cpus: &CpuSet) -> anyhow::Result<()> {
    Ok(sched_setaffinity(None, cpus)?)
}

/// Keeps all threads that a process has now on these processors, and those that they start.
///
/// # Errors
/// When the kernel refuses.
pub fn keep_process(pid: u32, cpus: &CpuSet) -> anyhow::Result<()> {
    let mut kept = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = thread?.file_name();
        let thread = name.to_str().and_then(|name| name.parse().ok());
        let thread = Pid::from_raw(thread.context("a thread's number")?);
        match sched_setaffinity(thread, cpus) {
            Ok(()) => kept += 1,
            // It ended meanwhile.
            Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error).context("sched_setaffinity"),
        }
    }
    ensure!(kept > 0, "process {pid} has no thread");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_where_it_is_kept() {
        std::thread::spawn(|| {
            let one = first().unwrap();
            assert_eq!(one.count(), 1);
            let (others, all) = (super::others().unwrap(), allowed().unwrap());
            assert_eq!(others.count(), (all.count() - 1).max(1));
            keep(&one).unwrap();
            assert_eq!(allowed().unwrap(), one);
        })
        .join()
        .unwrap();
        let all = allowed().unwrap();
        keep_process(std::process::id(), &all).unwrap();
        assert!(keep_process(u32::MAX >> 1, &all).is_err());
    }
}
