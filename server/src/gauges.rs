//! Sets the gauges from what is known now, once a second: a scrape reads and never computes.

use std::{sync::Arc, time::Duration};

use ::metrics::gauge;
use slat_proto::v1::{self, MigrationPhase as Phase};

use tokio::time::MissedTickBehavior;

use crate::{clock, fleet::Fleet, migration::Migrations};

const INTERVAL: Duration = Duration::from_secs(1);

const PHASES: [Phase; 7] = [
    Phase::Pending,
    Phase::Preparing,
    Phase::PrecopyActive,
    Phase::Switchover,
    Phase::Committed,
    Phase::Cancelling,
    Phase::InDoubt,
];

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Sets them for ever.
pub(crate) async fn keep(fleet: Arc<Fleet>, migrations: Arc<Migrations>) {
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        refresh(&fleet, &migrations);
    }
}

fn refresh(fleet: &Fleet, migrations: &Migrations) {
    use v1::{host::State as HostState, vm::State as VmState};
    let phases = migrations.phases();
    for phase in PHASES {
        let number = phases.get(&phase).copied().unwrap_or(0);
        let label = phase
            .as_str_name()
            .trim_start_matches("MIGRATION_PHASE_")
            .to_ascii_lowercase();
        gauge!("slat_migrations_active", "phase" => label).set(count(number));
        if phase == Phase::InDoubt {
            gauge!("slat_migration_in_doubt").set(count(number));
        }
    }
    let hosts = fleet.hosts();
    for (state, label) in [
        (HostState::Ready, "ready"),
        (HostState::Unreachable, "unreachable"),
    ] {
        let number = hosts.iter().filter(|host| host.state() == state).count();
        gauge!("slat_hosts", "state" => label).set(count(number));
    }
    for host in &hosts {
        let name = host.name.trim_start_matches("hosts/").to_owned();
        if let Some(offset) = &host.clock_offset {
            gauge!("slat_host_clock_offset_seconds", "host" => name.clone())
                .set(clock::seconds(offset));
        }
        if let Some(time) = &host.last_seen_time {
            let whole = u32::try_from(time.seconds).map_or(0.0, f64::from);
            gauge!("slat_host_last_report_timestamp_seconds", "host" => name)
                .set(whole + f64::from(time.nanos) / 1e9);
        }
    }
    gauge!("slat_vm_name_conflicts").set(count(fleet.name_conflicts()));
    let states = fleet.vm_states();
    for state in [
        VmState::Created,
        VmState::Running,
        VmState::Paused,
        VmState::Incoming,
        VmState::Relinquished,
        VmState::Failed,
        VmState::Stopped,
        VmState::Lost,
        VmState::Unresponsive,
    ] {
        let number = states.get(state.as_str_name()).copied().unwrap_or(0);
        let label = state
            .as_str_name()
            .trim_start_matches("STATE_")
            .to_ascii_lowercase();
        gauge!("slat_vms", "state" => label).set(count(number));
    }
}
