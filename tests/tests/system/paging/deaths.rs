//! What dies: a pager under load, a writer in the middle of its file, an agent.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use slat_proto::v1::{self, paging_status::State, save};
use slat_tests::{
    Fleet,
    guest::{MIB, busy},
    scene,
    wait::eventually,
};

use super::{sound, status, watched};

fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    Ok(kill_process(pid.context("no process id")?, signal)?)
}

fn kill(pid: u32) -> anyhow::Result<()> {
    signal(pid, Signal::KILL)
}

/// Processes by number: their parent's number and their command line.
pub(super) fn processes() -> Vec<(u32, u32, String)> {
    let of = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // `pid (name) state parent ...`, and the name may hold anything.
        let (_, rest) = stat.rsplit_once(')')?;
        let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        Some((pid, parent, line))
    };
    let all = std::fs::read_dir("/proc");
    all.into_iter().flatten().filter_map(of).collect()
}

/// Writers of saves that the fleet's agents have started.
fn writers(fleet: &Fleet) -> Vec<u32> {
    let root = fleet.root().to_string_lossy().into_owned();
    let all = processes();
    let is_agent = |pid: u32| {
        let mut all = all.iter();
        all.any(|(own, _, line)| *own == pid && line.contains(" agent ") && line.contains(&root))
    };
    let writers = all
        .iter()
        .filter(|(_, parent, line)| line.contains("save-writer") && is_agent(*parent));
    writers.map(|(pid, ..)| *pid).collect()
}

#[test]
fn a_killed_pager_is_replaced_and_the_guest_goes_on() {
    scene::paged(async |fleet| {
        let vm = fleet.run_vm("web", "host-a", watched(64, 2, None)).await?;
        let mut before = status(&vm)?.pager_pid;
        for round in 1..=5 {
            let begun = Instant::now();
            kill(before)?;
            let now = fleet
                .vm_until(&fleet.server(), &vm.name, "another pager serves", |vm| {
                    vm.paging.as_ref().is_some_and(|paging| {
                        paging.state() == State::Serving
                            && paging.pager_pid != before
                            && paging.pager_restarts >= round
                    })
                })
                .await?;
            println!("replaced and reported after {:?}", begun.elapsed());
            before = status(&now)?.pager_pid;
            sound(&fleet.runs_soundly_on(&vm.name, "host-a").await?)?;
        }
        Ok(())
    });
}

/// A pager that is stopped by a signal holds its guest up as one that is stuck would. Another takes
/// its place. What is said meanwhile is a matter of seconds.
#[test]
fn a_frozen_pager_is_replaced() {
    scene::paged(async |fleet| {
        let vm = fleet.run_vm("web", "host-a", watched(64, 2, None)).await?;
        let frozen = status(&vm)?.pager_pid;
        signal(frozen, Signal::STOP)?;
        let told = fleet
            .vm_until(&fleet.server(), &vm.name, "it is missed", |vm| {
                vm.paging.as_ref().is_some_and(|paging| {
                    paging.state() == State::NoPager || paging.pager_pid != frozen
                })
            })
            .await?;
        println!("{:?}", status(&told)?.message);
        let now = fleet
            .vm_until(&fleet.server(), &vm.name, "another pager serves", |vm| {
                vm.paging.as_ref().is_some_and(|paging| {
                    paging.state() == State::Serving && paging.pager_pid != frozen
                })
            })
            .await?;
        ensure!(status(&now)?.pager_restarts >= 1, "{now:#?}");
        ensure!(
            !processes().iter().any(|(pid, ..)| *pid == frozen),
            "it is still there"
        );
        sound(&fleet.runs_soundly_on(&vm.name, "host-a").await?)
    });
}

/// At every moment of a lazy restore.
#[test]
fn a_pager_killed_while_pages_come_loses_none() {
    scene::paged(async |fleet| {
        let vm = fleet
            .run_vm("web", "host-a", busy(v1::Backend::Kvm, 256, 2, None))
            .await?;
        let save = fleet.save(&vm.name, "one").await?;
        super::delete(fleet, &vm.name).await?;
        for round in 0..5_u32 {
            let name = format!("copy-{round}");
            let copy = fleet.restore(&save.name, &name, true).await?;
            tokio::time::sleep(Duration::from_millis(u64::from(round) * 15)).await;
            if let Some(pid) = copy.paging.as_ref().map(|paging| paging.pager_pid) {
                // It may have ended by itself: all pages are there.
                drop(kill(pid));
            }
            sound(&fleet.runs_soundly_on(&copy.name, "host-a").await?)?;
            let whole = fleet
                .vm_until(&fleet.server(), &copy.name, "it is loaded", |vm| {
                    vm.paging.is_none()
                })
                .await?;
            sound(&whole)?;
            super::delete(fleet, &copy.name).await?;
        }
        Ok(())
    });
}

/// The VM is unharmed, its readers of dirty pages too, and no file looks whole.
#[test]
fn a_writer_killed_at_random_moments_leaves_no_file() {
    let seed = 20_261_130;
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    scene::paged(async |fleet| {
        let spec = busy(v1::Backend::Kvm, 256, 1, Some(64 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let mut failed = 0;
        for round in 0..6 {
            let begun = fleet
                .begin_save(&vm.name, &format!("s-{round}"), "")
                .await?;
            let found = eventually("its writer is there", || async {
                let found = writers(fleet);
                ensure!(!found.is_empty(), "none");
                Ok(found)
            });
            let found = found.await?;
            tokio::time::sleep(Duration::from_millis(random.u64(0..20))).await;
            for pid in found {
                // It may have ended by itself.
                drop(kill(pid));
            }
            let save = fleet.save_ends(&begun.name).await?;
            if save.state() == save::State::Failed {
                failed += 1;
                ensure!(
                    !save.reason.is_empty() && !save.state_message.is_empty(),
                    "{save:#?}"
                );
                let id = format!("s-{round}");
                let files = fleet.save_files("host-a");
                ensure!(!files.iter().any(|file| file.contains(&id)), "{files:?}");
            }
            sound(&fleet.runs_soundly_on(&vm.name, "host-a").await?)?;
        }
        println!("{failed} of 6 failed");
        ensure!(failed > 0, "no writer was killed in time");
        eventually("it is the kernel's again", || async {
            let vm = fleet.vm(&fleet.server(), &vm.name).await?;
            ensure!(vm.paging.is_none(), "{:#?}", vm.paging);
            Ok(())
        })
        .await
    });
}

#[test]
fn an_agent_that_comes_back_finds_paged_vms_and_their_pagers() {
    scene::paged(async |fleet| {
        let vm = fleet.run_vm("web", "host-a", watched(64, 1, None)).await?;
        let pager = status(&vm)?.pager_pid;
        fleet.kill_agent("host-a");
        fleet.start_agent("host-a")?;
        fleet.hosts_ready().await?;
        let now = fleet.runs_soundly_on(&vm.name, "host-a").await?;
        ensure!(status(&now)?.pager_pid == pager, "{now:#?}");
        kill(pager)?;
        let now = fleet
            .vm_until(&fleet.server(), &vm.name, "another pager serves", |vm| {
                vm.paging
                    .as_ref()
                    .is_some_and(|p| p.state() == State::Serving && p.pager_pid != pager)
            })
            .await?;
        sound(&now)?;
        sound(&fleet.runs_soundly_on(&vm.name, "host-a").await?)
    });
}
