//! The queues of requests, and the threads that take from them.
//!
//! *Locking*: one lock a queue, held to put or to take.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{Condvar, Mutex},
    time::Duration,
};

use slat_paging::wire::{Answer, Ask, FromPager, ProblemKind, ToPager};

use crate::{
    error::{PagerError, Trouble},
    hear::hear,
    shared::Shared,
    sync::{lock, wait},
};

/// Requests that wait.
const MOST: usize = 1024;
/// Who waits is woken; this is against a wake-up that is lost.
const LOOK: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Asks {
    quick: Lane,
    slow: Lane,
    /// Who asks for the state is not to wait for a source that stalls.
    looks: Lane,
}

#[derive(Debug, Default)]
struct Lane {
    waiting: Mutex<VecDeque<Item>>,
    more: Condvar,
}

#[derive(Debug)]
enum Item {
    Ask(u64, Ask),
    /// Something that is no question, with its descriptors.
    Hear(ToPager, Vec<OwnedFd>),
}

impl Lane {
    /// Whether there was room.
    fn put(&self, item: Item) -> bool {
        let mut waiting = lock(&self.waiting);
        let room = waiting.len() < MOST;
        if room {
            waiting.push_back(item);
            self.more.notify_one();
        }
        room
    }

    fn take(&self, shared: &Shared) -> Option<Item> {
        let mut waiting = lock(&self.waiting);
        while waiting.is_empty() && !shared.is_over() {
            waiting = wait(&self.more, waiting, LOOK);
        }
        waiting.pop_front().filter(|_| !shared.is_over())
    }
}

impl Asks {
    /// Takes a request in.
    pub(crate) fn push(&self, shared: &Shared, request: u64, ask: Ask) {
        let lane = match ask {
            Ask::Retry => {
                shared.problems.mended(shared.queue.retry());
                shared.bell.ring();
                return reply(shared, request, Ok(Answer::Done));
            }
            Ask::State => &self.looks,
            // Slow ones pass by here: what was said before them was heard then.
            _ => &self.quick,
        };
        if !lane.put(Item::Ask(request, ask)) {
            reply(shared, request, Err(too_many()));
        }
    }

    /// Takes in what is no question.
    pub(crate) fn hear(&self, message: ToPager, fds: Vec<OwnedFd>) -> Result<(), PagerError> {
        let room = self.quick.put(Item::Hear(message, fds));
        room.then_some(())
            .ok_or_else(|| PagerError::Protocol(too_many().message))
    }
}

impl Asks {
    /// Wakes whoever waits, at the end.
    pub(crate) fn end(&self) {
        for lane in [&self.quick, &self.slow, &self.looks] {
            let _waiting = lock(&lane.waiting);
            lane.more.notify_all();
        }
    }
}

fn too_many() -> Trouble {
    Trouble::new(ProblemKind::Refused, "too many requests at once")
}

/// Answers a request.
pub(crate) fn reply(shared: &Shared, request: u64, result: Result<Answer, Trouble>) {
    let result = result.map_err(|trouble| trouble.problem());
    // A connection that ends is noticed by who reads it.
    let _ = shared
        .socket
        .send(&FromPager::Reply { request, result }, &[]);
}

/// The thread of what is quick.
pub(crate) fn run_quick(shared: &Shared, asks: &Asks) {
    while let Some(item) = asks.quick.take(shared) {
        match item {
            Item::Hear(message, fds) => {
                if let Err(error) = hear(shared, message, fds) {
                    return shared.fail(error);
                }
            }
            Item::Ask(request, ask) if is_slow(&ask) => {
                if !asks.slow.put(Item::Ask(request, ask)) {
                    reply(shared, request, Err(too_many()));
                }
            }
            // What is asked of mappings is asked of all of them.
            Item::Ask(request, ask) => {
                let swept = shared.wait_until_swept();
                reply(shared, request, swept.and_then(|()| quick(shared, &ask)));
            }
        }
    }
}

fn is_slow(ask: &Ask) -> bool {
    matches!(
        ask,
        Ask::Discard { .. }
            | Ask::Load { .. }
            | Ask::LoadAll
            | Ask::Arm { .. }
            | Ask::Prefault { .. }
    )
}

/// The thread that says the state.
pub(crate) fn run_looks(shared: &Shared, asks: &Asks) {
    while let Some(item) = asks.looks.take(shared) {
        if let Item::Ask(request, _) = item {
            let state = Box::new(shared.state());
            reply(shared, request, Ok(Answer::State(state)));
        }
    }
}

/// A thread of what is slow.
pub(crate) fn run_slow(shared: &Shared, asks: &Asks) {
    while let Some(item) = asks.slow.take(shared) {
        let Item::Ask(request, ask) = item else {
            continue;
        };
        let done = |()| Answer::Done;
        let result = match ask {
            Ask::Discard { gfn, pages } => shared.discard(gfn, pages).map(done),
            Ask::Load { gfn, pages, write } => shared.load(gfn, pages, write).map(done),
            Ask::Arm { snapshot } => shared.arm(snapshot),
            Ask::Prefault { gfn, pages } => {
                let mapped = shared.prefault(gfn, pages);
                mapped.map(|pages| Answer::Prefaulted { pages })
            }
            _ => shared.load_all().map(done),
        };
        reply(shared, request, result);
    }
}

fn quick(shared: &Shared, ask: &Ask) -> Result<Answer, Trouble> {
    let done = |()| Answer::Done;
    match *ask {
        Ask::Remove { memory } => shared.remove(memory).map(done),
        Ask::Move { memory, base_gfn } => shared.move_to(memory, base_gfn).map(done),
        Ask::Begin { snapshot } => shared.begin(snapshot).map(done),
        Ask::Unmap { gfn, pages } => shared.unmap(gfn, pages).map(done),
        Ask::Protect { gfn, pages } => shared.protect(gfn, pages).map(done),
        Ask::Age { gfn, pages } => shared.age(gfn, pages).map(Answer::Frames),
        Ask::Mapped { gfn, pages } => shared.mapped(gfn, pages),
        Ask::EndSnapshot { snapshot } => match shared.end_snapshot(snapshot) {
            true => Ok(Answer::Done),
            false => Err(no(format!("there is no snapshot {snapshot}"))),
        },
        // Those that are slow, or done at once, come elsewhere.
        Ask::Discard { .. }
        | Ask::Load { .. }
        | Ask::LoadAll
        | Ask::Arm { .. }
        | Ask::Prefault { .. }
        | Ask::Retry
        | Ask::State
        | Ask::Stop => Err(no("not here".to_owned())),
    }
}

/// What was asked for cannot be.
pub(super) fn no(what: String) -> Trouble {
    Trouble::new(ProblemKind::Refused, what)
}
