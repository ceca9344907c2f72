//! A fleet of which everything is said as it is breaks no rule; each lie breaks its own.

use super::*;
use crate::soak::oracle::{Asked, Record};

const A: &str = "hosts/host-a";
const B: &str = "hosts/host-b";

struct Scene {
    truth: Truth,
    views: Views,
    ledger: Ledger,
}

fn record(uid: &str, host: &str) -> Record {
    Record {
        uid: uid.into(),
        name: "vms/web".into(),
        host: host.into(),
        epoch: 2,
        standing: Standing::Owner,
        lives: true,
        state: Some(State::Running),
        errors: 0,
    }
}

fn row(uid: &str, host: &str) -> VmRow {
    VmRow {
        uid: uid.into(),
        name: "vms/web".into(),
        host: host.into(),
        state: "RUNNING".into(),
        epoch: 2,
        stale: false,
        conflicts: BTreeSet::new(),
    }
}

/// One VM that came from host-a to host-b, said by everybody.
fn scene() -> Scene {
    let mut scene = Scene {
        truth: Truth {
            records: vec![record("u", B)],
            hosts: [(A.to_owned(), true), (B.to_owned(), true)].into(),
            clocks: [(A.to_owned(), 0), (B.to_owned(), -600)].into(),
        },
        views: Views::default(),
        ledger: Ledger::default(),
    };
    scene.views.api.vms = vec![row("u", B)];
    let ready = |host: &str| (host.to_owned(), "READY".to_owned());
    scene.views.api.hosts = [ready(A), ready(B)].into();
    scene.views.by_name.insert("vms/web".into(), Ok("u".into()));
    scene.views.migrations = vec![Moved {
        name: "migrations/m".into(),
        uid: "u".into(),
        phase: Phase::Completed,
        location: VmLocation::Destination,
        source: A.into(),
        destination: B.into(),
        times: vec![1, 1, 2, 3],
    }];
    scene.views.offsets = [(A.to_owned(), 1_000), (B.to_owned(), -600_000_000_001)].into();
    scene.views.born.insert("u".into(), 70_000_000_000);
    let born = (69_000_000_000, 71_000_000_000);
    scene.ledger.born.insert("u".into(), born);
    scene.ledger.made.insert(0, ("u".into(), "vms/web".into()));
    scene.ledger.shown.insert("u".into());
    scene.ledger.migrations.push(Asked {
        name: "migrations/m".into(),
        uid: "u".into(),
        judged: false,
    });
    scene.repeat();
    scene
}

impl Scene {
    /// The others say what the API says.
    fn repeat(&mut self) {
        let views = &mut self.views;
        views.cli = views.api.clone();
        views.page = views.api.clone();
        views.metrics.clear();
        for state in ["created", "running", "paused", "incoming", "relinquished"]
            .into_iter()
            .chain(["failed", "stopped", "lost"])
        {
            let is = |row: &&VmRow| row.state.eq_ignore_ascii_case(state);
            let count = u32::try_from(views.api.vms.iter().filter(is).count()).unwrap();
            let name = format!("slat_vms{{state=\"{state}\"}}");
            views.metrics.insert(name, f64::from(count));
        }
        for state in ["ready", "unreachable"] {
            let is = |is: &&String| is.eq_ignore_ascii_case(state);
            let count = u32::try_from(views.api.hosts.values().filter(is).count()).unwrap();
            let name = format!("slat_hosts{{state=\"{state}\"}}");
            views.metrics.insert(name, f64::from(count));
        }
        let phases = ["pending", "preparing", "precopy_active", "switchover"];
        for phase in phases
            .into_iter()
            .chain(["committed", "cancelling", "in_doubt"])
        {
            let name = format!("slat_migrations_active{{phase=\"{phase}\"}}");
            views.metrics.insert(name, 0.0);
        }
        for (host, ahead) in [("host-a", 0.0), ("host-b", -600.2)] {
            let name = format!("slat_host_clock_offset_seconds{{host=\"{host}\"}}");
            views.metrics.insert(name, ahead);
        }
        views.metrics.insert("slat_vm_name_conflicts".into(), 0.0);
        views.metrics.insert("slat_migration_in_doubt".into(), 0.0);
    }

    fn rules(&self) -> Vec<Rule> {
        let mut rules: Vec<Rule> = judge(&self.truth, &self.views, &self.ledger)
            .into_iter()
            .map(|broken| broken.rule)
            .collect();
        rules.dedup();
        rules
    }
}

#[test]
fn the_truth_breaks_no_rule() {
    assert_eq!(scene().rules(), []);
}

#[test]
fn two_owners_are_told() {
    let mut scene = scene();
    scene.truth.records.push(record("u", A));
    assert!(scene.rules().contains(&Rule::OneOwner));
}

#[test]
fn a_vm_that_runs_is_not_lost() {
    let mut scene = scene();
    scene.views.api.vms[0].state = "LOST".into();
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::AliveIsShown]);
    scene.truth.records[0].lives = false;
    assert_eq!(scene.rules(), []);
    scene.views.api.vms[0].state = "RUNNING".into();
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::DeadIsLost]);
}

#[test]
fn wrong_host_epoch_and_state_are_told() {
    for lie in [
        |row: &mut VmRow| row.host = A.into(),
        |row: &mut VmRow| row.epoch = 1,
        |row: &mut VmRow| row.state = "PAUSED".into(),
        |row: &mut VmRow| row.stale = true,
    ] {
        let mut scene = scene();
        lie(&mut scene.views.api.vms[0]);
        scene.repeat();
        assert_eq!(scene.rules(), [Rule::AliveIsShown]);
    }
}

