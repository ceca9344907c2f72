//! A host that neither answers nor dies keeps a migration in doubt. A fence, and nothing else that
//! is not a journal, decides it: the hook ends what runs there, the destination takes the VM, and
//! the host that comes back gives up by its journal.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use slat_proto::{
    ApiError, Reason,
    model::proto_duration,
    v1::{self, MigrationPhase, VmLocation, host, vm::State},
};
use slat_tests::{
    Fleet,
    fleet::ended,
    guest::{MIB, busy, fast, paced},
    handover::{has_entry, stop_before_commit, stop_before_relinquished},
    process::VmProcess,
    wait::eventually,
};

use super::cli::slat;

slat_tests::on_each_backend!(
    a_source_that_had_relinquished,
    a_source_that_had_not_relinquished,
);

/// Migrations that may miss the moment on a machine under load.
const TRIES: usize = 25;
/// How long it is seen that nothing decides.
const NOTHING: Duration = Duration::from_secs(3);

/// On a busy machine no reason to go back from the switchover.
fn patient() -> v1::MigrationParams {
    v1::MigrationParams {
        max_downtime: Some(proto_duration(Duration::from_secs(5))),
        ..paced(32 * MIB)
    }
}

fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).context("pid 0")?;
    Ok(kill_process(pid, signal)?)
}

/// What is stopped on host-a.
struct Stopped {
    vm: v1::Vm,
    migration: String,
    agent: u32,
    process: VmProcess,
}

/// A migration whose source's processes, agent and VM, are stopped between READY and COMMIT;
/// `relinquished`: with RELINQUISHED in the source's journal.
async fn doubt(fleet: &mut Fleet, relinquished: bool) -> anyhow::Result<Stopped> {
    for number in 0..TRIES {
        let spec = busy(fleet.backend(), 32, 1, Some(MIB));
        let vm = fleet
            .run_vm(&format!("web-{number}"), "host-a", spec)
            .await?;
        let migration = fleet
            .migrate_until_precopy(&vm.name, "host-b", patient())
            .await?;
        let process = fleet.vm_process("host-a", &vm.name)?;
        let target = fleet.vm_process("host-b", &vm.name)?;
        let dirs = ["host-a", "host-b"].map(|host| fleet.vm_dir(host, &vm.name));
        let agent = fleet.agent_pid("host-a")?;
        // It could tell what is in the journal.
        signal(agent, Signal::STOP)?;
        let paths = dirs.clone();
        let (process, stopped) = tokio::task::spawn_blocking(move || {
            let stopped = if relinquished {
                stop_before_commit([&paths[0], &paths[1]], &process, &target)
            } else {
                stop_before_relinquished(&paths[1], &process, &target)
            };
            (process, stopped)
        })
        .await?;
        stopped?;
        let met = fleet
            .migration_until(&migration.name, "doubt or an end", |migration| {
                migration.phase() == MigrationPhase::InDoubt
                    || migration.phase() == MigrationPhase::Committed
                    || ended(migration.phase())
            })
            .await?;
        let as_wanted =
            has_entry(&dirs[0], "relinquished")? == relinquished && !has_entry(&dirs[1], "owned")?;
        if met.phase() == MigrationPhase::InDoubt && as_wanted {
            let migration = migration.name;
            if !relinquished {
                fleet.may_be_fenced(&vm.uid);
            }
            return Ok(Stopped {
                vm,
                migration,
                agent,
                process,
            });
        }
        // The moment was missed: everything goes on.
        process.resume()?;
        signal(agent, Signal::CONT)?;
        fleet
            .migration_until(&migration.name, "its end", |migration| {
                ended(migration.phase())
            })
            .await?;
        let delete = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.hosts_ready().await?;
        fleet.vms(&fleet.server()).delete_vm(delete).await?;
    }
    anyhow::bail!("the moment was missed {TRIES} times");
}

