//! The log's rules: who is told what, logging on and off, limits, expiry, bitmaps used again.
//! `world` holds it against a model.

mod source;
mod world;

use self::source::{FakeSource, Kind};
use super::reader::MAX_MEASUREMENTS;
use super::*;
use crate::memory::dirty::{Share, bitmap::tests::touched, source::DirtyError};

const ALL: Share = Share::Runs(usize::MAX);

fn cursor(name: &str) -> CursorName {
    CursorName::parse(name).unwrap()
}

fn spec(slot: u32, base_gfn: u64, pages: u64) -> SlotSpec {
    SlotSpec::new(slot, base_gfn, pages, false).unwrap()
}

/// A log over a source whose slots change along with it.
struct Rig {
    log: DirtyLog,
    source: Arc<FakeSource>,
}

impl Rig {
    fn new(kind: Kind, slots: &[(u32, u64, u64)]) -> Self {
        let source = Arc::new(FakeSource::new(kind));
        let log = DirtyLog::new();
        log.bind(Arc::clone(&source) as Arc<dyn DirtySource>);
        let rig = Self { log, source };
        for (slot, base, pages) in slots {
            rig.add(spec(*slot, *base, *pages)).unwrap();
        }
        rig
    }

    fn add(&self, spec: SlotSpec) -> Result<(), DirtyError> {
        let (add, remove) = (
            || self.source.add_slot(spec.slot, spec.pages),
            || self.source.remove_slot(spec.slot),
        );
        self.log.add_slot(spec, add, remove)
    }

    fn remove(&self, slot: u32) -> Result<(), DirtyError> {
        self.log.remove_slot(slot, || self.source.remove_slot(slot))
    }

    fn shift(&self, spec: SlotSpec) -> Result<(), DirtyError> {
        self.log
            .move_slot(spec, || self.source.call("move_slot", spec.slot))
    }
}

fn rig(slots: &[(u32, u64, u64)]) -> Rig {
    Rig::new(Kind::Bitmap, slots)
}

fn pages_of(batch: &DirtyBatch) -> Vec<(u32, u64)> {
    let mut pages = Vec::new();
    for (slot, bitmap) in &batch.slots {
        for (first, len) in bitmap.runs() {
            pages.extend((first..first + len).map(|page| (*slot, page)));
        }
    }
    pages
}

#[test]
fn each_reader_sees_each_page_and_unacknowledged_ones_again() {
    let Rig { log, source } = rig(&[(0, 0, 100), (1, 1000, 70)]);
    let (a, b) = (cursor("a"), cursor("b"));
    assert!(log.attach(&a).unwrap());
    assert!(!log.attach(&a).unwrap());
    source.guest_writes(0, 99);
    assert!(log.attach(&b).unwrap());
    source.guest_writes(1, 69);
    let first = log.harvest(&a).unwrap();
    assert_eq!(pages_of(&first), vec![(0, 99), (1, 69)]);
    assert_eq!(first.pages, 2);
    let other = log.harvest(&b).unwrap();
    assert_eq!(
        pages_of(&other),
        vec![(1, 69)],
        "b came after the first write"
    );
    log.acknowledge(&b, other.batch).unwrap();
    assert_eq!(log.harvest(&b).unwrap().pages, 0);

    // Written again between delivery and acknowledgement: owed again.
    source.guest_writes(1, 69);
    log.harvest(&b).unwrap();
    log.acknowledge(&a, first.batch).unwrap();
    let second = log.harvest(&a).unwrap();
    assert_eq!(pages_of(&second), vec![(1, 69)]);
    assert_eq!(log.harvest(&a).unwrap().pages, 1, "not acknowledged");
    let stale = log.acknowledge(&a, second.batch).unwrap_err();
    assert_eq!(stale.reason, Reason::BadParameter);
    assert_eq!(log.pages_harvested(), 3);
}

