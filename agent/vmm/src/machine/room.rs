//! Whether this host has ordinary memory for what is about to be made.

use slat_proto::{ApiError, Reason};

/// `no_memory` when the host could not hold new slots of so many bytes now. Where the kernel does
/// not say, it is not checked.
///
/// What is said of available memory is a text, which takes the kernel as long to write as a slot
/// to be made. It is not asked for where memory that is free decides already.
pub(super) fn check_free(needed: u64, no_memory: Reason) -> Result<(), ApiError> {
    if needed == 0 || is_plenty(needed) {
        return Ok(());
    }
    let free = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .as_deref()
        .and_then(available_bytes);
    match free {
        Some(free) if needed > free => Err(ApiError::new(
            no_memory,
            format!("the new slots need {needed} bytes, the host has {free}"),
        )
        .with("needed_bytes", needed)
        .with("free_bytes", free)),
        _ => Ok(()),
    }
}

/// Whether at most half of the memory that is free is needed, and a sixteenth of all is free: what
/// the kernel keeps back, by which available memory can be less than free memory, is below that.
fn is_plenty(needed: u64) -> bool {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit).max(1);
    let bytes = |units: libc::c_ulong| unit.saturating_mul(units);
    let (free, all) = (bytes(info.freeram), bytes(info.totalram));
    needed <= free / 2 && free >= all / 16
}

/// MemAvailable of /proc/meminfo.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:  100 kB\nMemAvailable:     42 kB\n";
        assert_eq!(available_bytes(text), Some(42 << 10));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }
}
