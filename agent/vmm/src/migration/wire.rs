//! Frames between the two sides of a migration.
//!
//! # Protocol, version 1
//! The source opens one control connection and N data connections. The first frame on each is `Hello` with the ticket that
//! the destination gave out through the control plane; anything else is closed without a word. Then:
//!
//! ```text
//! source                         destination
//!   Hello (each connection)  ->
//!                            <-  HelloAck
//!   SlotTable (control)      ->                       must equal what PrepareIncoming announced
//!                            <-  Populated (control)  per cent of memory that is there, again and again until 100
//!   Pages, Zero … (data)     ->                       pass n, split over the streams in any way
//!   IterEnd n (each data)    ->
//!                            <-  IterAck n (control)  every page of pass n is in memory
//!   …                                                 only then pass n + 1 begins: a page is never older than before
//!   State (control)          ->                       after the last pass, the VM paused
//!                            <-  Ready                journalled Prepared(e+1)
//!   Commit                   ->                       journalled Relinquished(e)
//!                            <-  Resumed              journalled Owned(e+1), vCPUs run
//! ```
//! Either side may send `Abort` (reason, message) on the control connection before `Commit` and closes.
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
//! `Pages` and `Zero` begin their payload with `count` runs of (first page in the slot u32, pages u32); `Pages` goes on with
//! the contents, one run after the other. Contents carry no sum: they are read by the kernel from memory that the guest may
//! be writing, so any sum taken before would be of other bytes; the digests of `verify` prove contents at rest.
//!
//! # Invariants
//! Every length is checked against its bound before a byte is allocated or read; every run against its slot before memory is
//! touched. The stream is hostile until its ticket was shown, and its contents even then.

use std::io::{self, Read, Write};

use slat_proto::{ApiError, Reason};

/// Bytes of a frame's header.
pub(crate) const HEADER: usize = 48;
/// The protocol's version.
pub(crate) const VERSION: u16 = 1;
/// Bytes of a ticket.
pub(crate) const TICKET: usize = 32;
/// Most pages in one `Pages` frame: 1 MiB of contents.
pub(crate) const MAX_FRAME_PAGES: u32 = 256;
/// Most runs in one frame.
pub(crate) const MAX_RUNS: u32 = MAX_FRAME_PAGES;
/// Bytes of one run.
pub(crate) const RUN: usize = 8;
/// Bytes of a page.
pub(crate) const PAGE: usize = slat_proto::model::PAGE_SIZE as usize;

const MAGIC: [u8; 4] = *b"SLAT";
const MAX_HELLO: u32 = 128;
const MAX_SLOT_TABLE: u32 = 510 * 24;
const MAX_STATE: u32 = 64 << 20;
const MAX_RESUMED: u32 = 4 + 510 * 24;
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
}

impl Kind {
    const ALL: [Kind; 13] = [
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
            Kind::HelloAck
            | Kind::IterEnd
            | Kind::IterAck
            | Kind::Ready
            | Kind::Commit
            | Kind::Populated => 0,
        }
    }
}

/// A failure of the data path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum WireError {
    /// A header or payload that the protocol does not allow.
    #[error("bad frame: {field}: {message}")]
    Corrupt {
        field: &'static str,
        message: String,
    },
    /// A run outside its slot.
    #[error("slot {slot}, page {page:#x} + {pages}: outside the declared slots")]
    OutOfSlot { slot: u32, page: u64, pages: u64 },
    /// The connection broke or ended.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(ApiError),
}

impl WireError {
    pub(crate) fn corrupt(field: &'static str, message: impl ToString) -> Self {
        Self::Corrupt {
            field,
            message: message.to_string(),
        }
    }
}

