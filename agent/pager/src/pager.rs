//! The process that resolves a guest's faults: its threads, from the first to the last.
//!
//! *Locking* and which threads there are: [`crate::shared`]. Here they are started, and ended when
//! the connection ends: those that read a source may be in a read that does not come back, and are
//! not waited for longer than [`PATIENCE`]; they touch nothing afterwards.

use std::{
    path::Path,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use slat_paging::{
    SOCKET,
    wire::{FromPager, Socket},
};

use crate::{
    asks::{Asks, run_looks, run_quick, run_slow},
    dialect,
    error::PagerError,
    faults::{handle, read_faults},
    load::load,
    options::Options,
    shared::Shared,
    sweep::sweep,
    ticker::tick,
};

/// Threads for requests that may wait for a source.
const SLOW: usize = 3;
/// How long loaders have to notice the end.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the VM process has to take a message in. It reads its pager's messages on a thread that
/// does little else.
const DEAF: Duration = Duration::from_secs(10);

/// Connects to the VM process whose directory this is.
///
/// # Errors
/// What the kernel says.
pub fn connect(dir: &Path) -> Result<Socket, PagerError> {
    let connected = Socket::connect(&dir.join(SOCKET));
    connected.map_err(PagerError::kernel("connecting to the VM process"))
}

/// Serves a VM process until it says stop or the connection ends.
///
/// # Errors
/// What ends a pager: see [`PagerError`].
pub fn run(socket: Socket) -> Result<(), PagerError> {
    run_with(socket, &Options::default())
}

/// As [`run`], with other numbers or another source.
///
/// # Errors
/// As [`run`].
pub fn run_with(socket: Socket, options: &Options) -> Result<(), PagerError> {
    let deaf = socket.set_send_patience(Some(DEAF));
    deaf.map_err(PagerError::kernel("setting up the connection"))?;
    let Some(shared) = dialect::attach(socket, options)? else {
        return Ok(());
    };
    let shared = Arc::new(shared);
    let asks = Arc::new(Asks::default());
    let mut threads = Vec::new();
    let started = start(&shared, &asks, &mut threads);
    let result = started.and_then(|()| {
        shared.socket.send(&FromPager::Attached, &[])?;
        shared.tell_if_loaded();
        dialect::serve(&shared, &asks)
    });
    shared.end();
    asks.end();
    shared.socket.close();
    let all = join(threads);
    if let Some(mirror) = &shared.mirror {
        mirror.end();
        let tables = mirror.mmu.stats().tables;
        tracing::debug!(tables, "tables of the mirror at the end");
        // What a thread that is still in a read has for its next fault is not given back.
        debug_assert!(!all || tables == 0, "{tables} tables");
    }
    result
}

/// Waits for the threads. Whether all have ended.
fn join(threads: Threads) -> bool {
    let end = Instant::now() + PATIENCE;
    let mut all = true;
    for (name, thread) in threads {
        // Only a read of a source may last; all else is woken, and ends.
        while name == "load" && !thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        if name == "load" && !thread.is_finished() {
            all = false;
            continue;
        }
        // What a thread said as it panicked is in the log.
        all &= thread.join().is_ok();
    }
    all
}

type Threads = Vec<(&'static str, JoinHandle<()>)>;

fn start(shared: &Arc<Shared>, asks: &Arc<Asks>, threads: &mut Threads) -> Result<(), PagerError> {
    let mut spawn = |name: &'static str, body: Box<dyn FnOnce() + Send>| {
        let thread = Builder::new().name(name.to_owned()).spawn(body);
        let thread = thread.map_err(PagerError::kernel("starting a thread"))?;
        threads.push((name, thread));
        Ok::<_, PagerError>(())
    };
    if shared.mirror.is_some() {
        let own = Arc::clone(shared);
        spawn("faults", Box::new(move || with_mirror(&own, read_faults)))?;
        let own = Arc::clone(shared);
        spawn("sweep", Box::new(move || with_mirror(&own, sweep)))?;
        for _ in 0..shared.tuning.handlers {
            let own = Arc::clone(shared);
            spawn("handle", Box::new(move || with_mirror(&own, handle)))?;
        }
    }
    if shared.source().is_some() {
        for loader in 0..shared.tuning.loaders {
            let own = Arc::clone(shared);
            spawn("load", Box::new(move || load(&own, loader)))?;
        }
    }
    let (own, its) = (Arc::clone(shared), Arc::clone(asks));
    spawn("asks", Box::new(move || run_quick(&own, &its)))?;
    let (own, its) = (Arc::clone(shared), Arc::clone(asks));
    spawn("asks", Box::new(move || run_looks(&own, &its)))?;
    for _ in 0..SLOW {
        let (own, its) = (Arc::clone(shared), Arc::clone(asks));
        spawn("asks", Box::new(move || run_slow(&own, &its)))?;
    }
    let own = Arc::clone(shared);
    spawn("ticker", Box::new(move || tick(&own)))
}

fn with_mirror(shared: &Shared, body: fn(&Shared, &crate::mirror::Mirror)) {
    if let Some(mirror) = &shared.mirror {
        body(shared, mirror);
    }
}
