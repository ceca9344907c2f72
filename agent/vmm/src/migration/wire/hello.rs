//! The first frame of a connection: the ticket, and which connection it is.

use super::{TICKET, WireError};

/// Which connection introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamRole {
    Control,
    /// Stream number, from 0.
    Data(u16),
}

/// The first frame's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) ticket: [u8; TICKET],
    pub(crate) role: StreamRole,
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.ticket.to_vec();
        let number = match self.role {
            StreamRole::Control => 0,
            StreamRole::Data(stream) => u32::from(stream) + 1,
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
            0 => StreamRole::Control,
            stream => u16::try_from(stream - 1)
                .map(StreamRole::Data)
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
