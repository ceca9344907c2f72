//! Whether the server refuses this start of the agent because its host was fenced.
//!
//! Then what runs here may run elsewhere by now, at a newer epoch: the fence's hook said that
//! nothing runs here, and was wrong, or meant something else by it. The agent ends no VM by itself,
//! and never registers this start again: it says so loudly, until it is started anew by somebody
//! who looked at what is left here.

use std::sync::atomic::{AtomicBool, Ordering};

use slat_proto::{ApiError, Reason};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Fenced(AtomicBool);

impl Fenced {
    /// How contact with the server stands.
    pub(super) fn note(&self, error: Option<&ApiError>) {
        let fenced = match error {
            None => false,
            Some(error) if error.reason == Reason::HostFenced => true,
            // Silence, or another refusal, takes nothing back.
            Some(_) => return,
        };
        if self.0.swap(fenced, Ordering::Relaxed) != fenced && fenced {
            tracing::error!(
                error = %error.map_or("", |error| error.message.as_str()),
                "this host was fenced while its agent ran: VMs that run here may run elsewhere too; end their processes, then \
                 start the agent anew"
            );
        }
    }

    /// As the server said last.
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_stays_until_the_server_takes_the_agent_again() {
        let fenced = Fenced::default();
        let error = |reason| ApiError::new(reason, "no");
        fenced.note(Some(&error(Reason::PeerUnreachable)));
        assert!(!fenced.is_set());
        fenced.note(Some(&error(Reason::HostFenced)));
        fenced.note(Some(&error(Reason::PeerUnreachable)));
        assert!(fenced.is_set());
        fenced.note(None);
        assert!(!fenced.is_set());
    }
}
