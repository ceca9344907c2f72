//! Figures of the migration benchmark, as a table, as JSON, and in `docs/benchmarks.md`.

use std::{fmt::Write as _, path::Path};

use serde_json::{Value, json};

use super::{
    figures::{Spread, machine, put_table},
    qemu::{self, Qemu, QemuRun},
    rows,
};

/// Of this table in `docs/benchmarks.md`.
const NAME: &str = "migration";

/// Goal for the ratio to the plain loop.
const GOAL_RATIO: f64 = 0.60;
/// Goal for the ratio to the loop by TLS.
const GOAL_RATIO_TLS: f64 = 0.90;
/// Goal for what TLS adds to the downtime, seconds.
const GOAL_ADDED: f64 = 0.002;
/// Goal for the downtime of an idle VM, seconds.
const GOAL_DOWNTIME: f64 = 0.020;
const GIB: f64 = (1_u64 << 30) as f64;

/// One migration and the bare loop's run beside it.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Bytes a second of the migration, headers included.
    pub slat: f64,
    /// Bytes a second of the bare loop.
    pub bare: f64,
    /// CPU seconds a GiB of the migration, both sides.
    pub cpu: f64,
    /// CPU seconds a GiB of the bare loop, both sides.
    pub bare_cpu: f64,
    /// Seconds.
    pub downtime: f64,
    /// Seconds from the request until COMPLETED: with what is done before the first byte (the
    /// destination builds the VM and populates its memory) and after the last.
    pub whole: f64,
}

/// All pairs of one configuration.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Connections that carry pages.
    pub streams: u32,
    /// Both by TLS, or both in the clear.
    pub tls: bool,
    /// At least one.
    pub pairs: Vec<Pair>,
}

/// QEMU's migrations beside Slat's, or why there are none.
#[derive(Clone, Debug)]
pub struct Peer {
    rows: Vec<rows::Row>,
    absent: Option<String>,
}

impl Peer {
    /// Without migrations yet.
    #[must_use]
    pub fn new(qemu: &Result<Qemu, String>) -> Self {
        let (rows, absent) = match qemu {
            Ok(qemu) => {
                let row =
                    |name: &str| rows::Row::new(name, qemu.label(), Some(rows::Goal::AtMost(1.0)));
                let whole = format!("whole time, {} streams", qemu::CHANNELS);
                let cpu = "CPU of both sides for a GiB, the target's memory included";
                (vec![row(&whole), row(cpu)], None)
            }
            Err(why) => (Vec::new(), Some(why.clone())),
        };
        Self { rows, absent }
    }

    /// One migration of each, of a guest of so many bytes.
    pub fn add(&mut self, slat: &Pair, qemu: QemuRun, memory_bytes: u64) {
        let cpu = per_gib(qemu.cpu.as_secs_f64(), memory_bytes);
        let samples = [(slat.whole, qemu.whole.as_secs_f64()), (slat.cpu, cpu)];
        for (row, (slat, qemu)) in self.rows.iter_mut().zip(samples) {
            row.add(slat * 1e9, qemu * 1e9);
        }
    }

    fn text(&self) -> String {
        match &self.absent {
            Some(why) => format!("QEMU, as a peer, is not compared: {why}.\n"),
            None => rows::table(&self.rows),
        }
    }
}

impl Row {
    fn spread(&self, value: impl Fn(&Pair) -> f64) -> Spread {
        Spread::of(self.pairs.iter().map(value))
    }

    /// Of the medians.
    fn ratio(&self) -> f64 {
        self.spread(|pair| pair.slat).median / self.spread(|pair| pair.bare).median
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "slat_bytes_per_second": self.spread(|pair| pair.slat).median.round(),
            "tls": self.tls,
            "streams": self.streams,
            "bare_bytes_per_second": self.spread(|pair| pair.bare).median.round(),
            "ratio": self.ratio(),
            "cpu_seconds_per_gib": self.spread(|pair| pair.cpu).median,
            "downtime_seconds": self.spread(|pair| pair.downtime).median,
            "whole_seconds": self.spread(|pair| pair.whole).median,
        })
    }
}

/// `{"rows":[…],"qemu":[…]}`, of migrations medians only.
#[must_use]
pub fn json(rows: &[Row], peer: &Peer) -> Value {
    json!({
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
        "qemu": rows::json(&peer.rows)["rows"],
        "qemu_absent": peer.absent,
    })
}

