//! What a fleet's server cannot end: a frozen copy that nobody releases, and a VM's process that is
//! stopped. Both are ended by uid at the host, without a signal by hand.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    model::proto_duration,
    v1::{self, MigrationPhase, VmLocation, leftover::Kind, vm::State},
};
use slat_tests::{
    Fleet,
    fleet::ended,
    guest::{MIB, busy, fast, paced, usual},
    handover::kill_after_commit,
};

slat_tests::on_each_backend!(
    a_frozen_copy_is_taken_back_and_moves_again,
    two_vms_of_a_name_and_a_stopped_one,
    a_frozen_copy_that_dies_is_lost_until_it_is_deleted,
    a_stopped_process_is_unresponsive_and_delays_no_other_vm,
);

/// Migrations that may miss the moment on a machine under load.
const TRIES: usize = 10;
/// What an operator waits for at most.
const BOUND: Duration = Duration::from_secs(15);

async fn leftovers(fleet: &Fleet, host: &str) -> anyhow::Result<Vec<v1::Leftover>> {
    let request = v1::ListLeftoversRequest {
        host: format!("hosts/{host}"),
    };
    let mut hosts = fleet.hosts(&fleet.agent(host));
    Ok(hosts.list_leftovers(request).await?.into_inner().leftovers)
}

async fn adopt(fleet: &Fleet, uid: &str, give_up: bool) -> Result<v1::Vm, ApiError> {
    let request = v1::AdoptLeftoverRequest {
        host: "hosts/host-a".into(),
        uid: uid.into(),
        give_up,
        ..Default::default()
    };
    let mut hosts = fleet.hosts(&fleet.agent("host-a"));
    let adopted = hosts.adopt_leftover(request).await?.into_inner();
    Ok(adopted.vm.unwrap_or_default())
}

fn reason<T: std::fmt::Debug>(result: Result<T, ApiError>) -> anyhow::Result<Reason> {
    match result {
        Err(error) => Ok(error.reason),
        Ok(done) => anyhow::bail!("not refused: {done:#?}"),
    }
}

/// Slow enough to be met, and on a busy machine no reason to go back from the switchover.
fn patient() -> v1::MigrationParams {
    v1::MigrationParams {
        max_downtime: Some(proto_duration(Duration::from_secs(5))),
        ..paced(32 * MIB)
    }
}

/// A VM whose destination died just after the source had given it away.
async fn frozen(fleet: &Fleet) -> anyhow::Result<v1::Vm> {
    for number in 0..TRIES {
        let spec = busy(fleet.backend(), 32, 1, Some(MIB));
        let vm = fleet
            .run_vm(&format!("web-{number}"), "host-a", spec)
            .await?;
        let migration = fleet
            .migrate_until_precopy(&vm.name, "host-b", patient())
            .await?;
        let process = fleet.vm_process("host-b", &vm.name)?;
        let dirs = ["host-a", "host-b"].map(|host| fleet.vm_dir(host, &vm.name));
        let killed =
            tokio::task::spawn_blocking(move || kill_after_commit(&dirs[0], &dirs[1], &process));
        killed.await??;
        let last = fleet
            .migration_until(&migration.name, "its end", |migration| {
                ended(migration.phase())
            })
            .await?;
        if last.vm_location() == VmLocation::Unknown {
            ensure!(last.phase() == MigrationPhase::Failed, "{last:#?}");
            return Ok(vm);
        }
        let delete = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(delete).await?;
    }
    anyhow::bail!("the moment was missed {TRIES} times");
}

async fn a_frozen_copy_is_taken_back_and_moves_again(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = frozen(fleet).await?;
    let left = leftovers(fleet, "host-a").await?;
    ensure!(left.len() == 1, "{left:#?}");
    ensure!(left[0].kind() == Kind::RelinquishedSource, "{left:#?}");
    ensure!(left[0].uid == vm.uid && left[0].adoptable, "{left:#?}");
    let refused = adopt(fleet, &vm.uid, false).await;
    ensure!(reason(refused)? == Reason::GiveUpRequired);
    let adopted = adopt(fleet, &vm.uid, true).await?;
    ensure!(adopted.state() == State::Paused, "{adopted:#?}");
    ensure!(adopted.epoch == 3 && !adopted.dirty_logging, "{adopted:#?}");
    ensure!(leftovers(fleet, "host-a").await?.is_empty());
    let resume = v1::ResumeVmRequest {
        name: vm.name.clone(),
        uid: vm.uid.clone(),
        ..Default::default()
    };
    fleet.vms(&fleet.agent("host-a")).resume_vm(resume).await?;
    fleet.runs_soundly_on(&vm.name, "host-a").await?;
    // It is a VM like any other again.
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    let there = fleet.runs_soundly_on(&vm.name, "host-b").await?;
    ensure!(there.epoch == 4 && there.uid == vm.uid, "{there:#?}");
    Ok(())
}

