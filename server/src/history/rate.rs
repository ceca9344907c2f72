//! Which rates are shown, their words and their units.

use super::ring::COUNTERS;

/// A counter whose growth is shown. Its number is its place in a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rate {
    /// Second-stage page faults.
    Faults = 0,
    /// Requests for a TLB flush of all vCPUs.
    FlushRequests = 1,
    /// Of these, those that reached a vCPU.
    Flushes = 2,
    /// Faults that pagers resolved, of VMs whose memory is watched.
    Paged = 3,
    /// Bytes on the wire of migrations, by their source.
    Sent = 4,
}

impl Rate {
    pub(crate) const ALL: [Self; COUNTERS] = [
        Self::Faults,
        Self::FlushRequests,
        Self::Flushes,
        Self::Paged,
        Self::Sent,
    ];

    /// As in a query.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Faults => "faults",
            Self::FlushRequests => "flush_requests",
            Self::Flushes => "flushes",
            Self::Paged => "paged",
            Self::Sent => "sent",
        }
    }

    /// The one unit that charts and tables show it in; `B/s` with binary prefixes.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Faults | Self::Paged => "faults/s",
            Self::FlushRequests | Self::Flushes => "flushes/s",
            Self::Sent => "B/s",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rate| rate.word() == word)
    }
}
