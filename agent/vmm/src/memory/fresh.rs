//! How long a new slot's memory takes until it is there, for `cargo xtask bench kvm`: what a VM's
//! process does in a migration's PREPARING, by one thread and with nothing around it.

use std::{
    io,
    time::{Duration, Instant},
};

use slat_proto::model::{PAGE_SIZE, SlotSpec};

use super::slots::SlotMemory;

/// Memory that was made and is gone again.
#[derive(Clone, Copy, Debug)]
pub struct Filled {
    /// How long its pages took to be there, and to be mapped in both views.
    pub time: Duration,
    /// Bytes of it that were 2 MiB pages.
    pub huge_bytes: u64,
}

/// Makes memory of that many pages, gives it all of them, and lets it go.
///
/// # Errors
/// When memory is short, or no slot can have so many pages.
pub fn fill_fresh(pages: u64) -> io::Result<Filled> {
    let spec = SlotSpec::new(0, 0, pages, false).map_err(io::Error::other)?;
    let memory = SlotMemory::new(spec)?;
    let begun = Instant::now();
    memory.populate(0, pages)?;
    let time = begun.elapsed();
    Ok(Filled {
        time,
        huge_bytes: memory
            .region()
            .made_of()
            .huge
            .unwrap_or(0)
            .min(pages * PAGE_SIZE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_was_there() {
        let filled = fill_fresh(1024).unwrap();
        assert!(filled.time > Duration::ZERO);
        assert!(filled.huge_bytes <= 1024 * PAGE_SIZE);
        assert!(fill_fresh(0).is_err(), "no slot has no page");
    }
}