async fn host(fleet: &Fleet, name: &str) -> anyhow::Result<Value> {
    let address = fleet.server().to_string();
    let env = [("SLAT_SERVER", address.as_str())];
    let output = slat(&["get", "host", name, "-o", "json"], &env).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// By the command line; standard output, or how it was refused.
async fn fence(fleet: &Fleet) -> anyhow::Result<Result<Value, String>> {
    let address = fleet.server().to_string();
    let env = [("SLAT_SERVER", address.as_str())];
    let output = slat(&["fence", "host", "host-a", "-o", "json"], &env).await?;
    if output.status.success() {
        return Ok(Ok(serde_json::from_slice(&output.stdout)?));
    }
    Ok(Err(String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// From the doubt to the VM that runs at its destination, once; the fence.
async fn resolved_by_a_fence(fleet: &mut Fleet, stopped: &Stopped) -> anyhow::Result<Value> {
    eventually("host-a is silent", || async {
        let request = v1::GetHostRequest {
            name: "hosts/host-a".into(),
        };
        let host = fleet.hosts(&fleet.server()).get_host(request).await?;
        ensure!(host.into_inner().state() == host::State::Unreachable);
        Ok(())
    })
    .await?;
    // Without a hook that works nothing is decided; nor by time.
    fleet.put_fence_hook("echo 'no way to the BMC' >&2; exit 3")?;
    let refused = fence(fleet).await?.err().context("a failing hook fences")?;
    ensure!(refused.contains("no way to the BMC"), "{refused}");
    ensure!(refused.contains(Reason::FenceFailed.as_str()), "{refused}");
    let begun = Instant::now();
    while begun.elapsed() < NOTHING {
        let request = v1::GetMigrationRequest {
            name: stopped.migration.clone(),
        };
        let migration = fleet.migrations().get_migration(request).await?;
        let phase = migration.into_inner().phase();
        ensure!(phase == MigrationPhase::InDoubt, "{phase:?}");
        let there = fleet.vm(&fleet.agent("host-b"), &stopped.vm.name).await?;
        ensure!(there.state() == State::Incoming, "{there:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // Written anew: the text file of a program that just ran may be busy.
    std::fs::remove_file(fleet.root().join(slat_tests::fleet::FENCE_HOOK))?;
    fleet.put_fence_hook(&format!(
        "for pid in {} {}; do\n  kill -9 $pid || exit 1\n  while grep -q '^State:.[^ZX]' /proc/$pid/status 2>/dev/null; do sleep 0.05; \
         done\ndone\necho \"$SLAT_FENCE_HOST is off\"",
        stopped.agent,
        stopped.process.pid()
    ))?;
    let fenced = fence(fleet).await?.map_err(anyhow::Error::msg)?;
    let proof = fenced["fence"].clone();
    ensure!(proof["proof"] == "host-a is off", "{fenced:#}");
    let done = fleet
        .migration_ends(&stopped.migration, MigrationPhase::Completed)
        .await?;
    ensure!(done.vm_location() == VmLocation::Destination, "{done:#?}");
    let runs = fleet.runs_soundly_on(&stopped.vm.name, "host-b").await?;
    ensure!(runs.epoch == stopped.vm.epoch + 1, "{runs:#?}");
    // Reaps it.
    fleet.kill_agent("host-a");
    Ok(proof)
}

/// The proof outlives the server; the VM is on host-b and nowhere else, and can move back.
async fn over(fleet: &mut Fleet, vm: &v1::Vm, proof: &Value) -> anyhow::Result<()> {
    fleet.kill_server();
    fleet.start_server()?;
    fleet.hosts_ready().await?;
    let shown = host(fleet, "host-a").await?;
    ensure!(shown["fence"] == *proof, "{shown:#}");
    let list = v1::ListVmsRequest::default();
    let listed = fleet.vms(&fleet.server()).list_vms(list).await?;
    let listed = listed.into_inner().vms;
    let counts = listed.len() == 1 && listed[0].host == "hosts/host-b";
    ensure!(counts && listed[0].state() == State::Running, "{listed:#?}");
    fleet.migrate_and_wait(&vm.name, "host-a", fast()).await?;
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn a_source_that_had_relinquished(fleet: &mut Fleet) -> anyhow::Result<()> {
    let stopped = doubt(fleet, true).await?;
    let proof = resolved_by_a_fence(fleet, &stopped).await?;
    let vm = &stopped.vm;
    // The host is switched on again: another start of its agent, over the same directory.
    fleet.start_agent("host-a")?;
    fleet.hosts_ready().await?;
    // It gives up by its journal.
    fleet.vm_dir_gone("host-a", &vm.name).await?;
    fleet.memory_used("host-a", 0).await?;
    over(fleet, vm, &proof).await
}

async fn a_source_that_had_not_relinquished(fleet: &mut Fleet) -> anyhow::Result<()> {
    let stopped = doubt(fleet, false).await?;
    let proof = resolved_by_a_fence(fleet, &stopped).await?;
    let vm = &stopped.vm;
    fleet.start_agent("host-a")?;
    fleet.hosts_ready().await?;
    // Its memory went with its process. What is left there is of an epoch that is over, and never
    // run again.
    let there = fleet.vm(&fleet.agent("host-a"), &vm.name).await?;
    ensure!(there.state() == State::Lost && there.epoch == vm.epoch);
    let request = v1::ListLeftoversRequest {
        host: "hosts/host-a".into(),
    };
    eventually("it is a leftover", || async {
        let mut hosts = fleet.hosts(&fleet.server());
        let listed = hosts.list_leftovers(request.clone()).await?.into_inner();
        ensure!(listed.leftovers.len() == 1, "{listed:#?}");
        let kind = listed.leftovers[0].kind();
        ensure!(kind == v1::leftover::Kind::SupersededVm, "{listed:#?}");
        Ok(())
    })
    .await?;
    let start = v1::StartVmRequest {
        uid: vm.uid.clone(),
        ..Default::default()
    };
    let refused = fleet.vms(&fleet.agent("host-a")).start_vm(start).await;
    let refused = ApiError::from(refused.err().context("it was started again")?);
    ensure!(refused.reason != Reason::Internal, "{refused:#?}");
    let delete = v1::DeleteLeftoverRequest {
        host: "hosts/host-a".into(),
        uid: vm.uid.clone(),
        ..Default::default()
    };
    fleet.hosts(&fleet.server()).delete_leftover(delete).await?;
    fleet.vm_dir_gone("host-a", &vm.name).await?;
    over(fleet, vm, &proof).await
}
