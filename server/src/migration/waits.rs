//! What a migration waits for, in words, and since when.
//!
//! Every wait of a migration has a name here and, where one is possible without guessing what
//! became of the VM, an end:
//!
//! * PENDING waits for sides of earlier migrations, as long as [`super::waiting`] says.
//! * PREPARING waits for a host, before the source was told to begin: for one call or, after a
//!   restart of the server, for [`super::waiting::HOST_PATIENCE`].
//! * Later the source's word is waited for, until it comes: it may have handed the VM over. A
//!   cancel waits for the same, or for the end of the destination's listener.
//! * IN_DOUBT waits for the source's journal, or for a fence of its host; no timer ends it. From
//!   the fence on the destination is waited for.
//! * COMMITTED waits for the destination, then for the source's last figures: 5 s after its last
//!   word, and 30 s while it compares digests or, asked to compare them, does not answer.
//! * Any phase may wait for the store.
//!
//! Plain data: the protocol's state and the time come in.

use prost_types::Timestamp;
use slat_proto::v1::{MigrationPhase as Phase, MigrationProgress};

use super::{
    protocol::{Action, MigrationProtocol, Side},
    subject::Subject,
    waiting::Earlier,
};
use crate::phase::has_ended;

/// What is looked at.
#[derive(Clone, Copy)]
pub(super) struct Standing<'a> {
    pub(super) subject: &'a Subject,
    pub(super) protocol: &'a MigrationProtocol,
    /// Sides that PENDING waits for.
    pub(super) before: &'a [Earlier],
    /// Destination's memory that is there, of all, bytes.
    pub(super) populated: (u64, u64),
    /// The record has been on its way to the disk for long.
    pub(super) disk_hangs: bool,
    /// What the sides themselves say they wait for: source, destination.
    pub(super) sides: [&'a str; 2],
}

/// The destination's memory that is there, of all.
pub(super) fn populated(bytes: u64, source: Option<&MigrationProgress>) -> (u64, u64) {
    (bytes, source.map_or(0, |progress| progress.total_bytes))
}

/// What is waited for, with the time since when.
#[derive(Debug, Default)]
pub(super) struct Waits {
    words: String,
    since: Option<Timestamp>,
}

impl Waits {
    /// Brings it up to date, at `now`.
    pub(super) fn update(&mut self, standing: Standing<'_>, now: &Timestamp) {
        let words = standing.words().unwrap_or_default();
        if words != self.words {
            self.since = (!words.is_empty()).then_some(*now);
            self.words = words;
        }
    }

    pub(super) fn words(&self) -> &str {
        &self.words
    }

    pub(super) fn since(&self) -> Option<Timestamp> {
        self.since
    }
}

impl Standing<'_> {
    fn words(self) -> Option<String> {
        let protocol = self.protocol;
        if has_ended(protocol.phase()) {
            return None;
        }
        if self.disk_hangs {
            return Some("the server's store to write the migration's record".to_owned());
        }
        let (source, destination) = (Side::Source, Side::Destination);
        for side in [destination, source] {
            let words = self.sides[side as usize];
            if !words.is_empty() && !protocol.is_silent(side) {
                return Some(self.side(side, words));
            }
        }
        match protocol.phase() {
            Phase::Pending => self.earlier(),
            _ if protocol.durable().source_fenced && !protocol.committed() => Some(self.side(
                destination,
                "to answer, and to take the VM if it has all of it",
            )),
            Phase::InDoubt => Some(self.side(
                source,
                "to answer: its journal says whether the VM was handed over",
            )),
            Phase::Preparing if !protocol.is_started() => self.before_the_start(),
            _ if protocol.is_silent(source) => Some(self.side(source, "to answer")),
            Phase::Cancelling if protocol.is_silent(destination) => {
                Some(self.side(destination, "to answer"))
            }
            Phase::Cancelling => Some(self.side(source, "to end its side")),
            Phase::Preparing => Some(self.after_the_start()),
            Phase::Committed if protocol.awaits_figures() => {
                let wanted = if protocol.awaits_verdict() {
                    "to compare memory digests"
                } else {
                    "to tell its last figures"
                };
                Some(self.side(source, wanted))
            }
            Phase::Committed if protocol.is_silent(destination) => {
                Some(self.side(destination, "to answer"))
            }
            Phase::Committed => Some(self.side(destination, "to run the VM")),
            _ => None,
        }
    }

    fn side(self, side: Side, wanted: &str) -> String {
        let role = super::subject::side_name(side);
        format!("{} ({role}) {wanted}", self.subject.host(side))
    }

    fn earlier(self) -> Option<String> {
        let side = self.before.iter().find(|side| !side.is_released())?;
        Some(side.to_string())
    }

    fn before_the_start(self) -> Option<String> {
        let asks = |action| self.protocol.is_in_flight(action);
        Some(if asks(Action::Prepare) {
            self.side(Side::Destination, "to make an empty VM and listen")
        } else if asks(Action::Start) {
            self.side(Side::Source, "to begin")
        } else if asks(Action::Describe) || self.protocol.awaits_hosts() {
            self.side(Side::Source, "to describe the VM")
        } else {
            return None;
        })
    }

    fn after_the_start(self) -> String {
        let (there, all) = self.populated;
        if all == 0 || there < all {
            self.side(Side::Destination, "to populate its memory")
        } else {
            self.side(Side::Source, "to turn dirty logging on and send")
        }
    }
}
