//! CPU time and memory of VM processes, for `/metrics`: read from `/proc` by one task, so that a
//! scrape measures nothing.
//!
//! # Memory
//! A VM's process maps its guest's memory twice, so its resident set counts each page twice, and
//! pages of hugetlbfs not at all. `smaps_rollup` would count them once, but walks every mapping of
//! every guest. So guest memory is what its files hold: the kernel counts their blocks anyway, huge
//! pages among them. The rest of the process is what it has resident beside shared memory.
//!
//! # Locking
//! One leaf mutex over the last figures, held to replace or copy them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use slat_proto::v1::{self, vm::State};

use super::supervisor::Supervisor;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// One VM process's use of its host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Used {
    /// User and system time since it began, seconds.
    pub(super) cpu_seconds: f64,
    /// Bytes, each page once; guest memory that is populated counts, in RAM or in swap. `None`: the
    /// kernel does not tell this user.
    pub(super) resident_bytes: Option<u64>,
}

/// The last figures, by the VM's name.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage(Arc<Mutex<BTreeMap<String, Used>>>);

impl Usage {
    fn last(&self) -> MutexGuard<'_, BTreeMap<String, Used>> {
        // It is replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As last seen.
    pub(super) fn get(&self) -> BTreeMap<String, Used> {
        self.last().clone()
    }

    /// Looks at every VM process again and again; its owner ends it.
    pub(super) async fn keep(self, supervisor: Arc<Supervisor>) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = supervisor.stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let vms = supervisor.snapshots();
            // Files of /proc do not wait for a disk, but for the kernel's locks.
            let looked = tokio::task::spawn_blocking(move || look(&vms)).await;
            if let Ok(looked) = looked {
                *self.last() = looked;
            }
        }
    }
}

fn look(vms: &[v1::Vm]) -> BTreeMap<String, Used> {
    let living = |vm: &&v1::Vm| vm.pid != 0 && vm.state() != State::Lost;
    vms.iter()
        .filter(living)
        .filter_map(|vm| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", vm.pid)).ok()?;
            let used = Used {
                cpu_seconds: cpu_seconds(&stat)?,
                resident_bytes: resident(vm.pid),
            };
            Some((vm.name.clone(), used))
        })
        .collect()
}

/// What a process has resident of its own, and what its memory files hold.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let files = in_memory_files(pid).ok()?;
    unshared(&status)?.checked_add(files)
}

/// Of `/proc/PID/status`: memory that is no shared memory, bytes.
fn unshared(status: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    let sum = kib("RssAnon:")?.checked_add(kib("RssFile:")?)?;
    sum.checked_mul(1024)
}

/// Bytes in the memfds that a process has open, each file once.
fn in_memory_files(pid: u32) -> io::Result<u64> {
    let mut bytes = 0_u64;
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // It may be closed by now.
        let Ok(target) = std::fs::read_link(&path) else {
            continue;
        };
        if !target
            .as_os_str()
            .as_encoded_bytes()
            .starts_with(b"/memfd:")
        {
            continue;
        }
        if let Ok(file) = std::fs::metadata(&path)
            && seen.insert((file.dev(), file.ino()))
        {
            bytes = bytes.saturating_add(file.blocks().saturating_mul(512));
        }
    }
    Ok(bytes)
}

/// Of `/proc/PID/stat`: its fields 14 and 15. The name, the second, may hold anything.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = number(14)?.checked_add(number(15)?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    // To a hundredth of a second, as the kernel counts.
    let millis = ticks.checked_mul(1000)? / per_second;
    Some(Duration::from_millis(millis).as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 100 999 \
                    77 18446744073709551615 0";
        let used = cpu_seconds(stat).unwrap();
        let per_second = rustix::param::clock_ticks_per_second();
        assert_eq!((used * 1000.0).round() as u64, 300_000 / per_second);
        assert_eq!(cpu_seconds("42 (a) S 1"), None);
        assert_eq!(cpu_seconds(""), None);
        let status =
            "VmRSS:\t  9999 kB\nRssAnon:\t     100 kB\nRssFile:\t      20 kB\nRssShmem:\t 999 kB\n";
        assert_eq!(unshared(status), Some(120 * 1024));
        assert_eq!(unshared("RssAnon:\t 1 kB\n"), None);
    }

    #[test]
    fn guest_memory_counts_once_and_only_what_is_populated() {
        use rustix::{
            fs::{MemfdFlags, ftruncate, memfd_create},
            io::pwrite,
            mm::{MapFlags, ProtFlags, mmap, munmap},
        };
        const MIB: u64 = 1 << 20;
        let length = 64 * MIB as usize;
        let own = std::process::id();
        let before = in_memory_files(own).unwrap();
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 2 * length as u64).unwrap();
        assert_eq!(
            in_memory_files(own).unwrap(),
            before,
            "nothing is populated"
        );
        let chunk = vec![1; length];
        assert_eq!(pwrite(&file, &chunk, 0), Ok(length));
        drop(chunk);
        // Another descriptor and two mappings, as of a guest.
        let again = file.try_clone().unwrap();
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        for _ in 0..2 {
            // SAFETY: a new mapping of a file that nobody else has; it is unmapped below, and no
            // reference into it is made.
            unsafe {
                let at = mmap(
                    std::ptr::null_mut(),
                    length,
                    access,
                    shared | MapFlags::POPULATE,
                    &file,
                    0,
                );
                let used = in_memory_files(own).unwrap();
                munmap(at.unwrap(), length).unwrap();
                assert_eq!(used - before, length as u64);
            }
        }
        assert!(resident(own).unwrap() > length as u64);
        drop((file, again));
        assert_eq!(in_memory_files(own).unwrap(), before);
    }

    #[test]
    fn this_process_uses_memory_and_a_lost_vm_none() {
        let vm = |state: State, pid| v1::Vm {
            name: "vms/a".into(),
            pid,
            state: state.into(),
            ..Default::default()
        };
        let own = std::process::id();
        let used = look(&[vm(State::Running, own)]);
        assert!(used["vms/a"].resident_bytes > Some(0));
        assert!(look(&[vm(State::Lost, own), vm(State::Running, 0)]).is_empty());
    }
}
