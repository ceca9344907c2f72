//! The loop that a migration is measured against: as many bytes over as many loopback connections,
//! with `write` and `read` and nothing else.
//!
//! Two processes, as in a migration. Sender and receiver each have the whole amount in memory that
//! was touched before the clock starts; they send and receive 1 MiB at a time, each connection its
//! own share. The sockets have no delay, as a migration's data streams, and buffers of 512 KiB,
//! with which this loop is faster than with a migration's 4 MiB. The clock runs from before the
//! first connect until every connection said that it has everything.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use socket2::SockRef;

/// Hidden first argument that makes the benchmark's program the receiver.
pub const RECEIVER: &str = "plain-receiver";

/// What each side's kernel holds of a stream.
const BUFFER: usize = 512 << 10;
/// Bytes of one write or read.
const CHUNK: usize = 1 << 20;

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct PlainRun {
    /// Bytes moved.
    pub bytes: u64,
    /// From the first connect until everything had arrived.
    pub time: Duration,
    /// CPU time of both processes.
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

/// The receiver's whole life: says its port, receives `bytes` over `streams` connections, says its
/// CPU time in nanoseconds.
///
/// # Errors
/// When a connection ends early.
pub fn receive(streams: usize, bytes: usize) -> anyhow::Result<()> {
    let mut memory = vec![1_u8; bytes];
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let before = cpu_time();
    thread::scope(|scope| {
        let workers: Vec<_> = shares(&mut memory, streams)
            .map(|share| {
                let (mut stream, _) = listener.accept()?;
                configure(&stream)?;
                Ok(scope.spawn(move || {
                    for chunk in share.chunks_mut(CHUNK) {
                        stream.read_exact(chunk)?;
                    }
                    stream.write_all(&[1])
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
        Err(_) => bail!("a thread of the plain loop panicked"),
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
/// started again.
///
/// # Errors
/// When the receiver cannot be started or a connection ends early.
pub fn run(streams: usize, bytes: usize) -> anyhow::Result<PlainRun> {
    let mut memory = vec![2_u8; bytes];
    let child = Command::new(std::env::current_exe()?)
        .arg(RECEIVER)
        .args([streams.to_string(), bytes.to_string()])
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

    let before = cpu_time();
    let begin = Instant::now();
    thread::scope(|scope| {
        let workers: Vec<_> = shares(&mut memory, streams)
            .map(|share| {
                let mut stream = TcpStream::connect(address)?;
                configure(&stream)?;
                Ok(scope.spawn(move || {
                    for chunk in share.chunks(CHUNK) {
                        stream.write_all(chunk)?;
                    }
                    stream.read_exact(&mut [0])
                }))
            })
            .collect::<std::io::Result<_>>()?;
        workers.into_iter().try_for_each(join)
    })?;
    let time = begin.elapsed();
    let sender = cpu_time() - before;
    let nanos: u64 = line()?.parse()?;
    ensure!(receiver.0.wait()?.success(), "the receiver failed");
    Ok(PlainRun {
        bytes: bytes as u64,
        time,
        cpu: sender + Duration::from_nanos(nanos),
    })
}
