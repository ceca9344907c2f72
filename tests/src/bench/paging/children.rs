//! A guest that writes is forked into ten at once: its pause, whether all write on, and how much
//! memory they take beside the parent's.
//!
//! A child has a page of its own once it touched it, so what children take is what they touch. The
//! guest writes at a rate here: ten that write as fast as they can have all their memory soon, and
//! no machine of this kind has it ten times. Pauses of a guest without a rate are in
//! [`super::copies`].

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_proto::v1::Backend;
use tokio::time::sleep;

use super::copies::{HOST, delete, sound, written};
use crate::{
    Fleet,
    bench::rows::{Goal, Row, Unit},
    guest::{MIB, busy},
};

/// Children of a fork.
pub const CHILDREN: u64 = 10;
/// What parent and children write, in bytes a second.
const RATE: u64 = 16 * MIB;
/// How long they write until their memory is counted.
const WRITING: Duration = Duration::from_secs(3);

/// Bytes of memory files, by device and inode.
type Files = BTreeMap<(u64, u64), u64>;

/// Adds the memory files that a process has open: each is there once, however many have it.
fn add_files(pid: u32, files: &mut Files) -> anyhow::Result<()> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let is_memory = fs::read_link(&path)
            .is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"));
        // One that was closed meanwhile is nobody's.
        if let (true, Ok(found)) = (is_memory, fs::metadata(&path)) {
            files.insert((found.dev(), found.ino()), found.blocks() * 512);
        }
    }
    Ok(())
}

/// Bytes of a process's own memory, and its memory files.
fn add(pid: u32, files: &mut Files) -> anyhow::Result<u64> {
    add_files(pid, files)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let anon = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|kib| kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(anon.context("RssAnon in /proc/PID/status")? << 10)
}

/// Bytes that VMs have: memory files, and what their processes and their pagers' have beside them.
async fn bytes_of(fleet: &Fleet, names: &[&str]) -> anyhow::Result<u64> {
    let (mut files, mut own) = (Files::new(), 0);
    for name in names {
        let vm = fleet.vm(&fleet.agent(HOST), name).await?;
        own += add(vm.pid, &mut files)?;
        if let Some(paging) = vm.paging {
            // One that has nothing left to do may have ended since.
            own += add(paging.pager_pid, &mut files).unwrap_or(0);
        }
    }
    Ok(files.values().sum::<u64>() + own)
}

/// Waits until each of the VMs has written since, and finds none that lost a page.
async fn all_write(fleet: &Fleet, names: &[&str]) -> anyhow::Result<()> {
    let agent = fleet.agent(HOST);
    for name in names {
        let before = written(&fleet.vm(&agent, name).await?);
        let after = fleet
            .vm_until(&agent, name, "it writes on", |vm| written(vm) > before)
            .await?;
        sound(&after)?;
    }
    Ok(())
}

/// Rows of forking a guest of so many MiB into ten.
///
/// # Errors
/// When something refuses, a child does not run, or any guest has lost a page.
pub async fn children(fleet: &Fleet, runs: u32, memory_mib: u64) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, memory_mib, 1, Some(RATE));
    let vm = fleet.run_vm("parent", HOST, spec).await?;
    let what = format!(
        "a guest of {memory_mib} MiB that writes {} MiB a second",
        RATE / MIB
    );
    let pause = format!("fork into {CHILDREN} children: pause of {what}");
    let mut pauses = Row::new(format!("{pause}, p50"), "5 ms", Some(Goal::AtMost(1.0)))
        .keyed("children.pause.p50");
    let mut memory = Row::new(
        format!(
            "{CHILDREN} children of {what}: memory beside the parent's, {} s after",
            WRITING.as_secs()
        ),
        "so many copies",
        None,
    )
    .of(Unit::Bytes)
    .keyed("children.memory");
    let ids: Vec<String> = (0..CHILDREN)
        .map(|child| format!("child-{child}"))
        .collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    for run in 0..=runs {
        let before = bytes_of(fleet, &[&vm.name]).await?;
        let fork = fleet.fork(&vm.name, &ids).await?;
        let begun = Instant::now();
        ensure!(fork.vms.len() == ids.len(), "{} children", fork.vms.len());
        let names: Vec<&str> = fork.vms.iter().map(|child| child.name.as_str()).collect();
        let all: Vec<&str> = names.iter().copied().chain([vm.name.as_str()]).collect();
        all_write(fleet, &all).await?;
        sleep(WRITING.saturating_sub(begun.elapsed())).await;
        let after = bytes_of(fleet, &all).await?;
        all_write(fleet, &all).await?;
        for name in names {
            delete(fleet, name).await?;
        }
        if run > 0 {
            pauses.add(fork.pause_nanos as f64, 5e6);
            let copies = (CHILDREN * memory_mib * MIB) as f64;
            memory.add(after.saturating_sub(before) as f64, copies);
        }
        fleet
            .vm_until(&fleet.agent(HOST), &vm.name, "nobody watches it", |vm| {
                vm.paging.is_none()
            })
            .await?;
    }
    delete(fleet, &vm.name).await?;
    let worst = pauses.worst(format!("{pause}, worst"));
    let worst = worst.keyed("children.pause.worst");
    Ok(vec![pauses, worst, memory])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_file_counts_once_however_many_have_it_open() {
        use std::os::unix::fs::FileExt as _;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("slat-test", flags).unwrap();
        let file = fs::File::from(file);
        file.write_all_at(&vec![1; 1 << 20], 3 << 20).unwrap();
        let again = file.try_clone().unwrap();
        let own = std::process::id();
        let mut files = Files::new();
        for _ in 0..2 {
            add_files(own, &mut files).unwrap();
        }
        let found = again.metadata().unwrap();
        assert_eq!(files.get(&(found.dev(), found.ino())), Some(&(1 << 20)));
        assert!(add(own, &mut files).unwrap() > 0);
        assert!(add(u32::MAX, &mut files).is_err());
    }
}
