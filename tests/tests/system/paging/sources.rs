//! A page source that fails while a guest needs it: the VM says what and where, and there is a way
//! on.

use std::{os::unix::fs::FileExt as _, path::PathBuf};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, paging_status::State};
use slat_tests::{
    Fleet,
    guest::{MIB, busy},
    scene,
    stalling::StallingFile,
};

use super::{sound, status};

/// A saved guest, and the path of its file.
pub(super) async fn saved(fleet: &Fleet) -> anyhow::Result<(v1::Save, PathBuf)> {
    let spec = busy(v1::Backend::Kvm, 256, 1, Some(64 * MIB));
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let save = fleet.save(&vm.name, "one").await?;
    super::delete(fleet, &vm.name).await?;
    let files = fleet.save_files("host-a");
    let file = files.iter().find(|file| file.contains("one"));
    let path = fleet.saves_dir("host-a").join(file.context("no file")?);
    Ok((save, path))
}

pub(super) async fn fails(fleet: &Fleet, vm: &str, reason: &str) -> anyhow::Result<()> {
    let failed = fleet
        .vm_until(&fleet.server(), vm, "its source failed", |vm| {
            let state = vm.paging.as_ref().map(v1::PagingStatus::state);
            state == Some(State::SourceFailed)
        })
        .await?;
    let paging = status(&failed)?;
    ensure!(paging.reason == reason, "{paging:#?}");
    ensure!(!paging.message.is_empty(), "{paging:#?}");
    Ok(())
}

async fn retry(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::RetryPageSourceRequest {
        name: vm.into(),
        ..Default::default()
    };
    let mut client = fleet.paging(&fleet.server());
    client.retry_page_source(request).await?;
    Ok(())
}

async fn loads(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let whole = fleet
        .vm_until(&fleet.server(), vm, "it is loaded", |vm| {
            vm.paging.is_none()
        })
        .await?;
    sound(&whole)?;
    sound(&fleet.runs_soundly_on(vm, "host-a").await?)
}

/// Bytes of the file that hold pages, by all odds.
pub(super) const SPOILED: std::ops::Range<u64> = 64 * MIB..192 * MIB;

#[test]
fn a_corrupt_file_stops_whoever_needs_it_until_it_is_mended() {
    scene::paged(async |fleet| {
        let (save, path) = saved(fleet).await?;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)?;
        let mut good = vec![0; (SPOILED.end - SPOILED.start) as usize];
        file.read_exact_at(&mut good, SPOILED.start)?;
        let bad: Vec<u8> = good.iter().map(|byte| !byte).collect();
        file.write_all_at(&bad, SPOILED.start)?;
        let copy = fleet.restore(&save.name, "copy", true).await?;
        fails(fleet, &copy.name, "PAGE_SOURCE_CORRUPT").await?;
        // Still so after a retry with nothing mended.
        retry(fleet, &copy.name).await?;
        fails(fleet, &copy.name, "PAGE_SOURCE_CORRUPT").await?;
        file.write_all_at(&good, SPOILED.start)?;
        retry(fleet, &copy.name).await?;
        loads(fleet, &copy.name).await
    });
}

#[test]
fn a_file_that_lost_its_end_says_so_and_the_vm_can_be_deleted() {
    scene::paged(async |fleet| {
        let (save, path) = saved(fleet).await?;
        let length = std::fs::metadata(&path)?.len();
        let copy = fleet.restore(&save.name, "copy", true).await?;
        let file = std::fs::File::options().write(true).open(&path)?;
        file.set_len(length / 8)?;
        // All of it may have come by then.
        let now = fleet
            .vm_until(&fleet.server(), &copy.name, "loaded or failed", |vm| {
                let state = vm.paging.as_ref().map(v1::PagingStatus::state);
                state.is_none() || state == Some(State::SourceFailed)
            })
            .await?;
        match &now.paging {
            None => println!("it was loaded before its file was cut"),
            Some(paging) => ensure!(paging.reason == "PAGE_SOURCE_TRUNCATED", "{paging:#?}"),
        }
        super::delete(fleet, &copy.name).await
    });
}

/// An open file outlives its name.
#[test]
fn a_file_that_is_deleted_below_its_reader_is_read_to_its_end() {
    scene::paged(async |fleet| {
        let (save, path) = saved(fleet).await?;
        let copy = fleet.restore(&save.name, "copy", true).await?;
        std::fs::remove_file(&path)?;
        loads(fleet, &copy.name).await
    });
}

/// Of one page, so that one read waits. A pager makes four at a time: if all wait, all else does.
const HELD: std::ops::Range<u64> = 128 * MIB..128 * MIB + 4096;

/// As a disk that does not answer: a read waits. What is elsewhere comes, the VM says why the rest
/// does not, and goes on or is deleted as asked.
#[test]
fn a_file_that_does_not_answer_holds_up_only_who_needs_it() {
    scene::paged(async |fleet| {
        let (save, path) = saved(fleet).await?;
        let stalling = match StallingFile::over(&path, HELD) {
            Ok(stalling) => stalling,
            Err(error) => {
                println!("SKIPPED: {error:#}");
                return Ok(());
            }
        };
        let copy = fleet.restore(&save.name, "copy", true).await?;
        fails(fleet, &copy.name, "PAGE_SOURCE_STALLED").await?;
        ensure!(stalling.waiting() > 0, "nobody reads what is held");
        let all_else = |vm: &v1::Vm| {
            let paging = vm.paging.as_ref();
            paging.is_some_and(|it| it.loaded_bytes >= it.source_bytes - 2 * MIB)
        };
        let server = fleet.server();
        fleet
            .vm_until(&server, &copy.name, "all else comes", all_else)
            .await?;
        stalling.let_go();
        retry(fleet, &copy.name).await?;
        loads(fleet, &copy.name).await?;
        stalling.hold();
        let next = fleet.restore(&save.name, "next", true).await?;
        fails(fleet, &next.name, "PAGE_SOURCE_STALLED").await?;
        super::delete(fleet, &next.name).await?;
        fleet.vm_dir_gone("host-a", &next.name).await
    });
}
