//! What a soak found.

use std::fmt;

use serde_json::{Value, json};

use super::judge::Broken;

/// A rule that did not hold when the allowance after a step was over.
#[derive(Clone, Debug)]
pub struct Disagreement {
    /// Number of the step; the end is one more than the last.
    pub step: usize,
    /// What was done.
    pub action: String,
    /// What was wrong then.
    pub broken: Broken,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Of the plan.
    pub seed: u64,
    /// Steps carried out.
    pub steps: usize,
    /// Migrations that were accepted.
    pub migrations: usize,
    /// In the order they were found.
    pub disagreements: Vec<Disagreement>,
    /// Steps after which the truth did not stand still long enough to be compared.
    pub unjudged: usize,
    /// The longest that anybody was behind the truth after a step, seconds, where all was right in
    /// the end.
    pub slowest_seconds: f64,
    /// What was left out, and why.
    pub skipped: Vec<String>,
}

impl Report {
    /// As one JSON object.
    #[must_use]
    pub fn json(&self) -> Value {
        let disagreements: Vec<Value> = self
            .disagreements
            .iter()
            .map(|found| {
                json!({
                    "step": found.step,
                    "action": found.action,
                    "rule": format!("{:?}", found.broken.rule),
                    "about": found.broken.about,
                    "said": found.broken.said,
                })
            })
            .collect();
        json!({
            "seed": self.seed,
            "steps": self.steps,
            "migrations": self.migrations,
            "disagreements": disagreements,
            "unjudged": self.unjudged,
            "slowest_seconds": self.slowest_seconds,
            "skipped": self.skipped,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for found in &self.disagreements {
            writeln!(
                f,
                "DISAGREEMENT after step {} ({}): {}",
                found.step, found.action, found.broken
            )?;
        }
        for skipped in &self.skipped {
            writeln!(f, "SKIPPED: {skipped}")?;
        }
        write!(
            f,
            "seed {}: {} steps, {} migrations, {} disagreements, {} steps unjudged, at most {:.1} s behind",
            self.seed,
            self.steps,
            self.migrations,
            self.disagreements.len(),
            self.unjudged,
            self.slowest_seconds
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::judge::Rule;

    #[test]
    fn a_report_has_what_programs_look_for() {
        let report = Report {
            seed: 7,
            steps: 2,
            migrations: 1,
            disagreements: vec![Disagreement {
                step: 2,
                action: "KillVm(0)".into(),
                broken: Broken::new(Rule::DeadIsLost, "u", "RUNNING"),
            }],
            ..Report::default()
        };
        let json = report.json();
        assert_eq!((&json["seed"], &json["steps"]), (&json!(7), &json!(2)));
        assert_eq!(json["migrations"], 1);
        assert_eq!(json["disagreements"][0]["rule"], "DeadIsLost");
        assert_eq!(json["disagreements"][0]["step"], 2);
        assert!(report.to_string().contains("DISAGREEMENT after step 2"));
    }
}
