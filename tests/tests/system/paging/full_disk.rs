//! The disk for saves is full: the save fails by name and leaves no file, the guest goes on, and
//! what it wrote is in the next save that has room.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, save::State},
};
use slat_tests::{
    Fleet,
    disk::SmallDisk,
    guest::{MIB, busy},
    scene,
};

use super::{delete, digest, frozen_digest, resume, sound};

/// Its agent's state is on a disk of 64 MiB.
const HOST: &str = "small";

/// A save that has no room, refused at once or failed later: named so, and without a file.
async fn has_no_room(fleet: &Fleet, vm: &str, save: &str, base: &str) -> anyhow::Result<()> {
    match fleet.begin_save(vm, save, base).await {
        Ok(begun) => {
            let failed = fleet.save_ends(&begun.name).await?;
            ensure!(failed.state() == State::Failed, "{failed:#?}");
            ensure!(failed.reason == Reason::DiskFull.as_str(), "{failed:#?}");
            ensure!(!failed.state_message.is_empty(), "{failed:#?}");
        }
        Err(error) => {
            let error = ApiError::from(error.downcast::<tonic::Status>()?);
            ensure!(error.reason == Reason::DiskFull, "{error:#?}");
        }
    }
    let files = fleet.save_files(HOST);
    ensure!(!files.iter().any(|file| file.contains(save)), "{files:?}");
    sound(&fleet.runs_soundly_on(vm, HOST).await?)
}

#[test]
fn a_save_without_room_fails_by_name_and_nothing_is_lost() {
    scene::paged(async |fleet| {
        let disk = match SmallDisk::mount(&fleet.root().join(HOST)) {
            Ok(disk) => disk,
            Err(error) => {
                println!("SKIPPED: {error:#}");
                return Ok(());
            }
        };
        fleet.add_host(HOST, 512, &["--data-ports", "0"]).await?;
        let spec = busy(v1::Backend::Kvm, 40, 1, Some(MIB));
        let vm = fleet.run_vm("web", HOST, spec).await?.name;
        let first = fleet.save(&vm, "first").await?;
        // It does not fit beside the first.
        has_no_room(fleet, &vm, "whole", "").await?;
        // Nothing fits: what was written since the first save was asked for and not kept.
        disk.fill()?;
        has_no_room(fleet, &vm, "differs", &first.name).await?;
        disk.free()?;
        let before = frozen_digest(fleet, &vm).await?;
        let next = fleet.save_on(&vm, "next", &first.name).await?;
        ensure!(next.file_bytes < first.file_bytes, "{next:#?}");
        let request = v1::RestoreVmRequest {
            save: next.name,
            vm_id: "copy".into(),
            ..Default::default()
        };
        let mut client = fleet.snapshots(&fleet.server());
        let copy = client.restore_vm(request).await?.into_inner().vm;
        let copy = copy.context("an answer without a VM")?.name;
        ensure!(digest(fleet, &copy).await? == before, "a page is missing");
        for name in [&vm, &copy] {
            resume(fleet, name).await?;
            sound(&fleet.runs_soundly_on(name, HOST).await?)?;
        }
        for name in [&vm, &copy] {
            delete(fleet, name).await?;
            fleet.vm_dir_gone(HOST, name).await?;
        }
        Ok(())
    });
}
