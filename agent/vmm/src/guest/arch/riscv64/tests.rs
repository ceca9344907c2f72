//! The encoder against an assembler's words, and the programs executed.

use slat_proto::model::{
    GuestSpec, MemoryBacking, MemstressFill, MemstressPattern, MemstressSpec, VmSpec,
    slots_for_memory,
};

use super::{
    encode::{
        Assembler,
        reg::{A0, A1, A2, A7, S0, S1, S2, S5, S6, S8, S9, S10, S11, SP, T0, T1, T3, T4, T5, ZERO},
    },
    hart::{Hart, Stop},
    *,
};
use crate::{
    guest::{
        Layout, install,
        memstress::{GuestAccess as _, control_page, counters, offset, run_batch},
    },
    memory::{GuestMemory, SlotMemory, SlotTable},
};

fn words(code: Assembler) -> Vec<u32> {
    let bytes = code.finish();
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|word| u32::from_le_bytes(*word)).collect()
}

#[test]
fn instructions_are_what_an_assembler_makes_of_them() {
    let mut code = Assembler::new();
    code.addi(T0, T1, -2048).addi(A0, A0, 2047).addiw(T3, T3, 1);
    code.slli(T5, S2, 25).srli(T0, T4, 32).ld(S6, S0, 32);
    code.lwu(T3, T1, 0).lbu(A0, T1, -1).sd(S2, S0, 264);
    code.sd(A0, SP, -8).sw(T3, T1, 0).add(T0, T0, S10);
    code.sub(T5, S11, S9).xor(S2, S2, T5).mul(T4, S2, S5);
    code.lui(T5, 0xfffff).auipc(A0, 1).csrr(A0, 0x142);
    code.csrr(A1, 0x141).csrr(A2, 0x143).ecall().ebreak();
    let [two, three, four] = [(); 3].map(|()| code.label());
    let one = code.here();
    code.beq(T4, T5, one).bne(A0, A1, two).bltu(S1, S11, one);
    code.bind(two).bgeu(T4, S8, one).j(one).j(two);
    code.beqz(A0, three).bnez(A1, one).bind(three).j(four);
    for _ in 0..1024 {
        code.addi(ZERO, ZERO, 0);
    }
    code.bind(four);
    let made = words(code);
    // By GNU as 2.40.
    let reference = [
        0x8003_0293,
        0x7ff5_0513,
        0x001e_0e1b,
        0x0199_1f13,
        0x020e_d293,
        0x0204_3b03,
        0x0003_6e03,
        0xfff3_4503,
        0x1124_3423,
        0xfea1_3c23,
        0x01c3_2023,
        0x01a2_82b3,
        0x419d_8f33,
        0x01e9_4933,
        0x0359_0eb3,
        0xffff_ff37,
        0x0000_1517,
        0x1420_2573,
        0x1410_25f3,
        0x1430_2673,
        0x0000_0073,
        0x0010_0073,
        0x01ee_8063,
        0x00b5_1463,
        0xffb4_ece3,
        0xff8e_fae3,
        0xff1f_f06f,
        0xff9f_f06f,
        0x0005_0463,
        0xfe05_92e3,
        0x0040_106f,
    ];
    for (at, (made, reference)) in made.iter().zip(reference).enumerate() {
        assert_eq!(*made, reference, "{at}: {made:#010x}, {reference:#010x}");
    }
    assert_eq!(made[reference.len()], 0x13, "nop");
}

/// Guest memory of one VM of memstress, with all that belongs to RISC-V in it.
fn vm(memory_bytes: u64, vcpus: u32, memstress: MemstressSpec) -> GuestMemory {
    let memory = memory(memory_bytes);
    let spec = VmSpec {
        memory_bytes,
        vcpus,
        backend: None,
        format: None,
        dirty_engine: None,
        backing: MemoryBacking::Auto,
        numa_node: None,
        prefault: false,
        paging: slat_proto::model::Paging::Kernel,
        guest: GuestSpec::Memstress(memstress),
        labels: slat_proto::model::Labels::default(),
    };
    install(&memory.table(), &spec).unwrap();
    assert!(memory.table().write(Layout::CODE, &super::memstress()));
    memory
}

fn memory(bytes: u64) -> GuestMemory {
    let memory = GuestMemory::new();
    let slots = slots_for_memory(bytes).unwrap().into_iter();
    memory.publish(
        slots
            .map(|spec| SlotMemory::new(spec).unwrap().into())
            .collect(),
    );
    memory
}

fn copy(from: &SlotTable) -> GuestMemory {
    let to = memory(from.pages() * 4096);
    let mut page = [0; 4096];
    for frame in 0..from.pages() {
        assert!(from.read(frame * 4096, &mut page) && to.table().write(frame * 4096, &page));
    }
    to
}

/// Runs batches of a vCPU from its start.
fn run(table: &SlotTable, vcpu: u32, batches: u64) {
    let mut hart = Hart::new(Layout::CODE);
    hart.x[10] = control_page(vcpu);
    for batch in 0..=batches {
        assert_eq!(hart.run(&mut &*table, 100_000), Stop::Call);
        assert_eq!((hart.x[17], hart.x[16]), (EXTENSION, DOORBELL));
        // Sent away once each time: it asks again.
        hart.x[10..12].copy_from_slice(&[0, 0x0101]);
        assert_eq!(hart.run(&mut &*table, 100), Stop::Call, "batch {batch}");
        hart.x[10..12].fill(0);
    }
}

