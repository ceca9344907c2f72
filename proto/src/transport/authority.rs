//! Lets any `:authority` in at a Unix socket, where it names nothing.
//!
//! gRPC clients of other languages send the socket's path there, raw or percent-encoded. The HTTP/2
//! library takes that for a malformed request and resets the stream. So what a client sends is read
//! here first: headers are decoded, an authority that is none is replaced by `localhost`, and they
//! are sent on without compression. Other frames, and HTTP/1, pass as they are.
//!
//! Bounds: a block of headers has at most [`MAX_BLOCK`] bytes as sent and [`MAX_HEADERS`] decoded;
//! the table is of the protocol's default size, which the server does not change. What exceeds
//! them, or cannot be decoded, ends the connection.

mod plain;

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::plain::length;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;
/// Largest frame while the server asks for no other.
const MAX_FRAME: usize = 16 << 10;
const MAX_BLOCK: usize = 32 << 10;
const MAX_HEADERS: usize = 64 << 10;
const TABLE: usize = 4096;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// See the module.
pub(super) struct AnyAuthority<S> {
    stream: S,
    filter: Filter,
    ended: bool,
}

impl<S> AnyAuthority<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            filter: Filter::default(),
            ended: false,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = &mut *self;
        loop {
            let out = &mut me.filter.out;
            if !out.is_empty() || me.ended {
                let here = out.len().min(buffer.remaining());
                buffer.put_slice(&out[..here]);
                out.advance(here);
                return Poll::Ready(Ok(()));
            }
            let mut piece = [0; 8 << 10];
            let mut read = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut me.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                me.ended = true;
                // What was begun and never ended goes on as it came.
                let rest = me.filter.input.split();
                me.filter.out.extend_from_slice(&rest);
            } else {
                me.filter.feed(read.filled())?;
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// What the connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    NotKnown,
    Http2,
    Other,
}

/// A block of headers that is being received.
struct Block {
    stream: [u8; 4],
    flags: u8,
    bytes: Vec<u8>,
}

/// Bytes in, bytes out.
struct Filter {
    speaks: Speaks,
    input: BytesMut,
    out: BytesMut,
    /// Bytes of a frame's payload that pass as they are.
    passing: usize,
    block: Option<Block>,
    decoder: Decoder<'static>,
}

impl Default for Filter {
    fn default() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE);
        Self {
            speaks: Speaks::NotKnown,
            input: BytesMut::new(),
            out: BytesMut::new(),
            passing: 0,
            block: None,
            decoder,
        }
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Filter {
    fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.input.extend_from_slice(bytes);
        if self.speaks == Speaks::NotKnown {
            let here = self.input.len().min(PREFACE.len());
            if self.input[..here] != PREFACE[..here] {
                self.speaks = Speaks::Other;
            } else if here == PREFACE.len() {
                self.speaks = Speaks::Http2;
                self.pass(PREFACE.len());
            }
        }
        match self.speaks {
            Speaks::NotKnown => {}
            Speaks::Other => self.pass(self.input.len()),
            Speaks::Http2 => while self.frame()? {},
        }
        Ok(())
    }

    fn pass(&mut self, count: usize) {
        let piece = self.input.split_to(count);
        self.out.extend_from_slice(&piece);
    }

    /// Takes one frame, or what is there of one that passes; false when more must come first.
    fn frame(&mut self) -> io::Result<bool> {
        if self.passing > 0 {
            let here = self.passing.min(self.input.len());
            self.pass(here);
            self.passing -= here;
            return Ok(here > 0);
        }
        let [l1, l2, l3, kind, flags, stream @ ..] = match self.input.first_chunk::<FRAME_HEADER>()
        {
            Some(header) => *header,
            None => return Ok(false),
        };
        let length = u32::from_be_bytes([0, l1, l2, l3]) as usize;
        if kind != HEADERS && kind != CONTINUATION {
            self.pass(FRAME_HEADER);
            self.passing = length;
            return Ok(true);
        }
        if length > MAX_FRAME {
            return Err(malformed("a frame of headers is too large"));
        }
        if self.input.len() < FRAME_HEADER + length {
            return Ok(false);
        }
        self.input.advance(FRAME_HEADER);
        let payload = self.input.split_to(length);
        let mut block = if kind == HEADERS {
            Block {
                stream,
                flags,
                bytes: fragment(&payload, flags)?.to_vec(),
            }
        } else {
            let mut block = self
                .block
                .take()
                .filter(|block| block.stream == stream)
                .ok_or_else(|| malformed("headers continue that were not begun"))?;
            block.bytes.extend_from_slice(&payload);
            block
        };
        block.flags |= flags & END_HEADERS;
        if block.bytes.len() > MAX_BLOCK {
            return Err(malformed("headers are too large"));
        }
        if block.flags & END_HEADERS == 0 {
            self.block = Some(block);
        } else {
            self.send(&block)?;
        }
        Ok(true)
    }

    /// Sends a whole block on, with an authority that the HTTP/2 library takes.
    fn send(&mut self, block: &Block) -> io::Result<()> {
        let cannot = || malformed("headers cannot be decoded");
        let bytes = plain::plain(&block.bytes).ok_or_else(cannot)?;
        let mut plain = Vec::new();
        let decoded = self.decoder.decode_with_cb(&bytes, |name, value| {
            // One too large is decoded to its end, for the table's sake, and refused below.
            if plain.len() > MAX_HEADERS {
                return;
            }
            let good = &*name != b":authority" || http::uri::Authority::try_from(&*value).is_ok();
            literal(&mut plain, &name, if good { &value } else { b"localhost" });
        });
        if decoded.is_err() || plain.len() > MAX_HEADERS {
            return Err(cannot());
        }
        let mut pieces = plain.chunks(MAX_FRAME).peekable();
        let mut kind = HEADERS;
        let mut flags = block.flags & END_STREAM;
        while let Some(piece) = pieces.next() {
            if pieces.peek().is_none() {
                flags |= END_HEADERS;
            }
            let [_, length @ ..] = (piece.len() as u32).to_be_bytes();
            self.out.extend_from_slice(&length);
            self.out.extend_from_slice(&[kind, flags]);
            self.out.extend_from_slice(&block.stream);
            self.out.extend_from_slice(piece);
            (kind, flags) = (CONTINUATION, 0);
        }
        Ok(())
    }
}

