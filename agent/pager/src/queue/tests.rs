//! What loaders are given, and in which order.

use std::{sync::atomic::AtomicI32, time::Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use slat_paging::{PAGE, bits::SharedBits, wire};

use super::*;

const PAGES: u64 = 1000;

fn memory(id: u32) -> Arc<Memory> {
    use std::os::fd::AsFd as _;
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, PAGES * PAGE as u64).unwrap();
    let bits = SharedBits::new("test", PAGES).unwrap();
    let bits = bits.as_fd().try_clone_to_owned().unwrap();
    let message = wire::Memory {
        memory: id,
        slot: id,
        base_gfn: 0,
        pages: PAGES,
        view: 0,
        file_start: 0,
        read_only: false,
        origin: Some(id),
        has_loaded: true,
    };
    Arc::new(Memory::new(&message, vec![file, bits], 0).unwrap())
}

/// Each fault is another thread's, unless a test says otherwise.
static THREADS: AtomicI32 = AtomicI32::new(1);

fn fault(memory: &Arc<Memory>, page: u64) -> Wait {
    Wait {
        memory: Arc::clone(memory),
        page,
        waiter: Waiter {
            thread: THREADS.fetch_add(1, Ordering::Relaxed),
            write: false,
            kind: None,
            since: Instant::now(),
        },
    }
}

fn take(queue: &Queue) -> Option<Range<u64>> {
    claim(queue).map(|claim| claim.pages)
}

fn claim(queue: &Queue) -> Option<Claim> {
    queue.take_load(&|_, page| page / 4 * 4..page / 4 * 4 + 4)
}

fn ask(queue: &Queue, memory: &Arc<Memory>, pages: Range<u64>) -> u64 {
    queue.ask(std::iter::once((Arc::clone(memory), pages)))
}

fn trouble() -> Trouble {
    Trouble::new(wire::ProblemKind::SourceGone, "told to fail")
}

fn fails(queue: &Queue, claim: &Claim) -> bool {
    let alone: Vec<u64> = claim.pages.clone().collect();
    queue.failed(claim, &alone, &trouble())
}

fn comes(queue: &Queue, claim: &Claim) {
    claim.memory.set_there(claim.pages.clone());
    queue.done(claim);
}

#[test]
fn a_page_that_two_threads_want_is_read_once_with_those_beside_it() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.push_fault(fault(&memory, 9));
    queue.push_fault(fault(&memory, 9));
    let first = claim(&queue).unwrap();
    assert_eq!(first.pages, 8..12);
    // Wanted while it is read: whoever reads it says so.
    queue.push_fault(fault(&memory, 10));
    assert_eq!(take(&queue), None);
    memory.set_there(8..12);
    assert_eq!(queue.done(&first).len(), 3);
    assert_eq!(queue.waiting(), 0);
}

#[test]
fn the_guest_comes_first_and_the_background_gets_on() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.add(Arc::clone(&memory));
    queue.load_all();
    ask(&queue, &memory, 500..520);
    for page in 0..20 {
        queue.push_fault(fault(&memory, 600 + page * 4));
    }
    let mut firsts = Vec::new();
    for _ in 0..22 {
        let claim = claim(&queue).unwrap();
        firsts.push(claim.pages.start);
        memory.set_there(claim.pages.clone());
        queue.done(&claim);
    }
    let background = firsts.iter().filter(|first| **first < 500).count();
    assert!((2..4).contains(&background), "{firsts:?}");
    let asked = firsts.iter().position(|first| *first == 500);
    let guest = firsts.iter().rposition(|first| *first >= 600);
    assert!(asked.is_none_or(|asked| Some(asked) > guest), "{firsts:?}");
}

#[test]
fn what_failed_waits_until_it_is_tried_again_and_old_news_is_none() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.push_fault(fault(&memory, 0));
    let first = claim(&queue).unwrap();
    assert!(fails(&queue, &first) && queue.has_failed());
    assert_eq!(take(&queue), None);
    queue.retry();
    let second = claim(&queue).unwrap();
    assert_eq!(second.pages, 0..4);
    // It was read before the source was mended.
    queue.retry();
    assert!(!fails(&queue, &second) && !queue.has_failed());
    assert_eq!(take(&queue), Some(0..4));
}

#[test]
fn reads_for_nobody_leave_loaders_to_the_guest() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.add(Arc::clone(&memory));
    queue.load_all();
    let idle = [claim(&queue).unwrap(), claim(&queue).unwrap()];
    assert_eq!(take(&queue), None);
    queue.push_fault(fault(&memory, 900));
    assert_eq!(take(&queue), Some(900..904));
    queue.done(&idle[0]);
    assert_eq!(take(&queue), Some(128..192));
}

#[test]
fn a_mapping_that_failed_before_it_was_tried_again_is_tried_again() {
    let (queue, memory) = (Queue::default(), memory(1));
    let began = queue.retries();
    assert_eq!(queue.retry(), 1);
    queue.failed_to_map(fault(&memory, 3), began);
    assert!(!queue.has_failed());
    assert_eq!(queue.take_ready().unwrap().page, 3);
    queue.failed_to_map(fault(&memory, 3), queue.retries());
    assert!(queue.has_failed() && queue.waiting() == 1);
    queue.retry();
    assert_eq!(queue.take_ready().unwrap().page, 3);
}