#[test]
fn a_slot_made_anew_keeps_exactly_what_readers_are_owed() {
    let Rig { log, source } = rig(&[(0, 0, 10), (1, 100, 10)]);
    let a = cursor("a");
    log.attach(&a).unwrap();
    source.guest_writes(1, 3);
    // What the source noted is lost with the slot.
    let make = || -> Result<(), DirtyError> {
        source.remove_slot(1)?;
        source.add_slot(1, 10)?;
        source.set_dirty_logging(1, true)
    };
    log.remake_slot(1, make, |_| false).unwrap();
    source.guest_writes(1, 4);
    assert_eq!(pages_of(&log.harvest(&a).unwrap()), [(1, 3), (1, 4)]);

    // Nothing is made anew that could not be harvested.
    source.state().fail.push("harvest");
    let mut made = false;
    let make = || -> Result<(), DirtyError> {
        made = true;
        Ok(())
    };
    log.remake_slot(1, make, |_| false).unwrap_err();
    assert!(!made);

    // What is gone is owed to nobody.
    let make = || source.remove_slot(1).and_then(|()| source.remove_slot(1));
    let error = log.remake_slot(1, make, |_| true).unwrap_err();
    assert_eq!(error.reason, Reason::NoSuchSlot);
    assert_eq!(pages_of(&log.harvest(&a).unwrap()), []);
    assert!(log.enabled() && !log.slot_enabled(1));
}

#[test]
fn what_the_host_writes_is_told_like_what_the_guest_writes() {
    let Rig { log, .. } = rig(&[(0, 0, 10), (1, 100, 70)]);
    let (a, b) = (cursor("a"), cursor("b"));
    log.written_by_host(1, 0, 70, || Ok::<_, DirtyError>(()))
        .unwrap();
    log.attach(&a).unwrap();
    log.attach(&b).unwrap();
    log.written_by_host(1, 63, 3, || Ok::<_, DirtyError>(()))
        .unwrap();
    // Some of it may have been written.
    log.written_by_host(0, 9, 1, || Err(DirtyError::NoSuchSlot { slot: 0 }))
        .unwrap_err();
    for reader in [&a, &b] {
        let batch = log.harvest(reader).unwrap();
        assert_eq!(pages_of(&batch), [(0, 9), (1, 63), (1, 64), (1, 65)]);
    }
}

#[test]
fn logging_is_on_exactly_while_there_are_readers() {
    let rig = rig(&[(0, 0, 10), (1, 100, 10)]);
    let Rig { log, source } = &rig;
    let on = || {
        let state = source.state();
        state.slots.values().filter(|slot| slot.logging).count()
    };
    let (a, b) = (cursor("a"), cursor("b"));
    assert!(!log.enabled() && log.is_idle());
    log.attach(&a).unwrap();
    assert!(!log.is_idle());
    log.attach(&b).unwrap();
    assert_eq!((log.enabled(), on()), (true, 2));
    rig.add(spec(2, 200, 10)).unwrap();
    assert_eq!(on(), 3, "a new slot logs at once");
    assert!(log.slot_enabled(2));
    log.detach(&a).unwrap();
    assert_eq!((log.enabled(), on()), (true, 3));
    log.detach(&b).unwrap();
    assert_eq!((log.enabled(), on()), (false, 0));
    assert!(log.is_idle());
    let inner = log.lock();
    assert!(!log.is_idle(), "somebody comes, or goes");
    drop(inner);
    assert_eq!(log.detach(&b).unwrap_err().reason, Reason::NoSuchCursor);
    assert_eq!(log.harvest(&b).unwrap_err().reason, Reason::NoSuchCursor);
}

#[test]
fn a_failure_to_turn_logging_on_leaves_it_off() {
    let Rig { log, source } = rig(&[(0, 0, 10), (1, 100, 10)]);
    // Slot 0 first: let slot 1 fail by refusing the second call.
    source.state().slots.remove(&1);
    let error = log.attach(&cursor("a")).unwrap_err();
    assert_eq!(error.reason, Reason::NoSuchSlot);
    assert!(!log.enabled());
    assert!(!source.state().slots[&0].logging);
    assert_eq!(
        log.harvest(&cursor("a")).unwrap_err().reason,
        Reason::NoSuchCursor
    );
}

