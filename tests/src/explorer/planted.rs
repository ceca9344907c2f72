//! Faults put into the drivers on purpose, to see that the exploration finds each.

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Planted {
    /// RELINQUISHED is not synced before COMMIT is said.
    NoSync,
    /// COMMIT is said although the append of RELINQUISHED failed.
    CommitUndurable,
    /// A destination in doubt decides by a clock.
    TimerDecides,
    /// The destination runs the VM as soon as it has said READY.
    RunsOnReady,
    /// An agent that answers for a dead source forgets RELINQUISHED.
    RestartForgets,
    /// The server's store forgets that StartOutgoing was made.
    StoreForgetsStart,
    /// The source goes back to precopy although it has sent its state.
    GoesBackLate,
    /// The hook says that a host is off, and its processes go on.
    HookLies,
    /// Neither an agent nor a VM's process remembers which grants, and tickets, were used.
    GrantUsedTwice,
    /// The end of its grant ends a destination that has said READY.
    ExpiryEndsReady,
    /// The end of its grant lets a source that relinquished its VM run it again.
    ExpiryTakesBack,
}

impl Planted {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::NoSync,
        Self::CommitUndurable,
        Self::TimerDecides,
        Self::RunsOnReady,
        Self::RestartForgets,
        Self::StoreForgetsStart,
        Self::GoesBackLate,
        Self::HookLies,
        Self::GrantUsedTwice,
        Self::ExpiryEndsReady,
        Self::ExpiryTakesBack,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoSync => "no-sync-before-commit",
            Self::CommitUndurable => "commit-after-failed-append",
            Self::TimerDecides => "timer-decides-doubt",
            Self::RunsOnReady => "destination-runs-on-ready",
            Self::RestartForgets => "restart-forgets-relinquished",
            Self::StoreForgetsStart => "store-forgets-start",
            Self::GoesBackLate => "goes-back-after-state",
            Self::HookLies => "hook-lies",
            Self::GrantUsedTwice => "grant-used-twice",
            Self::ExpiryEndsReady => "expiry-decides-ready",
            Self::ExpiryTakesBack => "expiry-decides-relinquished",
        }
    }
}
