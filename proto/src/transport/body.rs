//! A body of gRPC messages that is watched as it arrives: no message above the limit is taken into
//! memory, and what comes too slowly ends.
//!
//! Each message is preceded by five bytes: a flag and the length. The length is checked before a
//! byte of the message is kept. An error of the body is a [`Status`] with its reason.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;

use crate::{
    ApiError, Reason,
    codec::{MAX_MESSAGE, too_large},
};

/// How long a body may take.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// To its end.
    Whole(Duration),
    /// From one piece to the next.
    Piece(Duration),
    /// As long as it likes: somebody else ends it.
    Unlimited,
}

/// See the module.
pub(super) struct WatchedBody<B> {
    inner: B,
    lengths: Lengths,
    patience: Patience,
    timer: Option<Pin<Box<Sleep>>>,
    name_error: Box<dyn Fn(Box<dyn std::error::Error + Send + Sync>) -> Status + Send>,
}

impl<B> WatchedBody<B> {
    /// `name_error` makes a status of what the transport says when the body breaks off.
    pub(super) fn new(
        inner: B,
        patience: Patience,
        name_error: impl Fn(Box<dyn std::error::Error + Send + Sync>) -> Status + Send + 'static,
    ) -> Self {
        let timer = match patience {
            Patience::Whole(limit) | Patience::Piece(limit) => Some(Box::pin(sleep(limit))),
            Patience::Unlimited => None,
        };
        Self {
            inner,
            lengths: Lengths::default(),
            patience,
            timer,
            name_error: Box::new(name_error),
        }
    }

    fn late(&self) -> Status {
        ApiError::new(
            Reason::ConnectionLost,
            "the message did not arrive whole in time",
        )
        .with("advice", "is the network very slow, or the peer stopped?")
        .into()
    }
}

impl<B> Body for WatchedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let me = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut me.inner).poll_frame(context) else {
            if let Some(timer) = &mut me.timer {
                ready!(timer.as_mut().poll(context));
                return Poll::Ready(Some(Err(me.late())));
            }
            return Poll::Pending;
        };
        if let (Patience::Piece(limit), Some(timer)) = (me.patience, &mut me.timer) {
            timer.as_mut().reset(Instant::now() + limit);
        }
        Poll::Ready(match frame {
            None => None,
            Some(Err(error)) => Some(Err((me.name_error)(error.into()))),
            Some(Ok(frame)) => Some(match frame.data_ref() {
                Some(data) => me
                    .lengths
                    .check(data)
                    .map(|()| frame)
                    .map_err(|(_, error)| error.into()),
                None => Ok(frame),
            }),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A server's answer: a message that no client would take becomes the status of the call.
pub(super) struct BoundedAnswer<B> {
    inner: B,
    lengths: Lengths,
    /// What is said last, once what came before it has gone out.
    last: Option<http::HeaderMap>,
    over: bool,
}

impl<B> BoundedAnswer<B> {
    pub(super) fn new(inner: B) -> Self {
        Self {
            inner,
            lengths: Lengths::default(),
            last: None,
            over: false,
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for BoundedAnswer<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.over {
            let last = self.last.take();
            return Poll::Ready(last.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err((good, error)) = self.lengths.check(data)
        {
            self.over = true;
            self.last = Some(trailers(error.into()));
            // The messages before it are whole.
            return Poll::Ready(Some(Ok(Frame::data(data.slice(..good)))));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        if self.over {
            self.last.is_none()
        } else {
            self.inner.is_end_stream()
        }
    }
}

/// A status as the last word of an answer.
fn trailers(status: Status) -> http::HeaderMap {
    let mut headers = status.into_http::<()>().into_parts().0.headers;
    headers.remove(http::header::CONTENT_TYPE);
    headers
}

/// Reads the lengths of messages that pass by.
#[derive(Debug, Default)]
struct Lengths {
    prefix: [u8; 5],
    /// Bytes of the prefix that are there.
    have: usize,
    /// Bytes of the message that are to come.
    left: u64,
}

impl Lengths {
    /// Takes note of what passes.
    ///
    /// # Errors
    /// A message is too large; with how many of these bytes belong to the messages before it.
    fn check(&mut self, data: &[u8]) -> Result<(), (usize, ApiError)> {
        let mut at = 0;
        let mut good = 0;
        while at < data.len() {
            let rest = data.len() - at;
            if self.left > 0 {
                let here = usize::try_from(self.left).map_or(rest, |left| left.min(rest));
                at += here;
                self.left -= here as u64;
                continue;
            }
            if self.have == 0 {
                good = at;
            }
            let here = (self.prefix.len() - self.have).min(rest);
            self.prefix[self.have..self.have + here].copy_from_slice(&data[at..at + here]);
            self.have += here;
            at += here;
            if self.have < self.prefix.len() {
                return Ok(());
            }
            let [_, length @ ..] = self.prefix;
            self.have = 0;
            self.left = u32::from_be_bytes(length).into();
            if self.left > MAX_MESSAGE as u64 {
                return Err((good, too_large(self.left)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_is_read_however_it_is_cut() {
        let mut bytes = vec![0, 0, 0, 0, 3, 1, 2, 3];
        bytes.push(0);
        bytes.extend((MAX_MESSAGE as u32 + 1).to_be_bytes());
        for piece in 1..bytes.len() {
            let mut lengths = Lengths::default();
            let found: Vec<_> = bytes
                .chunks(piece)
                .map(|chunk| lengths.check(chunk))
                .collect();
            let (last, before) = found.split_last().unwrap();
            assert!(before.iter().all(Result::is_ok), "{piece}");
            let (good, error) = last.clone().unwrap_err();
            assert!(good <= 8, "{good}");
            assert_eq!(error.reason, Reason::MessageTooLarge);
            assert_eq!(error.metadata["limit_bytes"], MAX_MESSAGE.to_string());
        }
    }
}
