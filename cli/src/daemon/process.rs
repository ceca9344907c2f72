//! What this process uses of its host, under the names that Prometheus' own clients have for it.
//! Read from `/proc` by the recorder's task, never for a scrape.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use procfs::{
    ProcResult,
    process::{LimitValue, Process},
};

/// Help texts and units.
pub(super) fn describe() {
    let cpu = "User and system CPU time of this process.";
    describe_counter!("process_cpu_seconds_total", Unit::Seconds, cpu);
    for (name, help) in [
        (
            "process_resident_memory_bytes",
            "Resident memory of this process.",
        ),
        (
            "process_virtual_memory_bytes",
            "Virtual memory of this process.",
        ),
        ("process_open_fds", "Open file descriptors."),
        ("process_max_fds", "File descriptors that it may open."),
        ("process_threads", "Threads of this process."),
        (
            "process_start_time_seconds",
            "When it began, seconds since 1970.",
        ),
    ] {
        describe_gauge!(name, help);
    }
}

/// Sets all of them. What cannot be read stays as it was, or absent.
pub(super) fn collect() {
    if let Err(error) = read() {
        tracing::debug!(%error, "this process cannot be looked at");
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are floats; below 2^53 exact"
)]
fn float(value: u64) -> f64 {
    value as f64
}

fn read() -> ProcResult<()> {
    let process = Process::myself()?;
    let stat = process.stat()?;
    let ticks = procfs::ticks_per_second().max(1);
    // A counter of whole seconds: its rate over minutes is exact enough, and it never falls.
    counter!("process_cpu_seconds_total").absolute((stat.utime + stat.stime) / ticks);
    gauge!("process_resident_memory_bytes").set(float(stat.rss * procfs::page_size()));
    gauge!("process_virtual_memory_bytes").set(float(stat.vsize));
    let threads = u64::try_from(stat.num_threads).unwrap_or_default();
    gauge!("process_threads").set(float(threads));
    let began = float(procfs::boot_time_secs()?) + float(stat.starttime) / float(ticks);
    gauge!("process_start_time_seconds").set(began);
    let open = u64::try_from(process.fd_count()?).unwrap_or(u64::MAX);
    gauge!("process_open_fds").set(float(open));
    if let LimitValue::Value(most) = process.limits()?.max_open_files.soft_limit {
        gauge!("process_max_fds").set(float(most));
    }
    Ok(())
}
