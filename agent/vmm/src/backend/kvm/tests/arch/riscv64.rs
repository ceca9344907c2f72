//! RISC-V: facts and registers in saved state, and raw images by the SBI.

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_RISCV_AIA};

use super::{
    super::{
        migrate::{random, signed},
        raw::{failed, run},
    },
    *,
};
use crate::{
    backend::{compare_facts, host_facts},
    guest::arch::riscv64::{
        Assembler,
        reg::{A0, A1, A2, A6, A7, S0, S1, SP, T0},
    },
};

const CONSOLE: u64 = 0x4442_434e;
const RESET: u64 = 0x5352_5354;

/// A VM of an image, which prints nowhere.
fn raw_vm(image: Vec<u8>, vcpus: u32) -> Vm {
    let spec = VmSpec {
        memory_bytes: 8 << 20,
        vcpus,
        backend: Some(BackendKind::Kvm),
        format: None,
        dirty_engine: None,
        backing: MemoryBacking::Auto,
        numa_node: None,
        prefault: false,
        paging: slat_proto::model::Paging::Kernel,
        guest: GuestSpec::RawImage(image.into()),
        labels: Default::default(),
    };
    let memory = memory(spec.memory_bytes);
    guest::install(&memory.table(), &spec).unwrap();
    Vm::over(memory, spec, None)
}

/// A call of the SBI.
fn call(code: &mut Assembler, extension: u64, function: u64) {
    code.li(A7, extension).li(A6, function).ecall();
}

/// Ends the guest: a system reset that is a shutdown.
fn end(code: &mut Assembler) {
    code.li(A0, 0).li(A1, 0);
    call(code, RESET, 0);
}

/// Prints `text`, which `finish` puts after the code.
fn printer(text: &[u8], then: impl FnOnce(&mut Assembler)) -> Vec<u8> {
    let mut code = Assembler::new();
    // The text stands 0x800 bytes after the first instruction.
    code.auipc(S0, 0).addi(S0, S0, 0x400).addi(S0, S0, 0x400);
    code.li(S1, text.len() as u64);
    let next = code.here();
    code.lbu(A0, S0, 0);
    call(&mut code, CONSOLE, 2);
    code.addi(S0, S0, 1).addi(S1, S1, -1).bnez(S1, next);
    then(&mut code);
    let mut image = code.finish();
    image.resize(0x800, 0);
    image.extend(text);
    image
}

#[test]
fn an_image_prints_and_ends() {
    need_kvm!();
    // A store first: there is a stack.
    let image = printer(b"hello, world\n", |code| {
        code.sd(A0, SP, -8);
        end(code);
    });
    assert_eq!(
        run(&image, 1),
        (GuestEvent::Stopped, b"hello, world\n".to_vec())
    );
}

#[test]
fn one_vcpu_that_ends_stops_the_others() {
    need_kvm!();
    let mut code = Assembler::new();
    let first = code.label();
    code.beqz(A0, first);
    let stay = code.here();
    code.j(stay).bind(first);
    end(&mut code);
    assert_eq!(run(&code.finish(), 2).0, GuestEvent::Stopped);
}

#[test]
fn what_an_image_may_not_do_fails_it_with_words() {
    need_kvm!();
    let image = |make: fn(&mut Assembler)| {
        let mut code = Assembler::new();
        make(&mut code);
        let stay = code.here();
        code.j(stay);
        code.finish()
    };
    let doorbell = image(|code| call(code, 0x0800_0000, 0));
    failed(&doorbell, &["function 0x0 of SBI extension 0x8000000"]);
    let write = image(|code| call(code, CONSOLE, 0));
    failed(&write, &["SBI extension 0x4442434e", "pc 0x2000"]);
    let breakpoint = image(|code| {
        code.ebreak();
    });
    failed(&breakpoint, &["exception 3, breakpoint", "at 0x200000"]);
    let load = image(|code| {
        code.li(A1, 0xd000_0000).ld(A2, A1, 0);
    });
    failed(&load, &["read of guest-physical 0xd0000000"]);
    let store = image(|code| {
        code.li(A1, 0xd000_0000).sd(A2, A1, 0);
    });
    failed(&store, &["write to guest-physical 0xd0000000"]);
    let fetch = image(|code| {
        code.li(A1, 0xd000_0000).jr(A1);
    });
    // KVM_RUN fails with the program counter there, or the guest has an access fault: so newer
    // kernels do it.
    failed(&fetch, &["0xd0000000"]);
}

