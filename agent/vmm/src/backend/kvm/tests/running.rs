//! memstress in the guest: what it writes, how it is paced and stopped.

use slat_proto::model::{MemstressFill, MemstressPattern};

use super::*;
use crate::guest::{Layout, memstress::run_batch};

#[test]
fn it_writes_at_full_speed_and_finds_no_error() {
    need_kvm!();
    for vcpus in [1, 2] {
        let vm = Vm::new(memstress(64 << 20, vcpus, MemstressSpec::default()));
        vm.backend.run().unwrap();
        vm.wait("3 passes", || vm.counters().passes >= 3);
        vm.backend.pause().unwrap();
        let stopped = vm.counters();
        assert_eq!(stopped.errors, 0);
        assert_eq!(
            stopped.pages,
            Layout::new(64 << 20).unwrap().working_pages()
        );
        assert!(stopped.pages_written >= 3 * stopped.pages);
        vm.backend.pause().unwrap();
        assert_eq!(vm.counters(), stopped, "a paused guest does nothing");
        vm.backend.run().unwrap();
        vm.wait("another pass", || vm.counters().passes > stopped.passes);
        vm.backend.run().unwrap();
        vm.backend.pause().unwrap();
        assert_eq!(vm.counters().errors, 0);
    }
}

#[test]
fn machine_code_and_portable_code_leave_the_same_memory() {
    need_kvm!();
    let hot = MemstressPattern::HotCold {
        hot_percent: 10,
        hot_visit_percent: 90,
    };
    for (pattern, write_percent, fill) in [
        (MemstressPattern::Sequential, 100, MemstressFill::Zero),
        (MemstressPattern::Sequential, 40, MemstressFill::Random),
        (MemstressPattern::Random, 100, MemstressFill::Random),
        (MemstressPattern::Random, 50, MemstressFill::Zero),
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
        let vm = Vm::new(memstress(16 << 20, 2, spec));
        let batches = 20;
        vm.limit_visits(batches * vm.word(0, offset::BATCH));
        let model = copy(&vm.memory.table());
        // A page that is damaged before: both must count it alike.
        let at = Layout::new(16 << 20).unwrap().working_page(100);
        for memory in [&vm.memory, &model] {
            let table = memory.table();
            (&*table).write_u64(at + 4080, 0xdead).unwrap();
        }
        vm.run_visits(batches * vm.word(0, offset::BATCH));
        for vcpu in 0..2 {
            for _ in 0..batches {
                run_batch(&mut &*model.table(), vcpu).unwrap();
            }
        }
        assert_eq!(
            vm.counters(),
            counters(&model.table(), 2).unwrap(),
            "{spec:?}"
        );
        assert!(same(&vm.memory.table(), &model.table()), "{spec:?}");
        let found = vm.counters().errors;
        assert_eq!(found > 0, fill == MemstressFill::Random, "{spec:?}");
    }
}

#[test]
fn memory_above_the_hole_is_worked_on() {
    need_kvm!();
    let bytes = (3 << 30) + (64 << 20);
    let layout = Layout::new(bytes).unwrap();
    let vm = Vm::new(memstress(bytes, 1, MemstressSpec::default()));
    // Start just below the hole; memory stays sparse.
    let last_low = (0..layout.working_pages())
        .rev()
        .find(|page| layout.working_page(*page) < 3 << 30)
        .unwrap();
    vm.set_word(0, offset::POSITION, last_low - 255);
    vm.run_visits(512);
    assert_eq!(vm.counters().errors, 0);
    for page in [last_low, last_low + 1, last_low + 256] {
        let stamp = (&*vm.memory.table()).read_u64(layout.working_page(page));
        assert_eq!(stamp, Ok(page));
    }
    assert_eq!(layout.working_page(last_low + 1), 4 << 30);
}

#[test]
fn an_idle_guest_writes_nothing_and_pauses_at_once() {
    need_kvm!();
    let idle = MemstressSpec {
        dirty_rate: Some(0),
        ..Default::default()
    };
    let vm = Vm::new(memstress(16 << 20, 2, idle));
    vm.backend.run().unwrap();
    vm.wait("the doorbell", || vm.backend.stats().exits != Some(0));
    vm.backend.pause().unwrap();
    vm.backend.run().unwrap();
    vm.backend.pause().unwrap();
    assert_eq!(vm.counters().pages_written, 0);
    // Told to work, it works, from where it waited.
    for vcpu in 0..2 {
        vm.set_word(vcpu, offset::RATE, u64::MAX);
    }
    vm.backend.run().unwrap();
    vm.wait("a pass", || vm.counters().passes > 0);
    vm.backend.pause().unwrap();
    assert_eq!(vm.counters().errors, 0);
}

#[test]
fn a_paced_guest_stays_under_its_ceiling_across_pauses() {
    need_kvm!();
    let rate = 20 << 20;
    let paced = MemstressSpec {
        dirty_rate: Some(rate),
        ..Default::default()
    };
    let vm = Vm::new(memstress(64 << 20, 2, paced));
    let start = Instant::now();
    for round in 1..5 {
        vm.backend.run().unwrap();
        vm.wait("some pages", || {
            vm.counters().pages_written * 4096 > rate / 10 * round
        });
        vm.backend.pause().unwrap();
    }
    let written = (vm.counters().pages_written * 4096) as f64;
    // One batch a vCPU and the credit of 100 ms may come on top.
    let allowed = rate as f64 * (start.elapsed().as_secs_f64() + 0.1) + 2.0 * 512.0 * 4096.0;
    assert!(written <= allowed, "{written} bytes, {allowed} allowed");
    assert_eq!(vm.counters().errors, 0);
}

#[test]
fn the_smallest_vm_with_the_most_vcpus_runs() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 64, MemstressSpec::default()));
    vm.run_visits(1024);
    let counters = vm.counters();
    assert_eq!(counters.errors, 0);
    assert_eq!(counters.pages_written, 64 * 1024);
}

#[test]
fn dropping_a_running_vm_ends_its_threads() {
    need_kvm!();
    let vm = Vm::new(memstress(16 << 20, 2, MemstressSpec::default()));
    vm.backend.run().unwrap();
    vm.wait("a pass", || vm.counters().passes > 0);
    let Vm {
        backend, events, ..
    } = vm;
    drop(backend);
    // The sink lives in the threads: the channel closes when the last of them is gone.
    assert_eq!(
        events.recv_timeout(LIMIT),
        Err(mpsc::RecvTimeoutError::Disconnected)
    );
}
