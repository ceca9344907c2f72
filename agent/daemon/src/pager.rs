//! Keeps a VM's pager: one task a VM, from its process's beginning to its end.
//!
//! A pager is started when the VM's process says that there is none (`NO_PAGER`), and when somebody
//! here asks for one ([`super::paged`]): before a snapshot is taken, and while a VM is made of a
//! copy. One that an agent before this one started is found by the process id that the VM says,
//! once its command line shows that it is this VM's.
//!
//! A pager that dies while it is needed is replaced at once the first time, then after a pause that
//! doubles from [`FIRST_PAUSE`] to [`LONGEST_PAUSE`], until one has lived for [`STEADY`]: a guest
//! waits meanwhile, and a host must not burn on a pager that cannot start. One that ends with code
//! 0 had nothing left to do.
//!
//! One that the VM gave up (it said nothing for seconds: it is frozen) does not end by itself. It
//! is killed when the VM has been without it for [`LET_GO`], and so is one that was started and
//! does not serve within [`COMES`].
//!
//! A VM that ends tells its pager to stop first, so that its end is no death. Where the VM's
//! process itself was killed, its pager may die of that: none is started for a process that ended.
//!
//! When the VM's process is gone its pager's socket is closed, and it ends; one that does not
//! within [`LEAVE`] is killed. A pager owns nothing: killing one costs its guest a moment.

use std::{
    future::pending,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;

use super::{
    cgroup::Cgroups, counts, helper::Programs, living::LiveVm, paged::Wish, process::Process,
};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// One that lived for so long can start.
const STEADY: Duration = Duration::from_secs(10);
/// How long a pager may stay that the VM has given up: most end by themselves.
const LET_GO: Duration = Duration::from_secs(3);
/// How long one may take until it serves, on a slow machine.
const COMES: Duration = Duration::from_secs(30);
/// How long a pager may stay after its VM's process.
const LEAVE: Duration = Duration::from_secs(5);

struct Keeper {
    live: Arc<LiveVm>,
    programs: Arc<Programs>,
    cgroups: Arc<Cgroups>,
    current: Option<(Process, Instant)>,
    /// The VM has named the current one as its pager.
    served: bool,
    /// Since when the VM is without a pager while there is a current one.
    missing: Option<Instant>,
    /// The last one did not end by itself, and is to be replaced.
    lost: bool,
    /// Up to this wish a pager came, and had nothing left to do; whoever asks later gets another.
    finished: u64,
    /// The wishes that there were when the last one was started.
    asks: u64,
    /// Pagers in a row that did not live long.
    failed: u32,
    not_before: Instant,
}

/// Keeps a VM's pager until the VM's process is gone. Its owner ends it with the agent; pagers go
/// on.
pub(super) async fn keep(live: Arc<LiveVm>, programs: Arc<Programs>, cgroups: Arc<Cgroups>) {
    let mut wishes = live.paged().wishes();
    let mut keeper = Keeper {
        live: Arc::clone(&live),
        programs,
        cgroups,
        current: None,
        served: false,
        missing: None,
        lost: false,
        finished: 0,
        asks: 0,
        failed: 0,
        not_before: Instant::now(),
    };
    loop {
        let wish = *wishes.borrow_and_update();
        keeper.look(wish);
        let due = keeper.due(wish);
        let overdue = keeper.overdue();
        tokio::select! {
            biased;
            () = live.gone().cancelled() => break,
            () = keeper.ended() => keeper.note_end(),
            changed = wishes.changed() => if changed.is_err() { break },
            () = until(due) => keeper.start(wish.asks).await,
            () = until(overdue) => keeper.put_down(),
        }
    }
    keeper.see_off().await;
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => pending().await,
    }
}

impl Keeper {
    /// Takes in what the VM says: a pager that an agent before this one started.
    fn look(&mut self, wish: Wish) {
        if !wish.watched && wish.asked == 0 {
            // Nobody misses the last one.
            self.lost = false;
        }
        if self.current.is_none() && wish.pid != 0 {
            match found(&self.live, wish.pid) {
                Ok(process) => {
                    tracing::info!(vm = %self.live.name(), pid = wish.pid, "a VM's pager found again");
                    self.set_current(process);
                }
                Err(error) => {
                    tracing::debug!(vm = %self.live.name(), pid = wish.pid, %error, "no pager of this VM");
                }
            }
        }
        self.miss(wish);
    }

    /// Whether the VM does without the pager that there is.
    fn miss(&mut self, wish: Wish) {
        let Some((process, _)) = &self.current else {
            return;
        };
        self.served |= wish.pid == process.pid();
        let missing = wish.no_pager && wish.pid != process.pid();
        self.missing = missing.then(|| self.missing.unwrap_or_else(Instant::now));
    }