#[test]
fn a_failure_to_turn_logging_off_is_told_and_can_be_mended() {
    let Rig { log, source } = rig(&[(0, 0, 10), (1, 100, 10)]);
    let a = cursor("a");
    log.attach(&a).unwrap();
    source.state().fail.push("log_off");
    let error = log.detach(&a).unwrap_err();
    assert_eq!(error.metadata["slot"], "0");
    assert!(log.enabled(), "slot 0 still logs, and that shows");
    assert!(!source.state().slots[&1].logging, "the others are off");
    source.guest_writes(0, 3);
    assert!(log.attach(&a).unwrap());
    assert_eq!(
        log.harvest(&a).unwrap().pages,
        0,
        "written before it attached"
    );
    log.detach(&a).unwrap();
    assert!(!log.enabled());
}

#[test]
fn a_slot_that_came_or_moved_is_dirty_as_a_whole() {
    let rig = rig(&[(0, 0, 10)]);
    let log = &rig.log;
    let a = cursor("a");
    log.attach(&a).unwrap();
    rig.add(spec(3, 64, 65)).unwrap();
    let batch = log.harvest(&a).unwrap();
    assert_eq!(batch.pages, 65);
    log.acknowledge(&a, batch.batch).unwrap();
    rig.shift(spec(3, 500, 65)).unwrap();
    assert_eq!(log.harvest(&a).unwrap().pages, 65);
    rig.remove(3).unwrap();
    rig.add(spec(3, 64, 2)).unwrap();
    assert_eq!(
        log.harvest(&a).unwrap().pages,
        2,
        "nothing of the old slot 3"
    );
}

#[test]
fn callers_and_the_process_have_limits_of_their_own() {
    let Rig { log, .. } = rig(&[(0, 0, 10)]);
    for number in 0..MAX_CURSORS {
        log.read_api(&cursor(&format!("c{number}")), 0, ALL)
            .unwrap();
    }
    let error = log.read_api(&cursor("more"), 0, ALL).unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
    assert!(
        log.attach(&cursor("c0")).unwrap(),
        "a migration may all the same"
    );
    log.detach_api(&cursor("c0")).unwrap();
    log.harvest(&cursor("c0")).unwrap();
    for number in 1..MAX_CURSORS {
        log.attach(&cursor(&format!("m{number}"))).unwrap();
    }
    let error = log.attach(&cursor("m99")).unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
}

#[test]
fn an_idle_caller_does_not_keep_logging_on() {
    let Rig { log, .. } = rig(&[(0, 0, 10)]);
    let (idle, migration) = (cursor("idle"), cursor("migration"));
    let made = log.read_api(&idle, 0, ALL).unwrap();
    assert!(made.created);
    log.attach(&migration).unwrap();
    let now = Instant::now();
    assert_eq!(log.expire_idle(now + API_CURSOR_IDLE / 2), 0);
    assert_eq!(log.expire_idle(now + API_CURSOR_IDLE * 2), 1);
    assert!(log.enabled(), "the migration's never expires");
    log.detach(&migration).unwrap();
    assert!(!log.enabled());
    let gone = log.read_api(&idle, made.batch, ALL).unwrap_err();
    assert_eq!(gone.reason, Reason::NoSuchCursor);
    assert!(log.read_api(&idle, 0, ALL).unwrap().created);
}

