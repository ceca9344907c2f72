//! The table by hand: what reports, answers, restarts and orders make of it. What holds for any
//! reports in any order is in `random`.

mod random;

use slat_proto::model::{HostName, Labels, VmName, VmSpec};

use super::*;
use v1::{host::State as HostState, vm::State as VmState};

const INTERVAL: Duration = Duration::from_secs(1);

fn host(name: &str) -> v1::Host {
    v1::Host {
        name: name.into(),
        address: format!("{name}:7401"),
        uid: format!("agent-of-{name}"),
        incarnation: "1".into(),
        memory_bytes: 1 << 30,
        backends: vec![v1::Backend::Software.into()],
        ..Default::default()
    }
}

fn join(table: &mut Table, name: &str, at: Instant) {
    table.register(host(name), at).unwrap();
    table.called(name, "1", Ok(()));
}

fn table(at: Instant) -> Table {
    let mut table = Table::new(INTERVAL, INTERVAL * 3);
    for name in ["hosts/a", "hosts/b"] {
        join(&mut table, name, at);
    }
    table
}

fn vm_of(uid: &str, epoch: u64, state: VmState) -> v1::Vm {
    v1::Vm {
        name: "vms/web".into(),
        uid: uid.into(),
        epoch,
        state: state.into(),
        ..Default::default()
    }
}

fn vm(epoch: u64, state: VmState) -> v1::Vm {
    vm_of("u", epoch, state)
}

fn report(table: &mut Table, host: &str, vms: Vec<v1::Vm>, at: Instant) {
    let report = v1::ReportHostRequest {
        host: host.into(),
        incarnation: "1".into(),
        vms,
        ..Default::default()
    };
    table.report(report, at).unwrap();
}

fn web() -> VmRef {
    VmRef::new("vms/web", "", "").unwrap()
}

fn find(table: &Table, at: Instant) -> Option<v1::Vm> {
    table.vm(&web(), at).unwrap()
}

fn spec(mib: u64) -> VmSpec {
    VmSpec::from_message(&v1::VmSpec {
        memory_bytes: mib << 20,
        vcpus: 1,
        ..Default::default()
    })
    .unwrap()
}

fn name(id: &str) -> VmName {
    VmName::from_id(id).unwrap()
}

/// What the store would have, as a new life begins with it.
fn restarted(table: &Table, at: Instant) -> Table {
    let mut new = Table::new(INTERVAL, INTERVAL * 3);
    for entry in table.hosts.values() {
        new.restore_host(entry.host.clone(), at);
        for record in entry.records.iter() {
            new.restore_vm(record.vm.clone());
            let uid = &record.vm.uid;
            new.epochs.raise(uid, table.epochs.of(uid));
        }
    }
    new
}

#[test]
fn sides_never_hide_the_owner_and_the_highest_epoch_wins() {
    let at = Instant::now();
    let mut table = table(at);
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    report(&mut table, "hosts/b", vec![vm(2, VmState::Incoming)], at);
    assert_eq!(find(&table, at).unwrap().host, "hosts/a");
    report(&mut table, "hosts/b", vec![vm(2, VmState::Running)], at);
    assert_eq!(find(&table, at).unwrap().host, "hosts/b");
    // The source's last report comes late; then the VM is deleted at its new host.
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    report(&mut table, "hosts/b", vec![], at);
    assert!(find(&table, at).is_none());
    assert_eq!(table.vms(at).len(), 0);
}

#[test]
fn at_one_epoch_running_outranks_lost_wherever_it_is() {
    let at = Instant::now();
    for (first, second) in [("hosts/a", "hosts/b"), ("hosts/b", "hosts/a")] {
        let mut table = table(at);
        report(&mut table, first, vec![vm(3, VmState::Lost)], at);
        for living in [
            VmState::Running,
            VmState::Paused,
            VmState::Created,
            VmState::Unresponsive,
        ] {
            report(&mut table, second, vec![vm(3, living)], at);
            let shown = find(&table, at).unwrap();
            assert_eq!((shown.host.as_str(), shown.state()), (second, living));
        }
        report(&mut table, second, vec![], at);
        assert_eq!(find(&table, at).unwrap().state(), VmState::Lost);
    }
}

