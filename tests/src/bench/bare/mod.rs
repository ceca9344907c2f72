//! The loops that a migration is measured against: as many bytes over as many loopback connections
//! and nothing else, with `write` and `read`, or with rustls (`ends`).
//!
//! Two processes, as in a migration. Sender and receiver each have the whole amount in memory that
//! was touched before the clock starts; they send and receive 1 MiB at a time, each connection its
//! own share. The sockets have no delay, as a migration's data streams, and buffers of 512 KiB,
//! with which the plain loop is faster than with a migration's 4 MiB. The clock runs from when all
//! are connected, handshakes done, until every connection said that it has everything.

mod ends;

use std::{
    io::{BufRead as _, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use slat_trust::channel::{ChannelKey, Extraction};
use socket2::SockRef;

use self::ends::End;

/// Hidden first argument that makes the benchmark's program the receiver.
pub const RECEIVER: &str = "bare-receiver";

/// What each side's kernel holds of a stream.
const BUFFER: usize = 512 << 10;
/// Bytes of one write or read.
const CHUNK: usize = 1 << 20;
/// How long a key is good: longer than any run takes.
const LASTS: Duration = Duration::from_secs(3600);
/// What the receiver is told instead of a key.
const PLAIN: &str = "plain";

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct BareRun {
    /// Bytes moved.
    pub bytes: u64,
    /// Until everything had arrived.
    pub time: Duration,
    /// CPU time of both processes, handshakes included.
    pub cpu: Duration,
}

fn configure(stream: &TcpStream) -> std::io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_send_buffer_size(BUFFER)?;
    socket.set_recv_buffer_size(BUFFER)
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.cast_unsigned(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// A share of `memory` for each connection.
fn shares(memory: &mut [u8], streams: usize) -> impl Iterator<Item = &mut [u8]> {
    let share = memory.len().div_ceil(streams.max(1)).max(1);
    memory.chunks_mut(share)
}

fn key() -> anyhow::Result<ChannelKey> {
    Ok(ChannelKey::generate("bare", "bare", LASTS)?)
}

fn words(fingerprint: [u8; 32]) -> String {
    let bytes = fingerprint.iter().map(|byte| format!("{byte:02x}"));
    bytes.collect()
}

fn fingerprint(words: &str) -> anyhow::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    ensure!(words.len() == 64 && words.is_ascii(), "no key: {words}");
    for (number, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&words[2 * number..2 * number + 2], 16)?;
    }
    Ok(bytes)
}

/// The receiver's whole life: says its port and its key, receives, says its CPU time in
/// nanoseconds. `args`: connections, bytes, and the sender's key or `plain`.
///
/// # Errors
/// When a connection ends early.
pub fn receive(args: &[String]) -> anyhow::Result<()> {
    let [streams, bytes, peer] = args else {
        bail!("connections, bytes, and a key or `{PLAIN}`");
    };
    let (streams, bytes): (usize, usize) = (streams.parse()?, bytes.parse()?);
    let mut memory = vec![1_u8; bytes];
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let config = if peer == PLAIN {
        None
    } else {
        let key = key()?;
        println!("{}", words(key.fingerprint()));
        Some(key.server(fingerprint(peer)?, Extraction::Never)?)
    };
    let before = cpu_time();
    thread::scope(|scope| {
        let workers: Vec<_> = shares(&mut memory, streams)
            .map(|share| {
                let (stream, _) = listener.accept()?;
                configure(&stream)?;
                let mut end = End::server(stream, config.as_ref())?;
                Ok(scope.spawn(move || {
                    for chunk in share.chunks_mut(CHUNK) {
                        end.receive(chunk)?;
                    }
                    end.send(&[1])
                }))
            })
            .collect::<std::io::Result<_>>()?;
        workers.into_iter().try_for_each(join)
    })?;
    println!("{}", (cpu_time() - before).as_nanos());
    Ok(())
}

fn join(worker: thread::ScopedJoinHandle<'_, std::io::Result<()>>) -> anyhow::Result<()> {
    match worker.join() {
        Ok(result) => Ok(result?),
        Err(_) => bail!("a thread of the loop panicked"),
    }
}

/// Ends the receiver, whatever happens here.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Sends `bytes` over `streams` connections to a receiver in another process, which is this program
/// started again; by TLS, or in the clear.
///
/// # Errors
/// When the receiver cannot be started or a connection ends early.
pub fn run(streams: usize, bytes: usize, tls: bool) -> anyhow::Result<BareRun> {
    let mut memory = vec![2_u8; bytes];
    let key = tls.then(key).transpose()?;
    let shown = key
        .as_ref()
        .map_or(PLAIN.into(), |key| words(key.fingerprint()));
    let child = Command::new(std::env::current_exe()?)
        .arg(RECEIVER)
        .args([streams.to_string(), bytes.to_string(), shown])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut receiver = Receiver(child);
    let stdout = receiver.0.stdout.take().context("its standard output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut line = || {
        lines
            .next()
            .context("the receiver ended")?
            .context("its output")
    };
    let address: SocketAddr = line()?.parse()?;
    let config = match &key {
        Some(key) => Some(key.client(fingerprint(&line()?)?, Extraction::Never)?),
        None => None,
    };

    let before = cpu_time();
    let (mut ends, mut parts) = (Vec::new(), Vec::new());
    for share in shares(&mut memory, streams) {
        let stream = TcpStream::connect(address)?;
        configure(&stream)?;
        ends.push(End::client(stream, config.as_ref())?);
        parts.push(share);
    }
    let begin = Instant::now();
    thread::scope(|scope| {
        let both = ends.iter_mut().zip(&parts);
        let workers: Vec<_> = both
            .map(|(end, share)| {
                scope.spawn(move || {
                    for chunk in share.chunks(CHUNK) {
                        end.send(chunk)?;
                    }
                    end.receive(&mut [0])
                })
            })
            .collect();
        workers.into_iter().try_for_each(join)
    })?;
    let time = begin.elapsed();
    let sender = cpu_time() - before;
    let nanos: u64 = line()?.parse()?;
    ensure!(receiver.0.wait()?.success(), "the receiver failed");
    Ok(BareRun {
        bytes: bytes as u64,
        time,
        cpu: sender + Duration::from_nanos(nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_told_in_words() {
        let shown = key().unwrap().fingerprint();
        assert_eq!(fingerprint(&words(shown)).unwrap(), shown);
        assert!(fingerprint("plain").is_err());
    }
}
