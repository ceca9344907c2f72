//! A VM is copied on its host while it writes on.

use anyhow::ensure;
use slat_proto::v1;
use slat_tests::{
    Layout,
    guest::{MIB, busy},
    scene,
};

use super::{delete, sound};

#[test]
fn parent_and_child_write_on_and_find_no_error() {
    scene::paged(async |fleet| {
        let vm = fleet
            .run_vm("web", "host-a", busy(v1::Backend::Kvm, 64, 2, None))
            .await?;
        let fork = fleet.fork(&vm.name, &["child"]).await?;
        let child = &fork.vms[0];
        ensure!(fork.pause_nanos > 0 && child.uid != vm.uid, "{fork:#?}");
        ensure!(child.epoch == 1 && child.host == vm.host, "{child:#?}");
        for name in [&vm.name, &child.name] {
            sound(&fleet.runs_soundly_on(name, "host-a").await?)?;
        }
        // Neither needs the other.
        delete(fleet, &vm.name).await?;
        sound(&fleet.runs_soundly_on(&child.name, "host-a").await?)
    });
}

/// A child's child, whose pages lie in three VMs.
#[test]
fn chains_of_forks_read_through() {
    scene::paged(async |fleet| {
        let spec = busy(v1::Backend::Kvm, 64, 1, Some(16 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        fleet.fork(&vm.name, &["child"]).await?;
        fleet.fork("vms/child", &["grandchild"]).await?;
        fleet.fork("vms/grandchild", &["last"]).await?;
        for name in ["vms/web", "vms/child", "vms/grandchild", "vms/last"] {
            sound(&fleet.runs_soundly_on(name, "host-a").await?)?;
        }
        delete(fleet, "vms/child").await?;
        for name in ["vms/web", "vms/grandchild", "vms/last"] {
            sound(&fleet.runs_soundly_on(name, "host-a").await?)?;
        }
        Ok(())
    });
}

#[test]
fn ten_children_at_once() {
    if let Some(why) = scene::paging_missing() {
        println!("SKIPPED: {why}");
        return;
    }
    let layout = Layout {
        hosts: vec![("host-a", 2048)],
        ..Layout::two(v1::Backend::Kvm)
    };
    scene::run(layout, async |fleet| {
        let spec = busy(v1::Backend::Kvm, 64, 1, Some(16 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let names: Vec<String> = (0..10).map(|n| format!("child-{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let fork = fleet.fork(&vm.name, &names).await?;
        ensure!(fork.vms.len() == 10, "{fork:#?}");
        for name in fork.vms.iter().map(|child| &child.name).chain([&vm.name]) {
            sound(&fleet.runs_soundly_on(name, "host-a").await?)?;
        }
        Ok(())
    });
}

/// What cannot be forked says so, and stays as it is.
#[test]
fn a_vm_that_cannot_be_watched_is_not_forked() {
    scene::run(Layout::two(v1::Backend::Software), async |fleet| {
        let spec = slat_tests::guest::usual(fleet.backend());
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let refused = fleet.fork(&vm.name, &["child"]).await.unwrap_err();
        let refused = refused.downcast::<tonic::Status>()?;
        let refused = slat_proto::ApiError::from(refused);
        ensure!(
            refused.reason == slat_proto::Reason::CapabilityMissing,
            "{refused:#?}"
        );
        fleet.runs_soundly_on(&vm.name, "host-a").await?;
        Ok(())
    });
}