#[test]
fn two_vms_of_one_name_are_both_shown_and_neither_is_meant_by_it() {
    let at = Instant::now();
    let mut table = table(at);
    report(
        &mut table,
        "hosts/a",
        vec![vm_of("u1", 5, VmState::Running)],
        at,
    );
    report(
        &mut table,
        "hosts/b",
        vec![vm_of("u2", 1, VmState::Paused)],
        at,
    );
    let vms = table.vms(at);
    assert_eq!(vms.len(), 2);
    assert_eq!(vms[0].conflicts[0].uid, "u2");
    assert_eq!(vms[0].conflicts[0].host, "hosts/b");
    assert_eq!(vms[1].conflicts[0].uid, "u1");
    assert_eq!(table.counting(at).conflicting_names(), 1);
    let refused = table.vm(&web(), at).unwrap_err();
    assert_eq!(refused.reason, Reason::NameConflict);
    assert_eq!(refused.metadata["uids"], "u1,u2");
    assert_eq!(refused.metadata["hosts"], "hosts/a,hosts/b");
    assert!(!refused.metadata["advice"].contains("delete"));
    let by = |name: &str, uid: &str, host: &str| {
        let wanted = VmRef::new(name, uid, host).unwrap();
        table.vm(&wanted, at).unwrap().map(|vm| vm.uid)
    };
    assert_eq!(by("web", "", "hosts/b").unwrap(), "u2");
    assert_eq!(by("", "u1", "").unwrap(), "u1");
    assert_eq!(by("db", "u1", ""), None, "that uid has another name");
    assert_eq!(by("web", "", "hosts/c"), None);

    // A side of another VM of that name is shown, and is no conflict.
    report(
        &mut table,
        "hosts/a",
        vec![vm_of("u1", 5, VmState::Relinquished)],
        at,
    );
    assert_eq!(table.vms(at).len(), 2);
    assert!(table.vms(at).iter().all(|vm| vm.conflicts.is_empty()));
    assert_eq!(find(&table, at).unwrap().uid, "u2");
    assert_eq!(table.counting(at).conflicting_names(), 0);
}

#[test]
fn three_missed_intervals_are_unreachable() {
    let at = Instant::now();
    let mut table = table(at);
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    let state = |table: &Table, after: u32| {
        let host = table.host("hosts/a", at + INTERVAL * after).unwrap();
        host.state()
    };
    assert_eq!(state(&table, 3), HostState::Ready);
    assert_eq!(state(&table, 4), HostState::Unreachable);
    assert!(!find(&table, at + INTERVAL * 3).unwrap().stale);
    let old = find(&table, at + INTERVAL * 9).unwrap();
    assert!(old.stale && old.last_seen_time.is_some());
}

#[test]
fn a_host_may_be_quiet_for_three_reports_or_as_long_as_was_said() {
    let silence = |said| {
        crate::fleet::Fleet::new(INTERVAL, said, None)
            .table()
            .silence
    };
    assert_eq!(silence(None), INTERVAL * 3);
    let said = INTERVAL * 20;
    assert_eq!(silence(Some(said)), said);
}

#[test]
fn another_incarnation_must_register_first() {
    let at = Instant::now();
    let mut table = table(at);
    table.restore_host(host("hosts/c"), at);
    for (host, incarnation) in [
        ("hosts/a", "2"),
        ("hosts/c", ""),
        ("hosts/c", "1"),
        ("hosts/x", "1"),
    ] {
        let report = v1::ReportHostRequest {
            host: host.into(),
            incarnation: incarnation.into(),
            ..Default::default()
        };
        let error = table.report(report, at).unwrap_err();
        assert_eq!(error.reason, Reason::StaleIncarnation, "{host}");
    }
}

#[test]
fn answers_hold_against_older_reports_for_one_interval() {
    let at = Instant::now();
    let mut table = table(at);
    table.observe("hosts/a", vm(1, VmState::Created), at);
    report(&mut table, "hosts/a", vec![], at);
    assert!(find(&table, at).is_some());
    table.forget("hosts/a", "u", at);
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    assert!(find(&table, at).is_none());
    // Another VM that got the name meanwhile is not the one that went.
    report(
        &mut table,
        "hosts/a",
        vec![vm_of("u2", 1, VmState::Running)],
        at,
    );
    assert_eq!(find(&table, at).unwrap().uid, "u2");
    let later = at + INTERVAL * 2;
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], later);
    assert_eq!(find(&table, later).unwrap().uid, "u");
}

