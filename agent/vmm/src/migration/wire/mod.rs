//! Frames between the two sides of a migration.
//!
//! # Protocol
//! Version 3 has Echo, version 2 has not; nothing else differs. Both ends chose the version before
//! a connection is opened ([`crate::handover::preamble`]), and every frame carries it.
//!
//! The source opens one control connection and N data connections, each by TLS unless both agents
//! were started without. The first frame on each is `Hello` with what the connection has to show,
//! made from the ticket that the destination gave out through the control plane
//! ([`super::channel`]); anything else is closed without a word. Then:
//!
//! ```text
//! source                         destination
//!   Hello (each connection)  ->
//!                            <-  HelloAck
//!   Echo (control)           ->                       at any time before State, one at a time
//!                            <-  EchoAck              how long an append to its journal takes
//!   SlotTable (control)      ->                       equals what PrepareIncoming announced
//!                            <-  Populated (control)  per cent of memory, until it is 100
//!   Pages, Zero … (data)     ->                       iteration n, split over the streams
//!   IterEnd n (each data)    ->
//!                            <-  IterAck n (control)  every page of iteration n is in memory
//!   …                                                 only then does iteration n + 1 begin
//!   State (control)          ->                       after the last iteration, the VM paused
//!                            <-  Ready                journalled Prepared(e+1)
//!   Commit                   ->                       journalled Relinquished(e)
//!                            <-  Resumed              journalled Owned(e+1), vCPUs run
//! ```
//! An iteration is the last when State follows it: the destination does not tell them apart, so a
//! source may stop its vCPUs, send the last pages, and go on with another iteration after all.
//! Iterations never overlap, so an older copy of a page never replaces a newer one. Before `Commit`
//! either side may send `Abort` (reason, message) on the control connection, and closes it.
//!
//! # Frame
//! A header of 48 bytes, little-endian, then `length` bytes:
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `SLAT` |
//! | 4 | 2 | version |
//! | 6 | 2 | kind |
//! | 8 | 4 | length of the payload, bytes |
//! | 12 | 4 | slot (Pages, Zero) |
//! | 16 | 4 | count: runs (Pages, Zero), iteration (IterEnd, IterAck), per cent (Populated) |
//! | 20 | 4 | sequence number of the frame on its connection, from 0 |
//! | 24 | 8 | epoch of the source |
//! | 32 | 12 | zero |
//! | 44 | 4 | CRC-32 of the 44 bytes before |
//!
//! `Pages` and `Zero` begin their payload with `count` runs of (first page in the slot u32, pages
//! u32); `Pages` goes on with the contents, one run after the other. Contents carry no sum: they
//! are read by the kernel from memory that the guest may be writing, so any sum taken before would
//! be of other bytes; the digests of `verify` prove contents at rest.
//!
//! # Invariants
//! Every length is checked against its bound before a byte is allocated or read; every run against
//! its slot before memory is touched. The stream is hostile until it has shown what it has to, and
//! its contents even then.

mod abort;
mod error;
mod frame;
#[cfg(any(test, feature = "fuzz"))]
pub(super) mod fuzzed;
mod header;
mod hello;
mod runs;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    abort::encode_abort,
    error::{TOLD, WireError},
    frame::{FrameReader, FrameWriter, payload},
    header::Header,
    hello::{Hello, StreamRole},
    runs::{Run, decode_runs, encode_runs},
};

/// Bytes of a frame's header.
pub(crate) const HEADER: usize = 48;
/// Bytes of a ticket.
pub(crate) const TICKET: usize = 32;
/// Most pages in one `Pages` frame: 1 MiB of contents.
pub(crate) const MAX_FRAME_PAGES: u32 = 256;
/// Most runs in one frame.
pub(crate) const MAX_RUNS: u32 = MAX_FRAME_PAGES;
/// Bytes of one run.
pub(crate) const RUN: usize = 8;
/// The first protocol with Echo.
pub(crate) const ECHO_SINCE: u32 = 3;
/// Bytes of an EchoAck: nanoseconds of an append to the destination's journal (u64), 0 when it
/// could not be measured.
pub(crate) const ECHO_ACK: usize = 8;
/// Bytes of a page.
pub(crate) const PAGE: usize = slat_proto::model::PAGE_SIZE as usize;

const MAGIC: [u8; 4] = *b"SLAT";
const MAX_HELLO: u32 = 128;
/// As many slots as there are numbers. An older program takes 510; it also takes no number above
/// 509, so a VM that has more is refused there before anything is sent.
const MAX_SLOTS: u32 = slat_proto::model::MAX_SLOT + 1;
const MAX_SLOT_TABLE: u32 = MAX_SLOTS * 24;
const MAX_STATE: u32 = 64 << 20;
const MAX_RESUMED: u32 = 4 + MAX_SLOTS * 24;
const MAX_ABORT: u32 = 4096;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    Hello = 1,
    HelloAck = 2,
    SlotTable = 3,
    Pages = 4,
    Zero = 5,
    IterEnd = 6,
    IterAck = 7,
    State = 8,
    Ready = 9,
    Commit = 10,
    Resumed = 11,
    Abort = 12,
    Populated = 13,
    Echo = 14,
    EchoAck = 15,
}

impl Kind {
    const ALL: [Kind; 15] = [
        Kind::Hello,
        Kind::HelloAck,
        Kind::SlotTable,
        Kind::Pages,
        Kind::Zero,
        Kind::IterEnd,
        Kind::IterAck,
        Kind::State,
        Kind::Ready,
        Kind::Commit,
        Kind::Resumed,
        Kind::Abort,
        Kind::Populated,
        Kind::Echo,
        Kind::EchoAck,
    ];

    /// Most payload bytes of a frame of this kind.
    fn max_length(self) -> u32 {
        match self {
            Kind::Hello => MAX_HELLO,
            Kind::SlotTable => MAX_SLOT_TABLE,
            Kind::Pages => MAX_RUNS * RUN as u32 + MAX_FRAME_PAGES * PAGE as u32,
            Kind::Zero => MAX_RUNS * RUN as u32,
            Kind::State => MAX_STATE,
            Kind::Resumed => MAX_RESUMED,
            Kind::Abort => MAX_ABORT,
            Kind::EchoAck => ECHO_ACK as u32,
            Kind::HelloAck
            | Kind::IterEnd
            | Kind::IterAck
            | Kind::Ready
            | Kind::Commit
            | Kind::Populated
            | Kind::Echo => 0,
        }
    }
}
