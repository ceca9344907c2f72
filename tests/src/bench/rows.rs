//! Rows of a benchmark that compares Slat with a peer: times, their ratio, a goal; as a table and
//! as JSON. A missed goal is a result, not an error.

use serde_json::{Value, json};

use super::figures::Spread;

/// What a row is to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Slat takes at most so many times the peer's time.
    AtMost(f64),
    /// Slat is at least so many times faster.
    Faster(f64),
    /// Slat takes at most so many nanoseconds more.
    Over(f64),
}

impl Goal {
    fn text(self) -> String {
        match self {
            Self::AtMost(times) => format!("at most {times}x"),
            Self::Faster(times) => format!("at least {times}x faster"),
            Self::Over(nanos) => format!("under {} us more", nanos / 1e3),
        }
    }

    fn met(self, slat: f64, peer: f64) -> bool {
        match self {
            Self::AtMost(times) => slat <= peer * times,
            Self::Faster(times) => slat * times <= peer,
            Self::Over(nanos) => slat - peer < nanos,
        }
    }
}

/// What a row's samples are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unit {
    /// Nanoseconds.
    Time,
    /// Bytes.
    Bytes,
}

impl Unit {
    /// In the names of JSON's values.
    fn name(self) -> &'static str {
        match self {
            Self::Time => "ns",
            Self::Bytes => "bytes",
        }
    }

    /// What suits a value: its name, and what to multiply with.
    fn scale(self, value: f64) -> (&'static str, f64) {
        match self {
            Self::Time => match value {
                nanos if nanos < 1e3 => ("ns", 1.0),
                nanos if nanos < 1e6 => ("us", 1e-3),
                nanos if nanos < 1e9 => ("ms", 1e-6),
                _ => ("s", 1e-9),
            },
            Self::Bytes => match value {
                bytes if bytes < 1024.0 => ("bytes", 1.0),
                bytes if bytes < 1024.0 * 1024.0 => ("KiB", 1.0 / 1024.0),
                bytes if bytes < (1_u64 << 30) as f64 => ("MiB", 1.0 / (1 << 20) as f64),
                _ => ("GiB", 1.0 / (1_u64 << 30) as f64),
            },
        }
    }
}

/// One comparison; samples of both were taken in turns. They are times in nanoseconds unless the
/// row says otherwise.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured, for people: sizes are in it.
    pub name: String,
    /// The same for programs: it never changes. Empty where programs go by the name.
    key: String,
    /// What Slat is compared with.
    pub peer: String,
    /// What it is to reach; `None`: it is shown.
    pub goal: Option<Goal>,
    /// Slat's samples.
    pub slat: Vec<f64>,
    /// The peer's.
    pub peer_samples: Vec<f64>,
    unit: Unit,
    /// Each sample has the peer's that was taken beside it: their ratio has a spread.
    in_pairs: bool,
}

impl Row {
    /// Without samples yet.
    #[must_use]
    pub fn new(name: impl Into<String>, peer: impl Into<String>, goal: Option<Goal>) -> Self {
        Self {
            name: name.into(),
            key: String::new(),
            peer: peer.into(),
            goal,
            slat: Vec::new(),
            peer_samples: Vec::new(),
            unit: Unit::Time,
            in_pairs: false,
        }
    }

    /// The same, with a name for programs.
    #[must_use]
    pub fn keyed(self, key: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            ..self
        }
    }

    /// Its name for programs.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The same of something else.
    #[must_use]
    pub fn of(self, unit: Unit) -> Self {
        Self { unit, ..self }
    }

    /// The same, which shows the least and the greatest ratio of a sample to the one beside it.
    #[must_use]
    pub fn in_pairs(self) -> Self {
        Self {
            in_pairs: true,
            ..self
        }
    }

    /// One sample of each.
    pub fn add(&mut self, slat: f64, peer: f64) {
        self.slat.push(slat);
        self.peer_samples.push(peer);
    }

    /// A row of the sample alone in which Slat took longest.
    #[must_use]
    pub fn worst(&self, name: impl Into<String>) -> Self {
        let mut row = Self::new(name, self.peer.clone(), self.goal).of(self.unit);
        let pairs = self.slat.iter().zip(&self.peer_samples);
        if let Some((slat, peer)) = pairs.max_by(|one, other| one.0.total_cmp(other.0)) {
            row.add(*slat, *peer);
        }
        row
    }

    fn spreads(&self) -> [Spread; 2] {
        [&self.slat, &self.peer_samples].map(|samples| Spread::of(samples.iter().copied()))
    }

    /// Of the peer's samples.
    #[must_use]
    pub fn peer_median(&self) -> f64 {
        self.spreads()[1].median
    }

    /// Of the medians.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        let [slat, peer] = self.spreads();
        slat.median / peer.median
    }

    /// Whether the goal is reached, by the medians.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        let [slat, peer] = self.spreads();
        self.goal.map(|goal| goal.met(slat.median, peer.median))
    }

    /// Of each sample to the one beside it.
    fn ratios(&self) -> Option<Spread> {
        let pairs = self.slat.iter().zip(&self.peer_samples);
        let ratios = pairs.map(|(slat, peer)| slat / peer);
        self.in_pairs.then(|| Spread::of(ratios))
    }

    /// All that is known of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let [slat, peer] = self.spreads();
        let ratios = self.ratios();
        let mut row = json!({
            "name": self.name,
            "unit": self.unit.name(),
            "peer": self.peer,
            "samples": self.slat.len(),
            "ratio": self.ratio(),
            "ratio_least": ratios.map(|ratios| ratios.min),
            "ratio_greatest": ratios.map(|ratios| ratios.max),
            "goal": self.goal.map(Goal::text),
            "met": self.met(),
        });
        for (whose, spread) in [("slat", slat), ("peer", peer)] {
            let unit = self.unit.name();
            row[format!("{whose}_{unit}")] = json!(spread.median);
            row[format!("{whose}_least_{unit}")] = json!(spread.min);
            row[format!("{whose}_greatest_{unit}")] = json!(spread.max);
        }
        if !self.key.is_empty() {
            row["key"] = json!(self.key);
        }
        row
    }

    fn line(&self) -> String {
        let [slat, peer] = self.spreads();
        let met = match self.met() {
            None => "",
            Some(true) => "yes",
            Some(false) => "no",
        };
        // One that is far below 1 has digits, too.
        let digits = if self.ratio() < 0.1 { 4 } else { 2 };
        let ratio = match self.ratios() {
            None => format!("{:.digits$}x", self.ratio()),
            Some(ratios) => format!(
                "{:.digits$}x ({:.digits$}–{:.digits$})",
                self.ratio(),
                ratios.min,
                ratios.max
            ),
        };
        format!(
            "| {} | {} | {} | {} | {ratio} | {} | {met} |",
            self.name,
            show(self.unit, slat),
            self.peer,
            show(self.unit, peer),
            self.goal.map_or_else(String::new, Goal::text),
        )
    }
}

