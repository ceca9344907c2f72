//! A soak: random steps over a fleet of four hosts, and after each of them what API, command line,
//! page and metrics say compared with what is true. `cargo xtask soak` runs it.
//!
//! * [`plan`] makes steps from a seed. Pure.
//! * [`drive`] carries them out on real processes.
//! * [`oracle`] reads what is true: locks, journals, and what the VMs' processes say.
//! * [`observe`] asks everybody.
//! * [`mod@judge`] has the rules, each with its name. Pure.
//! * [`report`] is what was found.
//!
//! # How long they may be behind
//! Everything said must be true within two report intervals. What takes longer for a known cause
//! has an allowance with a name, below. When the truth itself moves (a migration goes on), the time
//! begins anew.
//!
//! A seed gives the same steps again; how they interleave with what the machine does is not the
//! same.

pub mod drive;
pub mod judge;
pub mod observe;
pub mod oracle;
pub mod plan;
pub mod report;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use slat_proto::v1::{self, Backend, MigrationPhase, VmLocation, leftover::Kind};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};

use self::{
    drive::{Disks, Driver, HOST_MIB, STEP_WITHIN},
    judge::{Broken, Rule, is_over, judge},
    observe::Views,
    oracle::{Ledger, Truth},
    plan::{HOSTS, Plan, SMALL_DISK, Step},
    report::{Disagreement, Report},
};
use crate::{
    disk::SmallDisk,
    fleet::{Fleet, Layout},
};

/// Between two reports of an agent.
const INTERVAL: Duration = Duration::from_millis(500);
/// The page gathers twice a second, and gauges are set once a second.
const GATHERED: Duration = Duration::from_millis(1500);
/// Processes of this machine wait for their turn: the soak is not the only one on it.
const MACHINE: Duration = Duration::from_secs(2);
/// A host is silent after three intervals without a report.
const SILENCE: Duration = Duration::from_millis(1500);
/// An agent that lost its server asks again after five seconds at most, and is called back.
const RETURN: Duration = Duration::from_secs(7);
/// The server opens its store again after a second and is tried by a probe.
const STORE: Duration = Duration::from_secs(10);
/// A truth that moves for as long is not judged.
const MOVES_FOR: Duration = Duration::from_secs(30);
/// By the bounds in docs/operations.md every migration ends within as long once all hosts answer.
const ENDS: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Of the plan.
    pub seed: u64,
    /// How long to go on beginning steps.
    pub length: Duration,
    /// Of half the VMs.
    pub backend: Backend,
}

/// How long everybody may take to learn of a step.
fn allowance(step: &Step) -> Duration {
    let more = match step {
        Step::Burst(steps) => return steps.iter().map(allowance).max().unwrap_or_default(),
        Step::KillAgent(_) => SILENCE,
        Step::StartAgent(_)
        | Step::RestartServer
        | Step::AgentTwin(_)
        | Step::Freeze { .. }
        | Step::MigrateAndKill { .. } => RETURN,
        Step::FullAgentDisk { .. } | Step::FullServerDisk { .. } => STORE,
        _ => Duration::ZERO,
    };
    2 * INTERVAL + GATHERED + MACHINE + more
}

struct Soak {
    driver: Driver,
    disks: Option<Disks>,
    report: Report,
    /// What was told and has not been right since: not waited for again.
    known: BTreeSet<(Rule, String)>,
}

impl Drop for Soak {
    fn drop(&mut self) {
        // Whoever uses the disks, then the disks, then the directory that they are in.
        self.driver.fleet.end_all();
        drop(self.disks.take());
    }
}

/// Runs a soak to its end. SIGINT ends it early, with all that is judged at an end.
///
/// # Errors
/// When the fleet cannot be started, or the harness fails.
pub async fn run(options: Options) -> anyhow::Result<Report> {
    let mut soak = Soak::start(options).await?;
    let begun = Instant::now();
    let mut plan = Plan::new(options.seed, soak.disks.is_some());
    let mut interrupt = signal(SignalKind::interrupt())?;
    while begun.elapsed() < options.length
        && let Some(step) = plan.next()
    {
        tokio::select! {
            done = soak.step(&step) => done?,
            _ = interrupt.recv() => {
                eprintln!("interrupted: ends here as if its time were over; once more leaves it at that");
                break;
            }
        }
        for vm in soak.driver.refused.drain(..) {
            plan.without(vm);
        }
    }
    tokio::select! {
        end = soak.end() => end?,
        _ = interrupt.recv() => anyhow::bail!("interrupted before its end was judged"),
    }
    Ok(std::mem::take(&mut soak.report))
}

