//! Hosts whose clocks are hours apart: nothing that the server shows is.

use slat_proto::{
    model::{duration_nanos, now, std_duration, timestamp_nanos},
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role,
        host_service_client::HostServiceClient,
    },
};

use super::{
    Fleet, VM,
    support::{answer, channel, hand_over, until},
};

const HOUR: i64 = 3600;
const SECOND: i128 = 1_000_000_000;
/// More than a test takes, and much less than the clocks are apart.
const NEAR: i128 = 60 * SECOND;

impl Fleet {
    /// The offset that is shown of a host's clock, nanoseconds.
    async fn offset(&self, host: &str) -> Option<i128> {
        let mut hosts = HostServiceClient::new(channel(self.server.address()));
        let request = v1::GetHostRequest { name: host.into() };
        let host = answer(hosts.get_host(request).await).unwrap();
        host.clock_offset.as_ref().map(duration_nanos)
    }

    /// Waits until the offsets are measured.
    async fn measured(&self, wanted: [(&str, i64); 2]) {
        for (host, seconds) in wanted {
            until("the offset is measured", async || {
                let near = |offset: i128| (offset - i128::from(seconds) * SECOND).abs() < SECOND;
                self.offset(host).await.is_some_and(near)
            })
            .await;
        }
    }
}

fn assert_in_order(migration: &v1::Migration) {
    let times: Vec<i128> = migration
        .phase_times
        .iter()
        .map(|entry| timestamp_nanos(entry.time.as_ref().unwrap()))
        .collect();
    assert!(times.is_sorted(), "{:#?}", migration.phase_times);
    assert!(times.last().unwrap() - times[0] < NEAR);
    let ago = timestamp_nanos(&now()) - times[0];
    assert!((0..NEAR).contains(&ago), "{ago}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_are_two_hours_apart_show_in_no_time_and_no_duration() {
    let mut fleet = Fleet::start().await;
    let (a, b) = (fleet.a.fake.clone(), fleet.b.fake.clone());
    a.set_clock(HOUR);
    b.set_clock(-HOUR);
    fleet
        .measured([("hosts/a", HOUR), ("hosts/b", -HOUR)])
        .await;

    let request = v1::CreateVmRequest {
        vm_id: "new".into(),
        host: "hosts/a".into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 64 << 20,
            vcpus: 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    let made = answer(fleet.clients.vms.create_vm(request).await).unwrap();
    let created = timestamp_nanos(made.create_time.as_ref().unwrap());
    let age = timestamp_nanos(&now()) - created;
    assert!((0..NEAR).contains(&age), "a new VM is {age} ns old");
    // What a report brought says the same as the answer.
    let list = answer(
        fleet
            .clients
            .vms
            .list_vms(v1::ListVmsRequest::default())
            .await,
    )
    .unwrap();
    let listed = list.vms.iter().find(|vm| vm.name == "vms/new").unwrap();
    assert_eq!(listed.create_time, made.create_time);

    for (from, to, there) in [(&a, &b, "hosts/b"), (&b, &a, "hosts/a")] {
        let name = fleet.clients.migrate("vms/new", there).await.unwrap().name;
        from.wait_call(&format!("start {name}")).await;
        for (phase, shown) in [
            (SidePhase::Precopy, Phase::PrecopyActive),
            (SidePhase::Switchover, Phase::Switchover),
        ] {
            from.phase(&name, Role::Source, phase);
            let now = fleet.clients.wait_phase(&name, shown).await;
            assert_in_order(&now);
        }
        hand_over(from, to, &name, "vms/new");
        let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
        assert_in_order(&done);
        assert!(std_duration(done.total_time.as_ref()).as_nanos() < NEAR.unsigned_abs());
        // It is as old as it was, whatever the clock of the host where it is now.
        let moved = fleet.clients.vm("vms/new").await.unwrap();
        assert_eq!(moved.host, there);
        let again = timestamp_nanos(moved.create_time.as_ref().unwrap());
        assert!((again - created).abs() < SECOND, "{}", again - created);
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_in_the_middle_of_a_migration_turns_no_phase_around() {
    let mut fleet = Fleet::start().await;
    fleet.measured([("hosts/a", 0), ("hosts/b", 0)]).await;
    let name = fleet.precopy().await;
    fleet.a.fake.set_clock(-2 * HOUR);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Switchover);
    assert_in_order(&fleet.clients.wait_phase(&name, Phase::Switchover).await);
    fleet
        .measured([("hosts/a", -2 * HOUR), ("hosts/b", 0)])
        .await;
    fleet.a.fake.set_clock(2 * HOUR);
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_in_order(&done);
    fleet
        .measured([("hosts/a", 2 * HOUR), ("hosts/b", 0)])
        .await;
    fleet.stop().await;
}
