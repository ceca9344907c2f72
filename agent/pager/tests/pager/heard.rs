//! What is heard of a pager, and the thread that answers it.

use std::{
    collections::HashMap,
    sync::{Condvar, Mutex},
    time::Instant,
};

use slat_paging::wire::{Answer, FromPager, PagerState, Problem, Socket, ToPager};

use crate::{view::Mem, vm::PATIENCE};

/// What is heard of a pager.
#[derive(Default)]
pub(crate) struct Heard {
    inner: Mutex<HeardInner>,
    changed: Condvar,
}

#[derive(Default)]
pub(crate) struct HeardInner {
    pub(crate) attached: bool,
    pub(crate) loaded: bool,
    closed: bool,
    pub(crate) ended: Vec<u64>,
    pub(crate) state: PagerState,
    pub(crate) replies: HashMap<u64, Result<Answer, Problem>>,
    /// Mappings are dropped, and the pager is not told.
    hold: bool,
    /// That is so of some.
    holding: bool,
}

impl Heard {
    /// Waits until something was heard.
    pub(crate) fn wait<T>(&self, mut what: impl FnMut(&mut HeardInner) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        let mut inner = self.inner.lock().unwrap();
        loop {
            if let Some(found) = what(&mut inner) {
                return found;
            }
            assert!(!inner.closed, "the pager is gone");
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "not heard: {:?}", inner.state);
            inner = self.changed.wait_timeout(inner, left).unwrap().0;
        }
    }

    /// From now on the pager is not told that mappings are dropped, and hears nothing else.
    pub(crate) fn hold(&self) {
        self.inner.lock().unwrap().hold = true;
    }

    /// Waits until something is held.
    pub(crate) fn held(&self) {
        self.wait(|inner| inner.holding.then_some(()));
    }

    pub(crate) fn let_go(&self) {
        self.inner.lock().unwrap().hold = false;
        self.changed.notify_all();
    }
}

pub(crate) fn listen(socket: &Socket, heard: &Heard, memories: &[Mem]) {
    while let Ok(packet) = socket.receive::<FromPager>() {
        let mut inner = heard.inner.lock().unwrap();
        match packet.message {
            FromPager::Hello { .. } => panic!("hello again"),
            FromPager::Attached => inner.attached = true,
            FromPager::Reply { request, result } => {
                inner.replies.insert(request, result);
            }
            FromPager::DropMappings {
                request,
                memory,
                page,
                pages,
            } => {
                drop(inner);
                let errno = memories[memory as usize].view.drop_mappings(page, pages);
                let mut inner = heard.inner.lock().unwrap();
                inner.holding = inner.hold;
                heard.changed.notify_all();
                let held = |inner: &mut HeardInner| inner.hold;
                let (mut inner, late) = heard
                    .changed
                    .wait_timeout_while(inner, PATIENCE, held)
                    .unwrap();
                assert!(!late.timed_out(), "held for ever");
                inner.holding = false;
                drop(inner);
                // A pager that is gone does not hear it.
                let _ = socket.send(&ToPager::Dropped { request, errno }, &[]);
                continue;
            }
            FromPager::State(state) => inner.state = *state,
            FromPager::SnapshotEnded { snapshot } => inner.ended.push(snapshot),
            FromPager::Loaded => inner.loaded = true,
        }
        heard.changed.notify_all();
    }
    heard.inner.lock().unwrap().closed = true;
    heard.changed.notify_all();
}
