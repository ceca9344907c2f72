//! Migrations through a real server over real sockets, with fake agents whose sides the test moves.
//! Waits are on WatchMigration and on the calls the agents receive.

mod cancel;
mod cancel_held;
mod clocks;
mod deleted;
mod doubt;
mod ends;
mod fenced;
mod grants;
mod identity;
mod preamble;
mod retention;
#[path = "../support/mod.rs"]
mod support;
mod unreadable;
mod waiting;
mod watching;

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role,
        VmLocation, vm::State,
    },
};
use slat_server::Server;
use slat_test_dir::TestDir;
use support::{Agent, Clients, Fake, hand_over, server, until, vm};

const VM: &str = "vms/web";

/// A server, hosts a and b, and a VM on a.
struct Fleet {
    state: TestDir,
    server: Server,
    a: Agent,
    b: Agent,
    clients: Clients,
}

impl Fleet {
    async fn start() -> Self {
        let state = slat_test_dir::TestDir::new();
        let server = server(state.path()).await;
        let source = Fake::new("hosts/a");
        source.put_vm(vm(VM, 64));
        let a = Agent::start(source, server.address()).await;
        let b = Agent::start(Fake::new("hosts/b"), server.address()).await;
        let clients = Clients::new(server.address());
        Self {
            state,
            server,
            a,
            b,
            clients,
        }
    }

    /// A migration whose source sends pages.
    async fn precopy(&mut self) -> String {
        let name = self.clients.migrate(VM, "hosts/b").await.unwrap().name;
        self.a.fake.wait_call(&format!("start {name}")).await;
        self.a.fake.phase(&name, Role::Source, SidePhase::Precopy);
        self.clients.wait_phase(&name, Phase::PrecopyActive).await;
        name
    }

    /// Stops the server and starts another on the same state; agents do not know yet.
    async fn restart_server(mut self) -> Self {
        self.server.stop().await;
        self.server = server(self.state.path()).await;
        self.clients = Clients::new(self.server.address());
        self
    }

    async fn report_again(&mut self) {
        self.a.report_to(self.server.address()).await;
        self.b.report_to(self.server.address()).await;
    }

    async fn stop(self) {
        self.server.stop().await;
        self.a.stop().await;
        self.b.stop().await;
    }
}

