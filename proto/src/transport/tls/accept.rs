//! The accepting end: asks for a certificate and serves nobody without a good one.
//!
//! A caller in the clear is told so: HTTP/2 by GOAWAY with INADEQUATE_SECURITY, HTTP/1 by 426. What
//! it has sent is read for a moment before the connection closes, or the kernel would answer what
//! was not read with a reset, and the caller would never see the words.

use std::{io, sync::Arc, time::Duration};

use slat_trust::{Credentials, Expects, Identity, Refusal};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::judged::{Judge, Judged};

/// A handshake has this long.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A caller that was refused has this long to hear it.
const LINGER: Duration = Duration::from_secs(1);
/// So much of what it sends meanwhile is thrown away.
const THROWN: usize = 64 << 10;
/// First byte of every TLS record of a handshake.
const TLS_HANDSHAKE: u8 = 0x16;
/// An empty SETTINGS frame, then GOAWAY: no stream was looked at, INADEQUATE_SECURITY, and why.
const GOAWAY_HEAD: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, // SETTINGS
    0, 0, 31, 7, 0, 0, 0, 0, 0, // GOAWAY: 8 bytes and 23 of words
    0, 0, 0, 0, 0, 0, 0, 12,
];
const GOAWAY_WORDS: &[u8; 23] = b"this endpoint needs TLS";
const UPGRADE: &[u8] = b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: TLS/1.3, HTTP/1.1\r\n\
Connection: close\r\nContent-Type: text/plain\r\nContent-Length: 35\r\n\r\n\
this endpoint speaks TLS: https://\n";

/// A connection whose caller passed.
pub(crate) struct Accepted {
    pub(crate) stream: Judged<TlsStream<TcpStream>>,
    pub(crate) identity: Arc<Identity>,
    /// It speaks HTTP/2, as it said in the handshake.
    pub(crate) http2: bool,
}

/// Takes a caller in.
///
/// # Errors
/// Why it is not taken; it was told. Nothing for one that only looked whether the port is open.
pub(crate) async fn accept(
    mut stream: TcpStream,
    address: &str,
    credentials: &Credentials,
) -> Result<Accepted, Option<Refusal>> {
    let broke =
        |error: &io::Error| Refusal::BadCertificate(format!("the handshake broke: {error}"));
    let late = || Refusal::BadCertificate("the handshake took too long".to_owned());
    let mut first = [0];
    let read = timeout(HANDSHAKE, stream.peek(&mut first)).await;
    match read.map_err(|_| late())?.map_err(|error| broke(&error))? {
        0 => return Err(None),
        _ if first != [TLS_HANDSHAKE] => {
            in_the_clear(&mut stream).await;
            return Err(Some(Refusal::NotTls));
        }
        _ => {}
    }
    let generation = credentials.generation();
    let acceptor = TlsAcceptor::from(credentials.acceptor());
    let mut handshake = acceptor.accept(stream).into_fallible();
    let done = timeout(HANDSHAKE, &mut handshake)
        .await
        .map_err(|_| late())?;
    let stream = match done {
        Ok(stream) => stream,
        Err((error, mut stream)) => {
            // Asked on the thread that judged: only there it knows the details.
            let refusal = Refusal::of_io(&error).unwrap_or_else(|| broke(&error));
            linger(&mut stream).await;
            return Err(Some(refusal));
        }
    };
    let (_, session) = stream.get_ref();
    let http2 = session.alpn_protocol() == Some(b"h2");
    let chain = session.peer_certificates().unwrap_or_default();
    let judge = Judge::of(address, chain, (credentials, generation), Expects::Anyone)?;
    Ok(Accepted {
        identity: judge.identity(),
        stream: Judged::new(stream, judge),
        http2,
    })
}

async fn in_the_clear(stream: &mut TcpStream) {
    let mut head = [0; 3];
    let read = timeout(LINGER, stream.peek(&mut head)).await;
    // The preface of HTTP/2 begins as no method of HTTP/1 does.
    let http2 = matches!(read, Ok(Ok(1..))) && head.starts_with(b"PRI");
    let words = if http2 {
        [&GOAWAY_HEAD[..], GOAWAY_WORDS].concat()
    } else {
        UPGRADE.to_vec()
    };
    // Whoever is gone hears nothing.
    drop(timeout(LINGER, stream.write_all(&words)).await);
    linger(stream).await;
}

/// Ends the writing and reads what the caller still sends, so that it hears what was written.
async fn linger(stream: &mut TcpStream) {
    let reading = async {
        stream.shutdown().await?;
        let mut thrown = 0;
        let mut piece = [0; 4096];
        while thrown < THROWN {
            match stream.read(&mut piece).await? {
                0 => break,
                read => thrown += read,
            }
        }
        Ok::<_, io::Error>(())
    };
    drop(timeout(LINGER, reading).await);
}
