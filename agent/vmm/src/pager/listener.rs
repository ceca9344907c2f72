//! The socket for pagers and agents: a thread that takes connections, and one for each of them, a
//! bounded number at a time.

use std::{
    fs::Permissions,
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use slat_paging::{
    Role,
    wire::{Greeting, Listener, Socket, VERSION},
};

use super::desk::Pager;
use crate::confine;

/// Connections at a time.
const MOST: usize = 16;
/// Who connects says who it is, and an agent what it wants, within this.
const GREETING: Duration = Duration::from_secs(10);
/// After a connection that could not be taken.
const AGAIN: Duration = Duration::from_millis(100);

/// The listening socket. Ends with the value.
#[derive(Debug)]
pub(crate) struct PagerSocket {
    listener: Arc<Listener>,
    pager: Arc<Pager>,
    thread: Option<JoinHandle<()>>,
}

/// A place among [`MOST`].
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PagerSocket {
    /// Listens on `path`, which must not exist, for the user's own processes.
    ///
    /// # Errors
    /// When the kernel refuses the socket or a thread.
    pub(crate) fn open(path: &Path, pager: &Arc<Pager>) -> io::Result<Self> {
        let listener = Arc::new(Listener::bind(path)?);
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        let thread = {
            let (listener, pager) = (Arc::clone(&listener), Arc::clone(pager));
            let accept = move || accept(&listener, &pager);
            Builder::new().name("pagers".to_owned()).spawn(accept)?
        };
        Ok(Self {
            listener,
            pager: Arc::clone(pager),
            thread: Some(thread),
        })
    }
}

impl Drop for PagerSocket {
    fn drop(&mut self) {
        self.pager.close(true);
        self.listener.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that takes pagers panicked");
        }
    }
}

fn accept(listener: &Listener, pager: &Arc<Pager>) {
    let places = Arc::new(AtomicUsize::new(0));
    loop {
        let socket = match listener.accept() {
            Ok(socket) => Arc::new(socket),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) => {
                // Descriptors that ran out come back.
                tracing::warn!(%error, "a pager's connection");
                std::thread::sleep(AGAIN);
                continue;
            }
        };
        let before = places.fetch_add(1, Ordering::Relaxed);
        let place = Place(Arc::clone(&places));
        if before >= MOST {
            tracing::warn!("more than {MOST} connections of pagers and agents");
            continue;
        }
        let pager = Arc::clone(pager);
        let serve = move || {
            let _place = place;
            confine::enter(confine::Role::Pager);
            serve(&pager, &socket);
        };
        if let Err(error) = Builder::new().name("pager".to_owned()).spawn(serve) {
            tracing::warn!(%error, "no thread for a pager's connection");
        }
    }
}

fn serve(pager: &Pager, socket: &Arc<Socket>) {
    let greeting = socket
        .set_patience(Some(GREETING))
        .and_then(|()| socket.set_send_patience(Some(GREETING)))
        .map_err(Into::into)
        .and_then(|()| socket.receive::<Greeting>());
    match greeting.map(|packet| packet.message) {
        Ok(Greeting::Hello { version, .. }) if version != VERSION => {
            tracing::warn!(version, "a pager or an agent of another version");
        }
        Ok(Greeting::Hello {
            role: Role::Pager,
            pid,
            ..
        }) => pager.serve_pager(socket, pid),
        Ok(Greeting::Hello {
            role: Role::Agent, ..
        }) => pager.serve_agent(socket),
        Err(error) => tracing::warn!(%error, "whoever connected did not say who it is"),
    }
}
