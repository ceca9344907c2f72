//! New guest memory until all of it is there, by one thread: Slat's, mapped in both views and of
//! 2 MiB pages where they are to be had, beside MADV_POPULATE_WRITE of a memfd.
//!
//! In steady state: memory that this machine, and a hypervisor below it, has just had. What is free
//! is given back to a hypervisor within seconds ([`warm`]), so as much and a quarter more is
//! touched and let go before each measurement, Slat's and the peer's alike.

use std::time::Instant;

use anyhow::Context as _;
use slat_vmm::fill_fresh;

use super::size;
use crate::{
    bench::{
        mapping::{Mapping, warm},
        rows::{Goal, Row},
    },
    guest::MIB,
};

/// Runs that do not count.
const WARM_UP: u32 = 1;

/// The row.
///
/// # Errors
/// When memory is short.
pub fn measure(runs: u32, memory_mib: u64) -> anyhow::Result<Row> {
    let bytes = memory_mib * MIB;
    let length = usize::try_from(bytes).context("too much to map")?;
    let mut row = Row::new("", "MADV_POPULATE_WRITE", Some(Goal::Faster(3.0)));
    let mut huge = u64::MAX;
    for run in 0..runs + WARM_UP {
        warm(length + length / 4)?;
        let slat = fill_fresh(bytes / 4096)?;
        warm(length + length / 4)?;
        let mapping = Mapping::memfd(length)?;
        let begun = Instant::now();
        mapping.populate()?;
        let peer = begun.elapsed().as_nanos() as f64;
        if run >= WARM_UP {
            row.add(slat.time.as_nanos() as f64, peer);
            huge = huge.min(slat.huge_bytes);
        }
    }
    row.name = format!(
        "populate {}, one thread ({} % or more in 2 MiB pages)",
        size(memory_mib),
        huge.min(bytes) * 100 / bytes
    );
    Ok(row)
}
