//! Any reports of a few hosts about a few uids, in any order: what is shown of each uid is what
//! `rank` promises, whatever came when.

use std::collections::BTreeMap;

use proptest::{prelude::*, sample::select};

use super::*;

const HOSTS: [&str; 3] = ["hosts/a", "hosts/b", "hosts/c"];
const UIDS: [&str; 2] = ["u1", "u2"];
const STATES: [VmState; 9] = [
    VmState::Created,
    VmState::Running,
    VmState::Paused,
    VmState::Incoming,
    VmState::Relinquished,
    VmState::Failed,
    VmState::Stopped,
    VmState::Lost,
    VmState::Unresponsive,
];

/// One host's report: which of the uids it has, and how.
type Said = (&'static str, BTreeMap<&'static str, (u64, VmState)>);

fn said() -> impl Strategy<Value = Said> {
    let record = (1_u64..4, select(&STATES[..]));
    let records = proptest::collection::btree_map(select(&UIDS[..]), record, 0..=2);
    (select(&HOSTS[..]), records)
}

fn feed(table: &mut Table, (host, records): &Said, at: Instant) {
    let vms = records
        .iter()
        .map(|(uid, (epoch, state))| vm_of(uid, *epoch, *state));
    report(table, host, vms.collect(), at);
}

fn empty(at: Instant) -> Table {
    let mut table = Table::new(INTERVAL, INTERVAL * 3);
    for host in HOSTS {
        join(&mut table, host, at);
    }
    table
}

fn runs(state: VmState) -> bool {
    !matches!(state, VmState::Incoming | VmState::Relinquished)
}

/// By uid: host, epoch, state.
fn shown(table: &Table, at: Instant) -> BTreeMap<String, (String, u64, VmState)> {
    let vms = table.vms(at);
    let number = vms.len();
    let shown: BTreeMap<_, _> = vms
        .into_iter()
        .map(|vm| {
            let state = vm.state();
            (vm.uid, (vm.host, vm.epoch, state))
        })
        .collect();
    assert_eq!(shown.len(), number, "a uid is shown once");
    shown
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_shown_is_what_counts(reports in proptest::collection::vec(said(), 1..12)) {
        let at = Instant::now();
        let mut table = empty(at);
        let mut last: BTreeMap<&str, Said> = BTreeMap::new();
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        for said in &reports {
            feed(&mut table, said, at);
            last.insert(said.0, said.clone());
            for (uid, (epoch, state)) in &said.1 {
                if runs(*state) {
                    let known = seen.entry(uid).or_default();
                    *known = (*known).max(*epoch);
                }
            }
            let now: Vec<(&str, &str, u64, VmState)> = last
                .values()
                .flat_map(|(host, records)| {
                    let one = |(uid, of): (&&'static str, &(u64, VmState))| (*host, *uid, of.0, of.1);
                    records.iter().map(one).collect::<Vec<_>>()
                })
                .collect();
            let shown = shown(&table, at);
            for uid in UIDS {
                // Epochs of uids that nobody has may be forgotten when they are the first.
                let highest = seen.get(uid).copied().unwrap_or(0);
                let of_uid: Vec<_> = now.iter().filter(|record| record.1 == uid).collect();
                let claims: Vec<_> = of_uid
                    .iter()
                    .filter(|record| runs(record.3) && record.2 >= highest)
                    .collect();
                match shown.get(uid) {
                    None => {
                        prop_assert!(claims.is_empty());
                        prop_assert!(of_uid.iter().all(|record| runs(record.3)));
                    }
                    Some((host, epoch, state)) => {
                        let said = of_uid.iter().any(|record| {
                            record.0 == host && record.2 == *epoch && record.3 == *state
                        });
                        prop_assert!(said, "nobody said that");
                        if !claims.is_empty() {
                            prop_assert!(runs(*state), "a side hides what may run");
                            prop_assert_eq!(*epoch, highest, "an epoch is undercut");
                            if claims.iter().any(|record| record.3 == VmState::Running) {
                                prop_assert_eq!(*state, VmState::Running);
                            }
                            if *state == VmState::Lost {
                                prop_assert!(claims.iter().all(|record| record.3 == VmState::Lost));
                            }
                        } else {
                            prop_assert!(!runs(*state), "an old record came back to life");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_order_of_the_last_reports_does_not_matter(
        reports in proptest::collection::vec(said(), 1..6),
        order in Just(vec![0_usize, 1, 2]).prop_shuffle(),
    ) {
        let at = Instant::now();
        let last: BTreeMap<&str, &Said> = reports.iter().map(|said| (said.0, said)).collect();
        let last: Vec<&Said> = last.into_values().collect();
        let mut straight = empty(at);
        for said in &last {
            feed(&mut straight, said, at);
        }
        let mut shuffled = empty(at);
        for index in order {
            if let Some(said) = last.get(index) {
                feed(&mut shuffled, said, at);
            }
        }
        prop_assert_eq!(shown(&straight, at), shown(&shuffled, at));
        // Nor does a restart in between.
        prop_assert_eq!(shown(&straight, at), shown(&restarted(&straight, at), at));
    }
}
