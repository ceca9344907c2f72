//! The log's rules: who is told what, logging on and off, limits, expiry, bitmaps used again.
//! `world` holds it against a model.

mod source;
mod world;

use self::source::{FakeSource, Kind};
use super::*;
use crate::memory::dirty::bitmap::tests::touched;

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
fn logging_is_on_exactly_while_there_are_readers() {
    let rig = rig(&[(0, 0, 10), (1, 100, 10)]);
    let Rig { log, source } = &rig;
    let on = || {
        let state = source.state();
        state.slots.values().filter(|slot| slot.logging).count()
    };
    let (a, b) = (cursor("a"), cursor("b"));
    assert!(!log.enabled());
    log.attach(&a).unwrap();
    log.attach(&b).unwrap();
    assert_eq!((log.enabled(), on()), (true, 2));
    rig.add(spec(2, 200, 10)).unwrap();
    assert_eq!(on(), 3, "a new slot logs at once");
    assert!(log.slot_enabled(2));
    log.detach(&a).unwrap();
    assert_eq!((log.enabled(), on()), (true, 3));
    log.detach(&b).unwrap();
    assert_eq!((log.enabled(), on()), (false, 0));
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
        log.read_api(&cursor(&format!("c{number}")), 0, usize::MAX)
            .unwrap();
    }
    let error = log.read_api(&cursor("more"), 0, usize::MAX).unwrap_err();
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
    let made = log.read_api(&idle, 0, usize::MAX).unwrap();
    assert!(made.created);
    log.attach(&migration).unwrap();
    let now = Instant::now();
    assert_eq!(log.expire_idle(now + API_CURSOR_IDLE / 2), 0);
    assert_eq!(log.expire_idle(now + API_CURSOR_IDLE * 2), 1);
    assert!(log.enabled(), "the migration's never expires");
    log.detach(&migration).unwrap();
    assert!(!log.enabled());
    let gone = log.read_api(&idle, made.batch, usize::MAX).unwrap_err();
    assert_eq!(gone.reason, Reason::NoSuchCursor);
    assert!(log.read_api(&idle, 0, usize::MAX).unwrap().created);
}

#[test]
fn what_an_earlier_cursor_of_the_name_delivered_is_not_acknowledged() {
    let Rig { log, source } = rig(&[(0, 0, 10)]);
    let name = cursor("backup");
    let first = log.read_api(&name, 0, usize::MAX).unwrap();
    log.detach_api(&name).unwrap();
    let again = log.read_api(&name, 0, usize::MAX).unwrap();
    assert!(again.created && again.batch > first.batch);
    source.guest_writes(0, 3);
    let stale = log.read_api(&name, first.batch, usize::MAX).unwrap_err();
    assert_eq!(stale.reason, Reason::NoSuchCursor);
    assert_eq!(stale.metadata["batch"], first.batch.to_string());
    let owed = log.read_api(&name, again.batch, usize::MAX).unwrap();
    assert_eq!(owed.ranges, vec![(3, 1)]);

    // So are those that were delivered on another host.
    log.number_batches_above(1 << 32);
    log.detach_api(&name).unwrap();
    let here = log.read_api(&name, 0, usize::MAX).unwrap();
    assert!(here.batch > 1 << 32);
    for batch in [1, owed.batch, 1 << 32] {
        let stale = log.read_api(&name, batch, usize::MAX).unwrap_err();
        assert_eq!(stale.reason, Reason::NoSuchCursor, "{batch}");
    }
    let ahead = log.read_api(&name, here.batch + 1, usize::MAX);
    assert_eq!(ahead.unwrap_err().reason, Reason::BadParameter);
    log.read_api(&name, here.batch, usize::MAX).unwrap();
}

#[test]
fn callers_see_frames_across_slots() {
    let Rig { log, source } = rig(&[(5, 0, 64), (2, 64, 64), (9, 1000, 8)]);
    let a = cursor("a");
    log.read_api(&a, 0, usize::MAX).unwrap();
    for (slot, page) in [(5, 63), (2, 0), (2, 1), (9, 7)] {
        source.guest_writes(slot, page);
    }
    let harvest = log.read_api(&a, 0, usize::MAX).unwrap();
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
