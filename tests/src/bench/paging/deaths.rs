//! A pager is killed while its guest writes as fast as it can: how long the guest stands still.
//!
//! Before each kill all mappings are taken away, so that every vCPU faults all the time: from the
//! kill on none gets further until another pager resolves a fault. When one does is seen in guest
//! memory, from outside: the guest counts in a table how often it wrote each page, and the VM's
//! memory file shows the table. A vCPU has stood still when its part of the table was seen not to
//! change for `STILL`, and goes on with the first change after that, once there is another pager:
//! a vCPU or a look that only had to wait for a processor ends nothing.
//!
//! A pager that did not live long is not replaced at once, as one that dies in a loop is not. So
//! each is left alone for `STEADY` before it is killed.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use slat_proto::{
    transport::Address,
    v1::{self, Backend, paging_status::State},
};
use slat_record::dir::VmDir;
use tokio::time::sleep;

use super::copies::{HOST, delete, sound};
use crate::{
    Fleet,
    bench::rows::{Goal, Row},
    guest::busy,
    memory_file::MemoryFile,
    wait::{PATIENCE, eventually},
};

/// Kills a run of the benchmark.
const KILLS: u32 = 4;
/// The guest's processors.
const VCPUS: u32 = 2;
/// The most memory: of more, more would fault, and no fault differently.
const MOST_MIB: u64 = 1024;
/// How long a pager lives before it is killed: what the agent takes for one that can start, and a
/// little more.
const STEADY: Duration = Duration::from_millis(10_500);
/// A vCPU that writes no page for so long waits for a pager. A fault takes a hundredth of it.
const STILL: Duration = Duration::from_millis(5);
/// Between two looks at the table.
const LOOK: Duration = Duration::from_micros(100);
/// Faults flow for so long before the pager is killed.
const FLOW: Duration = Duration::from_millis(100);
/// What a guest has to wait at most, nanoseconds.
const GOAL: f64 = 100e6;

/// Where a vCPU counts the pages that it wrote.
#[derive(Debug)]
struct Counts {
    memory: MemoryFile,
    /// By vCPU: first byte of its part of the table, and how many.
    parts: Vec<(u64, usize)>,
}

impl Counts {
    /// Control pages of memstress, one a vCPU, and what is in them.
    const CONTROL: u64 = 0x10000;
    const PAGE: u64 = 0x1000;
    const MAGIC: u64 = u64::from_le_bytes(*b"SLATMEM1");
    const FIRST: u64 = 0x040;
    const PAGES: u64 = 0x048;
    const TABLE: u64 = 0x060;

    fn of(pid: u32) -> anyhow::Result<Self> {
        let memory = MemoryFile::of(pid, 0)?;
        let mut parts = Vec::new();
        for vcpu in 0..u64::from(VCPUS) {
            let word = |at| memory.word(Self::CONTROL + vcpu * Self::PAGE + at);
            ensure!(word(0)? == Self::MAGIC, "no memstress guest");
            let start = word(Self::TABLE)? + word(Self::FIRST)? * 4;
            parts.push((start, usize::try_from(word(Self::PAGES)?)? * 4));
        }
        Ok(Self { memory, parts })
    }

    /// How many pages a vCPU has written.
    fn written(&self, vcpu: usize) -> anyhow::Result<u64> {
        let (start, bytes) = self.parts[vcpu];
        let mut table = vec![0; bytes];
        self.memory.read(start, &mut table)?;
        let (counts, _) = table.as_chunks::<4>();
        let counts = counts.iter().map(|count| u32::from_le_bytes(*count));
        Ok(counts.map(u64::from).sum())
    }

    /// Until a vCPU that stood still writes again, from `since` on; `replaced` says whether there
    /// is another pager.
    fn goes_on(
        &self,
        vcpu: usize,
        since: Instant,
        replaced: &(impl Fn() -> bool + Sync),
    ) -> anyhow::Result<Duration> {
        let (mut last, mut changed) = (self.written(vcpu)?, Instant::now());
        // When it was seen to be as it was.
        let mut same = changed;
        loop {
            ensure!(
                since.elapsed() < PATIENCE,
                "vCPU {vcpu}: no standstill and no page after it in {PATIENCE:?}"
            );
            let (now, at) = (self.written(vcpu)?, Instant::now());
            if now == last {
                same = at;
            } else {
                if same - changed >= STILL && replaced() {
                    return Ok(at - since);
                }
                (last, changed, same) = (now, at, at);
            }
            thread::sleep(LOOK);
        }
    }
}

/// Whether a process is the pager of the VM with that directory, and not the one called `before`.
fn is_another_pager(process: &Path, dir: &Path, before: u32) -> bool {
    let is_before = process.file_name() == Some(before.to_string().as_ref());
    let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let dir = dir.as_os_str().as_encoded_bytes();
    !is_before && words.contains(&b"pager".as_slice()) && words.contains(&dir)
}