/// Where a register's number stands in saved state.
fn place_of(body: &[u8], id: u64) -> usize {
    let place = body.windows(8).position(|word| word == id.to_le_bytes());
    place.unwrap()
}

/// Saved state with a word of it changed.
fn with_word(state: &[u8], id: u64, value: u64) -> Vec<u8> {
    let mut body = state[..state.len() - 4].to_vec();
    let at = place_of(&body, id) + 8;
    body[at..at + 8].copy_from_slice(&value.to_le_bytes());
    signed(body)
}

#[test]
fn a_register_that_must_be_equal_is_refused_by_its_name() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let state = vm.backend.save_state().unwrap();
    for (id, name) in [
        (0x8030_0000_0100_0006, "configuration satp_mode = 0x7"),
        (0x8030_0000_0400_0000, "timer frequency = 0x7"),
    ] {
        let error = vm
            .backend
            .load_state(&with_word(&state, id, 7))
            .unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    // Nothing was run meanwhile, so the true state still loads.
    vm.backend.load_state(&state).unwrap();
}

#[test]
fn a_host_that_lacks_an_extension_says_which() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let state = vm.backend.save_state().unwrap();
    // The SBI's list, in what the vCPU was told, begins with one that every host has.
    let mut body = state[..state.len() - 4].to_vec();
    let at = body
        .windows(9)
        .position(|text| text == b"riscv.sbi")
        .unwrap()
        + 11;
    body[at] = b'y';
    let error = vm.backend.load_state(&signed(body)).unwrap_err();
    assert!(error.to_string().contains("riscv.sbi.y"), "{error}");
}

#[test]
fn a_vm_says_what_it_was_told_and_not_what_its_host_could_tell() {
    need_kvm!();
    let host = host_facts(BackendKind::Kvm).unwrap();
    let vm = Vm::new(memstress(8 << 20, 2, random()));
    let told = vm.backend.cpu_facts();
    assert_eq!(compare_facts(&told, &host), []);
    println!("{told:?}");
    let state = vm.backend.save_state().unwrap();
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    target.backend.load_state(&state).unwrap();
    assert_eq!(target.backend.cpu_facts(), told);
}

/// Saved state of one vCPU without a register.
fn without(state: &[u8], id: u64) -> Vec<u8> {
    let mut body = state[..state.len() - 4].to_vec();
    let at = place_of(&body, id);
    body.drain(at..at + 16);
    let length = body.windows(4).position(|tag| tag == b"REGS").unwrap() + 4;
    resize(&mut body, length, -16);
    signed(body)
}

/// Saved state of one vCPU that was told of no such extension, which is not the first of the long
/// names.
fn not_told(state: &[u8], number: u64, name: &str) -> Vec<u8> {
    let state = with_word(state, 0x8030_0000_0700_0000 + number, 0);
    let mut body = state[..state.len() - 4].to_vec();
    let value = body
        .windows(9)
        .position(|text| text == b"riscv.isa")
        .unwrap()
        + 9;
    let name = format!("_{name}");
    let at = body
        .windows(name.len())
        .position(|text| text == name.as_bytes());
    let at = at.unwrap();
    body.drain(at..at + name.len());
    let size = u16::from_le_bytes([body[value], body[value + 1]]) - name.len() as u16;
    body[value..value + 2].copy_from_slice(&size.to_le_bytes());
    let length = body.windows(4).position(|tag| tag == b"TOLD").unwrap() + 4;
    resize(&mut body, length, -(name.len() as i32));
    signed(body)
}

