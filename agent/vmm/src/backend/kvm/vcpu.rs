//! vCPU threads.
//!
//! # Protocol
//! One thread a vCPU, parked when it is made. A thread that is let go clears its exit flag, takes
//! its vCPU's descriptor and runs the guest until KVM_RUN is interrupted while the wanted state is
//! no longer "run"; then it gives the descriptor back and parks. Because every park follows an
//! interrupted KVM_RUN with the exit flag set, I/O of the last exit has been completed by then and
//! the registers are those after the instruction: state can be saved.
//!
//! Wanted state and exit flags change together under `control`, so a thread never clears a flag it
//! should obey. A guest that ends or fails stops all vCPUs; the last one to park reports it, once.
//!
//! # Invariants
//! `parked` counts threads that hold no descriptor and run no guest code. A thread's kick target is
//! there exactly while the thread lives. Threads end when `control.wanted` is `Exit` and are joined
//! by [`Threads::stop`].

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kvm_ioctls::VcpuFd;

use super::{
    super::{
        BackendError, EventSink, GuestEvent,
        run_failure::{Cause, RunFailure},
    },
    arch,
    console::Console,
    exit::{Contract, GuestExit},
    kick::{self, ExitFlag, Target},
    run_error::{self, After},
    slots::Slots,
};
use crate::{
    confine,
    guest::memstress::{Pacer, Turn},
};

/// How long a vCPU may take to stop.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// A vCPU that shall leave the guest for a moment is kicked again after this.
const KICK_AGAIN: Duration = Duration::from_micros(100);
/// An idle guest's control page is looked at again after this.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// What the guest may ask for, and what that takes.
#[derive(Debug)]
pub(super) enum Serving {
    /// The doorbell.
    Memstress,
    /// Console and end.
    Raw(Option<Console>),
}

impl Serving {
    fn contract(&self) -> Contract {
        match self {
            Self::Memstress => Contract::Memstress,
            Self::Raw(_) => Contract::Raw,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Exit,
}

#[derive(Debug)]
struct ThreadControl {
    wanted: Wanted,
    parked: usize,
    /// Some vCPU ran: state can no longer be loaded.
    ran: bool,
    /// The guest ended, so the vCPUs never run again.
    ended: bool,
    /// That end, until it is reported.
    report: Option<GuestEvent>,
    targets: Vec<Option<Target>>,
    /// Thread ids, by vCPU; 0 before a thread begins.
    ids: Vec<i32>,
}

#[derive(Debug)]
struct Vcpu {
    fd: Mutex<VcpuFd>,
    exit: ExitFlag,
    /// Counts entries into KVM_RUN and returns from it: odd while the thread is inside.
    crossings: AtomicU64,
}

struct Shared {
    vcpus: Vec<Vcpu>,
    control: Mutex<ThreadControl>,
    /// Wanted state changed: threads wake from parking or pacing.
    told: Condvar,
    /// A thread parked or ended: the owner wakes.
    parked: Condvar,
    /// Mirror of `wanted == Run` for the path that takes no lock.
    go: AtomicBool,
    slots: Arc<Slots>,
    serving: Serving,
    events: EventSink,
}

/// The vCPUs of a VM and their threads.
pub(super) struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads")
            .field("control", &self.shared.control)
            .finish_non_exhaustive()
    }
}

fn gone(message: impl Into<String>) -> BackendError {
    BackendError::Vcpu {
        message: message.into(),
    }
}