/// A HEADERS frame's fragment of the block: without padding and priority.
fn fragment(payload: &[u8], flags: u8) -> io::Result<&[u8]> {
    let short = || malformed("a frame of headers is too short");
    let mut rest = payload;
    let mut padding = 0;
    if flags & PADDED != 0 {
        let (&length, after) = rest.split_first().ok_or_else(short)?;
        (padding, rest) = (usize::from(length), after);
    }
    if flags & PRIORITY != 0 {
        rest = rest.get(5..).ok_or_else(short)?;
    }
    let end = rest.len().checked_sub(padding).ok_or_else(short)?;
    Ok(&rest[..end])
}

/// A header as a literal that enters no table.
fn literal(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    for text in [name, value] {
        length(out, text.len());
        out.extend_from_slice(text);
    }
}

#[cfg(test)]
mod tests {
    use loona_hpack::Encoder;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn headers(authority: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
        let long = "x".repeat(300);
        [
            (":method", "POST"),
            (":path", "/slat.v1.VmService/ListVms"),
            (":authority", authority),
            ("long", long.as_str()),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .to_vec()
    }

    /// The headers that come out, stream by stream.
    fn blocks(mut bytes: &[u8]) -> Vec<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        bytes = bytes.strip_prefix(PREFACE).unwrap();
        while let Some(header) = bytes.first_chunk::<FRAME_HEADER>() {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let (payload, rest) = bytes[FRAME_HEADER..].split_at(length);
            if header[3] == HEADERS {
                assert_eq!(header[4], END_HEADERS);
                found.push(decoder.decode(payload).unwrap());
            }
            bytes = rest;
        }
        found
    }

    #[test]
    fn an_authority_that_is_none_is_replaced_and_all_else_stays_however_it_is_cut() {
        let mut encoder = Encoder::new();
        let mut sent = PREFACE.to_vec();
        sent.extend(frame(4, 0, 0, &[0; 6]));
        let authorities = ["/run/slat/vm.sock", "%2Frun%2Fvm.sock", "vm.example:1", ""];
        for (at, authority) in authorities.iter().enumerate() {
            // The table of the encoder grows with each: the second names the first's entries.
            let all = headers(authority);
            let block = encoder.encode(all.iter().map(|(n, v)| (&n[..], &v[..])));
            let (first, last) = block.split_at(block.len() / 2);
            let padded = [&[2, 0, 0, 0, 0, 9][..], first, &[0, 0]].concat();
            let stream = at as u32 * 2 + 1;
            sent.extend(frame(HEADERS, PADDED | PRIORITY, stream, &padded));
            sent.extend(frame(CONTINUATION, END_HEADERS, stream, last));
            sent.extend(frame(0, END_STREAM, stream, b"payload"));
        }
        let expected: Vec<_> = ["localhost", "localhost", "vm.example:1", "localhost"]
            .map(headers)
            .into();
        for piece in [1, 2, 7, 100, sent.len()] {
            let mut filter = Filter::default();
            for chunk in sent.chunks(piece) {
                filter.feed(chunk).unwrap();
            }
            assert!(filter.input.is_empty());
            assert_eq!(blocks(&filter.out), expected, "{piece}");
        }
    }

    #[test]
    fn http1_passes_and_nonsense_ends() {
        let mut filter = Filter::default();
        filter.feed(b"PRI * HTTP/1.1").unwrap();
        filter.feed(b"\r\n\r\n").unwrap();
        assert_eq!(&filter.out[..], b"PRI * HTTP/1.1\r\n\r\n");
        for nonsense in [
            frame(HEADERS, END_HEADERS, 1, &[0xff; 30]),
            frame(CONTINUATION, END_HEADERS, 1, &[0x82]),
            frame(HEADERS, PADDED, 1, &[9, 1]),
            frame(HEADERS, PRIORITY, 1, &[9, 1]),
            vec![0xff, 0, 0, HEADERS, 0, 0, 0, 0, 1],
        ] {
            let mut filter = Filter::default();
            filter.feed(PREFACE).unwrap();
            assert!(filter.feed(&nonsense).is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn a_small_block_that_grows_large_is_refused() {
        // One entry of 4 KiB in the table, named by a byte again and again.
        let mut block = vec![0x40, 1, b'n', 0x7f, 0x81, 0x1e];
        block.extend([b'v'; 4000]);
        block.extend([0xbe; 12_000]);
        let mut filter = Filter::default();
        filter.feed(PREFACE).unwrap();
        assert!(
            filter
                .feed(&frame(HEADERS, END_HEADERS, 1, &block))
                .is_err()
        );
        assert!(filter.out.len() < MAX_HEADERS);
    }
}