/// The VM as its own process shows it now.
async fn look(fleet: &Fleet, socket: &Address, vm: &str) -> anyhow::Result<v1::Vm> {
    let now = fleet.vm(socket, vm).await?;
    sound(&now)?;
    Ok(now)
}

/// A pager that serves, other than `before`.
async fn serving(
    fleet: &Fleet,
    socket: &Address,
    vm: &str,
    before: u32,
) -> anyhow::Result<v1::PagingStatus> {
    eventually("another pager serves", || async {
        let now = look(fleet, socket, vm).await?;
        let paging = now.paging.context("it is not watched")?;
        let serves = paging.state() == State::Serving && paging.pager_pid != before;
        ensure!(serves && paging.pager_pid != 0, "{paging:?}");
        Ok(paging)
    })
    .await
}

/// Kills a pager in the middle of faults: nanoseconds until the first vCPU writes on, and until
/// every one does.
async fn kill(
    fleet: &Fleet,
    vm: &str,
    counts: &Counts,
    before: &v1::PagingStatus,
) -> anyhow::Result<[f64; 2]> {
    let harvest = v1::HarvestWorkingSetRequest {
        name: vm.into(),
        ..Default::default()
    };
    let mut client = fleet.paging(&fleet.agent(HOST));
    client.harvest_working_set(harvest).await?;
    sleep(FLOW).await;
    let pid = i32::try_from(before.pager_pid).ok().and_then(Pid::from_raw);
    let pid = pid.context("no process id")?;
    let dir = fleet.vm_dir(HOST, vm);
    let replaced = || {
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut paths = all.map(|entry| entry.path());
        paths.any(|process| is_another_pager(&process, &dir, before.pager_pid))
    };
    let replaced = &replaced;
    let killed = Instant::now();
    kill_process(pid, Signal::KILL)?;
    let went = thread::scope(|scope| {
        let watch = |vcpu| scope.spawn(move || counts.goes_on(vcpu, killed, replaced));
        let watching: Vec<_> = (0..counts.parts.len()).map(watch).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, anyhow::Result<Duration>>| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        };
        let went: anyhow::Result<Vec<_>> = watching.into_iter().map(join).collect();
        went
    })?;
    let nanos = |went: Option<&Duration>| went.map_or(f64::NAN, |went| went.as_nanos() as f64);
    Ok([nanos(went.iter().min()), nanos(went.iter().max())])
}

/// Rows of killing the pager of a guest of at most so many MiB, and how often it was done.
///
/// # Errors
/// When something refuses, or the guest has lost a page.
pub async fn deaths(
    fleet: &Fleet,
    runs: u32,
    memory_mib: u64,
) -> anyhow::Result<(Vec<Row>, String)> {
    let memory_mib = memory_mib.min(MOST_MIB);
    let spec = v1::VmSpec {
        paging: v1::Paging::Agent.into(),
        ..busy(Backend::Kvm, memory_mib, VCPUS, None)
    };
    let vm = fleet.run_vm("paged", HOST, spec).await?;
    let socket = Address::Unix(VmDir::new(fleet.vm_dir(HOST, &vm.name)).socket());
    let counts = Counts::of(vm.pid)?;
    let name = |which: &str, of| {
        format!("a killed pager: until the {which} of {VCPUS} vCPUs writes on, {of}")
    };
    let row = |which: &str| {
        let row = Row::new(name(which, "p50"), "100 ms", Some(Goal::AtMost(1.0)));
        row.keyed(format!("deaths.{which}.p50"))
    };
    let (mut first, mut last) = (row("first"), row("last"));
    let mut paging = serving(fleet, &socket, &vm.name, 0).await?;
    let kills = runs * KILLS;
    for _ in 0..kills {
        // Nothing happens at the end of it that could be waited for.
        sleep(STEADY).await;
        let [one, all] = kill(fleet, &vm.name, &counts, &paging).await?;
        first.add(one, GOAL);
        last.add(all, GOAL);
        let before = paging.pager_restarts;
        paging = serving(fleet, &socket, &vm.name, paging.pager_pid).await?;
        ensure!(paging.pager_restarts == before + 1, "{paging:?}");
    }
    // Each page is looked at again by the guest, which knows what it wrote there.
    let passes = |vm: &v1::Vm| vm.guest_counters.map_or(0, |counters| counters.passes);
    let now = look(fleet, &socket, &vm.name).await?;
    let round = passes(&now) + 3;
    let whole = fleet
        .vm_until(&fleet.agent(HOST), &vm.name, "it went round", |vm| {
            passes(vm) >= round
        })
        .await?;
    sound(&whole)?;
    delete(fleet, &vm.name).await?;
    let worst = |row: &Row, which| {
        let worst = row.worst(name(which, "worst"));
        worst.keyed(format!("deaths.{which}.worst"))
    };
    let worst = [worst(&first, "first"), worst(&last, "last")];
    let note = format!(
        "{kills} pagers were killed, of a guest of {memory_mib} MiB; the guest found every page as \
         it had written it."
    );
    Ok(([first, last].into_iter().chain(worst).collect(), note))
}