#[test]
fn what_an_earlier_cursor_of_the_name_delivered_is_not_acknowledged() {
    let Rig { log, source } = rig(&[(0, 0, 10)]);
    let name = cursor("backup");
    let first = log.read_api(&name, 0, ALL).unwrap();
    log.detach_api(&name).unwrap();
    let again = log.read_api(&name, 0, ALL).unwrap();
    assert!(again.created && again.batch > first.batch);
    source.guest_writes(0, 3);
    let stale = log.read_api(&name, first.batch, ALL).unwrap_err();
    assert_eq!(stale.reason, Reason::NoSuchCursor);
    assert_eq!(stale.metadata["batch"], first.batch.to_string());
    let owed = log.read_api(&name, again.batch, ALL).unwrap();
    assert_eq!(owed.ranges, vec![(3, 1)]);

    // So are those that were delivered on another host.
    log.number_batches_above(1 << 32);
    log.detach_api(&name).unwrap();
    let here = log.read_api(&name, 0, ALL).unwrap();
    assert!(here.batch > 1 << 32);
    for batch in [1, owed.batch, 1 << 32] {
        let stale = log.read_api(&name, batch, ALL).unwrap_err();
        assert_eq!(stale.reason, Reason::NoSuchCursor, "{batch}");
    }
    let ahead = log.read_api(&name, here.batch + 1, ALL);
    assert_eq!(ahead.unwrap_err().reason, Reason::BadParameter);
    log.read_api(&name, here.batch, ALL).unwrap();
}

#[test]
fn callers_see_frames_across_slots() {
    let Rig { log, source } = rig(&[(5, 0, 64), (2, 64, 64), (9, 1000, 8)]);
    let a = cursor("a");
    log.read_api(&a, 0, ALL).unwrap();
    for (slot, page) in [(5, 63), (2, 0), (2, 1), (9, 7)] {
        source.guest_writes(slot, page);
    }
    let harvest = log.read_api(&a, 0, ALL).unwrap();
    assert_eq!(harvest.ranges, vec![(63, 3), (1007, 1)]);
    assert_eq!(harvest.pages, 4);
}

#[test]
fn a_slot_of_4_tib_is_followed_in_two_bitmaps_and_where_it_is_dirty() {
    const PAGES: u64 = 4 << 28;
    let Rig { log, source } = rig(&[(0, 0, PAGES)]);
    let a = cursor("a");
    log.attach(&a).unwrap();
    // So far from each other that each has a page of the bitmap of its own, huge or not.
    let dirtied = |number: u64| {
        source.guest_writes(0, number << 26);
        let batch = log.harvest(&a).unwrap();
        let touched = touched(&batch.slots[0].1);
        (batch, touched)
    };
    // Iterations, as a migration does them: harvested, sent, acknowledged. A bitmap that was used
    // before still has the memory of what was dirty then.
    let (batch, one) = dirtied(1);
    assert!(one > 0);
    log.acknowledge(&a, batch.batch).unwrap();
    drop(batch);
    let (batch, touched) = dirtied(2);
    assert_eq!(pages_of(&batch), vec![(0, 2 << 26)]);
    assert_eq!(touched, 2 * one, "the same bitmap");
    drop(batch);
    // The last one is not acknowledged when the vCPUs stop.
    let (batch, touched) = dirtied(3);
    assert_eq!(pages_of(&batch), vec![(0, 2 << 26), (0, 3 << 26)]);
    assert_eq!(
        touched,
        2 * one,
        "another bitmap, and only where it is dirty"
    );
    drop(batch);
    // Once more: the first bitmap, which had 1 and 2, and now also 3 and 4.
    let (batch, touched) = dirtied(4);
    assert_eq!(batch.pages, 3);
    assert_eq!(touched, 4 * one, "no third bitmap");
}

/// Windows of 65,536 pages: three and a bit.
const LARGE: u64 = 3 * (1 << 16) + 70;