/// Median, least and greatest, in what suits the median.
fn show(unit: Unit, spread: Spread) -> String {
    let (unit, scale) = unit.scale(spread.median);
    format!("{} {unit}", spread.show(scale, 2))
}

/// `{"rows":[…]}`.
#[must_use]
pub fn json(rows: &[Row]) -> Value {
    json!({ "rows": rows.iter().map(Row::json).collect::<Vec<_>>() })
}

/// The table in Markdown.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let head =
        "| row | Slat | peer | peer's time | ratio | goal | met |\n|---|---|---|---|---|---|---|";
    let lines = std::iter::once(head.to_owned()).chain(rows.iter().map(Row::line));
    lines.map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(goal: Option<Goal>, slat: f64, peer: f64) -> Row {
        let mut row = Row::new("x", "y", goal);
        // One wild run changes nothing.
        for (slat, peer) in [(slat, peer), (slat * 100.0, peer), (slat, peer * 100.0)] {
            row.add(slat, peer);
        }
        row
    }

    #[test]
    fn goals_are_met_or_missed_by_the_medians() {
        for (goal, slat, peer, met) in [
            (Goal::AtMost(1.2), 12.0, 10.0, true),
            (Goal::AtMost(1.2), 13.0, 10.0, false),
            (Goal::Faster(3.0), 10.0, 30.0, true),
            (Goal::Faster(3.0), 11.0, 30.0, false),
            (Goal::Over(150e3), 159e3, 10e3, true),
            (Goal::Over(150e3), 161e3, 10e3, false),
        ] {
            let row = row(Some(goal), slat, peer);
            assert_eq!(row.met(), Some(met), "{goal:?}");
            assert_eq!(row.json()["met"], met);
            assert_eq!(row.json()["goal"], goal.text());
        }
    }

    #[test]
    fn the_worst_sample_is_held_against_the_goal_alone() {
        let row = row(Some(Goal::AtMost(2.0)), 10.0, 10.0);
        let worst = row.worst("w");
        assert_eq!((worst.slat, worst.peer_samples), (vec![1000.0], vec![10.0]));
        assert_eq!((row.met(), row.worst("w").met()), (Some(true), Some(false)));
    }

    #[test]
    fn a_row_without_a_goal_is_shown() {
        let row = row(None, 2e3, 1e3);
        assert_eq!(row.json()["goal"], Value::Null);
        assert_eq!(row.json()["met"], Value::Null);
        assert_eq!(row.json()["ratio"], 2.0);
        assert_eq!(row.json()["slat_ns"], 2e3);
        assert_eq!(row.json()["ratio_least"], Value::Null);
        let table = table(&[row]);
        let last = table.lines().last().unwrap();
        assert!(
            last.starts_with("| x | 2.00 (2.00–200.00) us | y |"),
            "{last}"
        );
    }

    #[test]
    fn a_row_of_pairs_shows_how_their_ratios_spread() {
        let row = row(None, 2e3, 1e3).in_pairs();
        assert_eq!(row.json()["ratio_least"], 0.02);
        assert_eq!(row.json()["ratio_greatest"], 200.0);
        assert!(
            row.line().contains("| 2.00x (0.02–200.00) |"),
            "{}",
            row.line()
        );
    }

    #[test]
    fn bytes_are_no_times() {
        let row = row(None, 3e6, 1e6).of(Unit::Bytes).keyed("x.y");
        let json = row.json();
        assert_eq!(json["key"], "x.y");
        assert_eq!(
            (&json["unit"], &json["slat_bytes"]),
            (&json!("bytes"), &json!(3e6))
        );
        assert!(json.get("slat_ns").is_none());
        let small = Row::new("x", "y", None);
        let mut small = small.of(Unit::Bytes);
        small.add(20.0, 8192.0);
        assert!(small.line().contains("| 0.0024x |"), "{}", small.line());
        assert!(
            row.line().contains("| 2.86 (2.86–286.10) MiB |"),
            "{}",
            row.line()
        );
    }
}
