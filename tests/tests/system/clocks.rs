//! An agent whose host's clock is two hours ahead: the server measures that, and shows nothing of
//! it.
//!
//! The agent runs in this process, where it can be given a clock. Server, source and VMs are
//! processes as ever; a VM's own times are translated on its way there.

use std::{
    ffi::OsString,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use slat_daemon::{Agent, HostConfig};
use slat_proto::{
    model::{HostName, duration_nanos, now, timestamp_nanos},
    v1,
};
use slat_tests::{Fleet, Layout, binary, guest::usual, scene, wait::eventually};
use slat_vmm::handover::preamble::admit_here;

const SECOND: i128 = 1_000_000_000;
const AHEAD: Duration = Duration::from_secs(7200);

fn ahead() -> SystemTime {
    SystemTime::now() + AHEAD
}

async fn agent_ahead(fleet: &Fleet, state: &tempfile::TempDir) -> anyhow::Result<Agent> {
    let program: Vec<OsString> = vec![binary::slat()?.into(), "vm".into()];
    let config = HostConfig {
        name: HostName::parse("ahead")?,
        listen: "127.0.0.1:0".parse()?,
        advertise: None,
        server: Some(fleet.server()),
        state_dir: state.path().to_owned(),
        memory_bytes: 512 << 20,
        data_ip: "127.0.0.1".parse()?,
        vm_program: program,
        backends: slat_vmm::available_backends,
        admit: Arc::new(admit_here),
        clock: ahead,
        version: "0.0.0".to_owned(),
        render: None,
    };
    Ok(Agent::start(config).await?)
}

/// The offset that the server shows of a host's clock, nanoseconds.
async fn offset(fleet: &Fleet, host: &str) -> anyhow::Result<i128> {
    let request = v1::GetHostRequest {
        name: format!("hosts/{host}"),
    };
    let host = fleet.hosts(&fleet.server()).get_host(request).await?;
    let offset = host.into_inner().clock_offset.context("not measured")?;
    Ok(duration_nanos(&offset))
}

#[test]
fn a_host_two_hours_ahead_is_measured_and_its_vms_are_as_old_as_they_are() {
    let layout = Layout {
        backend: v1::Backend::Software,
        hosts: vec![("host-a", 512)],
    };
    scene::run(layout, async |fleet: &mut Fleet| {
        let state = tempfile::tempdir()?;
        let agent = agent_ahead(fleet, &state).await?;
        eventually("both clocks are measured", || async {
            let (here, there) = (
                offset(fleet, "host-a").await?,
                offset(fleet, "ahead").await?,
            );
            ensure!(here.abs() < SECOND, "{here}");
            ensure!((there - 7200 * SECOND).abs() < SECOND, "{there}");
            Ok(())
        })
        .await?;
        let spec = usual(fleet.backend());
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let created = timestamp_nanos(vm.create_time.as_ref().context("no create time")?);
        let params = v1::MigrationParams::default();
        let done = fleet.migrate_and_wait(&vm.name, "ahead", params).await?;
        let moved = fleet.vm(&fleet.server(), &vm.name).await?;
        ensure!(moved.host == "hosts/ahead", "{moved:#?}");
        let again = timestamp_nanos(moved.create_time.as_ref().context("no create time")?);
        ensure!((again - created).abs() < SECOND, "{} ns", again - created);
        // Its process there has the time by the clock of that host.
        let address = agent.address().to_string().parse()?;
        let there = fleet.vm(&address, &vm.name).await?;
        let there = timestamp_nanos(there.create_time.as_ref().context("no create time")?);
        let off = there - created - 7200 * SECOND;
        ensure!(off.abs() < SECOND, "{off} ns");

        let times: Vec<i128> = done
            .phase_times
            .iter()
            .filter_map(|entry| entry.time.as_ref())
            .map(timestamp_nanos)
            .collect();
        ensure!(times.is_sorted() && times.len() == 6, "{done:#?}");
        ensure!(times[5] <= timestamp_nanos(&now()), "{done:#?}");

        let delete = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(delete).await?;
        eventually("nothing is left", || async {
            for folder in ["vms", "transfers"] {
                let left = std::fs::read_dir(state.path().join(folder))?.count();
                ensure!(left == 0, "{left} in {folder}");
            }
            Ok(())
        })
        .await?;
        agent.stop().await;
        Ok(())
    });
}
