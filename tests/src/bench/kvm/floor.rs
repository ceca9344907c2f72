//! What a call costs that does nothing: the floor below every other row that goes through a socket.
//!
//! An empty call is a health check of the VM's process: the whole transport, no VM. One that looks
//! is ListSlots, which comes to the VM as a change does and finds nothing to do. Beside them a byte
//! goes there and back through a pair of Unix sockets, between two threads that wait for it: what
//! waking somebody twice takes on the machine.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    thread::JoinHandle,
    time::Instant,
};

use anyhow::Context as _;
use slat_proto::{
    transport::connect,
    v1::{self, Backend},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{HOST, Lab};
use crate::{bench::rows::Row, guest::busy};

const MEMORY_MIB: u64 = 64;
/// Calls for each of the runs asked for.
const CALLS: u32 = 40;
const PEER: &str = "a byte there and back";

/// Sends back what it is sent.
struct Echo {
    stream: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn new() -> anyhow::Result<Self> {
        let (ours, mut theirs) = UnixStream::pair()?;
        let thread = std::thread::Builder::new()
            .name("echo".to_owned())
            .spawn(move || {
                let mut byte = [0];
                while theirs.read_exact(&mut byte).is_ok() && theirs.write_all(&byte).is_ok() {}
            })?;
        Ok(Self {
            stream: Some(ours),
            thread: Some(thread),
        })
    }

    /// Nanoseconds there and back.
    fn round(&mut self) -> anyhow::Result<f64> {
        let stream = self.stream.as_mut().context("the echo has ended")?;
        let begun = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        Ok(begun.elapsed().as_nanos() as f64)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        drop(self.stream.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// All rows.
///
/// # Errors
/// When something refuses.
pub async fn measure(lab: &Lab) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, MEMORY_MIB, 1, Some(0));
    let vm = lab.create("floor", spec).await?;
    let mut health = HealthClient::new(connect(&lab.socket(&vm))?);
    let mut endpoints = [
        (lab.memory(&vm), "by the VM's socket"),
        (lab.fleet.memory(&lab.fleet.agent(HOST)), "by the agent"),
    ];
    let mut echo = Echo::new()?;
    let mut rows = vec![Row::new("an empty call, by the VM's socket", PEER, None)];
    for (_, endpoint) in &endpoints {
        let name = format!("a call that looks (ListSlots), {endpoint}");
        rows.push(Row::new(name, PEER, None));
    }
    for round in 0..(lab.runs + 1) * CALLS {
        let mut times = Vec::with_capacity(rows.len());
        let begun = Instant::now();
        health.check(HealthCheckRequest::default()).await?;
        times.push(begun.elapsed().as_nanos() as f64);
        for (memory, _) in &mut endpoints {
            let request = v1::ListSlotsRequest {
                vm: vm.name.clone(),
                ..Default::default()
            };
            let begun = Instant::now();
            memory.list_slots(request).await?;
            times.push(begun.elapsed().as_nanos() as f64);
        }
        for (row, slat) in rows.iter_mut().zip(times) {
            let peer = echo.round()?;
            if round >= CALLS {
                row.add(slat, peer);
            }
        }
    }
    lab.delete(&vm).await?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_comes_back() {
        let mut echo = Echo::new().unwrap();
        assert!(echo.round().unwrap() > 0.0 && echo.round().unwrap() > 0.0);
    }
}