impl Threads {
    /// Parked threads for `vcpus`; `run_size` is that of their shared pages.
    pub(super) fn new(
        vcpus: Vec<VcpuFd>,
        run_size: usize,
        slots: Arc<Slots>,
        serving: Serving,
        events: EventSink,
    ) -> Result<Self, BackendError> {
        let ioctl = |op| move |source: io::Error| BackendError::Ioctl { op, source };
        kick::install_handler().map_err(ioctl("sigaction"))?;
        let vcpus = vcpus
            .into_iter()
            .map(|fd| {
                Ok(Vcpu {
                    exit: ExitFlag::map(&fd, run_size).map_err(ioctl("mmap of a vCPU"))?,
                    fd: Mutex::new(fd),
                    crossings: AtomicU64::new(0),
                })
            })
            .collect::<Result<Vec<_>, BackendError>>()?;
        let count = vcpus.len();
        let shared = Arc::new(Shared {
            vcpus,
            control: Mutex::new(ThreadControl {
                wanted: Wanted::Pause,
                parked: 0,
                ran: false,
                ended: false,
                report: None,
                targets: vec![None; count],
                ids: vec![0; count],
            }),
            told: Condvar::new(),
            parked: Condvar::new(),
            go: AtomicBool::new(false),
            slots,
            serving,
            events,
        });
        // Dropped on an error below, it ends the threads made so far.
        let mut threads = Self {
            shared,
            handles: Vec::with_capacity(count),
        };
        for index in 0..count {
            let shared = Arc::clone(&threads.shared);
            let handle = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || shared.thread(index))
                .map_err(ioctl("starting a vCPU thread"))?;
            threads.handles.push(handle);
        }
        threads.wait_parked()?;
        Ok(threads)
    }

    /// Thread ids, by vCPU.
    pub(super) fn ids(&self) -> Vec<i32> {
        self.shared.lock().ids.clone()
    }

    pub(super) fn run(&self) -> Result<(), BackendError> {
        let mut control = self.shared.lock();
        if control.ended {
            return Err(gone("the guest has ended; its vCPUs do not run again"));
        }
        if control.targets.iter().any(Option::is_none) {
            return Err(gone("a vCPU thread is gone"));
        }
        control.ran = true;
        self.shared.want(&mut control, Wanted::Run);
        Ok(())
    }

    pub(super) fn pause(&self) -> Result<(), BackendError> {
        let mut control = self.shared.lock();
        if control.wanted == Wanted::Run {
            self.shared.want(&mut control, Wanted::Pause);
        }
        drop(control);
        self.wait_parked()
    }

    fn wait_parked(&self) -> Result<(), BackendError> {
        let count = self.handles.len();
        let (control, timeout) = self
            .shared
            .parked
            .wait_timeout_while(self.shared.lock(), PAUSE_LIMIT, |control| {
                control.parked < count
            })
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Err(gone(format!(
                "{} of {count} vCPUs did not stop within {} s",
                count - control.parked,
                PAUSE_LIMIT.as_secs()
            )));
        }
        Ok(())
    }

    /// Makes every vCPU that is in the guest leave it once. When this returns, what it wrote before
    /// the call has come from the CPU's own buffers into the kernel's log. vCPUs go on at once.
    pub(super) fn leave_guest(&self) -> Result<(), BackendError> {
        let crossings = |vcpu: &Vcpu| vcpu.crossings.load(Ordering::SeqCst);
        let at_first: Vec<u64> = self.shared.vcpus.iter().map(crossings).collect();
        let begun = Instant::now();
        loop {
            let inside: Vec<usize> = (0..at_first.len())
                .filter(|index| {
                    let first = at_first[*index];
                    first % 2 == 1 && crossings(&self.shared.vcpus[*index]) == first
                })
                .collect();
            if inside.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > PAUSE_LIMIT {
                return Err(gone(format!(
                    "{} vCPUs did not leave the guest within {} s",
                    inside.len(),
                    PAUSE_LIMIT.as_secs()
                )));
            }
            {
                let control = self.shared.lock();
                for target in inside.iter().filter_map(|index| control.targets[*index]) {
                    // SAFETY: a thread takes its target away under `control`, which is held, before
                    // it ends.
                    unsafe { target.kick() };
                }
            }
            // A signal that comes just before KVM_RUN does nothing, so one is not always enough.
            thread::sleep(KICK_AGAIN);
        }
    }

    /// Calls `each` with every vCPU while all are parked; `fresh` demands that none ever ran.
    pub(super) fn while_stopped(
        &self,
        fresh: bool,
        mut each: impl FnMut(u32, &VcpuFd) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        {
            let control = self.shared.lock();
            if control.wanted == Wanted::Run || control.parked < self.handles.len() {
                return Err(gone("the vCPUs run"));
            }
            if fresh && control.ran {
                return Err(gone("the vCPUs have run; state can only be loaded before"));
            }
        }
        for (index, vcpu) in self.shared.vcpus.iter().enumerate() {
            let fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
            // At most 64 vCPUs.
            each(index as u32, &fd)?;
        }
        Ok(())
    }

    /// Ends and joins the threads. One that does not stop is left behind, with an error in the log.
    fn stop(&mut self) {
        {
            let mut control = self.shared.lock();
            self.shared.want(&mut control, Wanted::Exit);
        }
        // The last owner may be a vCPU thread itself, through the event sink; it cannot wait for
        // its own end.
        let me = Target::current();
        let alive = |control: &mut ThreadControl| {
            let mut targets = control.targets.iter().flatten();
            targets.any(|target| *target != me)
        };
        let (control, timeout) = self
            .shared
            .parked
            .wait_timeout_while(self.shared.lock(), PAUSE_LIMIT, alive)
            .unwrap_or_else(PoisonError::into_inner);
        drop(control);
        if timeout.timed_out() {
            tracing::error!("a vCPU thread does not end; leaving it behind");
            return;
        }
        for handle in self.handles.drain(..) {
            if handle.thread().id() != thread::current().id() && handle.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ThreadControl> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the wanted state and makes every thread see it.
    fn want(&self, control: &mut ThreadControl, wanted: Wanted) {
        control.wanted = wanted;
        self.go.store(wanted == Wanted::Run, Ordering::SeqCst);
        if wanted != Wanted::Run {
            for (vcpu, target) in self.vcpus.iter().zip(&control.targets) {
                vcpu.exit.set(true);
                if let Some(target) = target {
                    // SAFETY: a thread takes its target away under `control`, which is held, before
                    // it ends.
                    unsafe { target.kick() };
                }
            }
        }
        self.told.notify_all();
    }

    /// The guest ends: stops all vCPUs, keeps the first reason.
    fn end(&self, event: GuestEvent) {
        let mut control = self.lock();
        if !control.ended {
            control.ended = true;
            control.report = Some(event);
        }
        if control.wanted == Wanted::Run {
            self.want(&mut control, Wanted::Pause);
        }
    }

    fn thread(&self, index: usize) {
        kick::unblock();
        confine::enter(confine::Role::Vcpu);
        {
            let mut control = self.lock();
            control.targets[index] = Some(Target::current());
            control.ids[index] = rustix::thread::gettid().as_raw_nonzero().get();
        }
        let leave = Leave {
            shared: self,
            index,
        };
        let mut pacer = Pacer::new();
        while self.park(index) {
            self.run_guest(index, &mut pacer);
        }
        drop(leave);
    }

    /// Parks until told to run (true) or to end (false).
    fn park(&self, index: usize) -> bool {
        let mut control = self.lock();
        control.parked += 1;
        self.parked.notify_all();
        if control.parked == self.vcpus.len()
            && let Some(event) = control.report.take()
        {
            drop(control);
            (self.events)(event);
            control = self.lock();
        }
        let mut control = self
            .told
            .wait_while(control, |control| control.wanted == Wanted::Pause)
            .unwrap_or_else(PoisonError::into_inner);
        control.parked -= 1;
        let run = control.wanted == Wanted::Run;
        if run {
            self.vcpus[index].exit.set(false);
        }
        run
    }

    /// Runs the guest until told otherwise.
    fn run_guest(&self, index: usize, pacer: &mut Pacer) {
        let mut fd = self.vcpus[index]
            .fd
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let contract = self.serving.contract();
        let crossings = &self.vcpus[index].crossings;
        let mut again = 0;
        let cause = loop {
            crossings.fetch_add(1, Ordering::SeqCst);
            let left = arch::run(&mut fd, contract);
            crossings.fetch_add(1, Ordering::SeqCst);
            match left {
                Ok(exit) => {
                    again = 0;
                    match self.serve(index, pacer, exit) {
                        Ok(()) => {}
                        Err(Unserved::Cause(cause)) => break cause,
                        Err(Unserved::Internal) => break run_error::internal(fd.get_kvm_run()),
                    }
                }
                Err(error) => match run_error::judge(error, again) {
                    After::Again if !self.go.load(Ordering::SeqCst) => return,
                    After::Again => again += u32::from(error.errno() == libc::EAGAIN),
                    After::Failed(cause) => break cause,
                },
            }
        };
        // At most 64 vCPUs.
        let at = Some((index as u32, arch::program_counter(&fd)));
        self.end(GuestEvent::Failed(RunFailure { at, cause }));
    }

    /// Serves an exit, or says what is wrong with it.
    fn serve(&self, index: usize, pacer: &mut Pacer, exit: GuestExit<'_>) -> Result<(), Unserved> {
        match exit {
            GuestExit::Again => {}
            GuestExit::Doorbell(answer) => answer.fill(u8::from(!self.may_go(index, pacer)?)),
            GuestExit::Print(bytes) => {
                if let Serving::Raw(Some(console)) = &self.serving {
                    console.print(bytes);
                }
            }
            // The instruction is done when the vCPU enters again.
            GuestExit::Store { gpa } if self.slots.drops_write(gpa) => {}
            GuestExit::Store { gpa } => {
                return Err(format!("write to guest-physical {gpa:#x}, where no slot is,").into());
            }
            GuestExit::RingFull => self
                .slots
                .relieve()
                .map_err(|error| format!("dirty ring full, and no room made: {error},"))?,
            GuestExit::End => self.end(GuestEvent::Stopped),
            GuestExit::Refused(what) => return Err(what.into()),
            GuestExit::Failed(cause) => return Err(Unserved::Cause(cause)),
            GuestExit::Internal => return Err(Unserved::Internal),
        }
        Ok(())
    }

    /// Waits until memstress may run a batch (true) or its vCPU shall stop (false).
    fn may_go(&self, index: usize, pacer: &mut Pacer) -> Result<bool, String> {
        loop {
            if !self.go.load(Ordering::SeqCst) {
                return Ok(false);
            }
            let table = self.slots.memory().table();
            let turn = pacer
                .turn(&mut &*table, index as u32, Instant::now())
                .map_err(|error| format!("memstress' control page: {error}"))?;
            drop(table);
            let wait = match turn {
                Turn::Go => return Ok(true),
                Turn::Wait(wait) => wait,
                Turn::Idle => IDLE_LOOK,
            };
            let _told = self
                .told
                .wait_timeout_while(self.lock(), wait, |control| control.wanted == Wanted::Run)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Why a vCPU cannot go on after an exit.
enum Unserved {
    Cause(Cause),
    /// See [`GuestExit::Internal`].
    Internal,
}

impl From<String> for Unserved {
    fn from(words: String) -> Self {
        Self::Cause(Cause::Guest(words))
    }
}

/// Takes a thread's kick target away when it ends, even by a panic.
struct Leave<'a> {
    shared: &'a Shared,
    index: usize,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.shared.lock().targets[self.index] = None;
        self.shared.parked.notify_all();
    }
}