fn resize(body: &mut [u8], at: usize, by: i32) {
    let size = i32::from_le_bytes(body[at..at + 4].try_into().unwrap()) + by;
    body[at..at + 4].copy_from_slice(&size.to_le_bytes());
}

#[test]
fn a_guest_of_a_lesser_host_stays_what_it_was() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let state = vm.backend.save_state().unwrap();
    // Zba cannot be hidden, Zicboz can, and takes its block's size with it.
    let lesser = not_told(&not_told(&state, 17, "zba"), 12, "zicboz");
    let lesser = without(&lesser, 0x8030_0000_0100_0005);
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    target.backend.load_state(&lesser).unwrap();
    let facts = target.backend.cpu_facts();
    assert!(
        !facts.iter().any(|fact| fact.value.contains("_zba")),
        "{facts:?}"
    );
    let again = target.backend.save_state().unwrap();
    assert_eq!(again.len(), lesser.len());
    // Time runs on (8 bytes), and with it the CRC (4).
    let differing = again.iter().zip(&lesser).filter(|(a, b)| a != b).count();
    assert!(differing <= 12, "{differing} bytes differ");
    target.run_visits(1024);
    assert_eq!(target.counters().errors, 0);
}

#[test]
fn floating_point_and_vector_registers_move() {
    need_kvm!();
    let facts = host_facts(BackendKind::Kvm).unwrap();
    let vectors = facts.iter().any(|fact| fact.name == "riscv.vlen_bits");
    let mut code = Assembler::new();
    code.li(T0, 1 << 13 | 1 << 9).li(A1, 0x1122_3344_5566_7788);
    // csrs sstatus, t0: FS and VS on; fmv.d.x ft3, a1.
    code.word(0x1002_a073).word(0xf205_81d3);
    if vectors {
        // vsetivli zero, 2, e64, m1, ta, ma; vmv.v.x v5, a1.
        code.word(0xcd81_7057).word(0x5e05_c2d7);
    } else {
        eprintln!("SKIPPED: vector registers: this host has none");
    }
    let stay = code.here();
    code.j(stay);
    let vm = raw_vm(code.finish(), 1);
    vm.backend.run().unwrap();
    thread::sleep(Duration::from_millis(200));
    vm.backend.pause().unwrap();
    let state = vm.backend.save_state().unwrap();
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    target.backend.load_state(&state).unwrap();
    let arrived = target.backend.save_state().unwrap();
    let value = 0x1122_3344_5566_7788_u64.to_le_bytes();
    for state in [&state, &arrived] {
        let double = place_of(state, 0x8030_0000_0600_0003) + 8;
        assert_eq!(state[double..double + 8], value);
        if vectors {
            // Of 128 bits.
            let vector = place_of(state, 0x8040_0000_0900_000b) + 8;
            assert_eq!(state[vector..vector + 16], [value, value].concat());
        }
    }
}

