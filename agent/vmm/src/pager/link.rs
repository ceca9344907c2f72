//! One connection of a pager, on a thread of its own.
//!
//! It is served from HELLO to its end. While there is nothing for it to do it waits for its SETUP.
//! A second pager is sent away. Nothing here takes the machine's locks: who holds those may be
//! waiting for this very pager.

use std::{
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use slat_paging::wire::{FromPager, Socket, ToPager, WireError};

use super::{
    desk::Pager,
    state::{Inner, Link, Stage},
};

/// How often a connection that waits for something to do is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// One that has nothing to do for so long is sent away.
const IDLE: Duration = Duration::from_secs(120);
/// A pager whose connection is closed, or that was told to end, is gone within this.
const LEAVES: Duration = Duration::from_secs(2);
/// A pager that takes nothing for so long is given up.
const SEND: Duration = Duration::from_secs(5);

impl Pager {
    /// Serves a pager until it ends.
    pub(super) fn serve_pager(&self, socket: &Arc<Socket>, pid: u32) {
        let Some(number) = self.admit(socket, pid) else {
            tracing::warn!(pid, "a second pager is sent away");
            return;
        };
        let ended = self.serve_link(socket, number);
        socket.close();
        self.leave(number);
        match ended {
            Ok(()) | Err(WireError::Closed) => tracing::info!(pid, "a pager ended"),
            Err(error) => tracing::warn!(pid, %error, "a pager is given up"),
        }
    }

    fn admit(&self, socket: &Arc<Socket>, pid: u32) -> Option<u64> {
        let begun = Instant::now();
        let mut inner = self.lock();
        while let Some(link) = &inner.link {
            // One that has just died, or was told to end, is on its way out.
            let leaves = link.stopping || link.socket.is_closed();
            if !leaves || begun.elapsed() > 2 * LEAVES {
                return None;
            }
            if begun.elapsed() > LEAVES {
                link.socket.close();
            }
            let waited = self.changed().wait_timeout(inner, LOOK);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if inner.over {
            return None;
        }
        inner.links += 1;
        inner.silence.broken();
        let number = inner.links;
        inner.link = Some(Link {
            number,
            socket: Arc::clone(socket),
            pid,
            stage: Stage::Waiting,
            stopping: false,
        });
        self.done(inner);
        Some(number)
    }

    fn leave(&self, number: u64) {
        let mut inner = self.lock();
        let own = inner.link.take_if(|link| link.number == number);
        let Some(link) = own else { return };
        if link.stage >= Stage::SetUp && inner.work.is_some() && !link.stopping {
            inner.restarts += 1;
        }
        inner.asks.pager_gone();
        // What was wrong with it is not what is wrong with the next.
        inner.told.problem = None;
        inner.told.waiting = 0;
        self.done(inner);
    }

    fn serve_link(&self, socket: &Socket, number: u64) -> Result<(), WireError> {
        socket.set_send_patience(Some(SEND))?;
        if !self.await_work(socket) {
            return Ok(());
        }
        self.set_up()?;
        socket.set_patience(None)?;
        loop {
            let packet = socket.receive::<FromPager>()?;
            self.heard(socket, number, packet.message)?;
        }
    }

    /// Waits for something to do; false when there is none, or nobody any more.
    fn await_work(&self, socket: &Socket) -> bool {
        let begun = Instant::now();
        let mut inner = self.lock();
        while inner.work.is_none() {
            if inner.over || begun.elapsed() > IDLE || socket.is_closed() {
                return false;
            }
            let waited = self.changed().wait_timeout(inner, LOOK);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Tells it everything. Whoever waits for a pager that is gone tries again, and is told of
    /// anew.
    fn set_up(&self) -> Result<(), WireError> {
        let mut inner = self.lock();
        if inner.work.as_ref().is_some_and(|work| work.watched) {
            for memory in inner.memories.values() {
                self.watcher().wake(memory.guest())?;
            }
        }
        inner.set_up(self.watcher())?;
        self.done(inner);
        Ok(())
    }

    /// The lock, for a pager that said something.
    fn hears(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.lock();
        let shown = inner.silence.shown().is_some();
        inner.silence.broken();
        if shown {
            self.done(inner);
            inner = self.lock();
        }
        inner
    }

    fn heard(&self, socket: &Socket, number: u64, message: FromPager) -> Result<(), WireError> {
        if let FromPager::DropMappings {
            request,
            memory,
            page,
            pages,
        } = message
        {
            // Without the lock: it may take long.
            let view = self.hears().view_of(memory, page, pages);
            let dropped = view.and_then(|slot| slot.guest().drop_mappings(page, pages));
            let errno =
                dropped.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            // It had nobody to talk to meanwhile.
            drop(self.hears());
            return socket.send(&ToPager::Dropped { request, errno }, &[]);
        }
        let mut inner = self.hears();
        let inner_ref = &mut *inner;
        match message {
            FromPager::Attached => {
                let link = inner_ref.link.as_mut();
                if let Some(link) = link.filter(|link| link.number == number) {
                    link.stage = Stage::Attached;
                }
                inner_ref.flush();
            }
            FromPager::Reply { request, result } => {
                // Before its vCPUs run, and before another pager is told of it.
                let begun = inner_ref.asks.begins(request).filter(|_| result.is_ok());
                if let Some(snapshot) = begun {
                    inner_ref.snapshots.begun(snapshot);
                }
                inner_ref.asks.answer(request, result);
            }
            FromPager::State(state) => inner_ref.told = *state,
            FromPager::SnapshotEnded { snapshot } => {
                if inner_ref.snapshots.all.remove(&snapshot).is_some() {
                    inner_ref.ended.push(snapshot);
                }
            }
            FromPager::Loaded => inner_ref.loaded = inner_ref.has_source,
            FromPager::Hello { .. } => {
                return Err(WireError::Bad("a second greeting".to_owned()));
            }
            FromPager::DropMappings { .. } => {}
        }
        self.done(inner);
        Ok(())
    }
}