    /// When a pager is to be killed that serves nobody.
    fn overdue(&self) -> Option<Instant> {
        let patience = if self.served { LET_GO } else { COMES };
        self.missing.map(|since| since + patience)
    }

    /// Kills it; its end is noted when it has ended.
    fn put_down(&mut self) {
        self.missing = None;
        if let Some((process, _)) = &self.current {
            let (vm, pid) = (self.live.name(), process.pid());
            tracing::warn!(%vm, pid, "killing a VM's pager that serves nobody");
            process.kill();
        }
    }

    fn set_current(&mut self, process: Process) {
        self.current = Some((process, Instant::now()));
        self.served = false;
        self.missing = None;
    }

    /// When a pager is to be started, if one is.
    fn due(&self, wish: Wish) -> Option<Instant> {
        let asked = wish.asked > 0 && wish.pid == 0 && wish.asks > self.finished;
        let needed = wish.no_pager || asked;
        (needed && self.current.is_none()).then_some(self.not_before)
    }

    async fn ended(&self) {
        match &self.current {
            Some((process, _)) => process.ended().await,
            None => pending().await,
        }
    }

    fn note_end(&mut self) {
        let Some((process, began)) = self.current.take() else {
            return;
        };
        self.missing = None;
        let (vm, pid) = (self.live.name(), process.pid());
        let end = process.end();
        if end.is_some_and(super::process::End::is_clean) {
            tracing::info!(%vm, pid, "a VM's pager has nothing left to do");
            self.finished = self.asks;
            self.failed = 0;
            return;
        }
        match end {
            Some(end) => tracing::warn!(%vm, pid, %end, "a VM's pager is gone"),
            None => tracing::info!(%vm, pid, "a VM's pager is gone"),
        }
        self.lost = true;
        self.back_off(began.elapsed() >= STEADY);
    }

    fn back_off(&mut self, steady: bool) {
        self.failed = if steady {
            1
        } else {
            self.failed.saturating_add(1)
        };
        self.not_before = Instant::now() + pause(self.failed);
    }

    async fn start(&mut self, asks: u64) {
        if self.live.process().has_ended() {
            // What it left is taken in just now, and then it is gone.
            self.not_before = Instant::now() + FIRST_PAUSE;
            return;
        }
        self.asks = asks;
        let vm = self.live.name();
        match self.programs.start_pager(self.live.dir()) {
            Ok(process) => {
                let pid = process.pid();
                let (cgroups, uid) = (Arc::clone(&self.cgroups), self.live.uid().to_string());
                // Off the runtime's threads: a sweep may hold the lock over many files.
                let entering = tokio::task::spawn_blocking(move || cgroups.enter(&uid, pid));
                if let Err(error) = entering.await {
                    tracing::error!(%error, "a pager stays in the agent's cgroup");
                }
                if self.lost {
                    counter!(counts::PAGER_RESTARTS).increment(1);
                    tracing::warn!(%vm, pid, failed = self.failed, "a VM's pager started again");
                } else {
                    tracing::info!(%vm, pid, "a VM's pager started");
                }
                self.lost = false;
                self.set_current(process);
            }
            Err(error) => {
                tracing::error!(%vm, %error, "a VM's pager cannot be started");
                self.back_off(false);
                self.not_before = self.not_before.max(Instant::now() + FIRST_PAUSE);
            }
        }
    }

    async fn see_off(self) {
        let Some((process, _)) = self.current else {
            return;
        };
        if tokio::time::timeout(LEAVE, process.ended()).await.is_err() {
            tracing::warn!(vm = %self.live.name(), pid = process.pid(), "ending a pager that outlives its VM");
            process.put_down().await;
        }
    }
}

/// Before the next one, after so many in a row did not live long.
fn pause(failed: u32) -> Duration {
    match failed {
        0 | 1 => Duration::ZERO,
        more => FIRST_PAUSE
            .saturating_mul(1 << (more - 2).min(8))
            .min(LONGEST_PAUSE),
    }
}

/// The process of that number, if its command line says that it is this VM's pager.
fn found(live: &LiveVm, pid: u32) -> io::Result<Process> {
    let process = Process::new(pid, None)?;
    // Read after the process was pinned: it is this one's, or it has ended.
    let words = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    let dir = live.dir().path().as_os_str().as_encoded_bytes();
    let mut words = words.split(|byte| *byte == 0);
    if words.any(|word| word == dir) {
        return Ok(process);
    }
    Err(io::Error::other("its command line names another directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_replaced_at_once_and_a_crash_loop_is_slow() {
        let pauses: Vec<u128> = (1..8).map(|failed| pause(failed).as_millis()).collect();
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
