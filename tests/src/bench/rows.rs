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

/// One comparison. Times are in nanoseconds; samples of both were taken in turns.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// What Slat is compared with.
    pub peer: String,
    /// What it is to reach; `None`: it is shown.
    pub goal: Option<Goal>,
    /// Slat's samples.
    pub slat_ns: Vec<f64>,
    /// The peer's.
    pub peer_ns: Vec<f64>,
}

impl Row {
    /// Without samples yet.
    #[must_use]
    pub fn new(name: impl Into<String>, peer: impl Into<String>, goal: Option<Goal>) -> Self {
        Self {
            name: name.into(),
            peer: peer.into(),
            goal,
            slat_ns: Vec::new(),
            peer_ns: Vec::new(),
        }
    }

    /// One sample of each.
    pub fn add(&mut self, slat_ns: f64, peer_ns: f64) {
        self.slat_ns.push(slat_ns);
        self.peer_ns.push(peer_ns);
    }

    fn spreads(&self) -> [Spread; 2] {
        [&self.slat_ns, &self.peer_ns].map(|samples| Spread::of(samples.iter().copied()))
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

    fn json(&self) -> Value {
        let [slat, peer] = self.spreads();
        json!({
            "name": self.name,
            "slat_ns": slat.median,
            "slat_least_ns": slat.min,
            "slat_greatest_ns": slat.max,
            "peer": self.peer,
            "peer_ns": peer.median,
            "peer_least_ns": peer.min,
            "peer_greatest_ns": peer.max,
            "samples": self.slat_ns.len(),
            "ratio": self.ratio(),
            "goal": self.goal.map(Goal::text),
            "met": self.met(),
        })
    }

    fn line(&self) -> String {
        let [slat, peer] = self.spreads();
        let met = match self.met() {
            None => "",
            Some(true) => "yes",
            Some(false) => "no",
        };
        format!(
            "| {} | {} | {} | {} | {:.2}x | {} | {met} |",
            self.name,
            show(slat),
            self.peer,
            show(peer),
            self.ratio(),
            self.goal.map_or_else(String::new, Goal::text),
        )
    }
}

/// Median, least and greatest, in the unit that suits the median.
fn show(spread: Spread) -> String {
    let (unit, scale) = match spread.median {
        nanos if nanos < 1e3 => ("ns", 1.0),
        nanos if nanos < 1e6 => ("us", 1e-3),
        nanos if nanos < 1e9 => ("ms", 1e-6),
        _ => ("s", 1e-9),
    };
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
    fn a_row_without_a_goal_is_shown() {
        let row = row(None, 2e3, 1e3);
        assert_eq!(row.json()["goal"], Value::Null);
        assert_eq!(row.json()["met"], Value::Null);
        assert_eq!(row.json()["ratio"], 2.0);
        let table = table(&[row]);
        let last = table.lines().last().unwrap();
        assert!(
            last.starts_with("| x | 2.00 (2.00–200.00) us | y |"),
            "{last}"
        );
    }
}
