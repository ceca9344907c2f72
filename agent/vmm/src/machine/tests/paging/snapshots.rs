//! Snapshots of running guests.

use slat_proto::{
    model::{CursorName, DirtyEngine},
    v1::paging_status::State as PagingState,
};

use super::*;

fn running(paging: Paging) -> Host {
    let host = Host::new();
    host.machine.create(spec(paging)).unwrap();
    host
}

/// Digests of the pages of slot 0, as the snapshot has them.
fn taken_pages(taken: &agent::Taken, pages: u64) -> Vec<u128> {
    let source = taken.source();
    let digest = |page| crate::memory::digest_page(page, &source.page(Some(0), page));
    (0..pages).map(digest).collect()
}

/// Digests of the pages of slot 0 now.
fn pages_now(host: &Host) -> Vec<u128> {
    let table = host.machine.memory().table();
    let slot = table.slot(0).unwrap();
    let mut page = [0; 4096];
    let digest = |at| {
        slot.read_page(at, &mut page);
        crate::memory::digest_page(at, &page)
    };
    (0..slot.spec().pages).map(digest).collect()
}

#[test]
fn a_running_guest_of_the_kernels_is_kept_as_it_was_and_is_the_kernels_again() {
    need_paging!();
    let host = running(Paging::Kernel);
    host.machine.start().unwrap();
    host.runs_on(5000);
    assert!(host.paging().is_none());
    let pager = host.pager();
    let taken = host.machine.take_snapshot("saves/s", false).unwrap();
    println!("pause of 16 MiB, 2 vCPUs: {:?}", taken.pause);
    assert!(taken.left.run && taken.paused.is_none() && !taken.pause.is_zero());
    assert!(host.machine.runs());
    assert!(pager.seen.mapped_before.load(Ordering::Relaxed));
    let shown = host.paging().unwrap();
    assert_eq!(shown.because, ["saved"]);
    assert_eq!((shown.state(), shown.snapshots), (PagingState::Serving, 1));
    let layers = agent::take(&host.socket(), taken.snapshot).unwrap();
    assert!(agent::take(&host.socket(), taken.snapshot).is_err(), "once");
    let pages = host.machine.memory().table().slot(0).unwrap().spec().pages;
    let first = taken_pages(&layers, pages);
    host.runs_on(5000);
    assert!(pager.seen.kept.load(Ordering::Relaxed) > 100);
    assert!(taken_pages(&layers, pages) == first, "it does not change");
    drop(layers);
    until("the kernel to have it again", || host.paging().is_none());
    pager.ended().unwrap();
    host.machine.make_huge_pages();
    host.runs_on(5000);
    // And once more, from the beginning.
    let _pager = host.pager();
    let taken = host.machine.take_snapshot("saves/s", false).unwrap();
    drop(agent::take(&host.socket(), taken.snapshot).unwrap());
    until("the kernel to have it again", || host.paging().is_none());
    host.runs_on(1000);
    host.finish();
}

#[test]
fn what_a_paused_guest_had_is_what_the_snapshot_has_whoever_keeps_it() {
    need_paging!();
    for paging in [Paging::Kernel, Paging::Agent] {
        let host = running(paging);
        let mut pager = host.pager();
        host.machine.start().unwrap();
        host.runs_on(5000);
        host.machine.pause().unwrap();
        let before = pages_now(&host);
        let one = host.machine.take_snapshot("saves/s", false).unwrap();
        assert!(one.pause.is_zero() && !one.left.run);
        let one = agent::take(&host.socket(), one.snapshot).unwrap();
        host.machine.resume().unwrap();
        host.runs_on(2000);
        // A pager dies in the middle of it, and a second snapshot begins.
        drop(pager);
        pager = host.pager();
        host.runs_on(2000);
        let two = host.machine.take_snapshot("vms/copy", false).unwrap();
        let two = agent::take(&host.socket(), two.snapshot).unwrap();
        assert_eq!(host.paging().unwrap().snapshots, 2);
        host.runs_on(2000);
        let pages = before.len() as u64;
        assert!(taken_pages(&one, pages) == before, "{paging}");
        assert!(taken_pages(&two, pages) != before, "{paging}");
        drop(one);
        until("the first to end", || host.paging().unwrap().snapshots == 1);
        host.runs_on(1000);
        drop(two);
        until("the second to end", || {
            host.paging().is_none_or(|paging| paging.snapshots == 0)
        });
        host.runs_on(1000);
        drop(pager);
        if paging == Paging::Agent {
            let _pager = host.pager();
            host.runs_on(100);
            host.finish();
        } else {
            host.finish();
        }
    }
}

