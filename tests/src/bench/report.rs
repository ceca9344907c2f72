//! Figures of the migration benchmark: medians with their spread, as a table, as JSON, and in
//! `docs/benchmarks.md`.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

/// Where our table stands in `docs/benchmarks.md`.
pub const BEGIN: &str = "<!-- cargo xtask bench migration --update-docs: begin -->";
/// Its end.
pub const END: &str = "<!-- cargo xtask bench migration --update-docs: end -->";

/// Goal for the ratio to the plain loop.
const GOAL_RATIO: f64 = 0.60;
/// Goal for the downtime of an idle VM, seconds.
const GOAL_DOWNTIME: f64 = 0.020;
const GIB: f64 = (1_u64 << 30) as f64;

/// One migration and the plain run beside it.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Bytes a second of the migration, headers included.
    pub slat: f64,
    /// Bytes a second of the plain loop.
    pub plain: f64,
    /// CPU seconds a GiB of the migration, both sides.
    pub cpu: f64,
    /// CPU seconds a GiB of the plain loop, both sides.
    pub plain_cpu: f64,
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
    /// At least one.
    pub pairs: Vec<Pair>,
}

/// Least, median and greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 || values.is_empty() {
            at(middle)
        } else {
            f64::midpoint(at(middle - 1), at(middle))
        };
        Self {
            min: at(0),
            median,
            max: at(values.len().saturating_sub(1)),
        }
    }

    fn show(self, scale: f64, digits: usize) -> String {
        format!(
            "{:.digits$} ({:.digits$}–{:.digits$})",
            self.median * scale,
            self.min * scale,
            self.max * scale
        )
    }
}

impl Row {
    fn spread(&self, value: impl Fn(&Pair) -> f64) -> Spread {
        Spread::of(self.pairs.iter().map(value))
    }

    /// Of the medians.
    fn ratio(&self) -> f64 {
        self.spread(|pair| pair.slat).median / self.spread(|pair| pair.plain).median
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "slat_bytes_per_second": self.spread(|pair| pair.slat).median.round(),
            "plain_bytes_per_second": self.spread(|pair| pair.plain).median.round(),
            "ratio": self.ratio(),
            "cpu_seconds_per_gib": self.spread(|pair| pair.cpu).median,
            "downtime_seconds": self.spread(|pair| pair.downtime).median,
        })
    }
}

/// `{"rows":[…]}`, medians only.
#[must_use]
pub fn json(rows: &[Row]) -> Value {
    json!({ "rows": rows.iter().map(Row::json).collect::<Vec<_>>() })
}

/// The table in Markdown, which reads well on a terminal too, with the goals below it.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    const HEAD: [&str; 8] = [
        "migration",
        "Slat GB/s",
        "plain GB/s",
        "ratio",
        "CPU s/GiB",
        "plain CPU s/GiB",
        "downtime ms",
        "whole s",
    ];
    let mut cells = vec![HEAD.map(str::to_owned)];
    for row in rows {
        let ratios = row.spread(|pair| pair.slat / pair.plain);
        cells.push([
            row.name.clone(),
            row.spread(|pair| pair.slat).show(1e-9, 2),
            row.spread(|pair| pair.plain).show(1e-9, 2),
            format!("{:.2} ({:.2}–{:.2})", row.ratio(), ratios.min, ratios.max),
            row.spread(|pair| pair.cpu).show(1.0, 2),
            row.spread(|pair| pair.plain_cpu).show(1.0, 2),
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
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runs = rows.iter().map(|row| row.pairs.len()).min().unwrap_or(0);
    ignore(writeln!(
        text,
        "Median (least–greatest) of {runs} alternating runs, {cores} cores, Linux {}, load average {}.\n\
        GB/s is from the first byte of a page until RESUMED, into memory that is populated, as the plain loop's is; \
        CPU counts both sides and the populating; whole is from the request until COMPLETED.\n",
        rustix::system::uname().release().to_string_lossy(),
        load_average()
    ));
    for row in rows {
        let downtime = row.spread(|pair| pair.downtime).median;
        ignore(writeln!(
            text,
            "- {}: at least {GOAL_RATIO:.2} of the plain loop: {}; downtime under {:.0} ms: {}",
            row.name,
            verdict(row.ratio() >= GOAL_RATIO),
            GOAL_DOWNTIME * 1e3,
            verdict(downtime < GOAL_DOWNTIME)
        ));
    }
    text
}

/// Writing to a String does not fail.
fn ignore(_: std::fmt::Result) {}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

/// Of the last minute; the benchmark's own work is in it.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// CPU seconds a GiB.
#[must_use]
pub fn per_gib(seconds: f64, bytes: u64) -> f64 {
    seconds / (bytes as f64 / GIB)
}

/// Puts the table between the two marker lines of a page; makes the page when there is none.
///
/// # Errors
/// When the page lacks the markers or cannot be written.
pub fn update_docs(page: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let old = match fs::read_to_string(page) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            format!("# Benchmarks\n\n## Live migration\n\n{BEGIN}\n{END}\n")
        }
        Err(error) => return Err(error).with_context(|| page.display().to_string()),
    };
    let new = replace(&old, &table(rows)).with_context(|| page.display().to_string())?;
    if let Some(parent) = page.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(page, new).with_context(|| page.display().to_string())
}

fn replace(page: &str, table: &str) -> anyhow::Result<String> {
    let begin = page.find(BEGIN).context("no line that begins the table")? + BEGIN.len();
    let end = page.find(END).context("no line that ends the table")?;
    ensure!(begin <= end, "the table ends before it begins");
    Ok(format!("{}\n\n{table}\n{}", &page[..begin], &page[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(slat: &[f64]) -> Row {
        Row {
            name: "x".into(),
            pairs: slat
                .iter()
                .map(|&slat| Pair {
                    slat,
                    plain: 4e9,
                    cpu: 0.5,
                    plain_cpu: 0.4,
                    downtime: 0.01,
                    whole: 1.0,
                })
                .collect(),
        }
    }

    #[test]
    fn medians_ignore_the_order_and_one_wild_run() {
        let json = json(&[row(&[9e9, 3e9, 1e9, 2e9, 2.5e9])]);
        assert_eq!(json["rows"][0]["slat_bytes_per_second"], 2.5e9);
        assert_eq!(json["rows"][0]["ratio"], 0.625);
        let even = Spread::of([4.0, 1.0, 2.0, 3.0].into_iter());
        assert_eq!(
            even,
            Spread {
                min: 1.0,
                median: 2.5,
                max: 4.0
            }
        );
    }

    #[test]
    fn goals_are_met_or_missed_by_the_median() {
        assert!(table(&[row(&[2.5e9])]).contains("plain loop: met; downtime under 20 ms: met"));
        assert!(table(&[row(&[2.3e9])]).contains("plain loop: missed;"));
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let page = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let once = replace(&page, "new\n").unwrap();
        assert!(once.starts_with("before\n") && once.ends_with("\nafter\n"));
        assert!(once.contains("new") && !once.contains("old"));
        assert_eq!(replace(&once, "new\n").unwrap(), once);
        assert!(replace("nothing", "new").is_err());
    }
}