#[test]
fn a_hidden_vm_and_a_double_one_are_told() {
    let mut scene = scene();
    scene.views.api.vms.push(row("u", B));
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::ShownOnce]);
    scene.views.api.vms.clear();
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::AliveIsShown]);
}

#[test]
fn a_silent_hosts_vm_is_shown_and_stale() {
    let mut scene = scene();
    scene.truth.hosts.insert(B.into(), false);
    scene.views.api.hosts.insert(B.into(), "UNREACHABLE".into());
    scene.views.silent.insert(B.into());
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::SilentIsStale]);
    scene.views.api.vms[0].stale = true;
    scene.repeat();
    assert_eq!(scene.rules(), []);
    scene.views.api.vms.clear();
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::SilentIsStale]);
}

#[test]
fn a_silent_host_is_named() {
    let mut scene = scene();
    scene.truth.hosts.insert(A.into(), false);
    assert_eq!(scene.rules(), [Rule::HostsAreTrue]);
}

#[test]
fn twins_name_each_other_and_their_name_means_none() {
    let mut scene = scene();
    scene.truth.records.push(record("v", A));
    scene.views.api.vms.push(row("v", A));
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::NamesConflict, Rule::ViewsAgree]);
    scene.views.api.vms[0].conflicts.insert("v".into());
    scene.views.api.vms[1].conflicts.insert("u".into());
    let refused = Err(Reason::NameConflict.as_str().to_owned());
    scene.views.by_name.insert("vms/web".into(), refused);
    scene.repeat();
    let conflicts = "slat_vm_name_conflicts".to_owned();
    scene.views.metrics.insert(conflicts, 1.0);
    assert_eq!(scene.rules(), []);
}

#[test]
fn a_frozen_copy_is_shown_as_what_it_is() {
    let mut scene = scene();
    scene.ledger.migrations.clear();
    scene.truth.records[0].standing = Standing::Source;
    scene.truth.records[0].state = Some(State::Relinquished);
    scene.views.api.vms[0].state = "LOST".into();
    scene.repeat();
    assert_eq!(scene.rules(), [Rule::SidesAreSides]);
    scene.views.api.vms[0].state = "RELINQUISHED".into();
    scene.repeat();
    assert_eq!(scene.rules(), []);
}

#[test]
fn what_was_deleted_is_nowhere_and_what_was_not_is_somewhere() {
    let mut scene = scene();
    scene.ledger.migrations.clear();
    scene.ledger.deleted.insert("u".into());
    assert_eq!(scene.rules(), [Rule::Gone]);
    // A silent host cannot be told yet.
    scene.truth.hosts.insert(B.into(), false);
    assert!(!scene.rules().contains(&Rule::Gone));
    scene.truth.hosts.insert(B.into(), true);
    scene.truth.records.clear();
    scene.ledger.made.clear();
    assert_eq!(scene.rules(), [Rule::NothingInvented]);
    scene.views.api.vms.clear();
    scene.repeat();
    assert_eq!(scene.rules(), []);
    scene.ledger.made.insert(0, ("u".into(), "vms/web".into()));
    assert_eq!(scene.rules(), [Rule::Kept]);
}

#[test]
fn each_view_is_compared() {
    let mut scene = scene();
    scene.views.page.vms[0].epoch = 9;
    assert_eq!(scene.rules(), [Rule::ViewsAgree]);
    scene.repeat();
    scene.views.cli.vms.clear();
    assert_eq!(scene.rules(), [Rule::ViewsAgree]);
    scene.repeat();
    let running = "slat_vms{state=\"running\"}".to_owned();
    scene.views.metrics.insert(running, 0.0);
    assert_eq!(scene.rules(), [Rule::ViewsAgree]);
}

#[test]
fn a_migration_says_where_its_vm_is() {
    let mut scene = scene();
    scene.views.migrations[0].location = VmLocation::Source;
    assert_eq!(scene.rules(), [Rule::MigrationTellsWhere]);
    scene.views.migrations[0].phase = Phase::Failed;
    scene.views.migrations[0].location = VmLocation::Unknown;
    assert_eq!(scene.rules(), [Rule::MigrationTellsWhere]);
    scene.views.migrations[0].phase = Phase::PrecopyActive;
    assert_eq!(scene.rules(), []);
    scene.views.migrations.clear();
    assert_eq!(scene.rules(), [Rule::MigrationEnds]);
}

#[test]
fn a_guest_that_finds_wrong_memory_is_told() {
    let mut scene = scene();
    scene.truth.records[0].errors = 1;
    assert_eq!(scene.rules(), [Rule::GuestMemory]);
}

#[test]
fn times_that_are_not_true_are_told() {
    let lies: [fn(&mut Scene); 6] = [
        |scene| {
            scene.views.offsets.insert(A.into(), 2_000_000_000);
        },
        |scene| {
            scene.views.offsets.remove(B);
        },
        |scene| {
            let series = "slat_host_clock_offset_seconds{host=\"host-b\"}";
            scene.views.metrics.insert(series.into(), 600.0);
        },
        |scene| {
            scene.views.born.insert("u".into(), 7_270_000_000_000);
        },
        |scene| {
            scene.views.born.insert("u".into(), 60_000_000_000);
        },
        |scene| scene.views.migrations[0].times = vec![1, 3, 2],
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let mut scene = scene();
        lie(&mut scene);
        assert_eq!(scene.rules(), [Rule::TimesAreTrue], "{number}");
    }
    // Of a silent host nothing new can be known.
    let mut scene = scene();
    scene.truth.clocks.insert(B.into(), 7200);
    scene.truth.hosts.insert(B.into(), false);
    assert!(!scene.rules().contains(&Rule::TimesAreTrue));
}