impl From<WireError> for ApiError {
    fn from(error: WireError) -> Self {
        let message = error.to_string();
        match error {
            WireError::Corrupt { field, .. } => {
                ApiError::new(Reason::StreamCorrupt, message).with("field", field)
            }
            WireError::OutOfSlot { slot, page, .. } => {
                ApiError::new(Reason::PageOutOfSlot, message)
                    .with("slot", slot)
                    .with("page", page)
            }
            WireError::Io(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                ApiError::new(
                    Reason::ProgressStalled,
                    "the other side neither sends nor takes data",
                )
            }
            WireError::Io(_) => ApiError::new(Reason::ConnectionLost, message),
            WireError::Aborted(error) => error,
        }
    }
}

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) length: u32,
    pub(crate) slot: u32,
    pub(crate) count: u32,
    pub(crate) sequence: u32,
    pub(crate) epoch: u64,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0_u8; HEADER];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.slot.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..44]);
        bytes[44..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<Self, WireError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[0..4] != MAGIC {
            return Err(WireError::corrupt("magic", "not a Slat stream"));
        }
        let version = u16_at(4);
        if version != VERSION {
            return Err(WireError::corrupt(
                "version",
                format!("{version}, this side speaks {VERSION}"),
            ));
        }
        if u32_at(44) != crc32fast::hash(&bytes[..44]) {
            return Err(WireError::corrupt("crc", "header checksum differs"));
        }
        let number = u16_at(6);
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| *kind as u16 == number)
            .ok_or_else(|| WireError::corrupt("kind", number))?;
        let header = Self {
            kind,
            length: u32_at(8),
            slot: u32_at(12),
            count: u32_at(16),
            sequence: u32_at(20),
            epoch: u64::from(u32_at(24)) | u64::from(u32_at(28)) << 32,
        };
        if header.length > kind.max_length() {
            return Err(WireError::corrupt(
                "length",
                format!(
                    "{} for {kind:?}, at most {}",
                    header.length,
                    kind.max_length()
                ),
            ));
        }
        if matches!(kind, Kind::Pages | Kind::Zero) {
            let runs = header.count.min(MAX_RUNS + 1) * RUN as u32;
            let fits = (1..=MAX_RUNS).contains(&header.count)
                && match kind {
                    Kind::Zero => header.length == runs,
                    _ => header.length > runs && (header.length - runs).is_multiple_of(PAGE as u32),
                };
            if !fits {
                return Err(WireError::corrupt(
                    "length",
                    format!("{} with {} runs", header.length, header.count),
                ));
            }
        }
        Ok(header)
    }
}

/// Consecutive pages of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) page: u32,
    pub(crate) pages: u32,
}

/// Appends runs to a payload.
pub(crate) fn encode_runs(runs: &[Run], to: &mut Vec<u8>) {
    for run in runs {
        to.extend_from_slice(&run.page.to_le_bytes());
        to.extend_from_slice(&run.pages.to_le_bytes());
    }
}

/// Runs of a frame, each within a slot of `slot_pages` pages, and for `Pages` exactly as many pages as it carries.
pub(crate) fn decode_runs(
    header: &Header,
    bytes: &[u8],
    slot_pages: u64,
) -> Result<Vec<Run>, WireError> {
    let runs: Vec<Run> = bytes
        .chunks_exact(RUN)
        .map(|chunk| Run {
            page: u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]),
            pages: u32::from_le_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect();
    let mut total = 0_u64;
    for run in &runs {
        if run.pages == 0 || u64::from(run.page) + u64::from(run.pages) > slot_pages {
            return Err(WireError::OutOfSlot {
                slot: header.slot,
                page: run.page.into(),
                pages: run.pages.into(),
            });
        }
        total += u64::from(run.pages);
    }
    let carried = u64::from(header.length) - (runs.len() * RUN) as u64;
    if header.kind == Kind::Pages && carried != total * PAGE as u64 {
        return Err(WireError::corrupt(
            "length",
            format!("{carried} bytes for {total} pages"),
        ));
    }
    Ok(runs)
}

/// Numbers and sends the small frames of one connection; page contents go another way with the same numbers.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    epoch: u64,
    sequence: u32,
}

impl FrameWriter {
    pub(crate) fn new(epoch: u64) -> Self {
        Self { epoch, sequence: 0 }
    }

    /// The next frame's header.
    pub(crate) fn header(
        &mut self,
        kind: Kind,
        slot: u32,
        count: u32,
        length: u32,
    ) -> [u8; HEADER] {
        let header = Header {
            kind,
            length,
            slot,
            count,
            sequence: self.sequence,
            epoch: self.epoch,
        };
        self.sequence = self.sequence.wrapping_add(1);
        header.encode()
    }

    /// Sends a whole frame.
    pub(crate) fn send(
        &mut self,
        to: &mut impl Write,
        kind: Kind,
        count: u32,
        payload: &[u8],
    ) -> Result<(), WireError> {
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|length| *length <= kind.max_length())
            .ok_or_else(|| {
                WireError::corrupt("length", format!("{} for {kind:?}", payload.len()))
            })?;
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        frame.extend_from_slice(&self.header(kind, 0, count, length));
        frame.extend_from_slice(payload);
        to.write_all(&frame)?;
        Ok(())
    }
}