impl Soak {
    async fn start(options: Options) -> anyhow::Result<Self> {
        let root = slat_test_dir::TestDir::with_prefix("slat-test-")?;
        let mut report = Report {
            seed: options.seed,
            ..Report::default()
        };
        let mount = |name: &str| SmallDisk::mount(&root.path().join(name));
        let disks = mount("server").and_then(|server| {
            let agent = mount(HOSTS[SMALL_DISK])?;
            Ok(Disks { agent, server })
        });
        if let Err(error) = &disks {
            report.skipped.push(format!("full disks: {error:#}"));
        }
        let layout = Layout {
            backend: options.backend,
            hosts: HOSTS.map(|name| (name, HOST_MIB)).to_vec(),
            own_clocks: true,
        };
        let driver = Driver {
            fleet: Fleet::start_in(root, layout, INTERVAL).await?,
            ledger: Ledger::default(),
            refused: Vec::new(),
            backend: options.backend,
        };
        Ok(Self {
            driver,
            disks: disks.ok(),
            report,
            known: BTreeSet::new(),
        })
    }

    async fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        self.report.steps += 1;
        let number = self.report.steps;
        let action = step.to_string();
        let begun = Instant::now();
        let mut note = Vec::new();
        for step in step.parts() {
            let done = self.driver.carry_out(step, self.disks.as_ref());
            let broken = match timeout(STEP_WITHIN, done).await {
                Ok(done) => {
                    let done = done?;
                    note.push(done.note);
                    done.broken
                }
                Err(_) => {
                    let said = format!("no answer in {} s", STEP_WITHIN.as_secs());
                    vec![Broken::new(Rule::Answers, step.to_string(), said)]
                }
            };
            self.tell(number, &action, broken);
        }
        let took = begun.elapsed();
        let note = note.join("; ");
        let settled = Instant::now();
        self.settle(number, &action, allowance(step)).await?;
        eprintln!(
            "step {number} {action}: {note} ({:.1} s, judged after {:.1} s)",
            took.as_secs_f64(),
            settled.elapsed().as_secs_f64()
        );
        Ok(())
    }

    fn tell(&mut self, step: usize, action: &str, broken: Vec<Broken>) {
        for broken in broken {
            eprintln!("DISAGREEMENT after step {step} ({action}): {broken}");
            self.report.disagreements.push(Disagreement {
                step,
                action: action.to_owned(),
                broken,
            });
        }
    }

    /// Compares until everything is right, or the allowance is over.
    async fn settle(&mut self, step: usize, action: &str, allowed: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut since = begun;
        let mut before = Truth::read(&self.driver.fleet).await?;
        loop {
            let views = Views::take(&self.driver.fleet).await;
            let after = Truth::read(&self.driver.fleet).await?;
            let moved = before != after;
            let broken = match &views {
                Ok(views) => judge(&after, views, &self.driver.ledger),
                Err(error) => vec![Broken::new(Rule::Answers, "a view", format!("{error:#}"))],
            };
            before = after;
            if moved {
                since = Instant::now();
            } else if let Some(views) = self.is_settled(&broken, views.ok()) {
                self.remember(&before, &views);
                let behind = since.elapsed().as_secs_f64();
                self.report.slowest_seconds = self.report.slowest_seconds.max(behind);
                self.known
                    .retain(|known| broken.iter().any(|one| key(one) == *known));
                return Ok(());
            } else if since.elapsed() > allowed {
                let new: Vec<Broken> = broken
                    .into_iter()
                    .filter(|one| self.known.insert(key(one)))
                    .collect();
                self.tell(step, action, new);
                return Ok(());
            }
            if begun.elapsed() > MOVES_FOR + allowed {
                self.report.unjudged += 1;
                return Ok(());
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// The views, when nothing is broken but what was told already.
    fn is_settled(&self, broken: &[Broken], views: Option<Views>) -> Option<Views> {
        let old = |one: &Broken| self.known.contains(&key(one));
        views.filter(|_| broken.iter().all(old))
    }

    /// What later judgements rest on.
    fn remember(&mut self, truth: &Truth, views: &Views) {
        let ledger = &mut self.driver.ledger;
        for row in &views.api.vms {
            if truth.is_up(&row.host) {
                ledger.shown.insert(row.uid.clone());
            }
        }
        for asked in &mut ledger.migrations {
            let over = |moved: &observe::Moved| moved.name == asked.name && is_over(moved.phase);
            asked.judged |= views.migrations.iter().any(over);
        }
    }

    /// Everything runs again, every migration ends, everything is deleted, nothing is left.
    async fn end(&mut self) -> anyhow::Result<()> {
        let step = self.report.steps + 1;
        self.report.migrations = self.driver.ledger.migrations.len();
        let fleet = &mut self.driver.fleet;
        let down: Vec<_> = fleet.host_names().filter(|(_, up)| !up).collect();
        for (host, _) in down {
            fleet.start_agent(host)?;
        }
        let begun = Instant::now();
        let open = loop {
            let open = self.open_migrations().await?;
            if open.is_empty() || begun.elapsed() > ENDS {
                break open;
            }
            sleep(LOOK_AGAIN).await;
        };
        let said = |open: String| Broken::new(Rule::MigrationEnds, "the end", open);
        self.tell(step, "the end", open.into_iter().map(said).collect());
        self.settle(step, "the end", allowance(&Step::RestartServer))
            .await?;
        let left = self.leftovers().await?;
        self.tell(step, "the end", left);
        let finished = self.driver.fleet.finish().await;
        if let Err(error) = finished {
            let broken = Broken::new(Rule::NothingLeft, "the fleet", format!("{error:#}"));
            self.tell(step, "the end", vec![broken]);
        }
        Ok(())
    }

    async fn open_migrations(&self) -> anyhow::Result<Vec<String>> {
        let migrations = self.driver.fleet.all_migrations().await?;
        Ok(migrations
            .into_iter()
            .filter(|migration| !is_over(migration.phase()))
            .map(|migration| format!("{migration:?}"))
            .collect())
    }

    /// Ends what is left on the hosts; what no migration explains is told.
    async fn leftovers(&self) -> anyhow::Result<Vec<Broken>> {
        let fleet = &self.driver.fleet;
        let views = Views::take(fleet).await?;
        let mut hosts = fleet.hosts(&fleet.server());
        let list = hosts
            .list_leftovers(v1::ListLeftoversRequest::default())
            .await?
            .into_inner();
        let mut broken = Vec::new();
        for left in list.leftovers {
            let explains = |moved: &observe::Moved| {
                moved.name == left.migration && keeps_copy(moved.phase, moved.location)
            };
            let explained =
                left.kind() == Kind::RelinquishedSource && views.migrations.iter().any(explains);
            if !explained {
                let said = format!("{left:?}");
                broken.push(Broken::new(Rule::LeftoversExplained, &left.uid, said));
            }
            let request = v1::DeleteLeftoverRequest {
                host: left.host.clone(),
                uid: left.uid.clone(),
                give_up: true,
            };
            if let Err(error) = hosts.delete_leftover(request).await {
                let said = format!("{left:?} cannot be deleted: {error:?}");
                broken.push(Broken::new(Rule::LeftoversExplained, left.uid, said));
            }
        }
        Ok(broken)
    }
}

/// Whether a migration that ended so may have left the last copy of its VM at its source: nobody
/// got the VM, or who got it died before the source heard of it.
fn keeps_copy(phase: MigrationPhase, location: VmLocation) -> bool {
    match phase {
        MigrationPhase::Failed => location == VmLocation::Unknown,
        MigrationPhase::Completed => location == VmLocation::Lost,
        _ => false,
    }
}

fn key(broken: &Broken) -> (Rule, String) {
    (broken.rule, broken.about.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_copy_is_kept_of_what_nobody_got_and_of_what_died_where_it_went() {
        use MigrationPhase::{Cancelled, Completed, Failed};
        use VmLocation::{Destination, Lost, Source, Unknown};
        for (phase, location, kept) in [
            (Failed, Unknown, true),
            (Failed, Lost, false),
            (Failed, Source, false),
            (Completed, Lost, true),
            (Completed, Destination, false),
            (Cancelled, Source, false),
        ] {
            assert_eq!(keeps_copy(phase, location), kept, "{phase:?} {location:?}");
        }
    }
}
