//! Fences: makes sure that nothing of a host runs any more, and lets doubts be resolved by that.
//!
//! ```text
//! hook runs --exit 0--> proof with the host, in memory: its incarnation is refused
//!                       --on disk--> migrations with a side there are told
//!           --anything else--> FENCE_FAILED, nothing changed
//! ```
//! While it runs no migration begins from the host or to it. When the host's agent registers
//! another start of itself meanwhile, nobody knows which start the hook ended: FENCE_FAILED.
//!
//! Nothing is decided before the proof is on disk: a server that dies in between finds it with the
//! host when it starts again, and each migration looks for it then. A hook that was killed or
//! failed may have done its work all the same; that counts for nothing until one says so.
//!
//! # Locking and tasks
//! Each fence is a task of its own: a caller that goes away ends nothing. `running` (`std`) is a
//! map of host names, locked for looks and changes only: one fence of a host at a time, and who
//! asks meanwhile waits for that one. [`Fences::stop`] kills hooks that run and returns when all
//! tasks have ended; `stop` is cancelled under `running`, so none begins after that.

mod hook;

use std::{
    collections::HashMap,
    fs::File,
    io::Read as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use metrics::counter;
use slat_proto::{
    ApiError, Reason,
    model::{nanos_duration, now},
    v1,
};
use tokio::{sync::watch, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::hook::FenceHook;
use crate::{
    fleet::{BeingFenced, Fenceable, Fleet},
    metrics::FENCES,
    migration::Migrations,
};

/// Before it is looked again whether a proof is on disk.
const PAUSE: Duration = Duration::from_millis(200);
/// Characters kept of who ordered a fence.
const WHO: usize = 300;

/// That a host is fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fenced {
    /// The hook ran for this order.
    Now,
    /// It was fenced before, and the hook was not run again.
    Before,
}

type Outcome = Result<Fenced, ApiError>;

/// See the module.
pub(crate) struct Fences {
    hook: Option<FenceHook>,
    fleet: Arc<Fleet>,
    migrations: Arc<Migrations>,
    running: Mutex<HashMap<String, watch::Receiver<Option<Outcome>>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Fences {
    pub(crate) fn new(
        hook: Option<FenceHook>,
        fleet: Arc<Fleet>,
        migrations: Arc<Migrations>,
    ) -> Arc<Self> {
        Arc::new(Self {
            hook,
            fleet,
            migrations,
            running: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Kills hooks that run; returns when all that was begun has ended.
    pub(crate) async fn stop(&self) {
        {
            let _nothing_begins = self.running();
            self.stop.cancel();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<Option<Outcome>>>> {
        // Only whole insertions and removals happen under it.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fences a host, unless its last incarnation is fenced already, which its message then says.
    /// The host as it is then.
    ///
    /// # Errors
    /// NO_SUCH_HOST, NO_FENCE_HOOK, HOST_IN_USE; FENCE_FAILED: nothing was decided; STORE: the hook
    /// did its work, and nothing is decided before that is on disk.
    pub(crate) async fn fence(
        self: &Arc<Self>,
        host: &str,
        force: bool,
        ordered_by: &str,
    ) -> Result<v1::Host, ApiError> {
        self.fleet.host(host)?;
        let mut outcome = self.begin(host, force, ordered_by)?;
        let ended = outcome.wait_for(Option::is_some).await;
        // A task that ended without a word was ended with the server.
        let ended = ended.map_or_else(|_| Some(Err(stopping(host))), |ended| ended.clone());
        let fenced = ended.unwrap_or_else(|| Err(stopping(host)))?;
        let mut shown = self.fleet.host(host)?;
        if fenced == Fenced::Before {
            let words = fenced_before(&shown);
            shown.state_message = match shown.state_message.as_str() {
                "" => words,
                message => format!("{words}; {message}"),
            };
        }
        Ok(shown)
    }

    /// Begins a fence, or joins the one that runs.
    fn begin(
        self: &Arc<Self>,
        host: &str,
        force: bool,
        ordered_by: &str,
    ) -> Result<watch::Receiver<Option<Outcome>>, ApiError> {
        let mut running = self.running();
        if self.stop.is_cancelled() {
            return Err(stopping(host));
        }
        if let Some(running) = running.get(host) {
            return Ok(running.clone());
        }
        let known = self
            .fleet
            .fence_of(host)
            .filter(|_| self.fleet.is_fenced(host));
        let wanted = match known {
            // Repeated: perhaps the last order had no answer, or its proof was not on disk.
            Some(fence) => Wanted::Settle(fence.id),
            None => {
                let hook = self.hook.clone().ok_or_else(|| no_hook(host))?;
                let target = self.fleet.may_fence(host, force)?;
                let who: String = ordered_by.chars().take(WHO).collect();
                tracing::warn!(%host, hook = %hook.program.display(), ordered_by = %who, "a host is being fenced");
                Wanted::Fence(hook, target, who)
            }
        };
        let (told, outcome) = watch::channel(None);
        running.insert(host.to_owned(), outcome.clone());
        // Made last: its end takes the lock.
        let turn = Turn {
            fences: Arc::clone(self),
            host: host.to_owned(),
            told,
            mark: Some(self.fleet.fence_begins(host)),
        };
        self.tasks.spawn(turn.take(wanted));
        Ok(outcome)
    }
}

/// What a turn is for.
enum Wanted {
    Settle(String),
    Fence(FenceHook, Fenceable, String),
}

/// The one fence of a host that runs.
struct Turn {
    fences: Arc<Fences>,
    host: String,
    told: watch::Sender<Option<Outcome>>,
    /// Until it has ended.
    mark: Option<BeingFenced>,
}

impl Turn {
    fn tell(&self, outcome: Outcome) {
        self.told.send_replace(Some(outcome));
    }

    /// It is over: who hears of that finds nothing of it.
    fn end(&mut self, outcome: Outcome) {
        self.leave();
        // Who waited may have been told of a disk that took long.
        if self.told.borrow().is_none() {
            self.tell(outcome);
        }
    }

    fn leave(&mut self) {
        // In this order, and once: the next turn has a mark of its own.
        if let Some(mark) = self.mark.take() {
            drop(mark);
            self.fences.running().remove(&self.host);
        }
    }

    async fn take(mut self, wanted: Wanted) {
        match wanted {
            Wanted::Settle(id) => self.settle(&id, Fenced::Before).await,
            Wanted::Fence(hook, target, who) => self.carry_out(hook, target, who).await,
        }
    }

    async fn carry_out(&mut self, hook: FenceHook, target: Fenceable, ordered_by: String) {
        let host = self.host.clone();
        match self.run(&hook, target, ordered_by).await {
            Ok(fence) => {
                counter!(FENCES, "result" => "done").increment(1);
                tracing::warn!(%host, fence = %fence.id, incarnation = %fence.incarnation, ordered_by = %fence.ordered_by,
                    proof = %fence.proof, "a host is fenced: nothing of it runs any more");
                self.settle(&fence.id, Fenced::Now).await;
            }
            Err(error) => {
                counter!(FENCES, "result" => "failed").increment(1);
                tracing::error!(%host, %error, reason = %error.reason, said = error.metadata.get("said"),
                    "a host is not fenced; nothing is decided");
                self.end(Err(error));
            }
        }
    }

    async fn run(
        &self,
        hook: &FenceHook,
        target: Fenceable,
        ordered_by: String,
    ) -> Result<v1::Fence, ApiError> {
        let fences = &self.fences;
        let id =
            new_id().map_err(|source| hook::HookError::Run(source).to_api(hook, &self.host))?;
        let done = hook::run(hook, &target, &id, &fences.stop).await;
        let done = done.map_err(|error| error.to_api(hook, &self.host))?;
        let nanos = i128::try_from(done.took.as_nanos()).unwrap_or(i128::MAX);
        let fence = v1::Fence {
            incarnation: target.incarnation,
            time: Some(now()),
            ordered_by,
            hook: hook.program.display().to_string(),
            proof: done.proof,
            duration: Some(nanos_duration(nanos)),
            id,
        };
        fences.fleet.fence(&self.host, fence.clone())?;
        Ok(fence)
    }

    /// Waits until the proof is on disk, then tells the migrations. Who waits is told of a disk
    /// that takes long; the proof waits for it.
    async fn settle(&mut self, id: &str, fenced: Fenced) {
        let (fences, host) = (Arc::clone(&self.fences), self.host.clone());
        while let Err(error) = fences.fleet.settled().await {
            if self.told.borrow().is_none() {
                tracing::error!(%host, fence = %id, %error, "a fence waits for the store");
                self.tell(Err(ApiError::new(
                    error.reason,
                    format!(
                        "{host} is fenced, and nothing is decided by that before it is on disk: {}",
                        error.message
                    ),
                )
                .with("host", &host)
                .with("fence", id)
                .with(
                    "advice",
                    "it is written when the store can be; see the server's log",
                )));
            }
            tokio::select! {
                () = fences.stop.cancelled() => return,
                () = sleep(PAUSE) => {}
            }
        }
        fences.fleet.fence_is_stored(&host, id);
        fences.migrations.host_fenced(&host).await;
        self.end(Ok(fenced));
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.leave();
    }
}

/// 16 random bytes, in hexadecimal.
fn new_id() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Of an order that found its work done.
fn fenced_before(host: &v1::Host) -> String {
    let fence = host.fence.clone().unwrap_or_default();
    let time = fence.time.map(|time| time.to_string());
    format!(
        "{} was fenced before, at {} (fence {}): the hook was not run again",
        host.name,
        time.unwrap_or_default(),
        fence.id
    )
}

fn no_hook(host: &str) -> ApiError {
    ApiError::new(
        Reason::NoFenceHook,
        format!("this server has no hook that fences {host}"),
    )
    .with("host", host)
    .with(
        "advice",
        "start the server with --fence-hook PROGRAM, or bring the host's agent back: its journals decide too",
    )
}

fn stopping(host: &str) -> ApiError {
    ApiError::new(
        Reason::FenceFailed,
        format!("the server stops; whether {host} is fenced is not known"),
    )
    .with("host", host)
    .with("advice", "order it again when the server runs")
}
