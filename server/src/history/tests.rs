//! The busiest among many, a VM that moves, and the bounds.

use super::*;

fn vm(uid: &str, name: &str, pid: u32, faults: u64) -> v1::Vm {
    v1::Vm {
        name: name.into(),
        uid: uid.into(),
        state: State::Running.into(),
        pid,
        mmu_stats: Some(v1::MmuStats {
            faults_taken: Some(faults),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn report(history: &History, host: &str, vms: Vec<v1::Vm>, at: u64) {
    let request = v1::ReportHostRequest {
        host: host.into(),
        vms,
        ..Default::default()
    };
    history.vms_at(host, history.samples_of(&request), at);
}

fn asked(of: Of, top: usize) -> Asked {
    Asked {
        of,
        rate: Rate::Faults,
        window: KEEP,
        top,
    }
}

fn all(_: &str, _: &str, _: &str) -> bool {
    true
}

/// `vms` VMs on hosts of ten, for `seconds`; the VM of number n makes n faults a second.
fn fleet(vms: u64, seconds: u64) -> (History, u64) {
    let history = History::new(Duration::from_secs(1));
    let begin = 1_000_000;
    for second in 0..seconds {
        for host in 0..vms / 10 {
            let of_host = (host * 10..host * 10 + 10)
                .map(|n| vm(&format!("uid-{n}"), &format!("vms/vm-{n}"), 1, n * second))
                .collect();
            let at = begin + second * 1000 + host;
            report(&history, &format!("hosts/h{host}"), of_host, at);
        }
    }
    (history, begin + seconds * 1000)
}

#[test]
fn the_busiest_of_two_thousand_are_shown_and_the_rest_is_counted() {
    let (history, now) = fleet(2000, 30);
    let found = history.busiest_at(&asked(Of::Vms, 10), all, now);
    let names: Vec<&str> = found.lines.iter().map(|line| line.name.as_str()).collect();
    assert_eq!(names[..3], ["vms/vm-1999", "vms/vm-1998", "vms/vm-1997"]);
    assert_eq!((names.len(), found.total, found.left_out), (10, 2000, 0));
    assert!(found.rest > 1_500_000.0, "{}", found.rest);
    let busiest = &found.lines[0];
    assert_eq!(busiest.now.map(f64::round), Some(1999.0));
    assert!(busiest.values.len() <= 120);
    assert!(
        busiest
            .values
            .iter()
            .flatten()
            .all(|rate| (rate - 1999.0).abs() < 1.0)
    );
    // Hosts: the sum of their VMs.
    let hosts = history.busiest_at(&asked(Of::Hosts, 3), all, now);
    assert_eq!(hosts.lines[0].name, "hosts/h199");
    assert_eq!(hosts.total, 200);
    let sum: u64 = (1990..2000).sum();
    assert_eq!(
        hosts.lines[0].now.map(|rate| rate.round() as u64),
        Some(sum)
    );
    // Among those that are asked for.
    let only = history.busiest_at(&asked(Of::Vms, 10), |_, _, host| host == "hosts/h7", now);
    assert_eq!((only.total, only.lines[0].name.as_str()), (10, "vms/vm-79"));
}

#[test]
fn memory_is_bounded_by_samples_whatever_the_number_of_vms() {
    let (history, now) = fleet(2000, 700);
    let kept = history.kept();
    let samples: usize = kept.vms.values().map(|vm| vm.ring.samples().len()).sum();
    assert!(samples <= BUDGET, "{samples}");
    let oldest = kept
        .vms
        .values()
        .filter_map(|vm| vm.ring.samples().front())
        .map(|sample| sample.at)
        .min();
    drop(kept);
    // And the lines still go back ten minutes.
    assert!(oldest.unwrap() < now - 590_000);
    // What is silent for ten minutes goes.
    report(&history, "hosts/other", Vec::new(), now + keep_millis() + 1);
    assert!(history.kept().vms.is_empty());
}

#[test]
fn vms_beyond_the_limit_are_counted_and_not_silently_missing() {
    let history = History::new(Duration::from_secs(1));
    let vms = (0..MAX_VMS + 7)
        .map(|n| vm(&format!("u{n}"), &format!("vms/v{n}"), 1, 0))
        .collect();
    report(&history, "hosts/a", vms, 10_000);
    let found = history.busiest_at(&asked(Of::Vms, 1), all, 10_001);
    assert_eq!(found.left_out, 7);
}

#[test]
fn a_vm_that_moves_stays_one_line_and_two_of_one_name_are_two() {
    let history = History::new(Duration::from_secs(1));
    for second in 0..5 {
        let at = 10_000 + second * 1000;
        report(
            &history,
            "hosts/a",
            vec![vm("u", "vms/web", 1, second * 100)],
            at,
        );
    }
    let mut left = vm("u", "vms/web", 1, 450);
    left.set_state(State::Relinquished);
    report(&history, "hosts/a", vec![left.clone()], 15_000);
    report(&history, "hosts/a", vec![left], 16_000);
    for second in 0..5 {
        let at = 15_500 + second * 1000;
        let vms = vec![
            vm("u", "vms/web", 9, second * 100),
            vm("twin", "vms/web", 5, second * 10),
        ];
        report(&history, "hosts/b", vms, at);
    }
    let found = history.busiest_at(&asked(Of::Vms, 10), all, 20_000);
    let keys: Vec<(&str, &str)> = found
        .lines
        .iter()
        .map(|line| (line.key.as_str(), line.host.as_str()))
        .collect();
    assert_eq!(keys, [("u", "hosts/b"), ("twin", "hosts/b")]);
    assert!(
        found.lines[0]
            .values
            .iter()
            .flatten()
            .all(|rate| *rate <= 100.5)
    );
    // The last counters of the process that gave it away are kept, once.
    let kept = history.kept();
    let of_a = kept.vms["u"].ring.samples().iter().filter(|s| s.run == 0);
    assert_eq!(of_a.clone().count(), 6);
    assert_eq!(of_a.last().unwrap().counters[0], 450);
}

#[test]
fn what_a_migration_sends_counts_for_its_vm_and_its_source() {
    let history = History::new(Duration::from_secs(1));
    let mut migration = v1::Migration {
        name: "migrations/m".into(),
        vm: "vms/web".into(),
        vm_uid: "u".into(),
        source: "hosts/a".into(),
        progress: Some(v1::MigrationProgress::default()),
        ..Default::default()
    };
    for second in 0..10 {
        let at = 10_000 + second * 1000;
        migration.progress.as_mut().unwrap().bytes_transferred = second * 5000;
        history.progress_at(&migration, at);
        report(&history, "hosts/a", vec![vm("u", "vms/web", 1, 7)], at + 1);
    }
    for of in [Of::Vms, Of::Hosts] {
        let sent = Asked {
            rate: Rate::Sent,
            ..asked(of, 5)
        };
        let found = history.busiest_at(&sent, all, 20_000);
        assert_eq!(found.lines[0].now.map(f64::round), Some(5000.0), "{of:?}");
    }
}