#[test]
fn machine_code_and_portable_code_leave_the_same_memory() {
    let hot = MemstressPattern::HotCold {
        hot_percent: 10,
        hot_visit_percent: 90,
    };
    for (pattern, write_percent, fill) in [
        (MemstressPattern::Sequential, 100, MemstressFill::Zero),
        (MemstressPattern::Sequential, 40, MemstressFill::Random),
        (MemstressPattern::Random, 100, MemstressFill::Random),
        (hot, 100, MemstressFill::Zero),
        (hot, 70, MemstressFill::Random),
    ] {
        let spec = MemstressSpec {
            pattern,
            write_percent,
            fill,
            seed: 42,
            dirty_rate: None,
        };
        let memory = vm(8 << 20, 2, spec);
        let table = memory.table();
        // A page that is damaged before, and a count about to wrap: both must treat them alike.
        let layout = Layout::new(8 << 20).unwrap();
        (&*table)
            .write_u64(layout.working_page(100) + 4080, 0xdead)
            .unwrap();
        let pair = layout.expected() + 50 * 4;
        (&*table).write_u64(pair, u64::MAX >> 32).unwrap();
        let model = copy(&table);
        let batches = 10;
        for vcpu in 0..2 {
            run(&table, vcpu, batches);
            for _ in 0..batches {
                run_batch(&mut &*model.table(), vcpu).unwrap();
            }
        }
        let found = counters(&table, 2).unwrap();
        assert_eq!(Some(found), counters(&model.table(), 2), "{spec:?}");
        assert!(found.pages_written > 0, "{spec:?}");
        let (mut one, mut other) = ([0; 4096], [0; 4096]);
        for frame in 0..table.pages() {
            assert!(table.read(frame * 4096, &mut one));
            assert!(model.table().read(frame * 4096, &mut other));
            assert!(one == other, "frame {frame} of {spec:?}");
        }
    }
}

#[test]
fn addresses_above_the_low_limit_skip_the_hole() {
    let memory = vm(8 << 20, 1, MemstressSpec::default());
    let table = memory.table();
    // As if memory ended in the middle of the working pages, and went on elsewhere.
    let layout = Layout::new(8 << 20).unwrap();
    let limit = layout.working_page(3);
    let hole = 16 * 4096;
    for (at, value) in [
        (offset::LOW_LIMIT, limit),
        (offset::HOLE, hole),
        (offset::BATCH, 5),
    ] {
        (&*table).write_u64(control_page(0) + at, value).unwrap();
    }
    run(&table, 0, 1);
    for (page, at) in [
        (2, limit - 4096),
        (3, limit + hole),
        (4, limit + hole + 4096),
    ] {
        assert_eq!((&*table).read_u64(at), Ok(page));
        assert_eq!((&*table).read_u64(at + 4088), Ok(1));
    }
    assert_eq!((&*table).read_u64(limit), Ok(0));
}

#[test]
fn a_host_that_does_not_know_the_doorbell_ends_in_an_exception() {
    let memory = vm(8 << 20, 1, MemstressSpec::default());
    let mut hart = Hart::new(Layout::CODE);
    hart.x[10] = control_page(0);
    assert_eq!(hart.run(&mut &*memory.table(), 100), Stop::Call);
    hart.x[10..12].copy_from_slice(&[-2i64 as u64, 0]);
    assert_eq!(hart.run(&mut &*memory.table(), 100), Stop::Breakpoint);
}

#[test]
fn the_handler_reports_what_happened_and_stays() {
    let memory = memory(8 << 20);
    let table = memory.table();
    assert!(table.write(0x4000, &support(&[], 0x4000)));
    let mut hart = Hart::new(0x4000);
    hart.csr = |number| 0x1000 + u64::from(number);
    assert_eq!(hart.run(&mut &*table, 100), Stop::Call);
    assert_eq!((hart.x[17], hart.x[16]), (EXTENSION, EXCEPTION));
    assert_eq!(hart.x[10..13], [0x1142, 0x1141, 0x1143]);
    let after = hart.pc;
    let mut once = hart.clone();
    let stays = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        once.run(&mut &*table, 1000);
    }));
    assert!(stays.is_err());
    assert_eq!(once.pc, after);
}

#[test]
fn code_and_support_fit_their_places() {
    // See the layout in `crate::guest`.
    assert!((100..0x8000).contains(&super::memstress().len()));
    assert!(support(&[], 0).len() <= 4096);
}

mod constants {
    use proptest::prelude::*;

    use super::*;

    fn made(value: u64) -> u64 {
        let memory = memory(8 << 20);
        let mut code = Assembler::new();
        code.li(A7, value).ecall();
        assert!(memory.table().write(0x1000, &code.finish()));
        let mut hart = Hart::new(0x1000);
        assert_eq!(hart.run(&mut &*memory.table(), 100), Stop::Call);
        hart.x[17]
    }

    #[test]
    fn at_every_edge_are_made() {
        for shift in 0..64 {
            for near in -2i64..=2 {
                for sign in [1i64, -1] {
                    let value = (1i64 << shift).wrapping_mul(sign).wrapping_add(near) as u64;
                    assert_eq!(made(value), value, "{value:#x}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn of_any_value_are_made(value: u64, shift in 0u32..64) {
            prop_assert_eq!(made(value >> shift), value >> shift);
        }
    }
}