#[test]
fn dirty_pages_are_told_across_a_snapshot() {
    need_paging!();
    for engine in [DirtyEngine::Bitmap, DirtyEngine::Ring] {
        let host = Host::new();
        let spec = VmSpec {
            dirty_engine: Some(engine),
            ..spec(Paging::Kernel)
        };
        if let Err(error) = host.machine.create(spec) {
            eprintln!("SKIPPED: {error}");
            continue;
        }
        let _pager = host.pager();
        host.machine.start().unwrap();
        host.runs_on(3000);
        host.machine.pause().unwrap();
        let before = pages_now(&host);
        let cursor = CursorName::parse("c").unwrap();
        host.machine.dirty().attach(&cursor).unwrap();
        host.machine.resume().unwrap();
        host.runs_on(300);
        let taken = host.machine.take_snapshot("saves/s", false).unwrap();
        let layers = agent::take(&host.socket(), taken.snapshot).unwrap();
        host.runs_on(300);
        drop(layers);
        until("the kernel to have it again", || host.paging().is_none());
        host.runs_on(300);
        host.machine.pause().unwrap();
        let batch = host.machine.dirty().harvest(&cursor).unwrap();
        let of = batch.slots.iter().find(|(slot, _)| *slot == 0);
        let written = &of.unwrap().1;
        for (page, (before, after)) in before.iter().zip(&pages_now(&host)).enumerate() {
            let page = page as u64;
            let dirty = written
                .runs()
                .any(|(first, len)| first <= page && page < first + len);
            assert!(before == after || dirty, "page {page} of {engine:?}");
        }
        host.finish();
    }
}

#[test]
fn a_pager_that_does_not_answer_in_the_pause_costs_two_seconds_and_nothing_else() {
    need_paging!();
    let host = running(Paging::Agent);
    let pager = host.pager();
    host.machine.start().unwrap();
    host.runs_on(1000);
    pager.seen.mute.store(true, Ordering::Relaxed);
    let error = host.machine.take_snapshot("saves/s", false).unwrap_err();
    assert_eq!(error.reason, Reason::PagerUnreachable);
    assert!(host.machine.runs());
    drop(pager);
    let _pager = host.pager();
    host.runs_on(1000);
    assert_eq!(host.paging().unwrap().snapshots, 0);
    let mut leases = Vec::new();
    for _ in 0..8 {
        let taken = host.machine.take_snapshot("saves/s", false).unwrap();
        leases.push(agent::take(&host.socket(), taken.snapshot).unwrap());
    }
    let error = host.machine.take_snapshot("saves/s", false).unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
    drop(leases);
    host.runs_on(1000);
    host.finish();
}

/// How long the vCPUs stand still, with memory that is all there and a guest that writes as fast
/// as it can.
#[test]
#[ignore = "takes 4 GiB"]
fn the_pause_of_four_gibibytes() {
    need_paging!();
    for (bytes, paging) in [
        (64 << 20, Paging::Kernel),
        (4 << 30, Paging::Kernel),
        (4 << 30, Paging::Agent),
    ] {
        let host = Host::new();
        let spec = VmSpec {
            memory_bytes: bytes,
            prefault: true,
            ..spec(paging)
        };
        host.machine.create(spec).unwrap();
        let _pager = host.pager();
        until("memory to be there", || {
            let vm = host.machine.snapshot().unwrap();
            vm.prefault.unwrap().done
        });
        host.machine.start().unwrap();
        host.runs_on(bytes / 4096 / 8);
        for _ in 0..3 {
            until("a pager", || {
                host.machine.pager.is_connected() || {
                    drop(host.pager());
                    false
                }
            });
            let begun = Instant::now();
            let taken = host.machine.take_snapshot("saves/s", false).unwrap();
            println!(
                "{} MiB, {paging}: pause {:?} of {:?} in all",
                bytes >> 20,
                taken.pause,
                begun.elapsed()
            );
            drop(agent::take(&host.socket(), taken.snapshot).unwrap());
            if paging == Paging::Kernel {
                until("the end of it", || host.paging().is_none());
                break;
            }
            until("the end of it", || host.paging().unwrap().snapshots == 0);
            host.runs_on(1000);
        }
        host.finish();
    }
}
