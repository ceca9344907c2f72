//! Raw images: the two ports, and what becomes of everything else.

use super::*;

fn run(image: &[u8], vcpus: u32) -> (GuestEvent, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let console = dir.path().join("console");
    let spec = VmSpec {
        memory_bytes: 8 << 20,
        vcpus,
        backend: Some(BackendKind::Kvm),
        format: None,
        guest: GuestSpec::RawImage(image.to_vec().into()),
    };
    let memory = memory(spec.memory_bytes);
    guest::install(&memory.table(), &spec).unwrap();
    let vm = Vm::over(memory, spec, Some(&console));
    vm.backend.run().unwrap();
    let event = vm.events.recv_timeout(LIMIT).unwrap();
    vm.backend.pause().unwrap();
    assert!(matches!(vm.backend.run(), Err(BackendError::Vcpu { .. })));
    assert!(vm.events.try_recv().is_err(), "reported once");
    (event, std::fs::read(console).unwrap())
}

/// Prints `text` and goes on with `then`: lea rsi, [rip + text]; mov ecx, len; 1: lodsb; out 0xe9, al; loop 1b; then; text.
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
    let failed = |image: &[u8], says: &[&str]| {
        let (event, _) = run(image, 1);
        let GuestEvent::Failed(words) = event else {
            panic!("{event:?}");
        };
        for say in says {
            assert!(words.contains(say), "{words}");
        }
    };
    failed(&[0xe6, 0x80], &["write", "port 0x80", "rip 0x20000"]); // out 0x80, al
    failed(&[0xe4, 0x60], &["read", "port 0x60"]); // in al, 0x60
    failed(&[0x0f, 0x0b], &["triple fault"]); // ud2
    failed(&[0xf4], &["rip"]); // hlt is privileged
    // mov eax, [0xd0000000]: not mapped by the guest's own tables.
    failed(&[0x8b, 0x04, 0x25, 0, 0, 0, 0x80], &["rip"]);
}

#[test]
fn an_image_that_does_not_fit_is_refused() {
    let memory = memory(8 << 20);
    let spec = VmSpec {
        memory_bytes: 8 << 20,
        vcpus: 1,
        backend: None,
        format: None,
        guest: GuestSpec::RawImage(vec![0; 6 << 20].into()),
    };
    let error = guest::install(&memory.table(), &spec).unwrap_err();
    assert!(matches!(error, guest::GuestError::ImageTooLarge { .. }));
}
