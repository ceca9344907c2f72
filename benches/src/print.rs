//! The result for people and for programs.

use std::{fs::File, io::Write as _, os::fd::OwnedFd};

use anyhow::Context as _;
use rustix::{io::fcntl_dupfd_cloexec, stdio};
use serde_json::{Map, Value, json};

use crate::report::{Figure, Row};

/// The standard output that the program was started with. Until the end, everything else that is
/// printed goes to standard error.
pub(crate) struct Console(OwnedFd);

impl Console {
    pub(crate) fn take() -> anyhow::Result<Self> {
        let kept = fcntl_dupfd_cloexec(stdio::stdout(), 3).context("keeping standard output")?;
        stdio::dup2_stdout(stdio::stderr()).context("criterion's output to standard error")?;
        Ok(Self(kept))
    }

    pub(crate) fn write(self, text: &str) -> anyhow::Result<()> {
        File::from(self.0)
            .write_all(text.as_bytes())
            .context("writing the result")
    }
}

const HEAD: [&str; 9] = [
    "row",
    "unit",
    "Slat",
    "fastest peer, or one thread",
    "",
    "baseline",
    "",
    "goal",
    "met",
];

/// Three significant digits, as far as they help.
fn number(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{v:.3e}"),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}

/// Nanoseconds in the row's unit.
fn scale(row: &Row) -> (f64, &'static str) {
    if row.per == "page" {
        (1.0, "ns/page")
    } else {
        (1e-6, "ms")
    }
}

fn spread(row: &Row, figure: &Figure) -> String {
    let (by, _) = scale(row);
    let stat = figure.stat;
    format!(
        "{} ({}–{})",
        number(stat.median * by),
        number(stat.min * by),
        number(stat.max * by)
    )
}

fn ratio(row: &Row, other: Option<&Figure>) -> String {
    row.over(other)
        .map(|ratio| format!("{}x", number(ratio)))
        .unwrap_or_default()
}

fn cells(row: &Row) -> [String; 9] {
    let slat = match (&row.counted, &row.skipped, row.slat()) {
        (Some(counted), _, _) => number(counted.value),
        (_, Some(why), _) => format!("skipped: {why}"),
        (_, _, Some(figure)) => spread(row, figure),
        _ => String::new(),
    };
    let named = |figure: Option<&Figure>| {
        figure
            .map(|figure| format!("{} {}", figure.name, spread(row, figure)))
            .unwrap_or_default()
    };
    // Where a row is about two threads, one thread is what it is compared with.
    let peer = row.peer().or(row.one_thread());
    let unit = row.counted.map_or(scale(row).1, |counted| counted.unit);
    [
        row.name.clone(),
        unit.to_owned(),
        slat,
        named(peer),
        ratio(row, peer),
        named(row.baseline()),
        ratio(row, row.baseline()),
        row.goal.clone().unwrap_or_default(),
        match row.met() {
            Some(true) => "yes".to_owned(),
            Some(false) => "NO".to_owned(),
            None => String::new(),
        },
    ]
}

fn lines(rows: &[Row], edge: &str, gap: &str, rule: bool) -> String {
    let cells: Vec<_> = rows.iter().map(cells).collect();
    let head = HEAD.map(str::to_owned);
    let width = |at: usize| {
        let all = cells.iter().chain([&head]);
        all.map(|row| row[at].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..HEAD.len()).map(width).collect();
    let line = |row: &[String; 9]| {
        let padded: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"))
            .collect();
        format!("{edge}{}{edge}", padded.join(gap))
            .trim()
            .to_owned()
            + "\n"
    };
    let mut text = line(&head);
    if rule {
        let dashes: Vec<_> = widths
            .iter()
            .map(|&width| "-".repeat(width.max(1)))
            .collect();
        text += &(format!("{edge}{}{edge}", dashes.join(gap))
            .trim()
            .to_owned()
            + "\n");
    }
    text + &cells.iter().map(line).collect::<String>()
}

/// How to read the two numbers in parentheses.
const LEGEND: &str = "Median (least–greatest) of 10 samples, subjects in turns on one core, CPU time; two threads: wall-clock time. \
Ratios are Slat's time over the other's.";

/// An aligned table.
pub(crate) fn table(rows: &[Row]) -> String {
    format!(
        "{}\n{LEGEND}\n{}",
        lines(rows, "", "  ", false),
        summary(rows)
    )
}

/// The table of docs/benchmarks.md.
pub(crate) fn markdown(rows: &[Row]) -> String {
    format!(
        "{}\n{LEGEND}\n\n{}",
        lines(rows, " | ", " | ", true),
        summary(rows)
    )
}

fn summary(rows: &[Row]) -> String {
    let judged = rows.iter().filter_map(Row::met);
    let (met, all) = judged.fold((0, 0), |(met, all), one| (met + usize::from(one), all + 1));
    format!("{met} of {all} goals met.\n")
}

fn put(fields: &mut Map<String, Value>, who: &str, figure: Option<&Figure>) {
    let stat = figure.map(|figure| figure.stat);
    fields.insert(format!("{who}_ns"), json!(stat.map(|stat| stat.median)));
    fields.insert(format!("{who}_min_ns"), json!(stat.map(|stat| stat.min)));
    fields.insert(format!("{who}_max_ns"), json!(stat.map(|stat| stat.max)));
}

/// One JSON object.
pub(crate) fn json(rows: &[Row]) -> anyhow::Result<String> {
    let one = |row: &Row| {
        let mut fields = Map::new();
        fields.insert("name".into(), json!(row.name));
        fields.insert("per".into(), json!(row.per));
        put(&mut fields, "slat", row.slat());
        let name = |figure: Option<&Figure>| json!(figure.map(|figure| &figure.name));
        fields.insert("peer".into(), name(row.peer()));
        put(&mut fields, "peer", row.peer());
        fields.insert("baseline".into(), name(row.baseline()));
        put(&mut fields, "baseline", row.baseline());
        fields.insert("goal".into(), json!(row.goal));
        fields.insert("met".into(), json!(row.met()));
        if let Some(one) = row.one_thread() {
            put(&mut fields, "one_thread", Some(one));
        }
        if let Some(counted) = row.counted {
            fields.insert("value".into(), json!(counted.value));
            fields.insert("unit".into(), json!(counted.unit));
        }
        if let Some(why) = &row.skipped {
            fields.insert("skipped".into(), json!(why));
        }
        let subjects: Map<_, _> = row
            .figures
            .iter()
            .map(|figure| (figure.name.clone(), json!(figure.stat)))
            .collect();
        fields.insert("subjects".into(), Value::Object(subjects));
        Value::Object(fields)
    };
    let rows: Vec<_> = rows.iter().map(one).collect();
    Ok(serde_json::to_string_pretty(&json!({ "rows": rows }))? + "\n")
}