#[test]
fn a_reader_of_all_memory_is_told_of_what_was_written_after_it_read() {
    let Rig { log, source } = Rig::new(Kind::Full, &[(0, 0, LARGE), (1, 1 << 20, 64)]);
    let migration = cursor("migration");
    assert!(log.attach_whole(&migration).unwrap());
    let unprotected = |slot: u32| source.state().slots[&slot].unprotected.count();
    assert_eq!(unprotected(0), LARGE, "nothing is protected at first");
    source.guest_writes(0, 5);
    // Just before it is read. Twice is once.
    log.protect(0, 0, 256).unwrap();
    log.protect(0, 256, 256).unwrap();
    assert_eq!(unprotected(0), LARGE - (1 << 16), "one window");
    source.guest_writes(0, 6);
    // In a window that is not read yet: it is read with the page.
    source.guest_writes(0, 70_000);
    log.protect(0, 1 << 16, LARGE - (1 << 16)).unwrap();
    log.protect(1, 0, 64).unwrap();
    source.guest_writes(0, LARGE - 1);
    let batch = log.harvest(&migration).unwrap();
    assert_eq!(pages_of(&batch), [(0, 6), (0, LARGE - 1)]);
    log.detach(&migration).unwrap();
    assert!(!log.enabled());
}

#[test]
fn another_reader_is_exact_beside_a_reader_of_all_memory() {
    let Rig { log, source } = Rig::new(Kind::Full, &[(0, 0, LARGE)]);
    let (migration, backup) = (cursor("migration"), cursor("backup"));
    log.attach_whole(&migration).unwrap();
    source.guest_writes(0, 70_000);
    assert!(log.read_api(&backup, 0, ALL).unwrap().created);
    assert_eq!(
        source.state().slots[&0].unprotected.count(),
        0,
        "all is protected for it at once"
    );
    source.guest_writes(0, 70_001);
    let told = log.read_api(&backup, 0, ALL).unwrap();
    assert_eq!(told.ranges, [(70_001, 1)]);
    // The other way round: where somebody reads already, nothing is left for later.
    log.detach(&migration).unwrap();
    log.attach_whole(&migration).unwrap();
    assert!(source.state().slots[&0].unprotected.is_empty());
}

#[test]
fn what_could_not_be_protected_fails_the_harvest() {
    let Rig { log, source } = Rig::new(Kind::Full, &[(0, 0, LARGE)]);
    let migration = cursor("migration");
    log.attach_whole(&migration).unwrap();
    source.state().fail.push("protect");
    log.protect(0, 0, 256).unwrap_err();
    // Its pages were read all the same: nothing may be believed any more.
    log.protect(0, 0, 256).unwrap_err();
    log.harvest(&migration).unwrap_err();
    log.detach(&migration).unwrap();
    log.attach_whole(&migration).unwrap();
    assert_eq!(log.harvest(&migration).unwrap().pages, 0);
}

#[test]
fn a_bitmap_is_told_in_pieces_and_what_does_not_fit_comes_next() {
    let Rig { log, source } = rig(&[(0, 0, 200), (1, 1000, 70)]);
    let name = cursor("a");
    let share = |most| Share::Pieces { words: 1, most };
    log.read_api(&name, 0, share(9)).unwrap();
    for (slot, page) in [(0, 0), (0, 9), (0, 130), (1, 69)] {
        source.guest_writes(slot, page);
    }
    let first = log.read_api(&name, 0, share(2)).unwrap();
    assert!(first.more && first.ranges.is_empty());
    assert_eq!(first.pages, 3);
    let bits = |set: &[usize], len: usize| {
        let mut bytes = vec![0_u8; len];
        for bit in set {
            bytes[bit / 8] |= 1 << (bit % 8);
        }
        bytes::Bytes::from(bytes)
    };
    assert_eq!(first.pieces, [(0, bits(&[0, 9], 8)), (128, bits(&[2], 8))]);
    let second = log.read_api(&name, first.batch, share(2)).unwrap();
    assert!(!second.more);
    // The piece ends where the slot does.
    assert_eq!(second.pieces, [(1064, bits(&[5], 1))]);
    // Not acknowledged, it is told of again, in the other form too.
    let again = log.read_api(&name, 0, ALL).unwrap();
    assert_eq!(again.ranges, [(1069, 1)]);
    let runs = |most| Share::Runs(most);
    source.guest_writes(0, 3);
    let cut = log.read_api(&name, 0, runs(1)).unwrap();
    assert!(cut.more && cut.ranges == [(3, 1)]);
}

