//! The accepted downtime on hosts that have far more to do than they can.
//!
//! No figure of one moment holds in the next there. Slat learns what a switchover between two hosts
//! takes from those that were, so the first each way may take long. From then on a limit of twice
//! what these took is accepted, and each migration that completes is held to it, or goes back to
//! precopy, or ends by name with the guest where it was.
//!
//! Until the state is sent there is a way back: a guest that stood still for longer than accepted
//! before that is a failure always. What follows cannot be taken back. That it alone broke the
//! limit fails the whole form; the brief one says it, because a stall of the machine can do it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::scene::{Outcome, Scene};
use crate::lab::{answer::milliseconds, fleet::Fleet};

/// Programs on each host that never rest; each has two processors.
const BUSY: u32 = 4;
/// The least that is accepted, in milliseconds: what Slat accepts when nothing is said.
const LEAST_LIMIT: f64 = 300.0;
/// Accepted while it learns.
const LEARNING: f64 = 5000.0;
/// Migrations that are to complete: of the brief form, and of the whole.
const WANTED: [usize; 2] = [2, 8];
/// How long they may be waited for: another migration begins before this is over, not after.
const PATIENCE: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(240)];
/// By which names a migration may give up.
const GIVES_UP: [&str; 4] = [
    "DOWNTIME_UNREACHABLE",
    "NOT_CONVERGING",
    "COMPLETION_TIMEOUT",
    "SWITCHOVER_TIMEOUT",
];

fn load(fleet: &mut Fleet<'_>) -> anyhow::Result<()> {
    for host in fleet.hosts().numbers() {
        let command = format!("for one in $(seq {BUSY}); do yes >/dev/null & done; true");
        fleet.hosts().run(host, &command)?;
    }
    Ok(())
}

fn unload(fleet: &mut Fleet<'_>) -> anyhow::Result<()> {
    for host in fleet.hosts().numbers() {
        fleet.hosts().run(host, "killall -9 yes")?;
    }
    Ok(())
}

/// Moves a writing guest from host to host under load.
pub(crate) fn under_load(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let brief = scene.brief;
    let whole = usize::from(!brief);
    let mut fleet = Fleet::start(scene.hosts)?;
    fleet.run_vm(scene.backend, 32, 1)?;
    load(&mut fleet)?;
    let moved = from_host_to_host(&mut fleet, WANTED[whole], PATIENCE[whole]);
    unload(&mut fleet)?;
    let moved = moved?;
    fleet.finish()?;
    moved.outcome(brief)
}

/// What became of migrations.
#[derive(Debug, Default)]
struct Moved {
    completed: usize,
    /// Of these, longer than accepted before the state was sent.
    broken: usize,
    /// Of these, longer than accepted by what follows.
    late: usize,
    /// One entry each.
    said: Vec<String>,
}

impl Moved {
    /// That none completed is no proof.
    fn outcome(&self, brief: bool) -> anyhow::Result<Outcome> {
        let said = self.said.join(", ");
        let allowed = if brief { self.late } else { 0 };
        ensure!(
            self.broken == 0 && self.late <= allowed,
            "of {} that completed {} broke the limit before the state was sent, {} after it: {said}",
            self.completed,
            self.broken,
            self.late
        );
        Ok(match self.completed {
            0 => Outcome::Skipped(format!("too busy a machine for any to complete: {said}")),
            _ => Outcome::Passed(format!("{said}; guest errors 0")),
        })
    }

