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
use slat_trust::{Credentials, Expects, Identity, Refusal};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

/// How often it is seen whether to judge again.
const LOOK: Duration = Duration::from_secs(2);

/// Who a peer is, and what it is judged by.
pub(super) struct Judge {
    identity: Arc<Identity>,
    /// Where it is, for people.
    address: Box<str>,
    credentials: Credentials,
    expects: Expects,
    chain: Vec<CertificateDer<'static>>,
    generation: u64,
    /// When the first certificate of the chain ends.
    ends: Option<SystemTime>,
}

impl Judge {
    /// Of the peer at `address` that shows `chain`. `generation` is that of the credentials which
    /// its handshake was done with.
    ///
    /// # Errors
    /// When it does not pass.
    pub(super) fn of(
        address: &str,
        chain: &[CertificateDer<'_>],
        (credentials, generation): (&Credentials, u64),
        expects: Expects,
    ) -> Result<Self, Refusal> {
        Ok(Self {
            identity: Arc::new(credentials.judge(chain, &expects)?),
            address: address.into(),
            credentials: credentials.clone(),
            ends: slat_trust::ends(chain),
            expects,
            chain: chain
                .iter()
                .cloned()
                .map(CertificateDer::into_owned)
                .collect(),
            generation,
        })
    }

    /// Who it is.
    pub(super) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity)
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
                let (peer, address) = (&self.judge.identity, &*self.judge.address);
                tracing::warn!(target: "audit", %peer, address, cause = refusal.word(), %refusal,
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
