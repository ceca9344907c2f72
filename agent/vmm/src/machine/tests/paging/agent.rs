//! The host's agent for tests: it takes layers from one VM process and hands them to another.

use std::{
    fs::File,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use slat_paging::{
    Role,
    wire::{FromAgent, Layer, LayerMemory, Problem, Socket, ToAgent, VERSION},
};

use super::fake_pager::Source;

type TakenMemory = (LayerMemory, Vec<OwnedFd>);

/// Layers with their descriptors, as they came.
pub(super) struct Taken {
    layers: Vec<(Layer, Vec<OwnedFd>, Vec<TakenMemory>)>,
}

fn greet(path: &Path) -> Socket {
    let socket = Socket::connect(path).unwrap();
    let hello = FromAgent::Hello {
        role: Role::Agent,
        version: VERSION,
    };
    socket.send(&hello, &[]).unwrap();
    socket
}

/// Takes a snapshot's layers, with its lease.
pub(super) fn take(path: &Path, snapshot: u64) -> Result<Taken, Problem> {
    let socket = greet(path);
    socket
        .send(&FromAgent::TakeSnapshot { snapshot }, &[])
        .unwrap();
    let mut taken = Taken { layers: Vec::new() };
    loop {
        let packet = socket.receive::<ToAgent>().unwrap();
        match packet.message {
            ToAgent::Layer(layer) => taken.layers.push((layer, packet.fds, Vec::new())),
            ToAgent::LayerMemory(memory) => {
                let last = taken.layers.last_mut().unwrap();
                last.2.push((memory, packet.fds));
            }
            ToAgent::Done => return Ok(taken),
            ToAgent::Failed(problem) => return Err(problem),
        }
    }
}

/// Hands layers over as a source.
pub(super) fn hand_over(path: &Path, taken: &Taken) -> Result<(), Problem> {
    let socket = greet(path);
    let borrowed = |fds: &[OwnedFd]| -> Vec<OwnedFd> {
        fds.iter().map(|fd| fd.try_clone().unwrap()).collect()
    };
    for (layer, fds, memories) in &taken.layers {
        let fds = borrowed(fds);
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        socket.send(&FromAgent::Layer(layer.clone()), &fds).unwrap();
        for (memory, fds) in memories {
            let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            socket
                .send(&FromAgent::LayerMemory(memory.clone()), &fds)
                .unwrap();
        }
    }
    socket.send(&FromAgent::SourceEnd, &[]).unwrap();
    match socket.receive::<ToAgent>().unwrap().message {
        ToAgent::Done => Ok(()),
        ToAgent::Failed(problem) => Err(problem),
        other => panic!("{other:?}"),
    }
}

impl Taken {
    pub(super) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// To read pages of, without the lease.
    pub(super) fn source(&self) -> Source {
        let layers = self.layers.iter().map(|(layer, _, memories)| {
            let memories = memories.iter().map(|(memory, fds)| {
                let fds = fds.iter().map(|fd| File::from(fd.try_clone().unwrap()));
                (memory.clone(), fds.collect())
            });
            (layer.clone(), memories.collect())
        });
        Source {
            layers: layers.collect(),
        }
    }
}
