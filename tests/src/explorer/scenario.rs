//! What is explored: scenarios, each with its budget of faults.
//!
//! A budget bounds how often each kind of thing goes wrong; it is the only bound. Within it every
//! order of everything is explored, without a bound on depth. One migration, one VM, two hosts, one
//! server.

use super::{planted::Planted, world::Budget};

/// One exploration.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name in reports.
    pub name: &'static str,
    /// What may go wrong.
    pub budget: Budget,
}

const fn scenario(name: &'static str, budget: Budget) -> Scenario {
    Scenario { name, budget }
}

const NONE: Budget = Budget::NONE;

/// What CI explores.
pub const BOUNDED: [Scenario; 19] = [
    scenario("nothing goes wrong", NONE),
    scenario("a VM process is killed", Budget { kills: 1, ..NONE }),
    scenario("a host loses its power", Budget { outages: 1, ..NONE }),
    scenario(
        "a host loses its power and is deleted",
        Budget {
            outages: 1,
            deletions: 1,
            ..NONE
        },
    ),
    scenario("a host is fenced", Budget { fences: 1, ..NONE }),
    scenario(
        "the server dies",
        Budget {
            server_crashes: 1,
            ..NONE
        },
    ),
    scenario("a call is lost", Budget { losses: 1, ..NONE }),
    scenario(
        "a call arrives twice, or too late",
        Budget { strays: 1, ..NONE },
    ),
    scenario("an answer is late", Budget { delays: 1, ..NONE }),
    scenario("the connection breaks", Budget { breaks: 1, ..NONE }),
    scenario(
        "a journal cannot be written",
        Budget {
            disk_faults: 1,
            ..NONE
        },
    ),
    scenario(
        "a side's work fails",
        Budget {
            work_faults: 1,
            ..NONE
        },
    ),
    scenario("the user cancels", Budget { cancels: 1, ..NONE }),
    scenario(
        "a grant's time ends",
        Budget {
            expiries: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and a call with a grant arrives twice",
        Budget {
            expiries: 1,
            replays: 1,
            ..NONE
        },
    ),
    scenario(
        "a switchover goes back",
        Budget {
            overruns: 1,
            ..NONE
        },
    ),
    scenario(
        "a switchover goes back and the connection breaks",
        Budget {
            overruns: 1,
            breaks: 1,
            ..NONE
        },
    ),
    scenario(
        "the connection breaks and a VM process is killed",
        Budget {
            breaks: 1,
            kills: 1,
            ..NONE
        },
    ),
    scenario(
        "a journal cannot be written and a host loses its power",
        Budget {
            disk_faults: 1,
            outages: 1,
            ..NONE
        },
    ),
];

/// What a long run explores besides.
pub const DEEP: [Scenario; 29] = [
    scenario(
        "a host is fenced and the connection breaks",
        Budget {
            fences: 1,
            breaks: 1,
            ..NONE
        },
    ),
    scenario(
        "a host is fenced and the user cancels",
        Budget {
            fences: 1,
            cancels: 1,
            ..NONE
        },
    ),
    scenario("both hosts are fenced", Budget { fences: 2, ..NONE }),
    scenario(
        "a host is fenced and the server dies",
        Budget {
            fences: 1,
            server_crashes: 1,
            ..NONE
        },
    ),
    scenario(
        "a host is fenced and a VM process is killed",
        Budget {
            fences: 1,
            kills: 1,
            ..NONE
        },
    ),
    scenario(
        "a host is fenced and a call arrives twice, or too late",
        Budget {
            fences: 1,
            strays: 1,
            ..NONE
        },
    ),
    scenario(
        "a host is fenced and deleted",
        Budget {
            fences: 1,
            deletions: 1,
            ..NONE
        },
    ),
    scenario(
        "a switchover goes back twice and an answer is late",
        Budget {
            overruns: 2,
            delays: 1,
            ..NONE
        },
    ),
    scenario(
        "a switchover goes back and the user cancels",
        Budget {
            overruns: 1,
            cancels: 1,
            ..NONE
        },
    ),
    scenario(
        "a switchover goes back and a VM process is killed",
        Budget {
            overruns: 1,
            kills: 1,
            ..NONE
        },
    ),
    scenario("the connection breaks twice", Budget { breaks: 2, ..NONE }),
    scenario(
        "the connection breaks and a host loses its power",
        Budget {
            breaks: 1,
            outages: 1,
            ..NONE
        },
    ),
    scenario("both hosts lose their power", Budget { outages: 2, ..NONE }),
    scenario(
        "both hosts lose their power and are deleted",
        Budget {
            outages: 2,
            deletions: 2,
            ..NONE
        },
    ),
    scenario(
        "a host loses its power and is deleted, and the server dies",
        Budget {
            outages: 1,
            deletions: 1,
            server_crashes: 1,
            ..NONE
        },
    ),
    scenario(
        "a host loses its power and is deleted, and the user cancels",
        Budget {
            outages: 1,
            deletions: 1,
            cancels: 1,
            ..NONE
        },
    ),
    scenario(
        "the user cancels while the connection breaks",
        Budget {
            cancels: 1,
            breaks: 1,
            ..NONE
        },
    ),
    scenario(
        "the user cancels while a VM process is killed",
        Budget {
            cancels: 1,
            kills: 1,
            ..NONE
        },
    ),
    scenario(
        "the server dies and the connection breaks",
        Budget {
            server_crashes: 1,
            breaks: 1,
            ..NONE
        },
    ),
    scenario(
        "the user cancels and a call arrives too late",
        Budget {
            cancels: 1,
            strays: 1,
            ..NONE
        },
    ),
    scenario(
        "both grants' times end",
        Budget {
            expiries: 2,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and a call arrives twice, or too late",
        Budget {
            expiries: 1,
            strays: 1,
            ..NONE
        },
    ),
    scenario(
        "the user cancels and a call with a grant arrives twice",
        Budget {
            cancels: 1,
            replays: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and a call is lost",
        Budget {
            expiries: 1,
            losses: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and the connection breaks",
        Budget {
            expiries: 1,
            breaks: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and a VM process is killed",
        Budget {
            expiries: 1,
            kills: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and the server dies",
        Budget {
            expiries: 1,
            server_crashes: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and the user cancels",
        Budget {
            expiries: 1,
            cancels: 1,
            ..NONE
        },
    ),
    scenario(
        "a grant's time ends and a host is fenced",
        Budget {
            expiries: 1,
            fences: 1,
            ..NONE
        },
    ),
];

impl Planted {
    /// What must go wrong for the fault to show.
    #[must_use]
    pub const fn budget(self) -> Budget {
        match self {
            Self::NoSync => Budget { outages: 1, ..NONE },
            Self::CommitUndurable => Budget {
                disk_faults: 1,
                outages: 1,
                ..NONE
            },
            Self::TimerDecides | Self::RunsOnReady => Budget { breaks: 1, ..NONE },
            Self::RestartForgets => Budget { kills: 1, ..NONE },
            Self::HookLies => Budget {
                fences: 1,
                breaks: 1,
                ..NONE
            },
            Self::GoesBackLate => Budget {
                overruns: 1,
                ..NONE
            },
            Self::GrantUsedTwice => Budget {
                replays: 1,
                cancels: 1,
                ..NONE
            },
            Self::ExpiryEndsReady | Self::ExpiryTakesBack => Budget {
                expiries: 1,
                ..NONE
            },
            Self::StoreForgetsStart => Budget {
                server_crashes: 1,
                cancels: 1,
                ..NONE
            },
        }
    }
}
