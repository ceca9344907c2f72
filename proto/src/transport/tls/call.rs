//! The calling end: connects, shows who it is, and waits until the other end has taken it.

use std::{
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rustls_pki_types::ServerName;
use slat_trust::{Credentials, Expects, Refusal};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    judged::{Judge, Judged},
    told::told,
};
use crate::{ApiError, Reason};

/// From the first byte of the handshake to the first byte behind it.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Read ahead while waiting: the other end's settings.
const AHEAD: usize = 1024;

/// Connects to `host` (as `a.example:7400`) and comes back when the other end has taken this one.
pub(crate) async fn call(
    host: &str,
    credentials: &Credentials,
    expects: &Expects,
) -> Result<Judged<Ahead<TlsStream<TcpStream>>>, CallError> {
    let stream = TcpStream::connect(host).await?;
    super::super::options::configure(&stream)?;
    match timeout(HANDSHAKE, greet(stream, host, credentials, expects)).await {
        Ok(done) => done,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "it did not end the TLS handshake in time",
        )
        .into()),
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum CallError {
    Io(io::Error),
    Refused(Box<tonic::Status>),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Refused(status) => f.write_str(status.message()),
        }
    }
}

/// By hand: the cause is to be found as a status, and a box of one is an error of another type.
impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            Self::Refused(status) => Some(&**status),
        }
    }
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<ApiError> for CallError {
    fn from(error: ApiError) -> Self {
        Self::Refused(Box::new(error.into()))
    }
}

async fn greet(
    stream: TcpStream,
    host: &str,
    credentials: &Credentials,
    expects: &Expects,
) -> Result<Judged<Ahead<TlsStream<TcpStream>>>, CallError> {
    let generation = credentials.generation();
    let connector = TlsConnector::from(credentials.connector(expects.clone()));
    // Who is there is told by the certificate's URI; no name is sent or compared.
    let nobody = ServerName::try_from("slat.invalid").map_err(io::Error::other)?;
    let failed = |error: io::Error| match Refusal::of_io(&error) {
        Some(refusal) => {
            let by_peer = Refusal::is_by_peer(&error);
            CallError::from(told(&refusal, host, by_peer))
        }
        None => CallError::Io(error),
    };
    let mut stream = connector.connect(nobody, stream).await.map_err(failed)?;
    let mut ahead = vec![0; AHEAD];
    let mut read = ReadBuf::new(&mut ahead);
    poll_fn(|context| Pin::new(&mut stream).poll_read(context, &mut read))
        .await
        .map_err(failed)?;
    let length = read.filled().len();
    if length == 0 {
        return Err(ApiError::new(
            Reason::PeerUnreachable,
            format!("{host} ended the connection without a word"),
        )
        .with("address", host)
        .with("advice", "see the log of the process there")
        .into());
    }
    ahead.truncate(length);
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let with = (credentials, generation);
    let judge = Judge::of(host, chain, with, expects.clone())
        .map_err(|refusal| CallError::from(told(&refusal, host, false)))?;
    Ok(Judged::new(
        Ahead {
            stream,
            ahead,
            taken: 0,
        },
        judge,
    ))
}

/// A stream of which something was read already.
pub(crate) struct Ahead<S> {
    stream: S,
    ahead: Vec<u8>,
    taken: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = &mut *self;
        if me.taken < me.ahead.len() {
            let rest = &me.ahead[me.taken..];
            let here = rest.len().min(buffer.remaining());
            buffer.put_slice(&rest[..here]);
            me.taken += here;
            if me.taken == me.ahead.len() {
                me.ahead = Vec::new();
                me.taken = 0;
            }
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut me.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
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

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }
}
