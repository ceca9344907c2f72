//! What is said to a save's writer, and what it says: the agent's end of `slat_paging`'s protocol.
//!
//! All of it blocks: a thread of the blocking pool. It ends when the socket is closed, from either
//! end, and when the writer says nothing for [`STALL`].

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    net::sockopt::{Timeout, set_socket_timeout},
};
use slat_image::Section;
use slat_paging::wire::{FromWriter, Socket, ToWriter, WireError, Written};
use slat_proto::{ApiError, Reason};

use crate::source::{PageSource, of_problem};

/// A writer that says nothing for so long makes no progress.
const STALL: Duration = Duration::from_secs(120);
/// How long it may take to hear all that it is told.
const HEAR: Duration = Duration::from_secs(30);

/// What is to be written.
#[derive(Debug)]
pub(crate) struct Order {
    /// The file's path, for messages.
    pub(crate) name: String,
    pub(crate) file: File,
    pub(crate) zstd_level: u32,
    /// The nearest first.
    pub(crate) bases: Vec<(String, Arc<File>)>,
    pub(crate) sections: Vec<Section>,
    /// Slots' numbers, and their lengths in pages.
    pub(crate) memories: Vec<(u32, u64)>,
    pub(crate) source: PageSource,
}

/// Tells a writer everything, and follows it to its end. What it was told of is given up then, the
/// snapshot's lease with it.
///
/// # Errors
/// What the writer says is wrong; PROGRESS_STALLED; INTERNAL when it ended without a word.
pub(crate) fn write(
    order: Order,
    socket: &Socket,
    progress: impl Fn(Written),
) -> Result<Written, ApiError> {
    let told = set_socket_timeout(socket.as_fd(), Timeout::Send, Some(HEAR))
        .map_err(WireError::from)
        .and_then(|()| tell(&order, socket));
    told.map_err(|error| gone(&error))?;
    // The writer has descriptors of its own now, and the lease shall end with the writer.
    drop(order);
    socket
        .set_patience(Some(STALL))
        .map_err(|error| gone(&error.into()))?;
    loop {
        match socket.receive::<FromWriter>() {
            Ok(packet) => match packet.message {
                FromWriter::Progress(written) => progress(written),
                FromWriter::Done(written) => return Ok(written),
                FromWriter::Failed(problem) => return Err(of_problem(&problem)),
            },
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                let words = format!(
                    "the writer of the save said nothing for {} s",
                    STALL.as_secs()
                );
                return Err(ApiError::new(Reason::ProgressStalled, words)
                    .with("seconds", STALL.as_secs())
                    .with("advice", "look at the disk that saves are written to"));
            }
            Err(error) => return Err(gone(&error)),
        }
    }
}

fn tell(order: &Order, socket: &Socket) -> Result<(), WireError> {
    let begin = ToWriter::Begin {
        name: order.name.clone(),
        zstd_level: order.zstd_level,
        bases: order.bases.iter().map(|(name, _)| name.clone()).collect(),
    };
    let bases = order.bases.iter().map(|(_, file)| file.as_fd());
    let fds: Vec<BorrowedFd<'_>> = std::iter::once(order.file.as_fd()).chain(bases).collect();
    socket.send(&begin, &fds)?;
    for section in &order.sections {
        let message = ToWriter::Section {
            name: section.name.clone(),
            version: section.version,
            optional: section.optional,
        };
        let contents = in_memory(&section.contents)?;
        socket.send(&message, &[contents.as_fd()])?;
    }
    for (number, pages) in &order.memories {
        let (number, pages) = (*number, *pages);
        socket.send(&ToWriter::Memory { number, pages }, &[])?;
    }
    order.source.tell_writer(socket)?;
    socket.send(&ToWriter::Go, &[])
}

/// Bytes as a memfd.
fn in_memory(bytes: &[u8]) -> Result<OwnedFd, WireError> {
    let file = memfd_create("slat-section", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(file);
    file.write_all(bytes)?;
    Ok(file.into())
}

fn gone(error: &WireError) -> ApiError {
    ApiError::new(
        Reason::Internal,
        format!("the writer of the save ended without a word: {error}"),
    )
    .with("cause", error)
    .with("advice", "look at the agent's log, and save again")
}
