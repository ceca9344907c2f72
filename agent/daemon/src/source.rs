//! Page sources, on their way between processes: this agent's part on a VM process's pager socket.
//!
//! A snapshot's layers are taken from the VM process that made it, and given to the processes of
//! its copies and to the writer of its save. What is taken is held as long as somebody here needs
//! it, and no longer: while a snapshot's lease is open its VM keeps pages for it.
//!
//! All of it blocks, bounded by [`PATIENCE`] a message: off the runtime's threads.

use std::{
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use slat_paging::{
    SOCKET,
    wire::{
        FromAgent, Layer, LayerMemory, MOST_FDS, Problem, ProblemKind, Role, Socket, ToAgent,
        ToWriter, VERSION, WireError,
    },
};
use slat_proto::{ApiError, Reason};
use slat_record::dir::VmDir;

/// How long a VM process may take for its next message.
const PATIENCE: Duration = Duration::from_secs(10);
/// Messages of a source at most. Each has some descriptors, of which a process has not many.
const MOST_PARTS: usize = 1024;

/// One message of a source, with its descriptors.
#[derive(Debug)]
struct Part {
    said: Said,
    fds: Vec<OwnedFd>,
}

#[derive(Clone, Debug)]
enum Said {
    Layer(Layer),
    Memory(LayerMemory),
}

/// A page source: layers, youngest first.
#[derive(Debug)]
pub(super) struct PageSource(Vec<Part>);

impl PageSource {
    /// A saved file, and the files that it builds on, the nearest first.
    ///
    /// # Errors
    /// DESCRIPTORS_EXHAUSTED.
    pub(super) fn of_files(name: &str, files: &[Arc<File>]) -> Result<Self, ApiError> {
        let fds: Result<Vec<OwnedFd>, _> = files
            .iter()
            .map(|file| file.try_clone().map(OwnedFd::from))
            .collect();
        let fds = fds.map_err(|error| {
            let words = format!("{name} cannot be handed over: {error}");
            ApiError::new(Reason::Internal, words)
                .with("save", name)
                .because_of(&error)
        })?;
        let name = name.to_owned();
        Ok(Self(vec![Part {
            said: Said::Layer(Layer::File { name }),
            fds,
        }]))
    }

    /// Takes a snapshot's layers, its lease among them, from the process of the VM in `dir`.
    ///
    /// # Errors
    /// VM_UNREACHABLE; what the process says is wrong; LIMIT_REACHED.
    pub(super) fn take(dir: &VmDir, snapshot: u64) -> Result<Self, ApiError> {
        let socket = connect(dir)?;
        send(dir, &socket, &FromAgent::TakeSnapshot { snapshot }, &[])?;
        let mut parts = Vec::new();
        loop {
            let packet = socket
                .receive::<ToAgent>()
                .map_err(|error| silent(dir, &error))?;
            let said = match packet.message {
                ToAgent::Layer(layer) => Said::Layer(layer),
                ToAgent::LayerMemory(memory) => Said::Memory(memory),
                ToAgent::Done => return Ok(Self(parts)),
                ToAgent::Failed(problem) => return Err(of_problem(&problem)),
            };
            if parts.len() == MOST_PARTS {
                let words =
                    format!("the snapshot's page source has more than {MOST_PARTS} memories");
                return Err(ApiError::new(Reason::LimitReached, words)
                    .with("most", MOST_PARTS)
                    .with("advice", "take less slots, or load the VM's memory first"));
            }
            parts.push(Part {
                said,
                fds: packet.fds,
            });
        }
    }

    /// The same, for several readers: its youngest layer is a snapshot that none of them may say
    /// anything to be done with.
    pub(super) fn shared(mut self) -> Self {
        if let Some(Part {
            said: Said::Layer(Layer::Snapshot { shared, .. }),
            ..
        }) = self.0.first_mut()
        {
            *shared = true;
        }
        self
    }

    /// Hands a source over to the process of the VM in `dir`, which gets descriptors of its own.
    ///
    /// # Errors
    /// VM_UNREACHABLE; what the process says is wrong.
    pub(super) fn give(&self, dir: &VmDir) -> Result<(), ApiError> {
        let socket = connect(dir)?;
        for part in &self.0 {
            let message = match &part.said {
                Said::Layer(layer) => FromAgent::Layer(layer.clone()),
                Said::Memory(memory) => FromAgent::LayerMemory(memory.clone()),
            };
            send(dir, &socket, &message, &part.borrowed())?;
        }
        send(dir, &socket, &FromAgent::SourceEnd, &[])?;
        match socket.receive::<ToAgent>() {
            Ok(packet) => match packet.message {
                ToAgent::Failed(problem) => Err(of_problem(&problem)),
                ToAgent::Done | ToAgent::Layer(_) | ToAgent::LayerMemory(_) => Ok(()),
            },
            Err(error) => Err(silent(dir, &error)),
        }
    }

    /// Hands a source over to a save's writer.
    ///
    /// # Errors
    /// When the writer does not take it.
    pub(super) fn tell_writer(&self, socket: &Socket) -> Result<(), WireError> {
        self.0.iter().try_for_each(|part| {
            let message = match &part.said {
                Said::Layer(layer) => ToWriter::Layer(layer.clone()),
                Said::Memory(memory) => ToWriter::LayerMemory(memory.clone()),
            };
            socket.send(&message, &part.borrowed())
        })
    }
}

impl Part {
    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().take(MOST_FDS).map(OwnedFd::as_fd).collect()
    }
}