/// Reads the frames of one connection and checks their order.
#[derive(Debug)]
pub(crate) struct FrameReader {
    epoch: u64,
    sequence: u32,
}

impl FrameReader {
    pub(crate) fn new(epoch: u64) -> Self {
        Self { epoch, sequence: 0 }
    }

    /// The next header; its payload follows on `from`.
    pub(crate) fn header(&mut self, from: &mut impl Read) -> Result<Header, WireError> {
        let mut bytes = [0_u8; HEADER];
        from.read_exact(&mut bytes)?;
        let header = Header::decode(&bytes)?;
        if header.sequence != self.sequence {
            return Err(WireError::corrupt(
                "sequence",
                format!("{}, expected {}", header.sequence, self.sequence),
            ));
        }
        if header.epoch != self.epoch {
            return Err(WireError::corrupt(
                "epoch",
                format!("{}, expected {}", header.epoch, self.epoch),
            ));
        }
        self.sequence = self.sequence.wrapping_add(1);
        Ok(header)
    }

    /// The whole next frame (not `Pages`: its contents go straight to guest memory). An `Abort` becomes the error it says.
    pub(crate) fn frame(&mut self, from: &mut impl Read) -> Result<(Header, Vec<u8>), WireError> {
        let header = self.header(from)?;
        let payload = payload(from, &header)?;
        if header.kind == Kind::Abort {
            return Err(WireError::Aborted(decode_abort(&payload)));
        }
        Ok((header, payload))
    }
}

/// A payload, read in pieces so that memory grows only with what really arrives.
pub(crate) fn payload(from: &mut impl Read, header: &Header) -> Result<Vec<u8>, WireError> {
    let mut payload = Vec::new();
    let read = from.take(header.length.into()).read_to_end(&mut payload)?;
    if read != header.length as usize {
        return Err(WireError::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(payload)
}

/// Which connection introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Control,
    /// Stream number, from 0.
    Data(u16),
}

/// The first frame's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) ticket: [u8; TICKET],
    pub(crate) role: Role,
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.ticket.to_vec();
        let number = match self.role {
            Role::Control => 0,
            Role::Data(stream) => u32::from(stream) + 1,
        };
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (ticket, number) = bytes
            .split_first_chunk::<TICKET>()
            .and_then(|(ticket, rest)| Some((ticket, <[u8; 4]>::try_from(rest).ok()?)))
            .ok_or_else(|| WireError::corrupt("length", "of Hello"))?;
        let role = match u32::from_le_bytes(number) {
            0 => Role::Control,
            stream => u16::try_from(stream - 1)
                .map(Role::Data)
                .map_err(|_| WireError::corrupt("stream", stream))?,
        };
        Ok(Self {
            ticket: *ticket,
            role,
        })
    }

    /// Compares without telling by its duration where the difference is.
    pub(crate) fn shows(&self, ticket: &[u8; TICKET]) -> bool {
        self.ticket
            .iter()
            .zip(ticket)
            .fold(0, |any, (a, b)| any | (a ^ b))
            == 0
    }
}

/// `Abort`'s payload: the reason, a newline, the message.
pub(crate) fn encode_abort(error: &ApiError) -> Vec<u8> {
    let mut text = format!("{}\n{}", error.reason, error.message);
    let mut end = text.len().min(MAX_ABORT as usize);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.into_bytes()
}