    /// Adds one that ended, with what was accepted, and whether it is held to that. Gives its
    /// downtime when the VM moved.
    fn add(&mut self, end: &Value, limit: f64, held: bool) -> anyhow::Result<Option<f64>> {
        let progress = &end["progress"];
        let back = match times_back(progress) {
            0 => String::new(),
            count => format!(" after going back {count} times"),
        };
        if end["phase"] != "MIGRATION_PHASE_COMPLETED" {
            let reason = end["error"]["reason"].as_str().unwrap_or("no reason");
            ensure!(
                GIVES_UP.contains(&reason),
                "it gave up by {reason}: {end:#}"
            );
            ensure!(end["vmLocation"] == "VM_LOCATION_SOURCE", "{end:#}");
            self.said.push(format!("{reason}{back}"));
            return Ok(None);
        }
        let part = |value: &Value| milliseconds(value).context("a part is missing");
        let parts = &progress["downtimeBreakdown"];
        let watched = part(&parts["pause"])? + part(&parts["finalCopy"])?;
        let downtime = part(&progress["downtime"])?;
        let predicted = part(&progress["prediction"]["total"])?;
        if held {
            self.completed += 1;
            self.broken += usize::from(watched > limit);
            self.late += usize::from(watched <= limit && downtime > limit);
        }
        self.said.push(format!(
            "{downtime:.0} ms ({watched:.0} until the state) of {predicted:.0} predicted and \
             {limit:.0} accepted{back}"
        ));
        Ok(Some(downtime))
    }
}

/// How often a switchover that was about to take too long went back to precopy.
fn times_back(progress: &Value) -> usize {
    let decisions = progress["decisions"].as_array();
    let back = |decision: &&Value| decision["action"] == "ACTION_RESUME_PRECOPY";
    decisions.map_or(0, |all| all.iter().filter(back).count())
}

fn from_host_to_host(
    fleet: &mut Fleet<'_>,
    wanted: usize,
    patience: Duration,
) -> anyhow::Result<Moved> {
    let begin = Instant::now();
    let count = *fleet.hosts().numbers().end();
    let mut home = 1;
    let mut learned = Vec::new();
    let mut moved = Moved::default();
    while moved.completed < wanted && begin.elapsed() < patience {
        let to = home % count + 1;
        let held = learned.len() == usize::from(count);
        let limit = match held {
            false => LEARNING,
            true => learned.iter().copied().fold(LEAST_LIMIT / 2.0, f64::max) * 2.0,
        };
        let options = format!("--max-downtime {limit:.0}ms --max-total-time 40s");
        let name = fleet.migrate(to, &options)?;
        if let Some(downtime) = moved.add(&fleet.end_of(&name)?, limit, held)? {
            home = to;
            learned.push(downtime);
            learned.truncate(usize::from(count));
        }
        fleet.sound_on(home)?;
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn completed(copy: &str, downtime: &str) -> Value {
        json!({"phase": "MIGRATION_PHASE_COMPLETED", "progress": {
            "downtime": downtime, "prediction": {"total": "0.2s"},
            "downtimeBreakdown": {"pause": "0s", "finalCopy": copy},
            "decisions": [{"action": "ACTION_RESUME_PRECOPY"}, {"action": "ACTION_SWITCHOVER"}],
        }})
    }

    #[test]
    fn a_broken_promise_fails_and_nothing_to_judge_is_skipped() {
        let mut moved = Moved::default();
        let late = json!({"phase": "MIGRATION_PHASE_FAILED", "vmLocation": "VM_LOCATION_SOURCE",
            "error": {"reason": "NOT_CONVERGING"}});
        assert_eq!(moved.add(&late, 300.0, true).unwrap(), None);
        assert!(matches!(moved.outcome(false), Ok(Outcome::Skipped(_))));
        let learns = completed("0.1s", "0.9s");
        assert_eq!(moved.add(&learns, LEARNING, false).unwrap(), Some(900.0));
        assert!(matches!(moved.outcome(false), Ok(Outcome::Skipped(_))));
        moved
            .add(&completed("0.1s", "0.299s"), 300.0, true)
            .unwrap();
        assert!(matches!(moved.outcome(false), Ok(Outcome::Passed(_))));
        moved
            .add(&completed("0.1s", "0.301s"), 300.0, true)
            .unwrap();
        assert!(moved.outcome(false).is_err() && moved.outcome(true).is_ok());
        moved
            .add(&completed("0.301s", "0.302s"), 300.0, true)
            .unwrap();
        assert!(moved.outcome(true).is_err());
        let other = json!({"phase": "MIGRATION_PHASE_FAILED", "error": {"reason": "INTERNAL"}});
        assert!(moved.add(&other, 300.0, true).is_err());
    }
}