/// The table in Markdown, which reads well on a terminal too, with the goals below it.
#[must_use]
pub fn table(rows: &[Row], peer: &Peer) -> String {
    const HEAD: [&str; 8] = [
        "migration",
        "Slat GB/s",
        "loop GB/s",
        "ratio",
        "CPU s/GiB",
        "loop CPU s/GiB",
        "downtime ms",
        "whole s",
    ];
    let mut cells = vec![HEAD.map(str::to_owned)];
    for row in rows {
        let ratios = row.spread(|pair| pair.slat / pair.bare);
        cells.push([
            row.name.clone(),
            row.spread(|pair| pair.slat).show(1e-9, 2),
            row.spread(|pair| pair.bare).show(1e-9, 2),
            format!("{:.2} ({:.2}–{:.2})", row.ratio(), ratios.min, ratios.max),
            row.spread(|pair| pair.cpu).show(1.0, 2),
            row.spread(|pair| pair.bare_cpu).show(1.0, 2),
            row.spread(|pair| pair.downtime).show(1e3, 1),
            row.spread(|pair| pair.whole).show(1.0, 2),
        ]);
    }
    let width = |column: usize| {
        let widths = cells.iter().map(|line| line[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let mut text = String::new();
    for (number, line) in cells.iter().enumerate() {
        let padded: Vec<String> = line
            .iter()
            .enumerate()
            .map(|(column, cell)| format!("{cell:<width$}", width = width(column)))
            .collect();
        ignore(writeln!(text, "| {} |", padded.join(" | ")));
        if number == 0 {
            let rule: Vec<String> = (0..HEAD.len()).map(|i| "-".repeat(width(i))).collect();
            ignore(writeln!(text, "| {} |", rule.join(" | ")));
        }
    }
    text.push('\n');
    let runs = rows.iter().map(|row| row.pairs.len()).min().unwrap_or(0);
    ignore(writeln!(
        text,
        "Median (least–greatest) of {runs} alternating runs, {}.\n\
        The loop is write and read and nothing else, and beside TLS it is rustls with the same cipher. \
        GB/s is from the first byte of a page until RESUMED, into memory that is populated, as the loop's is; \
        CPU counts both sides and the populating; whole is from the request until COMPLETED. \
        As much memory is touched and let go just before.\n",
        machine()
    ));
    for row in rows {
        ignore(writeln!(text, "{}", goals(row, rows)));
    }
    text.push('\n');
    text.push_str(&peer.text());
    text
}

/// Which goals `row` meets.
fn goals(row: &Row, rows: &[Row]) -> String {
    let downtime = |row: &Row| row.spread(|pair| pair.downtime).median;
    let (least, what) = if row.tls {
        (GOAL_RATIO_TLS, "rustls")
    } else {
        (GOAL_RATIO, "the plain loop")
    };
    let mut text = format!(
        "- {}: at least {least:.2} of {what}: {}; downtime under {:.0} ms: {}",
        row.name,
        verdict(row.ratio() >= least),
        GOAL_DOWNTIME * 1e3,
        verdict(downtime(row) < GOAL_DOWNTIME)
    );
    let beside = rows
        .iter()
        .find(|other| row.tls && !other.tls && other.streams == row.streams);
    if let Some(beside) = beside {
        let added = downtime(row) - downtime(beside);
        ignore(write!(
            text,
            "; TLS adds {:.1} ms to it, at most {:.0} ms: {}",
            added * 1e3,
            GOAL_ADDED * 1e3,
            verdict(added <= GOAL_ADDED)
        ));
    }
    text
}

/// Writing to a String does not fail.
fn ignore(_: std::fmt::Result) {}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

/// CPU seconds a GiB.
#[must_use]
pub fn per_gib(seconds: f64, bytes: u64) -> f64 {
    seconds / (bytes as f64 / GIB)
}

/// Puts the table of migrations where it stands in a page.
///
/// # Errors
/// As [`put_table`].
pub fn update_docs(page: &Path, rows: &[Row], peer: &Peer) -> anyhow::Result<()> {
    put_table(page, NAME, &table(rows, peer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(slat: &[f64]) -> Row {
        Row {
            name: "x".into(),
            streams: 1,
            tls: false,
            pairs: slat
                .iter()
                .map(|&slat| Pair {
                    slat,
                    bare: 4e9,
                    cpu: 0.5,
                    bare_cpu: 0.4,
                    downtime: 0.01,
                    whole: 1.0,
                })
                .collect(),
        }
    }

    fn absent() -> Peer {
        Peer::new(&Err("no such program".into()))
    }

    #[test]
    fn medians_ignore_the_order_and_one_wild_run() {
        let json = json(&[row(&[9e9, 3e9, 1e9, 2e9, 2.5e9])], &absent());
        assert_eq!(json["rows"][0]["slat_bytes_per_second"], 2.5e9);
        assert_eq!(json["rows"][0]["ratio"], 0.625);
    }

    #[test]
    fn goals_are_met_or_missed_by_the_median() {
        let met = table(&[row(&[2.5e9])], &absent());
        assert!(met.contains("plain loop: met; downtime under 20 ms: met"));
        assert!(table(&[row(&[2.3e9])], &absent()).contains("plain loop: missed;"));
        assert!(met.ends_with("QEMU, as a peer, is not compared: no such program.\n"));
    }

    #[test]
    fn tls_has_goals_of_its_own() {
        let tls = |slat: f64, downtime: f64| {
            let mut row = row(&[slat]);
            row.tls = true;
            row.pairs[0].downtime = downtime;
            row
        };
        let both = [row(&[2.5e9]), tls(3.7e9, 0.0119)];
        let met = table(&both, &absent());
        assert!(
            met.contains("0.90 of rustls: met; downtime under 20 ms: met; TLS adds 1.9 ms to it, at most 2 ms: met"),
            "{met}"
        );
        let missed = table(&[row(&[2.5e9]), tls(3.5e9, 0.0121)], &absent());
        assert!(missed.contains("0.90 of rustls: missed;"), "{missed}");
        assert!(missed.contains("at most 2 ms: missed"), "{missed}");
    }
}
