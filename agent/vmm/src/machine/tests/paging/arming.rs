//! A snapshot that takes long to arm: what goes on meanwhile, and what it finds afterwards.

use slat_proto::model::{SlotChange, SlotSpec};

use super::*;

/// A running guest whose pager answers no Arm for now.
fn slow_to_arm() -> (Host, FakePager) {
    let host = Host::new();
    host.machine.create(spec(Paging::Agent)).unwrap();
    let pager = host.pager();
    host.machine.start().unwrap();
    host.runs_on(1000);
    pager.seen.holds_arms.store(true, Ordering::Relaxed);
    (host, pager)
}

/// Waits until it was told to arm more than `before` times.
fn arming(pager: &FakePager, before: u64) {
    until("the arming", || {
        pager.seen.arms.load(Ordering::Relaxed) > before
    });
}

fn go_on(pager: &FakePager) {
    pager.seen.holds_arms.store(false, Ordering::Relaxed);
}

#[test]
fn who_pauses_the_vm_does_not_wait_for_the_arming_and_is_seen_by_it() {
    need_paging!();
    let (host, pager) = slow_to_arm();
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| host.machine.take_snapshot("saves/s", false));
        arming(&pager, 0);
        host.machine.pause().unwrap();
        host.machine.resume().unwrap();
        host.runs_on(100);
        host.machine.pause().unwrap();
        assert!(!taking.is_finished());
        go_on(&pager);
        let taken = taking.join().unwrap().unwrap();
        assert!(!taken.left.run && taken.pause.is_zero(), "it was paused");
        assert!(!host.machine.runs());
        drop(agent::take(&host.socket(), taken.snapshot).unwrap());
    });
    host.machine.resume().unwrap();
    host.runs_on(1000);
    host.finish();
    pager.ended().unwrap();
}

#[test]
fn the_vms_end_ends_the_arming_and_its_pager_is_told_to_stop() {
    need_paging!();
    let (host, pager) = slow_to_arm();
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| host.machine.take_snapshot("saves/s", false));
        arming(&pager, 0);
        host.machine.delete().unwrap();
        let error = taking.join().unwrap().unwrap_err();
        let known = [Reason::VmState, Reason::NoSuchVm];
        assert!(known.contains(&error.reason), "{error:?}");
    });
    assert!(host.machine.snapshot().is_none(), "it is gone");
    pager.ended().unwrap();
}

#[test]
fn slots_that_change_during_the_arming_make_it_begin_anew() {
    need_paging!();
    let (host, pager) = slow_to_arm();
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| host.machine.take_snapshot("saves/s", false));
        arming(&pager, 0);
        let slot = SlotSpec::new(9, 0x10_0000, 64, false).unwrap();
        host.machine
            .update_slots(&[SlotChange::Create(slot)], 0)
            .unwrap();
        go_on(&pager);
        let taken = taking.join().unwrap().unwrap();
        assert!(taken.slots.iter().any(|slot| slot.slot == 9));
        assert_eq!(taken.generation, host.machine.memory().table().generation());
        let arms = pager.seen.arms.load(Ordering::Relaxed);
        assert_eq!((arms, pager.seen.ends.load(Ordering::Relaxed)), (4, 1));
        assert_eq!(host.paging().unwrap().snapshots, 1, "the first is gone");
        let layers = agent::take(&host.socket(), taken.snapshot).unwrap();
        host.runs_on(1000);
        drop(layers);
    });
    host.finish();
    pager.ended().unwrap();
}

/// Two at a time wait for each other, and each is what it should be.
#[test]
fn two_at_once_are_armed_one_after_the_other() {
    need_paging!();
    let (host, pager) = slow_to_arm();
    std::thread::scope(|scope| {
        let one = scope.spawn(|| host.machine.take_snapshot("saves/s", false));
        arming(&pager, 0);
        let two = scope.spawn(|| host.machine.take_snapshot("vms/copy", false));
        go_on(&pager);
        let (one, two) = (one.join().unwrap().unwrap(), two.join().unwrap().unwrap());
        assert_ne!(one.snapshot, two.snapshot);
        let layers = [one, two].map(|taken| agent::take(&host.socket(), taken.snapshot).unwrap());
        host.runs_on(1000);
        drop(layers);
    });
    host.finish();
}
