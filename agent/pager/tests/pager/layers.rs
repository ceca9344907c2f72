//! Snapshots and layers as a VM process has them, and how it hands them over.

use std::os::fd::{AsFd, OwnedFd};

use slat_paging::{
    bits::Marks,
    wire::{Answer, Ask, Layer, LayerMemory, Socket, ToPager},
};

use crate::{
    view::{copy, file},
    vm::Vm,
};

/// A layer as the pager of a child gets it.
pub(crate) struct LayerFds {
    pub(crate) layer: Layer,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) memories: Vec<(LayerMemory, Vec<OwnedFd>)>,
}

/// A snapshot as the VM process has it.
pub(crate) struct Taken {
    pub(crate) number: u64,
    lease_read: OwnedFd,
    /// Until somebody takes it.
    lease: Option<OwnedFd>,
    parts: Vec<(OwnedFd, Marks)>,
}

impl Vm {
    /// Announces and arms a snapshot; [`Vm::begin`] begins it.
    pub(crate) fn arm(&mut self, number: u64) -> Answer {
        self.announce(number);
        self.ask(Ask::Arm { snapshot: number }).unwrap()
    }

    /// Says that there will be a snapshot.
    pub(crate) fn announce(&mut self, number: u64) {
        let (lease_read, lease) = rustix::pipe::pipe().unwrap();
        let parts = self
            .memories
            .iter()
            .map(|mem| (file("test-kept", mem.pages), Marks::new(mem.pages).unwrap()));
        let taken = Taken {
            number,
            lease_read,
            lease: Some(lease),
            parts: parts.collect(),
        };
        send_snapshot(&self.pager().socket, &taken, false);
        self.snapshots.push(taken);
    }

    pub(crate) fn begin(&self, number: u64) {
        self.done(Ask::Begin { snapshot: number });
    }

    /// Takes a snapshot, and forgets it: its layer, and then this VM's own layers below.
    pub(crate) fn fork(&mut self, number: u64) -> Vec<LayerFds> {
        self.arm(number);
        self.begin(number);
        self.layers_of(number)
    }

    /// The layers of a snapshot. Its lease is theirs from now on.
    pub(crate) fn layers_of(&mut self, number: u64) -> Vec<LayerFds> {
        let mut snapshots = self.snapshots.iter_mut();
        let taken = snapshots.find(|taken| taken.number == number).unwrap();
        let lease = taken.lease.take().unwrap();
        let memories = self.memories.iter().zip(&taken.parts);
        let memories = memories.map(|(mem, (kept, marks))| {
            let message = LayerMemory {
                number: mem.number,
                pages: mem.pages,
                file_start: 0,
                origin: mem.origin,
                has_loaded: mem.loaded.is_some(),
            };
            let mut fds = vec![copy(&mem.file), copy(kept), copy(marks)];
            fds.extend(mem.loaded.as_ref().map(copy));
            (message, fds)
        });
        let memories: Vec<_> = memories.collect();
        let own = LayerFds {
            layer: Layer::Snapshot {
                memories: memories.len() as u32,
                name: format!("snapshot {number}"),
                shared: false,
            },
            fds: vec![lease],
            memories,
        };
        let below = self.layers.iter().map(|layer| LayerFds {
            layer: layer.layer.clone(),
            fds: layer.fds.iter().map(copy).collect(),
            memories: layer
                .memories
                .iter()
                .map(|(memory, fds)| (memory.clone(), fds.iter().map(copy).collect()))
                .collect(),
        });
        std::iter::once(own).chain(below).collect()
    }

    /// A snapshot that has ended is not announced to the next pager.
    pub(crate) fn forget(&mut self, number: u64) {
        self.snapshots.retain(|taken| taken.number != number);
    }
}

pub(crate) fn send_snapshot(socket: &Socket, taken: &Taken, active: bool) {
    let snapshot = taken.number;
    let message = ToPager::Snapshot { snapshot, active };
    socket.send(&message, &[taken.lease_read.as_fd()]).unwrap();
    for ((kept, marks), memory) in taken.parts.iter().zip(0..) {
        let message = ToPager::SnapshotMemory { snapshot, memory };
        socket
            .send(&message, &[kept.as_fd(), marks.as_fd()])
            .unwrap();
    }
}
