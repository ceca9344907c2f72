//! A migration is its VM's, by uid: another VM of that name is none of its business.

use slat_proto::{
    ApiError, Reason,
    v1::{self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role},
};

use super::{
    Fleet, VM,
    support::{Fake, answer, until, vm},
};

const OLD: &str = "uid-vms/web";
const NEW: &str = "uid-of-the-second";

fn second() -> v1::Vm {
    v1::Vm {
        uid: NEW.into(),
        ..vm(VM, 64)
    }
}

/// The VM at `fake` is deleted and made again under its name; the server has heard of it.
async fn made_again(fleet: &mut Fleet) {
    fleet.a.fake.remove_vm(VM);
    fleet.a.fake.put_vm(second());
    let request = v1::ListVmsRequest::default();
    until(
        "the server knows the second VM, and that the first is gone",
        async || {
            let mut vms = fleet.clients.vms.clone();
            let list = vms.list_vms(request.clone()).await.unwrap().into_inner();
            list.vms.iter().any(|vm| vm.uid == NEW) && list.vms.iter().all(|vm| vm.uid != OLD)
        },
    )
    .await;
}

async fn create(fleet: &mut Fleet, migration: v1::Migration) -> Result<v1::Migration, ApiError> {
    let request = v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            destination: "hosts/b".into(),
            ..migration
        }),
        ..Default::default()
    };
    answer(fleet.clients.migrations.create_migration(request).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_of_a_deleted_vm_is_in_no_namesakes_way() {
    let mut fleet = Fleet::start().await;
    fleet.b.fake.keep_sides(true);
    let first = fleet.precopy().await;
    fleet.clients.cancel(&first).await.unwrap();
    fleet.clients.wait_phase(&first, Phase::Cancelled).await;
    made_again(&mut fleet).await;
    // The first VM's side is still on b, and the second VM does not wait for it.
    let next = fleet.clients.migrate(VM, "hosts/b").await.unwrap();
    assert_eq!(next.vm_uid, NEW);
    fleet
        .a
        .fake
        .wait_call(&format!("start {}", next.name))
        .await;
    let side = fleet.a.fake.side(&next.name, Role::Source).unwrap();
    assert_eq!(side.vm_uid, NEW);

    let list = async |fleet: &mut Fleet, uid: &str| -> Vec<String> {
        let request = v1::ListMigrationsRequest {
            vm_uid: uid.into(),
            ..Default::default()
        };
        let answer = fleet.clients.migrations.list_migrations(request).await;
        let found = answer.unwrap().into_inner().migrations;
        found.into_iter().map(|migration| migration.name).collect()
    };
    assert_eq!(list(&mut fleet, OLD).await, [first]);
    assert_eq!(list(&mut fleet, NEW).await, [next.name]);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namesake_at_the_source_is_not_the_vm() {
    let mut fleet = Fleet::start().await;
    // The first VM's migration is under way when its source says that it knows of none.
    fleet.b.fake.hold("prepare");
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    fleet.b.fake.wait_call("held prepare").await;
    made_again(&mut fleet).await;
    fleet
        .a
        .fake
        .refuse_start(ApiError::new(Reason::NoSuchVm, "no VM of that uid"));
    fleet.b.fake.let_go("prepare");
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    // It does not run where another VM of its name runs.
    assert_eq!(failed.vm_location(), v1::VmLocation::Lost, "{failed:#?}");
    assert_eq!(failed.vm_uid, OLD);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_named_by_uid_or_by_name_and_source() {
    let mut fleet = Fleet::start().await;
    let other = |migration: v1::Migration| v1::Migration {
        vm: VM.into(),
        ..migration
    };
    let of_uid = |uid: &str| v1::Migration {
        vm_uid: uid.into(),
        ..Default::default()
    };
    let from = |source: &str| v1::Migration {
        source: source.into(),
        ..Default::default()
    };
    for (wanted, reason) in [
        (v1::Migration::default(), Reason::BadParameter),
        (of_uid("nobody"), Reason::NoSuchVm),
        (other(of_uid("nobody")), Reason::NoSuchVm),
        (other(from("hosts/b")), Reason::NoSuchVm),
        (other(from("hosts/B")), Reason::BadParameter),
        (of_uid(&"x".repeat(200)), Reason::BadParameter),
    ] {
        let error = create(&mut fleet, wanted.clone()).await.unwrap_err();
        assert_eq!(error.reason, reason, "{wanted:?}: {error}");
    }
    for wanted in [of_uid(OLD), other(of_uid(OLD)), other(from("hosts/a"))] {
        let made = create(&mut fleet, wanted).await.unwrap();
        assert_eq!((made.vm.as_str(), made.vm_uid.as_str()), (VM, OLD));
        ended(&mut fleet, &made.name).await;
    }
    fleet.stop().await;
}

/// Cancels a migration and waits until both its sides are gone.
async fn ended(fleet: &mut Fleet, migration: &str) {
    fleet.a.fake.wait_call(&format!("start {migration}")).await;
    fleet
        .a
        .fake
        .phase(migration, Role::Source, SidePhase::Precopy);
    fleet.clients.cancel(migration).await.unwrap();
    fleet.clients.wait_phase(migration, Phase::Cancelled).await;
    let gone = |fake: &Fake, role| fake.side(migration, role).is_none();
    until("both sides are released", async || {
        gone(&fleet.a.fake, Role::Source) && gone(&fleet.b.fake, Role::Destination)
    })
    .await;
}
