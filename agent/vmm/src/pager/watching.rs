//! Whether a VM's memory is to be watched, and why. Pure: who holds the machine's control lock
//! tells it what is so, and does what it says.
//!
//! | reason | from | until |
//! |---|---|---|
//! | it is paged by the agent | its creation, or its arrival | its end |
//! | a snapshot | before it begins | it ended |
//! | a page source | it was built | all pages are there |
//!
//! Watching ends when no reason is left, and never begins at a migration's destination before that
//! owns the VM.

use std::collections::BTreeMap;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing: it is as it should be, or cannot be yet.
    Stay,
    /// Begin to watch.
    Watch,
    /// End it.
    Unwatch,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Watching {
    on: bool,
    agent: bool,
    /// What its pages come from, for people.
    source: Option<&'static str>,
    snapshots: BTreeMap<u64, String>,
    /// It was tried and failed: not again by itself.
    failed: bool,
}

impl Watching {
    /// It is paged by the agent from now on.
    pub(crate) fn by_agent(&mut self) {
        self.agent = true;
    }

    /// Pages come from a source, called so, or all have come.
    pub(crate) fn set_source(&mut self, source: Option<&'static str>) {
        self.source = source;
    }

    /// A snapshot is to begin, for `purpose`.
    pub(crate) fn snapshot_begins(&mut self, snapshot: u64, purpose: &str) {
        self.snapshots.insert(snapshot, purpose.to_owned());
    }

    /// A snapshot ended.
    pub(crate) fn snapshot_ended(&mut self, snapshot: u64) {
        self.snapshots.remove(&snapshot);
    }

    /// It could not be begun.
    pub(crate) fn give_up(&mut self) {
        self.failed = true;
    }

    /// The VM ends: nothing is to be watched any more.
    pub(crate) fn end(&mut self) {
        *self = Self::default();
    }

    /// It is watched now, or not.
    pub(crate) fn set_on(&mut self, on: bool) {
        self.on = on;
        self.failed = false;
    }

    /// Whether it is watched.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Whether it is to be.
    pub(crate) fn is_wanted(&self) -> bool {
        self.agent || self.source.is_some() || !self.snapshots.is_empty()
    }

    /// What is to be done when this process owns the VM (`owned`) and a pager is there (`pager`):
    /// a guest is not made to wait for one that may never come.
    pub(crate) fn step(&self, owned: bool, pager: bool) -> Step {
        match (self.on, self.is_wanted()) {
            (false, true) if owned && pager && !self.failed => Step::Watch,
            (true, false) => Step::Unwatch,
            _ => Step::Stay,
        }
    }

    /// Why, for people.
    pub(crate) fn because(&self) -> Vec<String> {
        let mut because = Vec::new();
        if self.agent {
            because.push("paging: AGENT".to_owned());
        }
        because.extend(self.source.map(str::to_owned));
        let word = |purpose: &String| {
            let saved = purpose.starts_with("saves/");
            if saved { "saved" } else { "forked" }.to_owned()
        };
        for word in self.snapshots.values().map(word) {
            if !because.contains(&word) {
                because.push(word);
            }
        }
        because
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_guest_is_watched_for_as_long_as_a_reason_lasts() {
        let mut watching = Watching::default();
        assert_eq!(watching.step(true, true), Step::Stay);
        watching.snapshot_begins(1, "saves/web");
        watching.snapshot_begins(2, "vms/copy");
        assert_eq!(watching.step(true, true), Step::Watch);
        watching.set_on(true);
        watching.set_source(Some("restored lazily"));
        assert_eq!(
            watching.because(),
            ["restored lazily", "saved", "forked"],
            "each once"
        );
        watching.snapshot_ended(1);
        watching.snapshot_ended(2);
        watching.snapshot_ended(2);
        assert_eq!(watching.step(true, false), Step::Stay, "the source");
        watching.set_source(None);
        assert_eq!(watching.step(true, false), Step::Unwatch);
        watching.set_on(false);
        assert_eq!(watching.step(true, true), Step::Stay);
        assert!(watching.because().is_empty());
    }

    #[test]
    fn the_agents_guest_is_watched_to_its_end() {
        let mut watching = Watching::default();
        watching.by_agent();
        watching.set_on(true);
        watching.snapshot_begins(1, "saves/web");
        watching.snapshot_ended(1);
        assert_eq!(watching.step(true, false), Step::Stay);
        assert_eq!(watching.because(), ["paging: AGENT"]);
    }

    #[test]
    fn one_that_arrives_is_watched_once_it_is_owned_and_has_a_pager() {
        let mut watching = Watching::default();
        watching.by_agent();
        for (owned, pager) in [(false, false), (false, true), (true, false)] {
            assert_eq!(watching.step(owned, pager), Step::Stay);
        }
        assert_eq!(watching.step(true, true), Step::Watch);
        watching.give_up();
        assert_eq!(watching.step(true, true), Step::Stay, "not again and again");
    }
}