#[test]
fn two_creates_of_one_name_do_not_both_pass() {
    let at = Instant::now();
    let mut table = table(at);
    let large = spec(600);
    let host = table
        .reserve(&name("one"), &large, None, &Labels::default(), at)
        .unwrap();
    assert_eq!(host, "hosts/a");
    let twice = table
        .reserve(&name("one"), &large, None, &Labels::default(), at)
        .unwrap_err();
    assert_eq!(twice.reason, Reason::VmExists);
    // Reserved memory counts.
    let host = table
        .reserve(&name("two"), &large, None, &Labels::default(), at)
        .unwrap();
    assert_eq!(host, "hosts/b");
    let full = table
        .reserve(&name("three"), &large, None, &Labels::default(), at)
        .unwrap_err();
    assert_eq!(full.reason, Reason::NoHost);
    table.reservations.remove("vms/one");
    table
        .reserve(&name("three"), &large, None, &Labels::default(), at)
        .unwrap();
}

#[test]
fn a_vm_goes_to_no_host_without_the_labels_that_are_asked_for() {
    let at = Instant::now();
    let mut table = table(at);
    let labels: Labels = "rack=r1".parse().unwrap();
    let refused = table.reserve(&name("one"), &spec(64), None, &labels, at);
    assert_eq!(refused.unwrap_err().reason, Reason::NoHost);
    // Its memory makes it the last choice.
    let small = v1::Host {
        labels: labels.to_field(),
        memory_bytes: 128 << 20,
        ..host("hosts/c")
    };
    table.register(small, at).unwrap();
    table.called("hosts/c", "1", Ok(()));
    let chosen = table.reserve(&name("one"), &spec(64), None, &labels, at);
    assert_eq!(chosen.unwrap(), "hosts/c");
    let anywhere = table.reserve(&name("two"), &spec(64), None, &Labels::default(), at);
    assert_ne!(anywhere.unwrap(), "hosts/c");
}

#[test]
fn a_name_on_a_silent_or_unreported_host_is_taken() {
    let at = Instant::now();
    let mut first = table(at);
    report(&mut first, "hosts/a", vec![vm(1, VmState::Running)], at);
    let silent = at + INTERVAL * 9;
    join(&mut first, "hosts/b", silent);
    let mut second = restarted(&first, at);
    assert_eq!(second.unreported(), ["hosts/a", "hosts/b"]);
    assert!(find(&second, at).unwrap().stale);
    join(&mut second, "hosts/b", at);
    for (table, at) in [(&mut first, silent), (&mut second, at)] {
        let taken = table
            .reserve(&name("web"), &spec(64), None, &Labels::default(), at)
            .unwrap_err();
        assert_eq!(taken.reason, Reason::VmExists);
        assert_eq!(taken.metadata["host"], "hosts/a");
        assert_eq!(taken.metadata["uid"], "u");
        assert!(taken.metadata.contains_key("last_seen"));
        let advice = &taken.metadata["advice"];
        assert!(
            advice.contains("slat delete host a --give-up-vms"),
            "{advice}"
        );
        assert!(!advice.contains("delete vm"), "{advice}");
    }
    // Its host comes back without it.
    join(&mut second, "hosts/a", at);
    assert!(find(&second, at).unwrap().stale, "it has not reported yet");
    report(&mut second, "hosts/a", vec![], at);
    assert!(find(&second, at).is_none());
    second
        .reserve(&name("web"), &spec(64), None, &Labels::default(), at)
        .unwrap();
}

#[test]
fn an_old_record_does_not_come_back_to_life_after_a_restart() {
    let at = Instant::now();
    let mut table = table(at);
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    report(&mut table, "hosts/b", vec![vm(2, VmState::Running)], at);
    report(&mut table, "hosts/b", vec![], at);
    let table = restarted(&table, at);
    assert_eq!(table.vms(at), []);
}

