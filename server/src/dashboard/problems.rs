//! What an operator should look at first: one line a kind, with how many and the first of them.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use slat_proto::v1::{self, MigrationPhase as Phase};

use super::{
    query::{host_marks, vm_marks},
    snapshot::Snapshot,
};

/// Names that one line gives.
const NAMED: usize = 6;

/// Whether it is urgent, what it is of, its mark, and in words.
const KINDS: &[(bool, &str, &str, &str)] = &[
    (
        true,
        "vms",
        "conflict",
        "that several VMs have: a call must give a uid or a host",
    ),
    (true, "hosts", "contended", "with two agents under one name"),
    (
        true,
        "vms",
        "errors",
        "whose guest read memory that it did not write",
    ),
    (true, "vms", "lost", "lost, with process and memory"),
    (
        true,
        "hosts",
        "unreachable",
        "silent; VMs there are shown as last seen",
    ),
    (
        true,
        "hosts",
        "fenced",
        "fenced: nothing there runs any more, until its agent is started anew",
    ),
    (
        true,
        "hosts",
        "unreported",
        "not heard of since the server started; VMs there are shown as stored",
    ),
    (
        true,
        "hosts",
        "trouble",
        "that can take no VM: what is wrong is in its note",
    ),
    (
        true,
        "vms",
        "unresponsive",
        "whose process lives and does not answer",
    ),
    (true, "vms", "failed", "failed"),
    (
        true,
        "vms",
        "waits",
        "that may wait for pages: their pager is gone or its source failed",
    ),
    (
        false,
        "vms",
        "frozen",
        "handed over and frozen: perhaps a last copy",
    ),
    (
        false,
        "hosts",
        "leftovers",
        "with leftovers that no VM and no migration explains",
    ),
    (false, "hosts", "clock", "with a clock that is off"),
];

struct Problem<'a> {
    bad: bool,
    text: &'static str,
    /// One of what it is about.
    noun: &'static str,
    /// Where the page lists them.
    link: String,
    names: Vec<&'a str>,
    count: usize,
}

impl Problem<'_> {
    fn json(&self) -> Value {
        json!({
            "bad": self.bad,
            "text": self.text,
            "noun": self.noun,
            "link": self.link,
            "names": self.names,
            "count": self.count,
        })
    }
}

fn problem<'a>(
    bad: bool,
    noun: &'static str,
    text: &'static str,
    link: String,
    all: impl Iterator<Item = &'a str>,
) -> Option<Problem<'a>> {
    let mut names: Vec<&str> = all.collect();
    let count = names.len();
    names.truncate(NAMED);
    (count > 0).then_some(Problem {
        bad,
        text,
        noun,
        link,
        names,
        count,
    })
}

/// The worst first; none when all is well.
pub(super) fn problems(snapshot: &Snapshot) -> Vec<Value> {
    let mut hosts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for host in snapshot.hosts.values() {
        for mark in host_marks(host) {
            hosts.entry(mark).or_default().push(&host.name);
        }
    }
    let mut vms: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for vm in &snapshot.vms {
        for mark in vm_marks(vm, snapshot) {
            let names = vms.entry(mark).or_default();
            // Twins stand side by side: one name.
            if names.last() != Some(&vm.name.as_str()) {
                names.push(&vm.name);
            }
        }
    }
    let doubt = snapshot
        .running
        .iter()
        .filter(|migration| migration.phase() == Phase::InDoubt)
        .map(|migration| migration.name.as_str());
    let nowhere = snapshot.ended.iter().filter(|migration| {
        let unknown = v1::VmLocation::Unknown;
        migration.phase() == Phase::Failed && migration.vm_location() == unknown
    });
    // An unreported host is unreachable too: said once, as what it is.
    let unreported = hosts.get("unreported").cloned().unwrap_or_default();
    let mut found = Vec::new();
    found.extend(problem(
        true,
        "migration",
        "in doubt: whether the commit happened is not known",
        "migrations?state=IN_DOUBT".to_owned(),
        doubt,
    ));
    // The worst first, as listed.
    for (bad, kind, mark, text) in KINDS {
        let names = match *kind {
            "hosts" => hosts.remove(mark),
            _ => vms.remove(mark),
        };
        let mut names = names.unwrap_or_default();
        if *mark == "unreachable" {
            names.retain(|name| !unreported.contains(name));
        }
        let link = format!("{kind}?mark={mark}");
        let noun = match (*kind, *mark) {
            ("hosts", _) => "host",
            // Twins are counted once.
            (_, "conflict") => "VM name",
            _ => "VM",
        };
        found.extend(problem(*bad, noun, text, link, names.into_iter()));
    }
    found.extend(problem(
        false,
        "migration",
        "failed past the commit: the VM runs nowhere",
        "migrations?state=FAILED".to_owned(),
        nowhere.map(|migration| migration.name.as_str()),
    ));
    found.iter().map(Problem::json).collect()
}
