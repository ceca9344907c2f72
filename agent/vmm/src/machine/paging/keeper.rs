//! The thread that carries out what comes of the pager's news, and the socket that it comes by.
//!
//! It hears that a snapshot ended or that all of a source is there, lets leases go that nobody
//! took, and begins and ends watching. The pager's own threads cannot: they must never wait for the
//! control lock, whose holder may wait for them.

use std::{
    io,
    path::Path,
    sync::{Arc, Weak},
    thread::{Builder, JoinHandle},
    time::Duration,
};

use super::super::Machine;
use crate::pager::{Pager, PagerSocket};

/// It looks around after this, whatever it hears.
const TICK: Duration = Duration::from_millis(250);

/// Pagers and agents are served for as long as this lives.
#[derive(Debug)]
pub(crate) struct ServedPagers {
    socket: Option<PagerSocket>,
    keeper: Option<JoinHandle<()>>,
}

impl Drop for ServedPagers {
    fn drop(&mut self) {
        // Its end is the keeper's.
        self.socket = None;
        if let Some(keeper) = self.keeper.take()
            && keeper.join().is_err()
        {
            tracing::error!("the thread that keeps watch over paging panicked");
        }
    }
}

impl Machine {
    /// Serves pagers and agents on `path`, which must not exist.
    ///
    /// # Errors
    /// When the kernel refuses the socket or a thread.
    pub(crate) fn serve_pagers(self: &Arc<Self>, path: &Path) -> io::Result<ServedPagers> {
        let socket = PagerSocket::open(path, &self.pager)?;
        let (machine, pager) = (Arc::downgrade(self), Arc::clone(&self.pager));
        let keeper = Builder::new()
            .name("paging".to_owned())
            .spawn(move || keep(&machine, &pager))?;
        Ok(ServedPagers {
            socket: Some(socket),
            keeper: Some(keeper),
        })
    }

    fn settle_paging(&self) {
        let (ended, loaded) = self.pager.news();
        for snapshot in &ended {
            self.watching().snapshot_ended(*snapshot);
            self.end_still(*snapshot);
        }
        if loaded {
            self.source_is_here();
        }
        if !ended.is_empty() || loaded {
            self.shared.change(|_| ());
        }
        self.settle_watching();
    }
}

fn keep(machine: &Weak<Machine>, pager: &Pager) {
    let mut seen = 0;
    let mut was = None;
    while !pager.is_over() {
        seen = pager.await_change(seen, TICK);
        let Some(machine) = machine.upgrade() else {
            return;
        };
        machine.settle_paging();
        // Whoever watches the VM hears of a pager that comes or goes.
        let shown = pager.shown();
        let silent = shown.silent.is_some();
        let now = Some((shown.attached, shown.pid, silent, shown.told.problem));
        if now != was {
            was = now;
            machine.shared.change(|_| ());
        }
    }
}
