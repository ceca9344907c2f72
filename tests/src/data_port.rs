//! A peer without a ticket at a destination's data port: finds the port and sends what breaks the
//! protocol.
//!
//! The header of a frame is written down here again from the protocol's description, so that a test
//! does not share the mistakes of what it tests.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;

/// How long such a peer waits for the port's reaction.
const REACTION: Duration = Duration::from_secs(20);

/// TCP ports on which a process listens, from `/proc`.
///
/// # Errors
/// When the process is gone.
pub fn listening_ports(pid: u32) -> anyhow::Result<Vec<SocketAddr>> {
    let mut inodes = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor closed meanwhile is no listener.
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if let Some(inode) = target
            .strip_prefix("socket:[")
            .and_then(|rest| rest.strip_suffix(']'))
        {
            inodes.push(inode.to_owned());
        }
    }
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    Ok(table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let listening = *fields.get(3)? == "0A" && inodes.iter().any(|i| i == fields[9]);
            listening.then(|| parse(fields[1])).flatten()
        })
        .collect())
}

/// `0100007F:1F90` as /proc writes it on a little-endian machine.
fn parse(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let ip = u32::from_str_radix(ip, 16).ok()?.to_ne_bytes();
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((Ipv4Addr::from(ip), port).into())
}

/// A frame header with a right sum, whatever else is wrong with it.
#[must_use]
pub fn header(magic: [u8; 4], version: u16, kind: u16, length: u32, epoch: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(48);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    // Slot, count, sequence.
    bytes.extend_from_slice(&[0; 12]);
    bytes.extend_from_slice(&epoch.to_le_bytes());
    bytes.extend_from_slice(&[0; 12]);
    let sum = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// What such a peer may say, each wrong in one way.
#[must_use]
pub fn insults() -> Vec<(&'static str, Vec<u8>)> {
    const HELLO: u16 = 1;
    const PAGES: u16 = 4;
    let hello = |ticket: &[u8], role: u32| {
        let mut bytes = header(*b"SLAT", 1, HELLO, ticket.len() as u32 + 4, 1);
        bytes.extend_from_slice(ticket);
        bytes.extend_from_slice(&role.to_le_bytes());
        bytes
    };
    let mut broken_sum = hello(&[0; 32], 0);
    broken_sum[44] ^= 1;
    vec![
        ("nothing at all", Vec::new()),
        ("garbage", (0..=255).cycle().take(1 << 16).collect()),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(8)),
        ("a wrong magic", header(*b"TALS", 1, HELLO, 36, 1)),
        ("a wrong version", header(*b"SLAT", 99, HELLO, 36, 1)),
        ("a wrong kind", header(*b"SLAT", 1, 77, 0, 1)),
        ("a wrong sum", broken_sum),
        ("a wrong epoch", header(*b"SLAT", 1, HELLO, 36, 9)),
        (
            "a length past every bound",
            header(*b"SLAT", 1, HELLO, u32::MAX, 1),
        ),
        (
            "pages before an introduction",
            header(*b"SLAT", 1, PAGES, 8 + 4096, 1),
        ),
        ("a wrong ticket, as control", hello(&[0; 32], 0)),
        ("a wrong ticket, as stream 0", hello(&[0xff; 32], 1)),
        ("a short ticket", hello(&[1; 3], 1)),
    ]
}

/// Says `bytes`, then ends its side. Returns what came back until the port closed the connection.
///
/// # Errors
/// When the port neither answers nor closes.
pub fn say(port: SocketAddr, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(port)?;
    stream.set_read_timeout(Some(REACTION))?;
    // The port may close before it has taken everything: that is an answer too.
    drop(stream.write_all(bytes));
    drop(stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => Ok(answer),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(answer),
        Err(error) => Err(error).context("the port keeps a connection without a ticket"),
    }
}