async fn two_vms_of_a_name_and_a_stopped_one(fleet: &mut Fleet) -> anyhow::Result<()> {
    let old = frozen(fleet).await?;
    // The name is free at the host that only keeps a copy: nothing of the old VM hides the new.
    let agent = fleet.agent("host-a");
    let id = old.name.strip_prefix("vms/").unwrap_or_default();
    let create = v1::CreateVmRequest {
        vm_id: id.to_owned(),
        spec: Some(usual(fleet.backend())),
        ..Default::default()
    };
    let new = fleet.vms(&agent).create_vm(create).await?.into_inner();
    ensure!(new.uid != old.uid, "{new:#?}");
    ensure!(fleet.vm(&agent, &old.name).await?.uid == new.uid);

    let process = slat_tests::process::VmProcess::behind(&fleet.host_vms("host-a").join(&new.uid))?
        .context("its directory is called by its uid")?;
    process.suspend()?;
    let delete = |force: bool| {
        let request = v1::DeleteVmRequest {
            uid: new.uid.clone(),
            force,
            ..Default::default()
        };
        let mut vms = fleet.vms(&agent);
        async move { vms.delete_vm(request).await.map_err(ApiError::from) }
    };
    let asked = Instant::now();
    ensure!(reason(delete(false).await)? == Reason::VmUnreachable);
    ensure!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    let asked = Instant::now();
    delete(true).await?;
    ensure!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    process.wait_end()?;

    let request = |give_up| v1::DeleteLeftoverRequest {
        host: "hosts/host-a".into(),
        uid: old.uid.clone(),
        give_up,
    };
    let mut hosts = fleet.hosts(&agent);
    let refused = hosts.delete_leftover(request(false)).await;
    ensure!(reason(refused.map_err(ApiError::from))? == Reason::GiveUpRequired);
    hosts.delete_leftover(request(true)).await?;
    ensure!(leftovers(fleet, "host-a").await?.is_empty());
    Ok(())
}

async fn a_frozen_copy_that_dies_is_lost_until_it_is_deleted(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let vm = frozen(fleet).await?;
    // Its journal is spoiled when it dies, and repaired in place later, under a running agent.
    let journal = fleet.host_vms("host-a").join(&vm.uid).join("journal");
    let written = std::fs::read(&journal)?;
    let process = fleet.vm_process("host-a", &vm.name)?;
    let mut spoiled = written.clone();
    spoiled[3] ^= 1;
    std::fs::write(&journal, spoiled)?;
    process.kill()?;
    let server = fleet.server();
    let says = |words: &'static str| {
        move |vm: &v1::Vm| vm.state() == State::Lost && vm.state_message.contains(words)
    };
    let unreadable = says("cannot be read");
    fleet
        .vm_until(&server, &vm.name, "LOST", unreadable)
        .await?;
    let delete = || async {
        let request = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        let mut vms = fleet.vms(&server);
        vms.delete_vm(request).await.map_err(ApiError::from)
    };
    ensure!(delete().await.is_err() && journal.exists());
    std::fs::write(&journal, &written)?;
    let given = says("gave it away");
    let lost = fleet.vm_until(&server, &vm.name, "LOST", given).await?;
    ensure!(lost.epoch == 1 && lost.uid == vm.uid, "{lost:#?}");
    let id = vm.name.strip_prefix("vms/").unwrap_or_default();
    let create = || v1::CreateVmRequest {
        vm_id: id.to_owned(),
        host: "hosts/host-a".into(),
        spec: Some(usual(fleet.backend())),
        ..Default::default()
    };
    let refused = fleet.vms(&server).create_vm(create()).await;
    ensure!(reason(refused.map_err(ApiError::from))? == Reason::VmExists);
    delete().await?;
    fleet.vm_dir_gone("host-a", &vm.name).await?;
    fleet.vms(&server).create_vm(create()).await?;
    Ok(())
}

async fn a_stopped_process_is_unresponsive_and_delays_no_other_vm(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let spec = || usual(fleet.backend());
    let silent = fleet.run_vm("silent", "host-a", spec()).await?;
    let web = fleet.run_vm("web", "host-a", spec()).await?;
    let process = fleet.vm_process("host-a", &silent.name)?;
    process.suspend()?;
    let server = fleet.server();
    let unresponsive = |vm: &v1::Vm| vm.state() == State::Unresponsive;
    let shown = fleet
        .vm_until(&server, &silent.name, "UNRESPONSIVE", unresponsive)
        .await?;
    ensure!(
        shown.epoch == 1 && shown.host == "hosts/host-a",
        "{shown:#?}"
    );
    let refused = fleet.migrate(&silent.name, "host-b", fast()).await;
    let refused = refused.err().context("a silent VM migrates")?;
    ensure!(
        format!("{refused:#}").contains("does not answer"),
        "{refused:#}"
    );
    for (number, host) in ["host-b", "host-a", "host-b"].into_iter().enumerate() {
        let moved = fleet.migrate_and_wait(&web.name, host, fast()).await?;
        let progress = moved.progress.clone().unwrap_or_default();
        ensure!(
            progress.bytes_transferred > 0 && !progress.iterations.is_empty(),
            "move {number} lost its record: {moved:#?}"
        );
        if number == 0 {
            fleet.kill_agent("host-a");
            fleet.start_agent("host-a")?;
            fleet.hosts_ready().await?;
            let found = fleet.vm(&fleet.agent("host-a"), &silent.name).await?;
            ensure!(unresponsive(&found) && found.epoch == 1, "{found:#?}");
        }
    }
    let pause = v1::PauseVmRequest {
        name: silent.name.clone(),
        ..Default::default()
    };
    let refused = fleet.vms(&server).pause_vm(pause).await;
    let refused = refused.err().context("a silent VM is paused")?;
    ensure!(refused.message().contains("does not answer"), "{refused:?}");
    // It runs on: a pause that was refused is not carried out once the process can.
    process.resume()?;
    fleet
        .runs_soundly_on(&silent.name, "host-a")
        .await
        .map(drop)
}
