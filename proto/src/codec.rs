//! Messages on the wire: protobuf, of at most [`MAX_MESSAGE`] bytes, at every client and server.
//!
//! The build script puts [`SlatCodec`] and the limit into all generated clients and servers. A
//! message that is too large or cannot be decoded is an error of its own, with its figures in the
//! metadata: MESSAGE_TOO_LARGE and MESSAGE_UNDECODABLE. Neither is ever taken for a peer's silence.
//! Lengths are checked where bytes pass ([`crate::transport`]), on their way out and in.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstEncoder;

use crate::{ApiError, Reason};

/// Largest message that any endpoint takes or sends, bytes encoded. A report carries every VM of a
/// host with raw images in their specs, a harvest every dirty range of a large VM.
pub const MAX_MESSAGE: usize = 64 << 20;

/// MESSAGE_TOO_LARGE for a message of `size` bytes.
pub(crate) fn too_large(size: u64) -> ApiError {
    ApiError::new(
        Reason::MessageTooLarge,
        format!("a message of {size} bytes is larger than the limit of {MAX_MESSAGE} bytes"),
    )
    .with("size_bytes", size)
    .with("limit_bytes", MAX_MESSAGE)
    .with(
        "advice",
        "ask for less at once: a smaller page of a list, fewer slots of a harvest",
    )
}

/// MESSAGE_UNDECODABLE, with the decoder's words.
pub(crate) fn undecodable(cause: impl std::fmt::Display) -> ApiError {
    ApiError::new(
        Reason::MessageUndecodable,
        format!("a message cannot be decoded: {cause}"),
    )
    .with("limit_bytes", MAX_MESSAGE)
    .with(
        "advice",
        "is the peer Slat, of a version that can talk to this one?",
    )
}

/// Protobuf with typed errors. See the module.
#[derive(Debug)]
pub struct SlatCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SlatCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> Codec for SlatCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = TypedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        TypedDecoder(PhantomData)
    }
}

/// Says by name that bytes are no message.
#[derive(Debug)]
pub struct TypedDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for TypedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(buffer)
            .map(Some)
            .map_err(|error| undecodable(error).into())
    }
}
