//! Whole frames of one connection, numbered and read in order.

use std::io::{self, Read, Write};

use super::{HEADER, Header, Kind, WireError, abort::decode_abort};

/// Numbers and sends the small frames of one connection; page contents go another way with the same
/// numbers.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    protocol: u32,
    epoch: u64,
    sequence: u32,
}

impl FrameWriter {
    pub(crate) fn new(protocol: u32, epoch: u64) -> Self {
        Self {
            protocol,
            epoch,
            sequence: 0,
        }
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
        header.encode(self.protocol)
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
    protocol: u32,
    epoch: u64,
    sequence: u32,
}

impl FrameReader {
    pub(crate) fn new(protocol: u32, epoch: u64) -> Self {
        Self {
            protocol,
            epoch,
            sequence: 0,
        }
    }

    /// The next header; its payload follows on `from`.
    pub(crate) fn header(&mut self, from: &mut impl Read) -> Result<Header, WireError> {
        let mut bytes = [0_u8; HEADER];
        from.read_exact(&mut bytes)?;
        let header = Header::decode(&bytes, self.protocol)?;
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

    /// The whole next frame (not `Pages`: its contents go straight to guest memory). An `Abort`
    /// becomes the error it says.
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
