//! A stream whose peer is judged again while it lasts.
//!
//! Every [`LOOK`] it is seen whether there is anything new to judge by: other files at this end, or
//! the moment at which a certificate of the peer's chain ends. Only then the whole chain is judged.
//! A peer that does not pass ends the stream: reads and writes fail.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use rustls_pki_types::CertificateDer;
use slat_trust::{Credentials, Expects, Refusal};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

/// How often it is seen whether to judge again.
const LOOK: Duration = Duration::from_secs(2);

/// What a peer is judged by.
pub(super) struct Judge {
    credentials: Credentials,
    expects: Expects,
    chain: Vec<CertificateDer<'static>>,
    generation: u64,
    /// When the first certificate of the chain ends.
    ends: Option<SystemTime>,
}

impl Judge {
    /// Of a peer that showed `chain` and passed just now.
    pub(super) fn new(
        credentials: &Credentials,
        expects: &Expects,
        chain: &[CertificateDer<'_>],
        generation: u64,
    ) -> Self {
        Self {
            credentials: credentials.clone(),
            expects: expects.clone(),
            ends: slat_trust::ends(chain),
            chain: chain
                .iter()
                .cloned()
                .map(CertificateDer::into_owned)
                .collect(),
            generation,
        }
    }

    fn look(&mut self) -> Result<(), Refusal> {
        let generation = self.credentials.generation();
        let over = self.ends.is_none_or(|ends| ends <= SystemTime::now());
        if generation == self.generation && !over {
            return Ok(());
        }
        self.credentials.judge(&self.chain, &self.expects)?;
        self.generation = generation;
        Ok(())
    }
}

/// See the module.
pub(crate) struct Judged<S> {
    stream: S,
    judge: Judge,
    tick: Interval,
    refused: Option<Arc<Refusal>>,
}

impl<S> Judged<S> {
    pub(super) fn new(stream: S, judge: Judge) -> Self {
        let mut tick = interval_at(Instant::now() + LOOK, LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            stream,
            judge,
            tick,
            refused: None,
        }
    }

    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.refused.is_none() && self.tick.poll_tick(context).is_ready() {
            if let Err(refusal) = self.judge.look() {
                tracing::warn!(target: "audit", cause = refusal.word(), %refusal,
                    "a connection ends: its peer does not pass any more");
                self.refused = Some(Arc::new(refusal));
            }
        }
        match &self.refused {
            Some(refusal) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                Refusal::clone(refusal),
            )),
            None => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Judged<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Judged<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }
}