#[test]
fn a_dropped_reader_is_told_so_and_counted() {
    let Rig { log, .. } = rig(&[(0, 0, 10)]);
    let (idle, deleted) = (cursor("idle"), cursor("deleted"));
    let made = log.read_api(&idle, 0, ALL).unwrap();
    let other = log.read_api(&deleted, 0, ALL).unwrap();
    log.detach_api(&deleted).unwrap();
    assert_eq!((log.readers(), log.dropped()), (1, 0));
    log.expire_idle(Instant::now() + API_CURSOR_IDLE);
    assert_eq!((log.readers(), log.dropped()), (0, 1));
    let told = log.read_api(&idle, made.batch, ALL).unwrap_err();
    assert_eq!(told.reason, Reason::NoSuchCursor);
    assert_eq!(told.metadata["dropped"], "IDLE");
    let told = log.read_api(&deleted, other.batch, ALL).unwrap_err();
    assert!(!told.metadata.contains_key("dropped"), "{told:?}");
    // A new one of the name is nobody's past.
    let made = log.read_api(&idle, 0, ALL).unwrap();
    assert!(made.created);
    log.detach_api(&idle).unwrap();
    let told = log.read_api(&idle, made.batch, ALL).unwrap_err();
    assert!(!told.metadata.contains_key("dropped"), "{told:?}");
}

#[test]
fn a_measurement_takes_nothing_from_others_and_leaves_nothing() {
    let Rig { log, source } = rig(&[(0, 0, 100)]);
    let backup = cursor("backup");
    log.attach(&backup).unwrap();
    source.guest_writes(0, 1);
    let mut measurement = log.measure().unwrap();
    let listed = log.list(Instant::now());
    let owners: Vec<_> = listed.cursors.iter().map(|one| one.owner()).collect();
    use slat_proto::v1::dirty_cursor::Owner;
    assert_eq!(owners, [Owner::Process, Owner::Measurement]);
    assert_eq!(listed.cursors[0].waiting_pages, 1);
    for page in [2, 3] {
        source.guest_writes(0, page);
    }
    assert_eq!(measurement.look(false).unwrap(), 2);
    for page in [3, 4] {
        source.guest_writes(0, page);
    }
    assert_eq!(measurement.look(true).unwrap(), 2);
    assert_eq!(measurement.distinct(), (2, 2, 3));
    let others: Vec<_> = (1..MAX_MEASUREMENTS)
        .map(|_| log.measure().unwrap())
        .collect();
    assert_eq!(log.measure().unwrap_err().reason, Reason::LimitReached);
    drop((others, measurement));
    let batch = log.harvest(&backup).unwrap();
    assert_eq!(pages_of(&batch), [(0, 1), (0, 2), (0, 3), (0, 4)]);
    assert_eq!(log.readers(), 1);
    log.detach(&backup).unwrap();
    drop(log.measure().unwrap());
    assert!(!log.enabled(), "logging goes off with the last");
}

#[test]
fn calls_that_waited_share_a_harvest_that_began_after_they_came() {
    let Rig { log, source } = rig(&[(0, 0, 100)]);
    let (a, b) = (cursor("a"), cursor("b"));
    log.attach(&a).unwrap();
    log.attach(&b).unwrap();
    let waited = log.call();
    source.guest_writes(0, 1);
    log.harvest(&a).unwrap();
    source.guest_writes(0, 2);
    let waiting = |call: u64| {
        let mut inner = log.lock();
        log.pull_for(&mut inner, call).unwrap();
        inner.cursors[&Reader::Process(b.clone())].owed().0
    };
    assert_eq!(
        waiting(waited),
        1,
        "what was written before it came, it has"
    );
    // One that comes now has to look.
    assert_eq!(waiting(log.call()), 2);
    // A harvest that failed covers nobody.
    let waited = log.call();
    source.guest_writes(0, 3);
    source.state().fail.push("harvest");
    log.harvest(&a).unwrap_err();
    assert_eq!(waiting(waited), 3);
}
