//! What is counted of faults, beside what the guest touched.

use slat_proto::model::MemstressPattern;

use super::{
    super::{count_faults, tracepoint::Tracepoint},
    *,
};

/// Of x86-64 a write to a port (2), of RISC-V a call of the SBI (35).
const DOORBELLS: Tracepoint = Tracepoint {
    system: "kvm",
    name: "kvm_userspace_exit",
    filter: "reason == 2 || reason == 35",
};

fn sequential(bytes: u64, vcpus: u32) -> VmSpec {
    let writes = MemstressSpec {
        pattern: MemstressPattern::Sequential,
        write_percent: 100,
        ..Default::default()
    };
    VmSpec {
        backing: MemoryBacking::Small,
        ..memstress(bytes, vcpus, writes)
    }
}

/// A VM whose memory is of small pages, so that a page that was never touched takes a fault of its
/// own.
fn of_small_pages(spec: VmSpec) -> Vm {
    let memory = GuestMemory::new();
    let slots = slots_for_memory(spec.memory_bytes).unwrap();
    let mode = crate::memory::Mode::from(&spec);
    let slots = slots.into_iter();
    memory.publish(
        slots
            .map(|slot| Arc::new(SlotMemory::with(slot, mode).unwrap()))
            .collect(),
    );
    guest::install(&memory.table(), &spec).unwrap();
    Vm::over(memory, spec, None)
}

/// Each page that the guest writes first, and each that it writes again under a dirty log, takes a
/// fault: there are as many as the guest says it wrote, at least. A round over pages that are
/// there takes next to none.
#[test]
fn faults_are_as_many_as_the_pages_that_the_guest_touched_first() {
    need_kvm!();
    let faults = count_faults();
    let mut vm = of_small_pages(sequential(32 << 20, 2));
    vm.backend = vm.backend.with_fault_events(&faults);
    let stats = |vm: &Vm| vm.backend.stats();
    let Some(before) = stats(&vm).faults_taken else {
        let stats = stats(&vm);
        assert!(!stats.faults_uncounted.is_empty(), "{stats:?}");
        assert!(stats.gaps().any(|gap| gap == v1::CounterGap::Faults));
        println!("SKIPPED: page faults: {}", stats.faults_uncounted);
        return;
    };
    let source = stats(&vm).faults_source();
    let pages = vm.counters().pages;
    assert_eq!(vm.counters().pages_written, 0);
    let mut seen = before;
    // Each vCPU goes over its half once, and at most a batch further.
    let mut round = |vm: &Vm| {
        let visits = (0..2).map(|vcpu| vm.word(vcpu, offset::VISITS));
        vm.run_visits(visits.max().unwrap() + pages.div_ceil(2));
        let now = vm.backend.stats().faults_taken.unwrap();
        let came = now - seen;
        seen = now;
        came
    };
    let first = round(&vm);
    let second = round(&vm);
    for slot in vm.memory.table().slots() {
        vm.backend
            .set_dirty_logging(slot.spec().slot, true)
            .unwrap();
    }
    let logged = round(&vm);
    println!(
        "{pages} pages, {source:?}: first written {first} faults, again {second}, under the log \
         {logged}"
    );
    assert_eq!(before, 0);
    assert!(first >= pages, "{first} faults for {pages} pages");
    // Processors of x86-64 may log without a fault.
    if source == v1::CounterSource::Tracepoint {
        assert!(
            logged >= pages,
            "{logged} faults for {pages} pages under the log"
        );
    }
    assert!(
        second < pages / 2,
        "{second} faults for {pages} pages that were there"
    );
    assert_eq!(vm.counters().errors, 0);
    assert!(
        vm.backend
            .capabilities()
            .contains(&v1::Capability::FaultStatistics)
    );
}

/// A tracepoint of KVM's own: vCPUs' threads are among those that are counted. Each batch of the
/// guest begins with a call of the doorbell, which leaves KVM_RUN.
#[test]
fn a_tracepoint_counts_what_vcpus_do() {
    need_kvm!();
    let doorbells = match DOORBELLS.count() {
        Ok(count) => count,
        Err(why) => return println!("SKIPPED: {why}"),
    };
    let vm = Vm::new(sequential(16 << 20, 2));
    // A host of RISC-V is asked by a guest of its own what it has, which rings too.
    let before = doorbells.read().unwrap();
    vm.run_visits(4096);
    let batches: u64 = (0..2)
        .map(|vcpu| vm.word(vcpu, offset::VISITS) / vm.word(vcpu, offset::BATCH))
        .sum();
    let all = doorbells.read().unwrap();
    let rung = all - before;
    println!("{rung} calls of the doorbell, {batches} batches");
    assert!(batches > 0 && rung >= batches);
    // Of threads that have ended, nothing is forgotten.
    drop(vm);
    assert_eq!(doorbells.read(), Some(all));
}