fn connect(dir: &VmDir) -> Result<Socket, ApiError> {
    let socket = Socket::connect(&dir.path().join(SOCKET));
    let socket = socket.map_err(|error| silent(dir, &error.into()))?;
    let patience = socket.set_patience(Some(PATIENCE));
    patience.map_err(|error| silent(dir, &error.into()))?;
    let hello = FromAgent::Hello {
        role: Role::Agent,
        version: VERSION,
    };
    send(dir, &socket, &hello, &[])?;
    Ok(socket)
}

fn send(
    dir: &VmDir,
    socket: &Socket,
    message: &FromAgent,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ApiError> {
    socket
        .send(message, fds)
        .map_err(|error| silent(dir, &error))
}

/// A VM process that does not talk about page sources.
fn silent(dir: &VmDir, error: &WireError) -> ApiError {
    let path = dir.path().join(SOCKET);
    let words = format!("{}: {error}", path.display());
    let made = ApiError::new(Reason::VmUnreachable, words)
        .with("path", path.display())
        .with("cause", error)
        .with("advice", "try again, and look at the VM's log");
    match error {
        WireError::Io(error) => made.because_of(error),
        _ => made,
    }
}

/// What a VM process, a pager or a writer says is wrong, as callers hear it.
pub(super) fn of_problem(problem: &Problem) -> ApiError {
    let (reason, advice) = match problem.kind {
        ProblemKind::SourceGone => (
            Reason::PageSourceGone,
            "bring back what the message names, then: slat retry vm NAME",
        ),
        ProblemKind::SourceTruncated => (
            Reason::PageSourceTruncated,
            "put a whole copy of that file in its place and restore anew",
        ),
        ProblemKind::SourceCorrupt => (
            Reason::PageSourceCorrupt,
            "restore anew from another save: slat verify save SAVE says what is wrong with one",
        ),
        ProblemKind::SourceStalled => (
            Reason::PageSourceStalled,
            "look at the disk that the message names, then: slat retry vm NAME",
        ),
        ProblemKind::NoMemory => (
            Reason::NoMemory,
            "free memory on the host, or delete a VM there",
        ),
        ProblemKind::NoSpace => (
            Reason::DiskFull,
            "free space on that file system and try again",
        ),
        ProblemKind::Refused => (Reason::VmState, "look at how the VM stands: slat get vm"),
        ProblemKind::Kernel => (Reason::Internal, "look at the VM's log and pager.log"),
        ProblemKind::Stopping => (Reason::PagerUnreachable, "try again"),
    };
    ApiError::new(reason, problem.message.clone()).with("advice", advice)
}
