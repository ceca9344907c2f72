//! The first frame of a connection: what it shows to be let in, and which connection it is.

use super::{TICKET, WireError};

/// Which connection introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamRole {
    Control,
    /// Stream number, from 0.
    Data(u16),
}

impl StreamRole {
    /// As it stands in the frame.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Control => 0,
            Self::Data(stream) => u32::from(stream) + 1,
        }
    }
}

/// The first frame's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// The ticket; by TLS, the token that was made from it for this connection.
    pub(crate) shows: [u8; TICKET],
    pub(crate) role: StreamRole,
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.shows.to_vec();
        bytes.extend_from_slice(&self.role.number().to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (shows, number) = bytes
            .split_first_chunk::<TICKET>()
            .and_then(|(shows, rest)| Some((shows, <[u8; 4]>::try_from(rest).ok()?)))
            .ok_or_else(|| WireError::corrupt("length", "of Hello"))?;
        let role = match u32::from_le_bytes(number) {
            0 => StreamRole::Control,
            stream => u16::try_from(stream - 1)
                .map(StreamRole::Data)
                .map_err(|_| WireError::corrupt("stream", stream))?,
        };
        Ok(Self {
            shows: *shows,
            role,
        })
    }
}
