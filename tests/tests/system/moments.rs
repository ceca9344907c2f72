//! kill -9 of any one process at any moment of a migration, from its acceptance to after its end.
//!
//! When exactly the victim dies is left to the clock; what must hold does not depend on it: the
//! migration ends, the VM is where it says, nobody but the VM's owner takes the VM with it, and
//! nothing is left of the other side. A failure names its round; `SLAT_TEST_ROUNDS` makes more of
//! them.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, MigrationPhase, VmLocation, vm::State};
use slat_tests::{
    Fleet,
    fleet::ended,
    guest::{MIB, busy, paced},
    process::VmProcess,
};

slat_tests::on_each_backend!(one_process_dies_whenever);

/// Rounds by default: each victim at some moments.
const ROUNDS: u64 = 12;
/// Between two moments. A migration here takes 0.5 s, so they cover it and what comes after.
const STEP: Duration = Duration::from_millis(37);
/// Moments in all.
const MOMENTS: u64 = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceVm,
    TargetVm,
    SourceAgent,
    DestinationAgent,
    Server,
}

const VICTIMS: [Victim; 5] = [
    Victim::TargetVm,
    Victim::SourceVm,
    Victim::SourceAgent,
    Victim::Server,
    Victim::DestinationAgent,
];

async fn one_process_dies_whenever(fleet: &mut Fleet) -> anyhow::Result<()> {
    let rounds = std::env::var("SLAT_TEST_ROUNDS").ok();
    let rounds = rounds.and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    for round in 0..rounds {
        let victim = VICTIMS[(round % VICTIMS.len() as u64) as usize];
        // 7 and 20 have no common divisor: every moment comes once before any comes again.
        let moment = STEP * ((round * 7) % MOMENTS) as u32;
        one_round(fleet, round, victim, moment)
            .await
            .with_context(|| format!("round {round}: {victim:?} dies after {moment:?}"))?;
    }
    Ok(())
}

async fn one_round(
    fleet: &mut Fleet,
    round: u64,
    victim: Victim,
    moment: Duration,
) -> anyhow::Result<()> {
    let id = format!("round-{round}");
    let spec = busy(fleet.backend(), 32, 1, Some(4 * MIB));
    let vm = fleet.run_vm(&id, "host-a", spec).await?;
    let source = fleet.vm_process("host-a", &vm.name)?;
    let migration = fleet.migrate(&vm.name, "host-b", paced(128 * MIB)).await?;
    tokio::time::sleep(moment).await;
    let mut target_died = false;
    match victim {
        Victim::SourceVm => source.kill()?,
        Victim::TargetVm => {
            // Before it is made, and when the directory is just being made, there is none to kill.
            if let Ok(Some(target)) = VmProcess::behind(&fleet.vm_dir("host-b", &vm.name)) {
                target.kill()?;
                target_died = true;
            }
        }
        Victim::SourceAgent => {
            fleet.kill_agent("host-a");
            fleet.start_agent("host-a")?;
        }
        Victim::DestinationAgent => {
            fleet.kill_agent("host-b");
            fleet.start_agent("host-b")?;
        }
        Victim::Server => {
            fleet.kill_server();
            fleet.start_server()?;
        }
    }
    let last = fleet
        .migration_until(&migration.name, "its end", |migration| {
            ended(migration.phase())
        })
        .await?;
    fleet.hosts_ready().await?;
    let where_it_is = (last.phase(), last.vm_location());
    let mut kept = false;
    match where_it_is {
        (MigrationPhase::Completed, VmLocation::Destination) if target_died => {
            lost(fleet, &vm.name).await?;
        }
        (MigrationPhase::Completed, VmLocation::Lost) if target_died => {
            lost(fleet, &vm.name).await?;
            kept = VmProcess::behind(&fleet.vm_dir("host-a", &vm.name))?.is_some();
        }
        (MigrationPhase::Completed, VmLocation::Destination) => {
            let there = fleet.runs_soundly_on(&vm.name, "host-b").await?;
            ensure!(there.epoch == 2 && there.uid == vm.uid, "{there:#?}");
        }
        (MigrationPhase::Failed, VmLocation::Source) => {
            ensure!(
                victim != Victim::SourceVm,
                "its process was killed: {last:#?}"
            );
            let here = fleet.runs_soundly_on(&vm.name, "host-a").await?;
            ensure!(here.pid == source.pid() && here.epoch == 1, "{here:#?}");
            fleet.vm_dir_gone("host-b", &vm.name).await?;
        }
        (MigrationPhase::Failed, VmLocation::Lost) => {
            let owner_died = victim == Victim::SourceVm || target_died;
            ensure!(owner_died, "lost without a cause: {last:#?}");
            lost(fleet, &vm.name).await?;
        }
        (MigrationPhase::Failed, VmLocation::Unknown) if target_died => {
            // Relinquished, and the destination died before it owned the VM: the frozen copy is
            // kept until somebody decides.
            fleet
                .vm_until(&fleet.server(), &vm.name, "RELINQUISHED", |vm| {
                    vm.state() == State::Relinquished
                })
                .await?;
            kept = VmProcess::behind(&fleet.vm_dir("host-a", &vm.name))?.is_some();
            ensure!(kept, "the last copy is gone: {last:#?}");
        }
        _ => anyhow::bail!("{last:#?}"),
    }
    if !kept && where_it_is.1 != VmLocation::Source {
        // Whatever it was, it is not at the source any more.
        source.wait_end()?;
    }
    let delete = v1::DeleteVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).delete_vm(delete).await?;
    source.wait_end()?;
    for host in ["host-a", "host-b"] {
        fleet.vm_dir_gone(host, &vm.name).await?;
        fleet.memory_used(host, 0).await?;
    }
    Ok(())
}

/// The VM is LOST and no process of it is left anywhere.
async fn lost(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    fleet
        .vm_until(&fleet.server(), vm, "LOST", |vm| vm.state() == State::Lost)
        .await?;
    slat_tests::wait::eventually("no process of it is left", || async {
        for host in ["host-a", "host-b"] {
            let process = VmProcess::behind(&fleet.vm_dir(host, vm))?;
            ensure!(process.is_none(), "{process:?} on {host}");
        }
        Ok(())
    })
    .await
}