/// What the guest selected and the priorities that it gave to its interrupts are in the state, and
/// the guest finds them where it arrives. The kernel's interrupt controller is no part of a VM: ADR
/// 8, `docs/adr/0008-no-aia-device.md`.
#[test]
fn registers_of_aia_move() {
    need_kvm!();
    let facts = host_facts(BackendKind::Kvm).unwrap();
    let isa = facts.iter().find(|fact| fact.name == "riscv.isa").unwrap();
    if !isa.value.split('_').any(|name| name == "ssaia") {
        return println!("SKIPPED: this host has no Ssaia: {}", isa.value);
    }
    let (_, bare) = super::super::super::host::new_vm().unwrap();
    let mut controller = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
        ..Default::default()
    };
    let offered = bare.create_device(&mut controller).is_ok();
    println!("this kernel offers KVM_DEV_TYPE_RISCV_AIA, which is not used: {offered}");
    // The priorities of interrupts 0 to 7, a byte each: software has 0x11, the timer 0x22.
    const SELECTED: u64 = 0x30;
    const PRIORITIES: u64 = 0x2200_0000_1100;
    const FOUND: u64 = 0x20_0800;
    let mut code = Assembler::new();
    code.auipc(S0, 0).addi(S0, S0, 0x400).addi(S0, S0, 0x400);
    code.li(T0, SELECTED).li(A1, PRIORITIES);
    // csrw siselect, t0; csrw sireg, a1. From there on it only looks.
    code.word(0x1502_9073).word(0x1515_9073);
    let again = code.here();
    // csrr a2, siselect; csrr a2, sireg.
    code.word(0x1500_2673).sd(A2, S0, 0);
    code.word(0x1510_2673).sd(A2, S0, 8);
    code.j(again);
    let found = |vm: &Vm| [0, 8].map(|at| (&*vm.memory.table()).read_u64(FOUND + at).unwrap());
    let look = |vm: &Vm| {
        for at in [0, 8] {
            (&*vm.memory.table())
                .write_u64(FOUND + at, u64::MAX)
                .unwrap();
        }
        vm.backend.run().unwrap();
        vm.wait("the guest to look", || !found(vm).contains(&u64::MAX));
        vm.backend.pause().unwrap();
        let state = vm.backend.save_state().unwrap();
        let register = |place: u64| {
            let at = place_of(&state, 0x8030_0000_0301_0000 + place) + 8;
            u64::from_le_bytes(state[at..at + 8].try_into().unwrap())
        };
        println!("siselect {:#x}, iprio1 {:#x}", register(0), register(1));
        // iprio1 has a byte for each interrupt that an architecture defines: 1 is the second, 5
        // the fourth.
        assert_eq!([register(0), register(1)], [SELECTED, 0x2200_1100]);
        state
    };
    let vm = raw_vm(code.finish(), 1);
    let state = look(&vm);
    assert_eq!(found(&vm), [SELECTED, PRIORITIES]);
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    target.backend.load_state(&state).unwrap();
    look(&target);
    assert_eq!(found(&target), [SELECTED, PRIORITIES]);
}

#[test]
fn a_hart_that_the_guest_stopped_can_be_paused_and_stays_stopped() {
    need_kvm!();
    let mut code = Assembler::new();
    let first = code.label();
    code.beqz(A0, first);
    // HSM: stops the calling hart.
    call(&mut code, 0x0048_534d, 1);
    code.bind(first);
    let stay = code.here();
    code.j(stay);
    let vm = raw_vm(code.finish(), 2);
    vm.backend.run().unwrap();
    thread::sleep(Duration::from_millis(200));
    vm.backend.pause().unwrap();
    let stopped = |vm: &Vm| {
        let state = vm.backend.save_state().unwrap();
        let states: Vec<u8> = state
            .windows(9)
            .filter(|section| section.starts_with(b"MPST\x04\0\0\0"))
            .map(|section| section[8])
            .collect();
        assert_eq!(states, [0, 5]);
        state
    };
    let state = stopped(&vm);
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    target.backend.load_state(&state).unwrap();
    target.backend.run().unwrap();
    target.backend.pause().unwrap();
    stopped(&target);
}

#[test]
fn time_does_not_go_back() {
    need_kvm!();
    let time = |state: &[u8]| {
        let id = 0x8030_0000_0400_0001_u64.to_le_bytes();
        let times = state.windows(16).filter(|words| words[..8] == id);
        times
            .map(|words| u64::from_le_bytes(words[8..].try_into().unwrap()))
            .max()
            .unwrap()
    };
    let vm = Vm::new(memstress(8 << 20, 4, random()));
    let state = vm.backend.save_state().unwrap();
    let target = Vm::over(copy(&vm.memory.table()), vm.spec.clone(), None);
    thread::sleep(Duration::from_millis(50));
    target.backend.load_state(&state).unwrap();
    let arrived = target.backend.save_state().unwrap();
    assert!(time(&arrived) >= time(&state));
}