fn decode_abort(payload: &[u8]) -> ApiError {
    let text = String::from_utf8_lossy(payload);
    let (reason, message) = text.split_once('\n').unwrap_or((&text, ""));
    let message: String = message.chars().filter(|c| !c.is_control()).collect();
    ApiError::new(Reason::parse(reason).unwrap_or(Reason::Internal), message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages(count: u32, length: u32) -> Header {
        Header {
            kind: Kind::Pages,
            length,
            slot: 1,
            count,
            sequence: 0,
            epoch: 7,
        }
    }

    #[test]
    fn headers_survive_and_each_bad_field_is_named() {
        let header = pages(2, 16 + 3 * 4096);
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        let field = |change: &dyn Fn(&mut [u8; HEADER]), resum: bool| {
            let mut bad = bytes;
            change(&mut bad);
            if resum {
                let sum = crc32fast::hash(&bad[..44]);
                bad[44..].copy_from_slice(&sum.to_le_bytes());
            }
            match Header::decode(&bad) {
                Err(WireError::Corrupt { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(field(&|b| b[0] = b'X', true), "magic");
        assert_eq!(field(&|b| b[4] = 9, true), "version");
        assert_eq!(field(&|b| b[6] = 99, true), "kind");
        assert_eq!(field(&|b| b[11] = 0xff, true), "length");
        assert_eq!(field(&|b| b[16] = 0, true), "length");
        assert_eq!(field(&|b| b[8] = 17, true), "length");
        assert_eq!(field(&|b| b[30] ^= 1, false), "crc");
    }

    #[test]
    fn runs_outside_the_slot_are_refused() {
        let check = |run: Run, carried: u32| {
            let mut bytes = Vec::new();
            encode_runs(&[run], &mut bytes);
            decode_runs(&pages(1, 8 + carried * 4096), &bytes, 100)
        };
        assert!(check(Run { page: 99, pages: 1 }, 1).is_ok());
        for bad in [(100, 1), (99, 2), (u32::MAX, 1), (0, u32::MAX), (5, 0)] {
            let result = check(
                Run {
                    page: bad.0,
                    pages: bad.1,
                },
                1,
            );
            assert!(
                matches!(result, Err(WireError::OutOfSlot { .. })),
                "{bad:?}"
            );
        }
        let result = check(Run { page: 0, pages: 2 }, 1);
        assert!(matches!(
            result,
            Err(WireError::Corrupt {
                field: "length",
                ..
            })
        ));
    }

    #[test]
    fn order_and_epoch_are_kept() {
        let mut stream = Vec::new();
        let mut writer = FrameWriter::new(7);
        writer.send(&mut stream, Kind::IterEnd, 3, &[]).unwrap();
        writer.send(&mut stream, Kind::Ready, 0, &[]).unwrap();
        let mut reader = FrameReader::new(7);
        let mut from = stream.as_slice();
        assert_eq!(reader.frame(&mut from).unwrap().0.count, 3);
        assert_eq!(reader.frame(&mut from).unwrap().0.kind, Kind::Ready);
        let again = reader.frame(&mut stream.as_slice());
        assert!(matches!(
            again,
            Err(WireError::Corrupt {
                field: "sequence",
                ..
            })
        ));
        let other = FrameReader::new(8).frame(&mut stream.as_slice());
        assert!(matches!(
            other,
            Err(WireError::Corrupt { field: "epoch", .. })
        ));
    }

    #[test]
    fn aborts_carry_their_reason() {
        let error = ApiError::new(Reason::DigestMismatch, "slot 0 differs");
        let mut stream = Vec::new();
        FrameWriter::new(1)
            .send(&mut stream, Kind::Abort, 0, &encode_abort(&error))
            .unwrap();
        match FrameReader::new(1).frame(&mut stream.as_slice()) {
            Err(WireError::Aborted(got)) => assert_eq!(got, error),
            other => panic!("{other:?}"),
        }
        let long = ApiError::new(Reason::Internal, "ü".repeat(5000));
        assert!(encode_abort(&long).len() <= MAX_ABORT as usize);
    }

    #[test]
    fn hello_needs_the_whole_ticket() {
        let hello = Hello {
            ticket: [5; TICKET],
            role: Role::Data(3),
        };
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        assert!(hello.shows(&[5; TICKET]));
        let mut other = [5; TICKET];
        other[31] = 6;
        assert!(!hello.shows(&other));
        assert!(Hello::decode(&hello.encode()[..35]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), sum in any::<bool>()) {
            let mut bytes = bytes;
            if bytes.len() >= HEADER {
                bytes[0..4].copy_from_slice(&MAGIC);
                bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
                bytes[7] = 0;
                if sum {
                    let sum = crc32fast::hash(&bytes[..44]);
                    bytes[44..48].copy_from_slice(&sum.to_le_bytes());
                }
            }
            let mut reader = FrameReader::new(0);
            let mut from = bytes.as_slice();
            if let Ok(header) = reader.header(&mut from)
                && let Ok(payload) = payload(&mut from, &header)
            {
                if matches!(header.kind, Kind::Pages | Kind::Zero) {
                    let runs = header.count as usize * RUN;
                    drop(decode_runs(&header, &payload[..runs.min(payload.len())], 100));
                }
                drop(Hello::decode(&payload));
            }
        }
    }
}