fn reason(migration: &v1::Migration) -> &str {
    migration
        .error
        .as_ref()
        .map_or("", |error| error.reason.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn there_and_back_again() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    assert!(done.error.is_none());
    let progress = done.progress.as_ref().unwrap();
    assert_eq!(progress.iterations.len(), 3);
    assert_eq!(progress.verification(), v1::Verification::Match);
    assert_eq!(progress.downtime.unwrap().nanos, 12_000_000);
    assert_eq!(done.destination_cpu_time.unwrap().nanos, 7_000_000);
    assert!(done.end_time.is_some() && done.total_time.is_some());
    let phases: Vec<Phase> = done.phase_times.iter().map(v1::PhaseTime::phase).collect();
    assert_eq!(
        phases,
        [
            Phase::Pending,
            Phase::Preparing,
            Phase::PrecopyActive,
            Phase::Switchover,
            Phase::Committed,
            Phase::Completed
        ]
    );
    // Both sides were released, and who saw COMPLETED finds the VM at its new host.
    fleet.a.fake.wait_call("release TRANSFER_ROLE_SOURCE").await;
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    let moved = fleet.clients.vm(VM).await.unwrap();
    assert_eq!((moved.host.as_str(), moved.epoch), ("hosts/b", 2));

    // At once back: nothing of the first is in the way.
    let back = fleet.clients.migrate(VM, "hosts/a").await.unwrap();
    assert_eq!((back.source.as_str(), back.epoch), ("hosts/b", 2));
    fleet
        .b
        .fake
        .wait_call(&format!("start {}", back.name))
        .await;
    hand_over(&fleet.b.fake, &fleet.a.fake, &back.name, VM);
    fleet.clients.wait_phase(&back.name, Phase::Completed).await;
    assert_eq!(fleet.clients.vm(VM).await.unwrap().epoch, 3);

    let list = v1::ListMigrationsRequest {
        page_size: 1,
        ..Default::default()
    };
    let list = fleet
        .clients
        .migrations
        .list_migrations(list)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(list.migrations[0].name, back.name);
    let rest = v1::ListMigrationsRequest {
        page_token: list.next_page_token,
        vm: "web".into(),
        ..Default::default()
    };
    let rest = fleet
        .clients
        .migrations
        .list_migrations(rest)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(rest.migrations.len(), 1);
    assert_eq!(rest.migrations[0].name, name);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_is_refused_before_anyone_is_asked() {
    let mut fleet = Fleet::start().await;
    let mut riscv = Fake::new("hosts/riscv");
    riscv.arch = "riscv64".into();
    let riscv = Agent::start(riscv, fleet.server.address()).await;
    let full = Fake::new("hosts/full");
    full.put_vm(vm("vms/large", 1000));
    let full = Agent::start(full, fleet.server.address()).await;

    for (vm, destination, expected) in [
        (VM, "hosts/a", Reason::SameHost),
        (VM, "hosts/x", Reason::NoSuchHost),
        ("vms/none", "hosts/b", Reason::NoSuchVm),
        (VM, "hosts/riscv", Reason::IsaMismatch),
        (VM, "hosts/full", Reason::DstNoMemory),
        ("vms/../etc", "hosts/b", Reason::BadParameter),
        (VM, "hosts/B", Reason::BadParameter),
    ] {
        let error = fleet.clients.migrate(vm, destination).await.unwrap_err();
        assert_eq!(error.reason, expected, "{vm} to {destination}: {error}");
    }
    let first = fleet.precopy().await;
    let second = fleet.clients.migrate(VM, "hosts/b").await.unwrap_err();
    assert_eq!(second.reason, Reason::MigrationInProgress);
    assert_eq!(second.metadata["migration"], first);
    let delete = v1::DeleteVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    let delete = support::answer(fleet.clients.vms.delete_vm(delete).await).unwrap_err();
    assert_eq!(delete.reason, Reason::MigrationInProgress);
    assert_eq!(fleet.clients.vm(VM).await.unwrap().migration, first);
    let again = v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            vm: "vms/large".into(),
            destination: "hosts/a".into(),
            ..Default::default()
        }),
        migration_id: first.strip_prefix("migrations/").unwrap().into(),
        ..Default::default()
    };
    let again = fleet.clients.migrations.create_migration(again).await;
    assert_eq!(
        support::answer(again).unwrap_err().reason,
        Reason::MigrationExists
    );
    riscv.stop().await;
    full.stop().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_added_later_counts_where_its_vm_is_to_go() {
    let mut fleet = Fleet::start().await;
    let source = Fake::new("hosts/source");
    source.put_vm(v1::Vm {
        memory_bytes: 900 << 20,
        ..vm("vms/grown", 64)
    });
    let source = Agent::start(source, fleet.server.address()).await;
    let narrow = Fake::new("hosts/narrow");
    narrow.put_vm(vm("vms/other", 200));
    let narrow = Agent::start(narrow, fleet.server.address()).await;

    let refused = fleet.clients.migrate("vms/grown", "hosts/narrow").await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.reason, Reason::DstNoMemory, "{refused}");
    assert_eq!(refused.metadata["needed_bytes"], (900 << 20).to_string());
    // With 900 MiB free and no less it may go.
    let taken = fleet.clients.migrate("vms/grown", "hosts/b").await;
    taken.unwrap();
    source.stop().await;
    narrow.stop().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_creates_for_one_vm_one_is_taken() {
    let fleet = Fleet::start().await;
    let attempts: Vec<_> = (0..8)
        .map(|_| {
            let mut clients = Clients::new(fleet.server.address());
            tokio::spawn(async move { clients.migrate(VM, "hosts/b").await })
        })
        .collect();
    let mut accepted = 0;
    for attempt in attempts {
        match attempt.await.unwrap() {
            Ok(_) => accepted += 1,
            Err(error) => assert_eq!(error.reason, Reason::MigrationInProgress),
        }
    }
    assert_eq!(accepted, 1);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_moves_nothing() {
    let mut fleet = Fleet::start().await;
    let request = v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            vm: VM.into(),
            destination: "hosts/b".into(),
            ..Default::default()
        }),
        validate_only: true,
        ..Default::default()
    };
    let planned = fleet
        .clients
        .migrations
        .create_migration(request)
        .await
        .unwrap();
    let name = planned.into_inner().name;
    let get = v1::GetMigrationRequest { name };
    let found = support::answer(fleet.clients.migrations.get_migration(get).await);
    assert_eq!(found.unwrap_err().reason, Reason::NoSuchMigration);
    let asked = fleet.b.fake.calls();
    assert!(
        asked.iter().all(|call| call.starts_with("prepare")),
        "compared, and nothing else: {asked:?}"
    );
    assert!(fleet.b.fake.vm(VM).is_none());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_fails_leaves_the_vm_and_a_retry_works() {
    let mut fleet = Fleet::start().await;
    let full = ApiError::new(Reason::DstNoMemory, "no memory left").with("free_bytes", 1);
    fleet.b.fake.refuse_prepare(full);
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "DST_NO_MEMORY");
    assert_eq!(failed.error.as_ref().unwrap().side, "destination");
    assert_eq!(failed.error.as_ref().unwrap().metadata["free_bytes"], "1");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    assert_eq!(fleet.clients.vm(VM).await.unwrap().host, "hosts/a");
    fleet.precopy().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_refused_cleans_the_destination() {
    let mut fleet = Fleet::start().await;
    fleet
        .a
        .fake
        .refuse_start(ApiError::new(Reason::StaleEpoch, "epoch 9"));
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "STALE_EPOCH");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    assert!(fleet.b.fake.vm(VM).is_none());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_ends_the_migration_with_its_reason() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let why = ApiError::new(Reason::ConnectionLost, "the destination went away")
        .to_migration_error(Phase::PrecopyActive, "source");
    fleet.a.fake.set(&name, Role::Source, |side| {
        side.phase = SidePhase::Failed.into();
        side.error = Some(why);
    });
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "CONNECTION_LOST");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    fleet
        .b
        .fake
        .wait_call("cancel TRANSFER_ROLE_DESTINATION")
        .await;
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_died_before_the_commit_is_the_reason_whoever_is_heard_first() {
    let error = |reason: Reason, side: &str, text: &str| {
        let error = ApiError::new(reason, text).to_migration_error(Phase::Switchover, side);
        Some(error)
    };
    for source_first in [true, false] {
        let mut fleet = Fleet::start().await;
        let name = fleet.precopy().await;
        fleet
            .a
            .fake
            .phase(&name, Role::Source, SidePhase::Switchover);
        fleet.clients.wait_phase(&name, Phase::Switchover).await;
        let (a, b) = (fleet.a.fake.clone(), fleet.b.fake.clone());
        let source = || {
            a.set(&name, Role::Source, |side| {
                side.phase = SidePhase::Failed.into();
                side.error = error(Reason::ConnectionLost, "source", "the connection broke");
            });
        };
        let destination = || {
            b.set(&name, Role::Destination, |side| {
                side.phase = SidePhase::Failed.into();
                side.process_gone = true;
                side.error = error(Reason::VmProcessDied, "destination", "it died");
            });
        };
        if source_first {
            source();
            destination();
        } else {
            destination();
            source();
        }
        let failed = fleet
            .clients
            .wait(&name, |migration| {
                reason(migration) == "VM_PROCESS_DIED" && migration.phase() == Phase::Failed
            })
            .await;
        assert_eq!(failed.vm_location(), VmLocation::Source);
        let error = failed.error.unwrap();
        assert_eq!(
            (error.side.as_str(), error.metadata["vm_location"].as_str()),
            ("destination", "SOURCE")
        );
        assert!(error.advice.contains("migrate again"), "{}", error.advice);
        fleet.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_process_that_dies_before_the_commit_loses_the_vm() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.a.fake.set(&name, Role::Source, |side| {
        side.phase = SidePhase::Failed.into();
        side.vm_lost = true;
    });
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "VM_PROCESS_DIED");
    assert_eq!(failed.vm_location(), VmLocation::Lost);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_destination_makes_the_source_give_up() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Failed);
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "CONNECTION_LOST");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_destination_learns_the_commit_from_the_sources_journal() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    // The source's process died after it relinquished: its agent answers from the journal; COMMIT
    // was never heard.
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    let call = fleet.b.fake.wait_call("resolve").await;
    assert!(call.contains("DECISION_COMMIT"), "{call}");
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    assert_eq!(fleet.clients.vm(VM).await.unwrap().state(), State::Running);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_destination_is_told_that_the_source_failed() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    fleet.a.fake.phase(&name, Role::Source, SidePhase::Failed);
    let call = fleet.b.fake.wait_call("resolve").await;
    assert!(call.contains("DECISION_ABORT"), "{call}");
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(failed.vm_location(), VmLocation::Source);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_source_after_the_switchover_is_doubt_until_its_journal_is_read() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    let (source, address) = fleet.a.stop().await;
    let doubt = fleet.clients.wait_phase(&name, Phase::InDoubt).await;
    assert_eq!(reason(&doubt), "IN_DOUBT");
    assert_eq!(doubt.vm_location(), VmLocation::PausedBoth);
    assert!(
        fleet
            .b
            .fake
            .calls()
            .iter()
            .all(|call| !call.starts_with("resolve"))
    );
    // The agent comes back; the process had relinquished before it died.
    source.phase(&name, Role::Source, SidePhase::Relinquished);
    fleet.a = Agent::serve_at(source, address).await;
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert!(done.error.is_none());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_source_agent_in_precopy_is_waited_for() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let (source, address) = fleet.a.stop().await;
    until("the source is seen to be gone", async || {
        let clients = &mut Clients::new(fleet.server.address());
        clients.vm(VM).await.unwrap().stale
    })
    .await;
    assert_eq!(
        fleet.clients.migration(&name).await.phase(),
        Phase::PrecopyActive
    );
    fleet.a = Agent::serve_at(source, address).await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_reports_that_it_completed() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let mut fleet = fleet.restart_server().await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    assert_eq!(done.progress.unwrap().iterations.len(), 3);
    fleet.report_again().await;
    assert_eq!(fleet.clients.vm(VM).await.unwrap().host, "hosts/b");
    fleet.a.fake.wait_call("release TRANSFER_ROLE_SOURCE").await;
    // Nothing was begun twice.
    let starts = |fake: &Fake| {
        fake.calls()
            .iter()
            .filter(|c| c.starts_with("start"))
            .count()
    };
    assert_eq!(starts(&fleet.a.fake), 1);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_reports_that_it_failed_while_nobody_looked() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.server.stop().await;
    let why = ApiError::new(Reason::NotConverging, "it dirties too fast")
        .to_migration_error(Phase::PrecopyActive, "source");
    fleet.a.fake.set(&name, Role::Source, |side| {
        side.phase = SidePhase::Failed.into();
        side.error = Some(why);
    });
    fleet.server = server(fleet.state.path()).await;
    let mut clients = Clients::new(fleet.server.address());
    let failed = clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "NOT_CONVERGING");
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_before_its_agents_waits_for_them() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.server.stop().await;
    let (source, source_at) = fleet.a.stop().await;
    let (destination, destination_at) = fleet.b.stop().await;
    fleet.server = server(fleet.state.path()).await;
    let mut clients = Clients::new(fleet.server.address());
    assert_eq!(clients.migration(&name).await.phase(), Phase::PrecopyActive);
    fleet.a = Agent::serve_at(source, source_at).await;
    fleet.b = Agent::serve_at(destination, destination_at).await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_between_prepare_and_start_begins_again_with_the_same_name() {
    let mut fleet = Fleet::start().await;
    // The source never got the call: the server died between its two calls.
    fleet
        .a
        .fake
        .refuse_start(ApiError::new(Reason::PeerUnreachable, "lost"));
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    fleet.a.fake.wait_call("start").await;
    let mut fleet = fleet.restart_server().await;
    // Leave is for agents as they are registered.
    fleet.report_again().await;
    until("the source has its side", async || {
        fleet.a.fake.side(&name, Role::Source).is_some()
    })
    .await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_repeated_is_the_same_migration() {
    let mut fleet = Fleet::start().await;
    let request = |destination: &str, streams: u32| v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            vm: VM.into(),
            destination: destination.into(),
            params: Some(v1::MigrationParams {
                streams,
                ..Default::default()
            }),
            ..Default::default()
        }),
        migration_id: "once".into(),
        ..Default::default()
    };
    let migrations = &mut fleet.clients.migrations;
    let first = migrations.create_migration(request("hosts/b", 0)).await;
    let first = first.unwrap().into_inner();
    // 2 is what 0 means.
    for streams in [0, 2] {
        let again = migrations
            .create_migration(request("hosts/b", streams))
            .await;
        let again = again.unwrap().into_inner();
        assert_eq!(
            (&again.name, again.create_time),
            (&first.name, first.create_time)
        );
    }
    for other in [request("hosts/b", 3), request("hosts/c", 0)] {
        let refused = support::answer(migrations.create_migration(other).await).unwrap_err();
        assert_eq!(refused.reason, Reason::MigrationExists);
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ticket_is_nowhere_to_be_seen() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let shown = format!("{:?}", fleet.clients.migration(&name).await);
    assert!(!shown.contains("ticket") && !shown.contains("7, 7, 7, 7"));
    let state = fleet.state.path().join("slat-server.redb");
    fleet.server.stop().await;
    let stored = std::fs::read(state).unwrap();
    assert!(!stored.windows(32).any(|window| window == [7; 32]));
    fleet.a.stop().await;
    fleet.b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_on_the_same_state_is_refused() {
    let state = slat_test_dir::TestDir::new();
    let first = server(state.path()).await;
    let config = slat_server::ServerConfig {
        credentials: None,
        access: slat_proto::transport::Access::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: state.path().to_owned(),
        report_interval: std::time::Duration::from_secs(1),
        host_silence: None,
        retention: slat_server::Retention::default(),
        fence: None,
        render: Some(Arc::new(String::new)),
        version: "0".into(),
    };
    let error = Server::start(config).await.unwrap_err();
    assert!(
        error.to_string().contains("open in another server"),
        "{error}"
    );
    first.stop().await;
}