#[test]
fn who_asks_for_what_another_reads_hears_that_it_failed() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.ahead(&memory, 8..12);
    let ahead = claim(&queue).unwrap();
    assert_eq!(ahead.pages, 8..12);
    let asked = ask(&queue, &memory, 9..11);
    assert_eq!(take(&queue), None);
    // It was read for nobody: who asks for it tries for itself.
    assert!(!fails(&queue, &ahead));
    assert_eq!(queue.ask_failed(asked), None);
    let own = claim(&queue).unwrap();
    assert_eq!(own.pages, 9..11);
    // Another that asks for a part of it, and for others.
    let other = ask(&queue, &memory, 10..14);
    assert!(fails(&queue, &own) && queue.has_failed());
    assert_eq!(queue.ask_failed(asked), Some(trouble()));
    assert_eq!(queue.ask_failed(other), None);
    let second = claim(&queue).unwrap();
    assert_eq!(second.pages, 10..14);
    comes(&queue, &second);
    // Who still waits is read for again when somebody says so.
    queue.retry();
    assert_eq!(queue.ask_failed(asked), None);
    assert_eq!(take(&queue), Some(9..10));
    queue.end_ask(asked);
    queue.end_ask(other);
    assert_eq!(take(&queue), None);
}

#[test]
fn what_was_asked_for_is_read_again_when_a_read_of_before_fails() {
    let (queue, memory) = (Queue::default(), memory(1));
    let asked = ask(&queue, &memory, 0..10);
    let first = claim(&queue).unwrap();
    queue.retry();
    assert!(!fails(&queue, &first));
    assert_eq!(queue.ask_failed(asked), None);
    assert_eq!(take(&queue), Some(0..10));
}

#[test]
fn the_background_goes_on_behind_claims_and_back_only_to_one_that_failed() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.add(Arc::clone(&memory));
    queue.load_all();
    queue.push_fault(fault(&memory, 2));
    let of_guest = claim(&queue).unwrap();
    assert_eq!(of_guest.pages, 0..4);
    let first = claim(&queue).unwrap();
    let second = claim(&queue).unwrap();
    assert_eq!(
        (first.pages.clone(), second.pages.clone()),
        (4..68, 68..132)
    );
    comes(&queue, &first);
    let third = claim(&queue).unwrap();
    assert_eq!(third.pages, 132..196);
    assert!(fails(&queue, &of_guest));
    comes(&queue, &third);
    // What failed comes first.
    assert_eq!(take(&queue), Some(0..4));
}

#[test]
fn a_page_that_fails_twice_is_tried_again_once() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.push_fault(fault(&memory, 0));
    let first = claim(&queue).unwrap();
    assert!(fails(&queue, &first));
    // Others wait for it meanwhile, and somebody asks for it.
    queue.push_fault(fault(&memory, 0));
    let asked = ask(&queue, &memory, 0..1);
    let second = claim(&queue).unwrap();
    assert!(fails(&queue, &second));
    queue.end_ask(asked);
    assert_eq!((take(&queue), queue.waiting()), (None, 2));
    queue.retry();
    let again = claim(&queue).unwrap();
    assert!(fails(&queue, &again));
    assert_eq!(take(&queue), None, "read twice");
    // It comes by another way.
    memory.set_there(0..4);
    queue.retry();
    assert_eq!(take(&queue), None);
    assert!(queue.take_ready().is_some() && queue.take_ready().is_some());
    assert!(!queue.has_failed());
    assert_eq!(queue.waiting(), 0);
}

#[test]
fn who_waits_for_a_page_that_failed_goes_on_when_it_came_by_another_way() {
    let (queue, memory) = (Queue::default(), memory(1));
    queue.push_fault(fault(&memory, 5));
    queue.push_fault(fault(&memory, 9));
    let claims = [claim(&queue).unwrap(), claim(&queue).unwrap()];
    assert!(claims.iter().all(|claim| fails(&queue, claim)));
    memory.set_there(4..8);
    queue.came(&memory, 4..8);
    assert_eq!(queue.take_ready().map(|wait| wait.page), Some(5));
    // The other waits on.
    assert!(queue.has_failed() && queue.waiting() == 1);
}

/// A neighbour that cannot be read is no word about a page that was wanted since.
#[test]
fn a_page_that_was_wanted_too_late_to_be_tried_alone_is_tried_again() {
    let (queue, memory) = (Queue::default(), memory(0));
    queue.push_fault(fault(&memory, 1));
    let first = claim(&queue).unwrap();
    assert_eq!(first.pages, 0..4);
    // While it is read, after who reads looked at what is wanted.
    queue.push_fault(fault(&memory, 2));
    assert!(queue.failed(&first, &[1], &trouble()));
    assert!(queue.has_failed());
    assert_eq!(take(&queue), Some(0..4), "with its neighbours, then alone");
}

/// A vCPU that is interrupted while it waits faults again, and takes no second place.
#[test]
fn a_thread_waits_once_for_a_page() {
    let (queue, memory) = (Queue::default(), memory(0));
    for write in [false, true, false] {
        let mut wait = fault(&memory, 1);
        (wait.waiter.thread, wait.waiter.write) = (7, write);
        queue.push_fault(wait);
    }
    assert_eq!(queue.waiting(), 1);
    let claim = claim(&queue).unwrap();
    memory.set_there(claim.pages.clone());
    let served = queue.done(&claim);
    assert_eq!(served.len(), 1);
    assert!(served[0].waiter.write);
}
