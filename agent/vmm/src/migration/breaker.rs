//! Breaks off what the source's threads are blocked in, so that a cancel acts at once.
//!
//! Every connection of a migration is watched from its first moment, and every wait of the
//! coordinator that is not a read or a write of one asks the breaker. Breaking off is final.
//!
//! *Locking*: one mutex around the watched connections, held for a look and for the shutdowns,
//! which do not block.

use std::{
    io,
    net::{Shutdown, TcpStream},
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    broken: AtomicBool,
    watched: Mutex<Vec<Watched>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Watched {
    stream: TcpStream,
    how: Shutdown,
}

impl Breaker {
    fn watched(&self) -> MutexGuard<'_, Vec<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on breaking off shuts `stream` down as `how` says; at once when that has happened
    /// already.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(super) fn watch(&self, stream: &TcpStream, how: Shutdown) -> io::Result<()> {
        let stream = stream.try_clone()?;
        let mut watched = self.watched();
        if self.is_broken() {
            // Closed by itself meanwhile: as good.
            drop(stream.shutdown(how));
        } else {
            watched.push(Watched { stream, how });
        }
        Ok(())
    }

    /// Lets go of the connection that was watched last.
    pub(super) fn forget_last(&self) {
        self.watched().pop();
    }

    /// Breaks off; the connections are let go.
    pub(super) fn break_off(&self) {
        let mut watched = self.watched();
        self.broken.store(true, Ordering::Release);
        for Watched { stream, how } in watched.drain(..) {
            // Closed by itself meanwhile: as good.
            drop(stream.shutdown(how));
        }
        drop(watched);
        self.changed.notify_all();
    }

    /// Whether it was broken off.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// What a long computation looks at.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.broken
    }

    /// Waits for `time`, less when it is broken off: then the answer is false.
    pub(super) fn sleep(&self, time: Duration) -> bool {
        let watched = self.watched();
        drop(
            self.changed
                .wait_timeout_while(watched, time, |_| !self.is_broken())
                .unwrap_or_else(PoisonError::into_inner),
        );
        !self.is_broken()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::TcpListener,
        sync::Arc,
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_sleep_ends_when_it_is_broken_off() {
        let breaker = Arc::new(Breaker::default());
        assert!(breaker.sleep(Duration::from_millis(1)));
        let begun = Instant::now();
        let sleeper = {
            let breaker = Arc::clone(&breaker);
            thread::spawn(move || breaker.sleep(LONG))
        };
        breaker.break_off();
        assert!(!sleeper.join().unwrap());
        assert!(begun.elapsed() < LONG / 2);
        assert!(!breaker.sleep(LONG));
    }

    #[test]
    fn connections_are_shut_whether_they_are_watched_before_or_after() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let breaker = Breaker::default();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut before, forgotten, mut after) = (connect(), connect(), connect());
        breaker.watch(&before, Shutdown::Read).unwrap();
        breaker.watch(&forgotten, Shutdown::Both).unwrap();
        breaker.forget_last();
        breaker.break_off();
        breaker.watch(&after, Shutdown::Read).unwrap();
        let mut byte = [0];
        assert_eq!(before.read(&mut byte).unwrap(), 0);
        assert_eq!(after.read(&mut byte).unwrap(), 0);
        forgotten.set_nonblocking(true).unwrap();
        let open = (&forgotten).read(&mut byte).unwrap_err();
        assert_eq!(open.kind(), io::ErrorKind::WouldBlock);
    }
}
