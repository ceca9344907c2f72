//! Layers of a page source, with their descriptors: received from an agent and kept for every
//! pager to come; handed on to whoever reads a snapshot.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use slat_paging::{
    MOST_LAYERS,
    wire::{Layer, LayerMemory, Problem, ProblemKind},
};

/// A descriptor that several may hold.
pub(super) type Fd = Arc<dyn AsFd + Send + Sync>;

/// Memories of a layer at most: as many as slots of a VM.
const MOST_MEMORIES: u32 = 1 << 15;

/// One memory of a layer.
#[derive(Clone)]
pub(super) struct KeptMemory {
    pub(super) memory: LayerMemory,
    pub(super) fds: Vec<Fd>,
}

/// A layer with all that belongs to it.
#[derive(Clone)]
pub(super) struct KeptLayer {
    pub(super) layer: Layer,
    pub(super) fds: Vec<Fd>,
    pub(super) memories: Vec<KeptMemory>,
}

/// For a message.
pub(super) fn borrowed(fds: &[Fd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(|fd| fd.as_fd()).collect()
}

fn shared(fds: Vec<OwnedFd>) -> Vec<Fd> {
    fds.into_iter().map(|fd| Arc::new(fd) as Fd).collect()
}

fn refused(message: impl Into<String>) -> Problem {
    Problem {
        kind: ProblemKind::Refused,
        message: message.into(),
    }
}

/// A source as it is received, message by message.
#[derive(Default)]
pub(super) struct Incoming {
    layers: Vec<KeptLayer>,
    /// Memories that the last layer has yet to have.
    missing: u32,
}

impl Incoming {
    /// The next layer.
    pub(super) fn layer(&mut self, layer: Layer, fds: Vec<OwnedFd>) -> Result<(), Problem> {
        if self.missing > 0 {
            return Err(refused("a layer before the memories of the last one"));
        }
        if self.layers.len() == MOST_LAYERS {
            return Err(refused(format!("more than {MOST_LAYERS} layers")));
        }
        let (memories, right) = match &layer {
            Layer::File { .. } => (0, !fds.is_empty()),
            Layer::Snapshot { memories, .. } => (*memories, fds.len() == 1),
        };
        if !right || memories > MOST_MEMORIES {
            let fds = fds.len();
            let message = format!("a layer with {fds} descriptors, {memories} memories");
            return Err(refused(message));
        }
        self.missing = memories;
        self.layers.push(KeptLayer {
            layer,
            fds: shared(fds),
            memories: Vec::new(),
        });
        Ok(())
    }

    /// A memory of the last layer.
    pub(super) fn memory(&mut self, memory: LayerMemory, fds: Vec<OwnedFd>) -> Result<(), Problem> {
        let wanted = 3 + usize::from(memory.has_loaded);
        let Some(layer) = self.layers.last_mut().filter(|_| self.missing > 0) else {
            return Err(refused("a memory without a layer"));
        };
        if fds.len() != wanted {
            let fds = fds.len();
            return Err(refused(format!(
                "a memory with {fds} descriptors, not {wanted}"
            )));
        }
        self.missing -= 1;
        layer.memories.push(KeptMemory {
            memory,
            fds: shared(fds),
        });
        Ok(())
    }

    /// That was all.
    pub(super) fn end(self) -> Result<Vec<KeptLayer>, Problem> {
        if self.missing > 0 {
            return Err(refused("the last layer lacks memories"));
        }
        Ok(self.layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fds(count: usize) -> Vec<OwnedFd> {
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        (0..count).map(|_| null()).collect()
    }

    fn snapshot(memories: u32) -> Layer {
        let name = "web".to_owned();
        Layer::Snapshot {
            memories,
            name,
            shared: false,
        }
    }

    fn memory(has_loaded: bool) -> LayerMemory {
        LayerMemory {
            number: 0,
            pages: 1,
            file_start: 0,
            origin: None,
            has_loaded,
        }
    }

    #[test]
    fn a_source_is_taken_when_it_is_whole() {
        let mut source = Incoming::default();
        source.layer(snapshot(2), fds(1)).unwrap();
        source.memory(memory(false), fds(3)).unwrap();
        source.memory(memory(true), fds(4)).unwrap();
        let file = Layer::File {
            name: "f".to_owned(),
        };
        source.layer(file, fds(2)).unwrap();
        let layers = source.end().unwrap();
        assert_eq!((layers.len(), layers[0].memories.len()), (2, 2));
    }

    #[test]
    fn what_is_not_is_refused() {
        let mut source = Incoming::default();
        assert!(source.memory(memory(false), fds(3)).is_err());
        assert!(source.layer(snapshot(1), fds(0)).is_err());
        assert!(source.layer(snapshot(u32::MAX), fds(1)).is_err());
        source.layer(snapshot(1), fds(1)).unwrap();
        assert!(source.layer(snapshot(1), fds(1)).is_err());
        assert!(source.memory(memory(true), fds(3)).is_err());
        assert!(source.end().is_err());
        let mut many = Incoming::default();
        for _ in 0..MOST_LAYERS {
            many.layer(snapshot(0), fds(1)).unwrap();
        }
        assert!(many.layer(snapshot(0), fds(1)).is_err());
    }
}
