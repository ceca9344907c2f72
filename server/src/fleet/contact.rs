//! Whether a host can be used: when its agent was last heard, whether the server can call it back,
//! and who else wants its name. Plain data; time comes in.
//!
//! READY means both ways: the agent reports, and under the address that it advertises an agent
//! answers which is that same one. A host whose agent never answered there, or has not answered
//! [`FAILURES`] times in a row, is UNREACHABLE although it reports, and says why.

use std::time::{Duration, Instant};

use slat_proto::v1;

/// Failed calls in a row that make a host unreachable which could be called before.
const FAILURES: u32 = 3;
/// A contender not heard for as long has given up.
const QUIET: Duration = Duration::from_secs(15);

/// Another agent that wants the host's name.
#[derive(Clone, Debug)]
struct Contender {
    address: String,
    uid: String,
    last: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Contact {
    /// Since when the host is known from the store.
    known: Option<Instant>,
    /// When it registered or reported last.
    heard: Option<Instant>,
    /// It reported since the server started.
    pub(super) reported: bool,
    /// It reported since its agent registered.
    pub(super) told: bool,
    /// Its agent answered a call under its address, since it registered.
    answered: bool,
    /// Calls that failed since.
    failures: u32,
    /// Why the last call failed; empty when it did not.
    why: String,
    contender: Option<Contender>,
    /// Why it can take no VM, as it says itself; empty when it can.
    pub(super) trouble: String,
}

/// What a call back changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing that anybody needs to know.
    Same,
    /// It can be called now.
    Reached,
    /// It cannot be called any more, or never could.
    Lost,
}

impl Contact {
    /// Of a host that the store knows.
    pub(super) fn known(at: Instant) -> Self {
        Self {
            known: Some(at),
            ..Default::default()
        }
    }

    /// An agent registers. `same`: the one that was called back already.
    pub(super) fn register(&mut self, same: bool, at: Instant) {
        self.heard = Some(at);
        self.told &= same;
        if !same {
            self.answered = false;
            self.failures = 0;
            self.why.clear();
        }
    }

    pub(super) fn report(&mut self, at: Instant) {
        self.heard = Some(at);
        self.reported = true;
        self.told = true;
    }

    /// Heard within `silence`.
    pub(super) fn reports(&self, at: Instant, silence: Duration) -> bool {
        self.heard
            .is_some_and(|heard| at.saturating_duration_since(heard) <= silence)
    }

    /// Whether its name is its agent's: it reports, or the server has just started and does not
    /// know yet.
    pub(super) fn holds_name(&self, at: Instant, silence: Duration) -> bool {
        let fresh = self
            .known
            .is_some_and(|known| at.saturating_duration_since(known) <= silence);
        self.reports(at, silence) || (self.heard.is_none() && fresh)
    }

    fn callable(&self) -> bool {
        self.answered && self.failures < FAILURES
    }

    pub(super) fn ready(&self, at: Instant, silence: Duration) -> bool {
        self.callable() && self.reports(at, silence)
    }

    /// How calling it back went; `Err` says why it failed.
    pub(super) fn called(&mut self, result: Result<(), String>) -> Turn {
        let before = self.callable();
        let first = self.why.is_empty();
        match result {
            Ok(()) => {
                self.answered = true;
                self.failures = 0;
                self.why.clear();
                if before { Turn::Same } else { Turn::Reached }
            }
            Err(why) => {
                self.failures = self.failures.saturating_add(1);
                self.why = why;
                let lost = before && !self.callable();
                if lost || (!self.answered && first) {
                    Turn::Lost
                } else {
                    Turn::Same
                }
            }
        }
    }

    /// Another agent asks for the name and is refused. Whether that begins an episode.
    pub(super) fn contend(&mut self, address: &str, uid: &str, at: Instant) -> bool {
        let begins = self
            .contender(at)
            .is_none_or(|known| known.address != address || known.uid != uid);
        self.contender = Some(Contender {
            address: address.to_owned(),
            uid: uid.to_owned(),
            last: at,
        });
        begins
    }

    /// The name was given up, or given to the contender.
    pub(super) fn settled(&mut self) {
        self.contender = None;
    }

    fn contender(&self, at: Instant) -> Option<&Contender> {
        self.contender
            .as_ref()
            .filter(|known| at.saturating_duration_since(known.last) <= QUIET)
    }

    /// Fills in how the host stands.
    pub(super) fn show(&self, host: &mut v1::Host, at: Instant, silence: Duration) {
        use v1::host::State;
        let ready = self.ready(at, silence);
        let state = if ready {
            State::Ready
        } else {
            State::Unreachable
        };
        host.state = state.into();
        host.reported = self.reported;
        host.contender.clear();
        let mut words = Vec::new();
        if self.heard.is_none() {
            words.push("its agent has not been heard from since the server started".to_owned());
        } else if !self.reports(at, silence) {
            words.push("its agent does not report".to_owned());
        } else if !self.why.is_empty() {
            words.push(format!(
                "the server cannot call its agent at {}: {}",
                host.address, self.why
            ));
        } else if !ready {
            words.push("its agent has not been called back yet".to_owned());
        }
        if ready && !self.trouble.is_empty() {
            words.push(self.trouble.clone());
        }
        if let Some(contender) = self.contender(at) {
            let uid = if contender.uid.is_empty() {
                "no uid"
            } else {
                contender.uid.as_str()
            };
            host.contender = format!("{} ({uid})", contender.address);
            words.push(format!(
                "another agent, {}, registers under this name and is refused",
                host.contender
            ));
        }
        host.state_message = words.join("; ");
    }
}
