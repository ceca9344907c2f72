//! x86-64: CPUID in saved state, and raw images by ports.

use super::{
    super::{
        migrate::{random, signed},
        raw::{failed, run},
    },
    *,
};
use crate::backend::compare_facts;

/// Saved state whose leaf 1 of CPUID is changed: `change` gets its ecx and edx.
fn with_other_features(state: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    // The first CPUID entry begins after the container's header and the section's.
    let mut body = state[..state.len() - 4].to_vec();
    let entries = 20 + 8;
    let leaf_1 = (0..64)
        .map(|entry| entries + entry * 40)
        .find(|at| body[*at..at + 4] == 1u32.to_le_bytes())
        .unwrap();
    change(&mut body[leaf_1 + 20..leaf_1 + 28]);
    signed(body)
}

#[test]
fn a_host_that_lacks_a_feature_says_which() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let state = vm.backend.save_state().unwrap();
    let state = with_other_features(&state, |words| words[4..].fill(0xff));
    let error = vm.backend.load_state(&state).unwrap_err();
    assert!(error.to_string().contains("x86.cpuid.1.0.edx"), "{error}");
}

#[test]
fn a_vm_says_what_it_was_told_and_not_what_its_host_could_tell() {
    need_kvm!();
    let host = crate::backend::host_facts(BackendKind::Kvm).unwrap();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    assert_eq!(compare_facts(&vm.backend.cpu_facts(), &host), []);
    // Of a host that lacks the lowest feature of ecx.
    let state = vm.backend.save_state().unwrap();
    let state = with_other_features(&state, |words| {
        let ecx = u32::from_le_bytes(words[..4].try_into().unwrap());
        assert_ne!(ecx, 0);
        words[..4].copy_from_slice(&(ecx & (ecx - 1)).to_le_bytes());
    });
    let arrived = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    arrived.backend.load_state(&state).unwrap();
    let lesser = arrived.backend.cpu_facts();
    assert_eq!(compare_facts(&lesser, &host), []);
    let differences = compare_facts(&host, &lesser);
    assert_eq!(differences.len(), 1, "{differences:?}");
    assert_eq!(differences[0].name, "x86.cpuid.1.0.ecx");
}

/// Prints `text` and goes on with `then`: lea rsi, [rip + text]; mov ecx, len; 1: lodsb; out 0xe9,
/// al; loop 1b; then; text.
fn printer(text: &[u8], then: &[u8]) -> Vec<u8> {
    let mut code = vec![0x48, 0x8d, 0x35];
    code.extend((5 + 5 + then.len() as u32).to_le_bytes());
    code.push(0xb9);
    code.extend((text.len() as u32).to_le_bytes());
    code.extend([0xac, 0xe6, 0xe9, 0xe2, 0xfb]);
    code.extend(then);
    code.extend(text);
    code
}

const END: [u8; 2] = [0xe6, 0xf4];

#[test]
fn an_image_prints_and_ends() {
    need_kvm!();
    // push/pop first: there is a stack.
    let mut image = vec![0x50, 0x58];
    image.extend(printer(b"hello, world\n", &END));
    assert_eq!(
        run(&image, 1),
        (GuestEvent::Stopped, b"hello, world\n".to_vec())
    );
}

#[test]
fn one_vcpu_that_ends_stops_the_others() {
    need_kvm!();
    // test edi, edi; jz +2; jmp $; then the end for vCPU 0.
    let image = [[0x85, 0xff, 0x74, 0x02, 0xeb, 0xfe].as_slice(), &END].concat();
    assert_eq!(run(&image, 2).0, GuestEvent::Stopped);
}

#[test]
fn what_an_image_may_not_do_fails_it_with_words() {
    need_kvm!();
    failed(&[0xe6, 0x80], &["write", "port 0x80", "rip 0x20000"]); // out 0x80, al
    failed(&[0xe4, 0x60], &["read", "port 0x60"]); // in al, 0x60
    failed(&[0x0f, 0x0b], &["triple fault"]); // ud2
    failed(&[0xf4], &["rip"]); // hlt is privileged
    // mov eax, [0xd0000000]: not mapped by the guest's own tables.
    failed(&[0x8b, 0x04, 0x25, 0, 0, 0, 0x80], &["rip"]);
}