#[test]
fn a_second_agent_is_refused_while_the_first_reports_and_is_named() {
    let at = Instant::now();
    let mut table = table(at);
    report(&mut table, "hosts/a", vec![], at);
    let mut second = host("hosts/a");
    second.uid = "another".into();
    second.address = "elsewhere:7401".into();
    second.incarnation = "2".into();
    let refused = table.register(second.clone(), at).unwrap_err();
    assert_eq!(refused.reason, Reason::HostNameTaken);
    assert_eq!(refused.metadata["address"], "hosts/a:7401");
    assert_eq!(refused.metadata["uid"], "agent-of-hosts/a");
    let shown = table.host("hosts/a", at).unwrap();
    assert_eq!(shown.contender, "elsewhere:7401 (another)");
    assert_eq!(shown.state(), HostState::Ready);
    assert!(shown.state_message.contains("elsewhere:7401"));
    // The first goes on, and can start anew at any time, also elsewhere.
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    let mut anew = host("hosts/a");
    anew.incarnation = "9".into();
    anew.address = "moved:7401".into();
    table.register(anew.clone(), at).unwrap();
    assert!(!table.host("hosts/a", at).unwrap().contender.is_empty());
    let quiet = at + Duration::from_secs(16);
    assert_eq!(table.host("hosts/a", quiet).unwrap().contender, "");
    // Silent, it keeps its name as long as it may have VMs.
    let refused = table.register(second.clone(), quiet).unwrap_err();
    assert!(refused.metadata["advice"].contains("--give-up-vms"));
    table.register(anew, quiet).unwrap();
    let report = v1::ReportHostRequest {
        host: "hosts/a".into(),
        incarnation: "9".into(),
        ..Default::default()
    };
    table.report(report, quiet).unwrap();
    let silent = quiet + INTERVAL * 4;
    table.register(second, silent).unwrap();
    assert_eq!(table.host("hosts/a", silent).unwrap().contender, "");
}

#[test]
fn a_host_that_is_being_deleted_stays_silent_until_the_last_of_the_orders_ends() {
    let at = Instant::now();
    let mut table = table(at);
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    let silent = at + INTERVAL * 4;
    let begin = |table: &mut Table, give_up| table.begin_deletion("hosts/a", give_up, &[], silent);
    // An order that is refused marks nothing.
    let refused = table.begin_deletion("hosts/a", true, &[], at).unwrap_err();
    assert_eq!(refused.reason, Reason::HostInUse);
    let refused = begin(&mut table, false).unwrap_err();
    assert_eq!(refused.reason, Reason::HostInUse);
    table.register(host("hosts/a"), at).unwrap();

    begin(&mut table, true).unwrap();
    begin(&mut table, true).unwrap();
    let told = v1::ReportHostRequest {
        host: "hosts/a".into(),
        incarnation: "1".into(),
        ..Default::default()
    };
    for _ in ["two orders", "one order"] {
        let refusals = [
            table.admit(&host("hosts/a"), silent).unwrap_err(),
            table.register(host("hosts/a"), silent).unwrap_err(),
            table.report(told.clone(), silent).unwrap_err(),
        ];
        for refused in refusals {
            assert_eq!(refused.reason, Reason::HostDeleted);
            assert_eq!(refused.metadata["host"], "hosts/a");
            assert!(refused.metadata["advice"].starts_with("try again"));
        }
        // The other host is nobody's business.
        report(&mut table, "hosts/b", vec![], silent);
        assert!(table.may_delete("hosts/a", true, &[], silent).is_ok());
        table.deletions.end("hosts/a");
    }
    table.report(told, silent).unwrap();
    let refused = begin(&mut table, true).unwrap_err();
    assert_eq!(refused.reason, Reason::HostInUse, "it reports again");
}

#[test]
fn agents_without_a_uid_are_told_apart_by_their_address() {
    let at = Instant::now();
    let mut table = table(at);
    let old = |address: &str| v1::Host {
        uid: String::new(),
        address: address.into(),
        ..host("hosts/old")
    };
    table.register(old("x:1"), at).unwrap();
    let refused = table.register(old("y:1"), at).unwrap_err();
    assert_eq!(refused.reason, Reason::HostNameTaken);
    table.register(old("x:1"), at).unwrap();
    // The same agent, upgraded.
    let mut upgraded = old("x:1");
    upgraded.uid = "new".into();
    table.register(upgraded, at).unwrap();
}

#[test]
fn after_a_restart_the_known_agent_comes_first() {
    let at = Instant::now();
    let mut table = restarted(&table(at), at);
    let mut second = host("hosts/a");
    second.uid = "another".into();
    let refused = table.register(second.clone(), at).unwrap_err();
    assert_eq!(refused.reason, Reason::HostNameTaken);
    let later = at + INTERVAL * 4;
    table.register(second, later).unwrap();
}

