//! A host whose clock is hours off, and is set while VMs run and move: the server measures that,
//! and shows nothing of it.
//!
//! Agents and VM processes are processes as ever; the library that shifts their clock is preloaded.

use anyhow::{Context as _, ensure};
use slat_proto::{
    model::{duration_nanos, now, timestamp_nanos},
    v1,
};
use slat_tests::{Fleet, Layout, guest::usual, scene, wait::eventually};

const SECOND: i128 = 1_000_000_000;

/// The offset that the server shows of a host's clock, nanoseconds.
async fn offset(fleet: &Fleet, host: &str) -> anyhow::Result<i128> {
    let request = v1::GetHostRequest {
        name: format!("hosts/{host}"),
    };
    let host = fleet.hosts(&fleet.server()).get_host(request).await?;
    let offset = host.into_inner().clock_offset.context("not measured")?;
    Ok(duration_nanos(&offset))
}

/// Sets a host's clock, and waits until the server has measured it.
async fn set(fleet: &Fleet, host: &str, ahead: i64) -> anyhow::Result<()> {
    fleet.clocks().context("no clocks")?.set(host, ahead)?;
    eventually("the clock is measured", || async {
        let off = offset(fleet, host).await? - i128::from(ahead) * SECOND;
        ensure!(off.abs() < SECOND, "{off} ns from {ahead} s");
        Ok(())
    })
    .await
}

fn made(vm: &v1::Vm) -> anyhow::Result<i128> {
    let time = vm.create_time.as_ref().context("no create time")?;
    Ok(timestamp_nanos(time))
}

fn near(what: &str, time: i128, wanted: i128) -> anyhow::Result<()> {
    let off = time - wanted;
    ensure!(off.abs() < SECOND, "{what}: {off} ns off");
    Ok(())
}

#[test]
fn clocks_of_hosts_that_are_hours_off_and_set_at_any_time_make_no_vm_older_and_turn_no_phase() {
    let layout = Layout {
        own_clocks: true,
        ..Layout::two(scene::best_backend())
    };
    scene::run(layout, async |fleet: &mut Fleet| {
        set(fleet, "host-b", 7200).await?;
        let begin = timestamp_nanos(&now());
        let spec = usual(fleet.backend());
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let created = made(&vm)?;
        near("created", created, begin)?;
        // The destination's clock is set at once before the move, when nobody has measured it.
        for (to, ahead) in [("host-b", -7200), ("host-a", 3600)] {
            fleet.clocks().context("no clocks")?.set(to, ahead)?;
            let params = v1::MigrationParams::default();
            let done = fleet.migrate_and_wait(&vm.name, to, params).await?;
            let times = done.phase_times.iter().filter_map(|t| t.time.as_ref());
            let times: Vec<i128> = times.map(timestamp_nanos).collect();
            ensure!(times.is_sorted() && times.len() == 6, "{done:#?}");
            ensure!(times[5] <= timestamp_nanos(&now()), "{done:#?}");
            // The VM's process has the time by its own host's clock.
            let there = fleet.vm(&fleet.agent(to), &vm.name).await?;
            let ahead = i128::from(ahead) * SECOND;
            near("at the agent", made(&there)?, created + ahead)?;
            eventually("it is as old as it is", || async {
                let shown = fleet.vm(&fleet.server(), &vm.name).await?;
                ensure!(shown.host == format!("hosts/{to}"), "{shown:#?}");
                near("at the server", made(&shown)?, created)
            })
            .await?;
        }
        // While it runs.
        for ahead in [-600, 0] {
            set(fleet, "host-a", ahead).await?;
            eventually("it is as old as it is", || async {
                let shown = fleet.vm(&fleet.server(), &vm.name).await?;
                near("at the server", made(&shown)?, created)
            })
            .await?;
        }
        let delete = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(delete).await?;
        Ok(())
    });
}
