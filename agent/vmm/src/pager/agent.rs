//! A connection of the host's agent: it hands a page source over, or takes a snapshot's
//! descriptors. One order a connection.

use slat_paging::wire::{FromAgent, Packet, Problem, ProblemKind, Socket, ToAgent, WireError};

use super::{
    desk::Pager,
    layers::{Incoming, KeptLayer, borrowed},
};

impl Pager {
    /// Carries one order out.
    pub(super) fn serve_agent(&self, socket: &Socket) {
        if let Err(error) = self.serve_order(socket) {
            tracing::warn!(%error, "an agent's order about pages");
        }
    }

    fn serve_order(&self, socket: &Socket) -> Result<(), WireError> {
        let mut source = Incoming::default();
        loop {
            let Packet { message, fds } = socket.receive::<FromAgent>()?;
            let taken = match message {
                FromAgent::Layer(layer) => source.layer(layer, fds),
                FromAgent::LayerMemory(memory) => source.memory(memory, fds),
                FromAgent::SourceEnd => {
                    let ended = source.end().and_then(|layers| self.take_source(layers));
                    return answer(socket, ended);
                }
                FromAgent::TakeSnapshot { snapshot } => return self.lend(socket, snapshot),
                FromAgent::Hello { .. } => Err(refused("a second greeting")),
            };
            if taken.is_err() {
                return answer(socket, taken);
            }
        }
    }

    /// Keeps a source for the VM that is to be built here.
    fn take_source(&self, layers: Vec<KeptLayer>) -> Result<(), Problem> {
        let mut inner = self.lock();
        if inner.work.is_some() || inner.over {
            return Err(refused("there is a VM already"));
        }
        inner.source = layers;
        inner.has_source = true;
        self.done(inner);
        Ok(())
    }

    fn lend(&self, socket: &Socket, snapshot: u64) -> Result<(), WireError> {
        let layers = {
            let mut inner = self.lock();
            let (own, unloaded) = (inner.source.clone(), inner.has_source);
            let taken = inner.snapshots.take(snapshot, &self.vm, unloaded);
            match taken {
                Ok(layer) => std::iter::once(layer).chain(own).collect::<Vec<_>>(),
                Err(problem) => return answer(socket, Err(problem)),
            }
        };
        for layer in &layers {
            let message = ToAgent::Layer(layer.layer.clone());
            socket.send(&message, &borrowed(&layer.fds))?;
            for memory in &layer.memories {
                let message = ToAgent::LayerMemory(memory.memory.clone());
                socket.send(&message, &borrowed(&memory.fds))?;
            }
        }
        socket.send(&ToAgent::Done, &[])
    }
}

fn answer(socket: &Socket, result: Result<(), Problem>) -> Result<(), WireError> {
    let message = match result {
        Ok(()) => ToAgent::Done,
        Err(problem) => ToAgent::Failed(problem),
    };
    socket.send(&message, &[])
}

fn refused(message: &str) -> Problem {
    Problem {
        kind: ProblemKind::Refused,
        message: message.to_owned(),
    }
}