#[test]
fn ready_needs_a_call_back_and_three_failures_end_it() {
    let at = Instant::now();
    let mut table = table(at);
    table.register(host("hosts/c"), at).unwrap();
    let shown = |table: &Table| table.host("hosts/c", at).unwrap();
    assert_eq!(shown(&table).state(), HostState::Unreachable);
    assert_eq!(
        shown(&table).state_message,
        "its agent has not been called back yet"
    );
    let wanted = HostName::parse("hosts/c").unwrap();
    let refused = table.reserve(&name("x"), &spec(64), Some(&wanted), &Labels::default(), at);
    assert_eq!(refused.unwrap_err().reason, Reason::HostUnreachable);
    table.called("hosts/c", "1", Err("it does not resolve".into()));
    assert_eq!(shown(&table).state(), HostState::Unreachable);
    assert!(shown(&table).state_message.contains("it does not resolve"));
    table.called("hosts/c", "1", Ok(()));
    assert_eq!(shown(&table).state(), HostState::Ready);
    assert_eq!(shown(&table).state_message, "");
    for failures in 1..=3 {
        table.called("hosts/c", "1", Err("refused".into()));
        let ready = shown(&table).state() == HostState::Ready;
        assert_eq!(ready, failures < 3, "{failures}");
    }
    // What is said of an earlier start does not count.
    table.called("hosts/c", "0", Ok(()));
    assert_eq!(shown(&table).state(), HostState::Unreachable);
}

#[test]
fn a_host_that_says_it_can_take_no_vm_is_ready_and_not_chosen_until_it_can() {
    let at = Instant::now();
    let mut table = table(at);
    let say = |table: &mut Table, host: &str, words: &str| {
        let report = v1::ReportHostRequest {
            host: host.into(),
            incarnation: "1".into(),
            state_message: words.into(),
            ..Default::default()
        };
        table.report(report, at).unwrap();
    };
    say(&mut table, "hosts/a", "/state cannot be written");
    say(&mut table, "hosts/b", "");
    let shown = table.host("hosts/a", at).unwrap();
    assert_eq!(shown.state(), HostState::Ready);
    assert_eq!(shown.state_message, "/state cannot be written");
    let chosen = table
        .reserve(&name("one"), &spec(64), None, &Labels::default(), at)
        .unwrap();
    assert_eq!(chosen, "hosts/b");
    say(&mut table, "hosts/b", "/state cannot be written");
    let refused = table.reserve(&name("two"), &spec(64), None, &Labels::default(), at);
    let refused = refused.unwrap_err();
    assert_eq!(refused.reason, Reason::NoHost);
    assert_eq!(refused.metadata["hosts_in_trouble"], "2");
    say(&mut table, "hosts/a", "");
    let chosen = table
        .reserve(&name("two"), &spec(64), None, &Labels::default(), at)
        .unwrap();
    assert_eq!(chosen, "hosts/a");
}

#[test]
fn a_cordoned_host_is_not_chosen_and_stays_so() {
    let at = Instant::now();
    let mut table = table(at);
    table.cordon("hosts/a", true).unwrap();
    let none = table.cordon("hosts/x", true).unwrap_err();
    assert_eq!(none.reason, Reason::NoSuchHost);
    let chosen = table
        .reserve(&name("one"), &spec(64), None, &Labels::default(), at)
        .unwrap();
    assert_eq!(chosen, "hosts/b");
    let wanted = HostName::parse("hosts/a").unwrap();
    let refused = table.reserve(
        &name("two"),
        &spec(64),
        Some(&wanted),
        &Labels::default(),
        at,
    );
    assert_eq!(refused.unwrap_err().reason, Reason::HostCordoned);
    // Neither a new start of its agent nor of the server ends it.
    let mut anew = host("hosts/a");
    anew.incarnation = "2".into();
    table.register(anew, at).unwrap();
    let mut table = restarted(&table, at);
    join(&mut table, "hosts/a", at);
    assert!(table.host("hosts/a", at).unwrap().cordoned);
    table.cordon("hosts/a", false).unwrap();
    table
        .reserve(
            &name("two"),
            &spec(64),
            Some(&wanted),
            &Labels::default(),
            at,
        )
        .unwrap();
}

#[test]
fn only_what_changed_is_to_be_saved() {
    let at = Instant::now();
    let mut table = table(at);
    drop(table.unsaved.take());
    report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
    assert_eq!(table.unsaved.vms.len(), 1);
    assert_eq!(table.unsaved.epochs.len(), 1);
    drop(table.unsaved.take());
    let mut same = vm(1, VmState::Running);
    same.mmu_stats = Some(v1::MmuStats::default());
    report(&mut table, "hosts/a", vec![same], at);
    assert!(table.unsaved.is_empty(), "statistics are not saved");
    report(&mut table, "hosts/a", vec![vm(1, VmState::Paused)], at);
    let failed = table.unsaved.take();
    assert_eq!((failed.vms.len(), failed.epochs.len()), (1, 0));
    table.unsaved.put_back(failed);
    assert!(!table.unsaved.is_empty());
}
