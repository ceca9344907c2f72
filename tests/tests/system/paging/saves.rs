//! A VM is saved, running and paused, and restored, at once and lazily.

use anyhow::ensure;
use slat_proto::{ApiError, Reason, v1};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, busy, usual},
    scene,
};

use super::{delete, digest, frozen_digest, sound};

/// A paused VM's save has its memory, to the byte; on either backend.
async fn paused_and_back(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let before = frozen_digest(fleet, &vm.name).await?;
    let save = fleet.save(&vm.name, "one").await?;
    ensure!(!save.vm_ran && save.pause_nanos == 0, "{save:#?}");
    ensure!(save.name == "hosts/host-a/saves/one" && save.vm_uid == vm.uid);
    let restored = v1::RestoreVmRequest {
        save: save.name.clone(),
        vm_id: "copy".into(),
        ..Default::default()
    };
    let mut client = fleet.snapshots(&fleet.server());
    let restored = client.restore_vm(restored).await?.into_inner();
    let copy = restored.vm.unwrap_or_default();
    ensure!(copy.state() == v1::vm::State::Paused, "{copy:#?}");
    ensure!(copy.uid != vm.uid && copy.epoch == 1, "{copy:#?}");
    ensure!(digest(fleet, &copy.name).await? == before);
    super::resume(fleet, &copy.name).await?;
    fleet.runs_soundly_on(&copy.name, "host-a").await?;
    // The parent is as it was.
    ensure!(digest(fleet, &vm.name).await? == before);
    Ok(())
}

mod kvm {
    use super::*;

    #[test]
    fn a_paused_vm_is_saved_and_restored() {
        scene::run(Layout::two(v1::Backend::Kvm), paused_and_back);
    }
}

mod software {
    use super::*;

    #[test]
    fn a_paused_vm_is_saved_and_restored() {
        scene::run(Layout::two(v1::Backend::Software), paused_and_back);
    }

    /// Its memory cannot be watched: it waits for the file, and says so.
    #[test]
    fn a_running_vm_waits_for_its_file_and_goes_on() {
        scene::run(Layout::two(v1::Backend::Software), async |fleet| {
            let vm = fleet
                .run_vm("web", "host-a", usual(fleet.backend()))
                .await?;
            let save = fleet.save(&vm.name, "one").await?;
            ensure!(save.vm_ran && !save.vm_paused.is_empty(), "{save:#?}");
            ensure!(save.pause_nanos > 1_000_000, "it waited: {save:#?}");
            fleet.runs_soundly_on(&vm.name, "host-a").await?;
            let copy = fleet.restore(&save.name, "copy", false).await?;
            fleet.runs_soundly_on(&copy.name, "host-a").await?;
            Ok(())
        });
    }
}

/// The file has one moment of a guest that writes on, which the guest itself can tell: it checks
/// each page that it reads.
#[test]
fn a_running_vm_is_saved_and_restored_lazily() {
    scene::paged(async |fleet| {
        let vm = fleet
            .run_vm("web", "host-a", busy(v1::Backend::Kvm, 128, 2, None))
            .await?;
        let save = fleet.save(&vm.name, "one").await?;
        ensure!(save.vm_ran && save.vm_paused.is_empty(), "{save:#?}");
        ensure!(save.pause_nanos > 0, "{save:#?}");
        let after = fleet.runs_soundly_on(&vm.name, "host-a").await?;
        ensure!(after.paging.is_none(), "still watched: {after:#?}");
        let copy = fleet.restore(&save.name, "copy", true).await?;
        sound(&fleet.runs_soundly_on(&copy.name, "host-a").await?)?;
        // All of it comes, and then the kernel pages it alone.
        let whole = fleet
            .vm_until(&fleet.server(), &copy.name, "it is loaded", |vm| {
                vm.paging.is_none()
            })
            .await?;
        sound(&whole)?;
        fleet.runs_soundly_on(&copy.name, "host-a").await?;
        // What was restored can be saved, and migrated.
        fleet.save(&copy.name, "two").await?;
        fleet
            .migrate_and_wait(&copy.name, "host-b", slat_tests::guest::patient())
            .await?;
        fleet.runs_soundly_on(&copy.name, "host-b").await?;
        Ok(())
    });
}

#[test]
fn a_save_on_another_has_what_differs() {
    scene::paged(async |fleet| {
        let spec = busy(v1::Backend::Kvm, 128, 1, Some(MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let first = fleet.save(&vm.name, "one").await?;
        let second = fleet.save_on(&vm.name, "two", &first.name).await?;
        ensure!(
            second.file_bytes * 2 < first.file_bytes,
            "{first:#?} {second:#?}"
        );
        let third = fleet.save_on(&vm.name, "three", &second.name).await?;
        let copy = fleet.restore(&third.name, "copy", true).await?;
        fleet.runs_soundly_on(&copy.name, "host-a").await?;
        // What others are built on stays.
        let request = v1::DeleteSaveRequest {
            name: first.name.clone(),
        };
        let refused = fleet.snapshots(&fleet.server()).delete_save(request).await;
        let refused = ApiError::from(refused.unwrap_err());
        ensure!(refused.reason == Reason::SaveInUse, "{refused:#?}");
        Ok(())
    });
}

#[test]
fn saves_are_listed_verified_and_deleted() {
    scene::run(Layout::two(scene::best_backend()), async |fleet| {
        let vm = fleet
            .run_vm("web", "host-a", usual(fleet.backend()))
            .await?;
        let save = fleet.save(&vm.name, "one").await?;
        let mut client = fleet.snapshots(&fleet.server());
        let again = fleet.begin_save(&vm.name, "one", "").await.unwrap_err();
        ensure!(again.to_string().contains("one"), "{again:#}");
        let list = client.list_saves(v1::ListSavesRequest::default()).await?;
        let names: Vec<String> = list
            .into_inner()
            .saves
            .into_iter()
            .map(|s| s.name)
            .collect();
        ensure!(names == [save.name.clone()], "{names:?}");
        let verify = v1::VerifySaveRequest {
            name: save.name.clone(),
        };
        let verified = client.verify_save(verify.clone()).await?.into_inner();
        ensure!(
            verified.file_bytes == save.file_bytes,
            "{verified:?} {save:#?}"
        );
        // One byte in the middle.
        let path = fleet
            .saves_dir("host-a")
            .join(&fleet.save_files("host-a")[0]);
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes)?;
        let corrupt = ApiError::from(client.verify_save(verify).await.unwrap_err());
        ensure!(corrupt.reason == Reason::SaveCorrupt, "{corrupt:#?}");
        client
            .delete_save(v1::DeleteSaveRequest { name: save.name })
            .await?;
        ensure!(fleet.save_files("host-a").is_empty());
        delete(fleet, &vm.name).await?;
        Ok(())
    });
}
