//! vCPU state: saved, carried to another VM over copied memory, loaded.

use slat_proto::model::{MemstressFill, MemstressPattern};

use super::*;
use crate::guest::Layout;

pub(super) fn random() -> MemstressSpec {
    MemstressSpec {
        pattern: MemstressPattern::Random,
        fill: MemstressFill::Random,
        ..Default::default()
    }
}

/// Runs until more pages are written, and pauses wherever the guest is.
fn run_some(vm: &Vm) {
    let before = vm.counters().pages_written;
    vm.backend.run().unwrap();
    vm.wait("pages", || vm.counters().pages_written > before + 5000);
    vm.backend.pause().unwrap();
}

fn moved(vm: &Vm) -> Vm {
    let state = vm.backend.save_state().unwrap();
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    target.backend.load_state(&state).unwrap();
    target
}

#[test]
fn a_guest_goes_on_where_it_was_stopped() {
    need_kvm!();
    let mut vm = Vm::new(memstress(16 << 20, 2, random()));
    for _ in 0..8 {
        run_some(&vm);
        let target = moved(&vm);
        let before = vm.counters();
        assert_eq!(target.counters(), before);
        vm = target;
        run_some(&vm);
        assert!(vm.counters().pages_written > before.pages_written);
        assert_eq!(vm.counters().errors, 0);
    }
}

#[test]
fn state_that_is_loaded_and_saved_again_is_the_same_but_for_time() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    run_some(&vm);
    let state = vm.backend.save_state().unwrap();
    let again = moved(&vm).backend.save_state().unwrap();
    assert_eq!(state.len(), again.len());
    // The time-stamp counter runs on (8 bytes), and with it the CRC (4).
    let differing = state.iter().zip(&again).filter(|(a, b)| a != b).count();
    assert!(differing <= 24, "{differing} bytes differ");
}

#[test]
fn one_page_left_behind_is_found_by_the_guest() {
    need_kvm!();
    let vm = Vm::new(memstress(16 << 20, 2, random()));
    run_some(&vm);
    let old = copy(&vm.memory.table());
    let page = 1234;
    let at = Layout::new(16 << 20).unwrap().working_page(page);
    let stamp = |memory: &GuestMemory| (&*memory.table()).read_u64(at + 8).unwrap();
    while stamp(&vm.memory) == stamp(&old) {
        run_some(&vm);
    }
    let target = moved(&vm);
    let mut bytes = [0; 4096];
    assert!(old.table().read(at, &mut bytes));
    assert!(target.memory.table().write(at, &bytes));
    target.backend.run().unwrap();
    target.wait("the error", || target.counters().errors > 0);
    target.backend.pause().unwrap();
    assert_eq!(target.counters().first_error_page, page);
    assert_eq!(vm.counters().errors, 0);
}

#[test]
fn an_idle_guest_stays_idle_after_it_moved() {
    need_kvm!();
    let idle = MemstressSpec {
        dirty_rate: Some(0),
        ..random()
    };
    let vm = Vm::new(memstress(8 << 20, 1, idle));
    vm.backend.run().unwrap();
    vm.wait("the doorbell", || vm.backend.stats().exits != Some(0));
    vm.backend.pause().unwrap();
    let target = moved(&vm);
    target.backend.run().unwrap();
    target.wait("the doorbell", || target.backend.stats().exits != Some(0));
    target.backend.pause().unwrap();
    assert!(same(&vm.memory.table(), &target.memory.table()));
}

#[test]
fn calls_out_of_turn_are_refused() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let state = vm.backend.save_state().unwrap();
    vm.backend.run().unwrap();
    assert!(matches!(
        vm.backend.save_state(),
        Err(BackendError::Vcpu { .. })
    ));
    vm.backend.pause().unwrap();
    assert!(matches!(
        vm.backend.load_state(&state),
        Err(BackendError::Vcpu { .. })
    ));
    let two = Vm::new(memstress(8 << 20, 2, random()));
    assert!(matches!(
        two.backend.load_state(&state),
        Err(BackendError::State { .. })
    ));
}

/// Sets the CRC right, as a liar would.
pub(super) fn signed(mut body: Vec<u8>) -> Vec<u8> {
    let crc = crc32fast::hash(&body);
    body.extend(crc.to_le_bytes());
    body
}

#[test]
fn damaged_state_is_refused_or_loads() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    run_some(&vm);
    let state = vm.backend.save_state().unwrap();
    let body = &state[..state.len() - 4];
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    let refused = |state: &[u8]| match target.backend.load_state(state) {
        Err(error) if error.refuses_state() => true,
        Ok(()) => false,
        Err(other) => panic!("{other:?}"),
    };
    for cut in 0..state.len() {
        assert!(refused(&state[..cut]), "cut at {cut}");
    }
    for cut in 0..body.len() {
        assert!(refused(&signed(body[..cut].to_vec())), "body cut at {cut}");
    }
    // The last register is refused when all others are set: such a VM must not run.
    let mut bad_mp_state = body.to_vec();
    let last = bad_mp_state.len() - 1;
    bad_mp_state[last] = 0xff;
    assert!(refused(&signed(bad_mp_state)));
    assert!(matches!(
        target.backend.run(),
        Err(BackendError::Vcpu { .. })
    ));
    let mut loaded = 0;
    // Every byte of the headers and of most of what the vCPU was told, then every third.
    for at in (0..body.len()).filter(|at| *at < 512 || at % 3 == 0) {
        let mut damaged = state.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(refused(&damaged), "byte {at}: the CRC must find it");
        damaged.truncate(body.len());
        loaded += usize::from(!refused(&signed(damaged)));
    }
    assert!(loaded > 0 && loaded < body.len(), "{loaded} loaded");
    // After all that the true state still loads and runs.
    target.backend.load_state(&state).unwrap();
    run_some(&target);
    assert_eq!(target.counters().errors, 0);
}

/// As above, with damage of every kind, and the checksum right again: what a hostile source could
/// send. Few rounds, for each sets a vCPU's registers.
#[test]
fn hostile_state_is_refused_or_loads() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 2, random()));
    run_some(&vm);
    let state = vm.backend.save_state().unwrap();
    let body = state[..state.len() - 4].to_vec();
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    crate::fuzz::damaged(
        "saved state of two vCPUs",
        100,
        &[body],
        |body| match target.backend.load_state(&signed(std::mem::take(body))) {
            Ok(()) => true,
            Err(error) if error.refuses_state() => false,
            Err(other) => panic!("{other:?}"),
        },
    );
    target.backend.load_state(&state).unwrap();
    run_some(&target);
    assert_eq!(target.counters().errors, 0);
}
