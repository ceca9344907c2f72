//! Migrations whose VM died on its way, and what is kept and said of it then; verifications.

use super::*;

/// Of all there is: source RELINQUISHED and frozen, destination dead before it owned the VM.
pub(super) async fn destination_dies_after_the_commit(
    fleet: &mut Fleet,
) -> (String, v1::Migration) {
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    let mut frozen = fleet.a.fake.vm(VM).unwrap();
    frozen.state = State::Relinquished.into();
    fleet.a.fake.put_vm(frozen);
    fleet.b.fake.remove_vm(VM);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Failed);
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    (name, failed)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_a_frozen_copy_to_run_is_told_what_it_is_and_how_to_take_it_back() {
    let mut fleet = Fleet::start().await;
    let (name, _) = destination_dies_after_the_commit(&mut fleet).await;
    let uid = fleet.a.fake.vm(VM).unwrap().uid;
    let vms = &mut fleet.clients.vms;
    let vm = || VM.to_owned();
    let answers = [
        support::answer(
            vms.start_vm(v1::StartVmRequest {
                name: vm(),
                ..Default::default()
            })
            .await,
        ),
        support::answer(
            vms.resume_vm(v1::ResumeVmRequest {
                name: vm(),
                ..Default::default()
            })
            .await,
        ),
        support::answer(
            vms.pause_vm(v1::PauseVmRequest {
                name: vm(),
                ..Default::default()
            })
            .await,
        ),
    ];
    for answer in answers {
        let refused = answer.unwrap_err();
        assert_eq!(refused.reason, Reason::VmNotRunning);
        assert_eq!(refused.metadata["migration"], name);
        // A copy is there: nothing may say that all is lost.
        assert_eq!(refused.metadata.get("vm_location"), None);
        let order = format!("slat adopt vm --uid {uid} --host a --give-up");
        let advice = &refused.metadata["advice"];
        assert!(advice.contains(&order), "{advice}");
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_went_to_a_host_that_fell_silent_is_shown_there_and_keeps_its_name() {
    let mut fleet = Fleet::start().await;
    let before = fleet.clients.vm(VM).await.unwrap();
    let name = fleet.precopy().await;
    // The last that its host said: a side that receives.
    fleet.b.fake.put_vm(v1::Vm {
        state: State::Incoming.into(),
        migration: name.clone(),
        ..before.clone()
    });
    fleet.b.report_to(fleet.server.address()).await;
    let (b, b_at) = fleet.b.stop().await;
    fleet.a.fake.remove_vm(VM);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Completed);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    let check = async |clients: &mut Clients| {
        let vm = clients.vm(VM).await.unwrap();
        let place = (vm.host.as_str(), vm.epoch, vm.stale, vm.uid.as_str());
        assert_eq!(place, ("hosts/b", before.epoch + 1, true, &*before.uid));
    };
    check(&mut fleet.clients).await;
    fleet.server.stop().await;
    fleet.server = server(fleet.state.path()).await;
    fleet.clients = Clients::new(fleet.server.address());
    fleet.a.report_to(fleet.server.address()).await;
    check(&mut fleet.clients).await;
    let create = v1::CreateVmRequest {
        vm_id: VM.trim_start_matches("vms/").into(),
        spec: before.spec.clone(),
        host: "hosts/a".into(),
        ..Default::default()
    };
    let refused = support::answer(fleet.clients.vms.create_vm(create).await).unwrap_err();
    assert_eq!(refused.reason, Reason::VmExists);
    fleet.b = Agent::serve_at(b, b_at).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_a_leftover_from_the_moment_its_migration_ended() {
    let mut fleet = Fleet::start().await;
    let uid = fleet.a.fake.vm(VM).unwrap().uid;
    let (name, _) = destination_dies_after_the_commit(&mut fleet).await;
    // In no report yet.
    fleet.a.fake.put_leftover(v1::Leftover {
        uid: uid.clone(),
        vm: VM.into(),
        kind: v1::leftover::Kind::RelinquishedSource.into(),
        migration: name,
        ..Default::default()
    });
    let list = v1::ListLeftoversRequest::default();
    let list = support::answer(fleet.clients.hosts.list_leftovers(list).await).unwrap();
    let uids: Vec<_> = list.leftovers.iter().map(|left| &left.uid).collect();
    assert_eq!(uids, [&uid]);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_that_was_refused_while_its_host_was_silent_is_not_carried_out_later() {
    let mut fleet = Fleet::start().await;
    let (name, _) = destination_dies_after_the_commit(&mut fleet).await;
    let (a, a_at) = fleet.a.stop().await;
    let delete = || v1::DeleteVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    let refused = support::answer(fleet.clients.vms.delete_vm(delete()).await).unwrap_err();
    assert_eq!(refused.reason, Reason::HostUnreachable);
    let advice = &refused.metadata["advice"];
    assert!(advice.contains("nothing is deleted later"), "{advice}");
    fleet.a = Agent::serve_at(a, a_at).await;
    fleet.a.report_to(fleet.server.address()).await;
    // Longer than the pause between two attempts at what is still wanted.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert!(!released_source(&fleet.a.fake), "carried out late");
    assert_eq!(fleet.a.fake.vm(VM).unwrap().state(), State::Relinquished);
    support::answer(fleet.clients.vms.delete_vm(delete()).await).unwrap();
    assert!(released_source(&fleet.a.fake), "{name}");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_died_at_both_ends_is_shown_as_lost_until_it_is_deleted() {
    let mut fleet = Fleet::start().await;
    let before = fleet.clients.vm(VM).await.unwrap();
    let name = fleet.precopy().await;
    let (a, b) = (&fleet.a.fake, &fleet.b.fake);
    b.phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    // Neither agent shows the VM: the one's journal says RELINQUISHED, the other's PREPARED.
    a.remove_vm(VM);
    b.remove_vm(VM);
    a.set(&name, Role::Source, |side| {
        side.phase = SidePhase::Relinquished.into();
        side.process_gone = true;
    });
    b.phase(&name, Role::Destination, SidePhase::Failed);
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(failed.vm_location(), VmLocation::Lost);

    let mut fleet = fleet.restart_server().await;
    fleet.report_again().await;
    let lost = fleet.clients.vm(VM).await.unwrap();
    assert_eq!((lost.state(), lost.epoch), (State::Lost, before.epoch + 1));
    assert!(
        lost.kept_by_server && !lost.stale && lost.spec == before.spec,
        "{lost:?}"
    );
    assert!(lost.state_message.contains(&name), "{}", lost.state_message);
    let listed = fleet.clients.list().await.vms;
    assert!(listed.iter().any(|vm| vm.uid == before.uid), "{listed:?}");
    let start = v1::StartVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    let refused = support::answer(fleet.clients.vms.start_vm(start).await).unwrap_err();
    assert_eq!(refused.reason, Reason::VmState);
    let watch = v1::WatchVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    let watched = fleet.clients.vms.watch_vm(watch).await.unwrap();
    let told = watched.into_inner().message().await.unwrap().unwrap();
    assert_eq!(told.state(), State::Lost);

    let delete = v1::DeleteVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    fleet.clients.vms.delete_vm(delete).await.unwrap();
    let mut fleet = fleet.restart_server().await;
    fleet.report_again().await;
    let gone = fleet.clients.vm(VM).await.unwrap_err();
    assert_eq!(gone.reason, Reason::NoSuchVm);
    fleet.stop().await;
}

fn released_source(fake: &Fake) -> bool {
    fake.calls()
        .iter()
        .any(|call| call.starts_with("release TRANSFER_ROLE_SOURCE"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_copy_is_kept_until_the_user_deletes_the_vm() {
    let mut fleet = Fleet::start().await;
    let (name, failed) = destination_dies_after_the_commit(&mut fleet).await;
    assert_eq!(failed.vm_location(), VmLocation::Unknown);
    assert_eq!(reason(&failed), "VM_PROCESS_DIED");
    let error = failed.error.as_ref().unwrap();
    assert!(error.advice.contains("slat delete vm"), "{error:?}");
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    assert!(!released_source(&fleet.a.fake));
    let shown = fleet.clients.vm(VM).await.unwrap();
    assert_eq!(
        (shown.host.as_str(), shown.state()),
        ("hosts/a", State::Relinquished)
    );
    let error = fleet.clients.migrate(VM, "hosts/b").await.unwrap_err();
    assert_eq!(error.reason, Reason::VmNotRunning);
    assert_eq!(error.metadata["migration"], name);

    // Neither does a new life of the server end it.
    let mut fleet = fleet.restart_server().await;
    fleet.report_again().await;
    assert_eq!(
        fleet.clients.vm(VM).await.unwrap().state(),
        State::Relinquished
    );
    assert!(!released_source(&fleet.a.fake));

    // A host that cannot release it says so; asked again, it is gone and its name is free.
    fleet.a.fake.keep_sides(true);
    let delete = || v1::DeleteVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    let refused = support::answer(fleet.clients.vms.delete_vm(delete()).await).unwrap_err();
    assert_eq!(refused.reason, Reason::HostUnreachable);
    assert!(fleet.a.fake.vm(VM).is_some());
    fleet.a.fake.keep_sides(false);
    fleet.clients.vms.delete_vm(delete()).await.unwrap();
    assert!(released_source(&fleet.a.fake));
    assert!(fleet.a.fake.vm(VM).is_none());
    let gone = fleet.clients.vm(VM).await.unwrap_err();
    assert_eq!(gone.reason, Reason::NoSuchVm);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_dies_as_the_owner_is_not_called_arrived() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let (a, b) = (&fleet.a.fake, &fleet.b.fake);
    b.phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    let mut vm = a.vm(VM).unwrap();
    vm.state = State::Relinquished.into();
    a.put_vm(vm.clone());
    a.phase(&name, Role::Source, SidePhase::Relinquished);
    vm.state = State::Lost.into();
    vm.epoch += 1;
    b.put_vm(vm.clone());
    b.set(&name, Role::Destination, |side| {
        side.phase = SidePhase::Completed.into();
        (side.vm_lost, side.process_gone) = (true, true);
    });
    let ended = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(ended.vm_location(), VmLocation::Lost);
    assert_eq!(reason(&ended), "VM_PROCESS_DIED");
    let error = ended.error.as_ref().unwrap();
    assert_eq!(error.metadata["frozen_copy"], "hosts/a");
    let order = format!("slat adopt vm --uid {} --host a --give-up", vm.uid);
    assert!(error.advice.contains(&order), "{}", error.advice);
    b.wait_call("release TRANSFER_ROLE_DESTINATION").await;
    assert!(!released_source(a));
    let shown = fleet.clients.vm(VM).await.unwrap();
    assert_eq!(
        (shown.host.as_str(), shown.state()),
        ("hosts/b", State::Lost)
    );

    // The copy is for a person to see and to end.
    a.put_leftover(v1::Leftover {
        host: "hosts/a".into(),
        uid: vm.uid.clone(),
        vm: VM.into(),
        migration: name.clone(),
        adoptable: true,
        ..Default::default()
    });
    let mut fleet = fleet.restart_server().await;
    fleet.report_again().await;
    assert!(!released_source(&fleet.a.fake));
    let request = v1::ListLeftoversRequest::default();
    let listed = fleet.clients.hosts.list_leftovers(request).await;
    let listed = listed.unwrap().into_inner().leftovers;
    assert!(listed.iter().any(|left| left.uid == vm.uid), "{listed:?}");
    let delete = v1::DeleteVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    fleet.clients.vms.delete_vm(delete).await.unwrap();
    assert!(released_source(&fleet.a.fake));
    assert!(fleet.b.fake.vm(VM).is_none());
    fleet.stop().await;
}

/// A migration that is to be verified after the commit, with both sides asked to begin.
async fn verified_later(fleet: &mut Fleet) -> String {
    let request = v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            vm: VM.into(),
            destination: "hosts/b".into(),
            params: Some(v1::MigrationParams {
                verify: v1::migration_params::Verify::AfterCommit.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let created = fleet.clients.migrations.create_migration(request).await;
    let name = created.unwrap().into_inner().name;
    fleet.a.fake.wait_call(&format!("start {name}")).await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_cannot_be_had_is_said_to_be_impossible_and_holds_nothing_up() {
    for (gone, longest, words) in [
        // Its process died: at once.
        (true, 4, "is gone"),
        // It stands still without having begun to compare: after its last word.
        (false, 9, "in time"),
    ] {
        let mut fleet = Fleet::start().await;
        let name = verified_later(&mut fleet).await;
        fleet.a.fake.set(&name, Role::Source, |side| {
            side.phase = SidePhase::Relinquished.into();
            side.process_gone = gone;
        });
        fleet.clients.wait_phase(&name, Phase::Committed).await;
        let begun = std::time::Instant::now();
        fleet
            .b
            .fake
            .phase(&name, Role::Destination, SidePhase::Completed);
        let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
        let took = begun.elapsed();
        assert!(took < std::time::Duration::from_secs(longest), "{took:?}");
        assert_eq!(done.vm_location(), VmLocation::Destination);
        let progress = done.progress.unwrap();
        assert_eq!(progress.verification(), v1::Verification::Impossible);
        let said = &progress.verification_message;
        assert!(said.contains(words), "{said}");
        fleet.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_is_waited_for_while_the_source_is_silent() {
    let mut fleet = Fleet::start().await;
    let name = verified_later(&mut fleet).await;
    fleet.a.fake.set(&name, Role::Source, |side| {
        side.phase = SidePhase::Relinquished.into();
        let progress = side.progress.get_or_insert_default();
        progress.verification = v1::Verification::Pending.into();
    });
    fleet
        .clients
        .wait(&name, |migration| {
            migration.phase() == Phase::Committed && migration.progress.is_some()
        })
        .await;
    let (source, address) = fleet.a.stop().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Completed);
    until("the source is seen to be silent", async || {
        let list = Clients::new(fleet.server.address())
            .vms
            .list_vms(v1::ListVmsRequest::default())
            .await;
        list.unwrap()
            .into_inner()
            .unreachable
            .contains(&"hosts/a".to_owned())
    })
    .await;
    assert_eq!(
        fleet.clients.migration(&name).await.phase(),
        Phase::Committed
    );
    // It was comparing all the while.
    source.set(&name, Role::Source, |side| {
        side.phase = SidePhase::Completed.into();
        side.progress.get_or_insert_default().verification = v1::Verification::Mismatch.into();
    });
    fleet.a = Agent::serve_at(source, address).await;
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(
        done.progress.unwrap().verification(),
        v1::Verification::Mismatch
    );
    fleet.stop().await;
}
