//! How VMs end that are watched: no end is a pager's death, and a guest that waits for a page which
//! does not come can be paused, deleted and killed.

use std::{
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use slat_proto::{
    ApiError, Reason,
    v1::{self, vm},
};
use slat_tests::{
    Fleet,
    guest::{MIB, busy, patient},
    scene,
    wait::eventually,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    delete, sound,
    sources::{SPOILED, fails, saved},
    status, watched,
};

/// What a pause or a delete of a guest that waits may take on a slow machine: the code's own bounds
/// together are twelve seconds.
const BOUND: Duration = Duration::from_secs(30);

/// Pagers that an agent started in place of one that died, as it counts them.
async fn deaths(fleet: &Fleet, host: &str) -> anyhow::Result<f64> {
    let mut stream = tokio::net::TcpStream::connect(fleet.agent(host).to_string()).await?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: slat\r\nConnection: close\r\n\r\n")
        .await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with("slat_pager_restarts_total"));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.with_context(|| format!("no such metric: {text}"))
}

/// Waits until no pager of the fleet is left, so that one started in vain would have been counted.
async fn pagers_gone(fleet: &Fleet) -> anyhow::Result<()> {
    let root = fleet.root().to_string_lossy().into_owned();
    eventually("no pager is left", || async {
        let left = super::deaths::processes();
        let left = left
            .iter()
            .find(|(_, _, line)| line.contains(" pager ") && line.contains(&root));
        ensure!(left.is_none(), "{left:?}");
        Ok(())
    })
    .await
}

fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    Ok(kill_process(pid.context("no process id")?, signal)?)
}

#[test]
fn the_end_of_a_watched_vm_is_no_death_of_its_pager() {
    scene::paged(async |fleet| {
        // Deleted as it runs.
        for round in 0..3 {
            let name = format!("web-{round}");
            let vm = fleet.run_vm(&name, "host-a", watched(64, 2, None)).await?;
            fleet.runs_soundly_on(&vm.name, "host-a").await?;
            delete(fleet, &vm.name).await?;
        }
        // It moves there and back, and each host it left has none.
        let vm = fleet.run_vm("web", "host-a", watched(64, 1, None)).await?;
        for host in ["host-b", "host-a"] {
            fleet.migrate_and_wait(&vm.name, host, patient()).await?;
            sound(&fleet.runs_soundly_on(&vm.name, host).await?)?;
            fleet
                .vm_until(&fleet.server(), &vm.name, "it is paged there", |vm| {
                    vm.paging
                        .as_ref()
                        .is_some_and(|paging| paging.mapped_pages > 0)
                })
                .await?;
        }
        delete(fleet, &vm.name).await?;
        pagers_gone(fleet).await?;
        for host in ["host-a", "host-b"] {
            let deaths = deaths(fleet, host).await?;
            ensure!(deaths == 0.0, "{host}: {deaths}");
        }
        Ok(())
    });
}

/// A guest one of whose vCPUs waits for a page that is corrupt.
async fn waiting(fleet: &Fleet) -> anyhow::Result<v1::Vm> {
    let (save, path) = saved(fleet).await?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)?;
    let mut bytes = vec![0; (SPOILED.end - SPOILED.start) as usize];
    file.read_exact_at(&mut bytes, SPOILED.start)?;
    for byte in &mut bytes {
        *byte = !*byte;
    }
    file.write_all_at(&bytes, SPOILED.start)?;
    let copy = fleet.restore(&save.name, "copy", true).await?;
    fails(fleet, &copy.name, "PAGE_SOURCE_CORRUPT").await?;
    let now = fleet
        .vm_until(&fleet.server(), &copy.name, "its vCPU waits", |vm| {
            let paging = vm.paging.as_ref();
            paging.is_some_and(|paging| paging.faults_waiting > 0)
        })
        .await?;
    ensure!(now.state() == vm::State::Running, "{now:#?}");
    Ok(now)
}

#[test]
fn a_guest_that_waits_for_a_page_can_be_paused_and_deleted() {
    scene::paged(async |fleet| {
        let vm = waiting(fleet).await?;
        let begun = Instant::now();
        let request = v1::PauseVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        match fleet.vms(&fleet.server()).pause_vm(request).await {
            Ok(paused) => {
                let paused = paused.into_inner();
                ensure!(paused.state() == vm::State::Paused, "{paused:#?}");
            }
            // Where the kernel lets no signal interrupt who waits for a page.
            Err(refused) => {
                let refused = ApiError::from(refused);
                ensure!(refused.reason == Reason::SourcePause, "{refused:#?}");
                let state = refused.metadata.get("paging_state");
                ensure!(
                    state.is_some_and(|state| state == "STATE_SOURCE_FAILED"),
                    "{refused:#?}"
                );
            }
        }
        println!("the pause took {:?}", begun.elapsed());
        ensure!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
        let still = fleet.vm(&fleet.server(), &vm.name).await?;
        let state = status(&still)?.state();
        ensure!(
            state == v1::paging_status::State::SourceFailed,
            "{still:#?}"
        );
        let begun = Instant::now();
        delete(fleet, &vm.name).await?;
        println!("its end took {:?}", begun.elapsed());
        ensure!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
        pagers_gone(fleet).await?;
        ensure!(deaths(fleet, "host-a").await? == 0.0);
        Ok(())
    });
}

#[test]
fn a_running_guest_that_waits_for_a_page_is_deleted_in_bounded_time() {
    scene::paged(async |fleet| {
        let vm = waiting(fleet).await?;
        let begun = Instant::now();
        delete(fleet, &vm.name).await?;
        println!("its end took {:?}", begun.elapsed());
        ensure!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
        let found = fleet.vm(&fleet.server(), &vm.name).await;
        ensure!(found.is_err(), "{found:#?}");
        pagers_gone(fleet).await?;
        ensure!(deaths(fleet, "host-a").await? == 0.0);
        Ok(())
    });
}

/// Killed, its process leaves nothing that waits in the kernel, and its pager goes.
#[test]
fn the_process_of_a_guest_that_waits_for_a_page_can_be_killed() {
    scene::paged(async |fleet| {
        let vm = waiting(fleet).await?;
        let begun = Instant::now();
        signal(vm.pid, Signal::KILL)?;
        fleet
            .vm_until(&fleet.server(), &vm.name, "it is lost", |vm| {
                vm.state() == vm::State::Lost
            })
            .await?;
        println!("it was seen as lost after {:?}", begun.elapsed());
        ensure!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
        pagers_gone(fleet).await?;
        ensure!(deaths(fleet, "host-a").await? == 0.0);
        delete(fleet, &vm.name).await
    });
}

/// A save that is being taken does not outlive its VM, nor keep it.
#[test]
fn a_vm_is_deleted_while_it_is_being_saved() {
    scene::paged(async |fleet| {
        let spec = busy(v1::Backend::Kvm, 256, 1, Some(64 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let begun = fleet.begin_save(&vm.name, "one", "").await?;
        let at = Instant::now();
        delete(fleet, &vm.name).await?;
        ensure!(at.elapsed() < BOUND, "{:?}", at.elapsed());
        let save = fleet.save_ends(&begun.name).await?;
        println!("the save is {}", save.state().as_str_name());
        pagers_gone(fleet).await?;
        ensure!(deaths(fleet, "host-a").await? == 0.0);
        Ok(())
    });
}
