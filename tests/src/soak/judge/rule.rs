//! The rules, and one that does not hold.

use std::fmt;

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// At most one living process owns a VM.
    OneOwner,
    /// No guest found memory that it did not write.
    GuestMemory,
    /// A VM that was made and not deleted is on a disk.
    Kept,
    /// A VM that was deleted is on no host whose agent runs.
    Gone,
    /// No uid is shown twice.
    ShownOnce,
    /// An owner that lives is shown where it is, as its process says.
    AliveIsShown,
    /// An owner whose process died is LOST.
    DeadIsLost,
    /// What never owned or gave away is never LOST, and an owner's side hides no owner.
    SidesAreSides,
    /// A VM of a silent host is shown as last seen.
    SilentIsStale,
    /// Nothing is shown that is on no disk.
    NothingInvented,
    /// VMs of one name name each other, and the name alone means none of them.
    NamesConflict,
    /// Exactly those hosts are READY whose agents run; the others are called silent.
    HostsAreTrue,
    /// Command line, page and metrics say what the API says.
    ViewsAgree,
    /// Clocks of hosts are measured, a VM is as old as it is, phases follow one another.
    TimesAreTrue,
    /// A migration ends.
    MigrationEnds,
    /// A migration that ended says where its VM is.
    MigrationTellsWhere,
    /// Everybody answers, and a refusal has a reason that somebody can act upon.
    Answers,
    /// What is left on a host when nothing runs was explained before.
    LeftoversExplained,
    /// When all VMs are deleted, no process, directory or reserved memory is left, and the machines
    /// can explain every journal.
    NothingLeft,
}

/// A rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Broken {
    /// Which.
    pub rule: Rule,
    /// Whom it is about: a uid, a host, a migration, a series. With the rule it tells one
    /// disagreement from another.
    pub about: String,
    /// What is true and what is said.
    pub said: String,
}

impl Broken {
    /// A rule that does not hold.
    pub fn new(rule: Rule, about: impl Into<String>, said: impl fmt::Display) -> Self {
        Self {
            rule,
            about: about.into(),
            said: said.to_string(),
        }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}: {}", self.rule, self.about, self.said)
    }
}
