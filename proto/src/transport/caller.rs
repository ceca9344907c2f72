//! Who calls: in the extensions of every request that reaches a service.

use std::sync::Arc;

/// Who calls. `request.extensions().get::<Caller>()` in a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// What its certificate says, as `spiffe://example.org/slat/agent/host-a`; `None` where no
    /// certificate is asked for.
    pub identity: Option<Arc<str>>,
    /// The address it calls from, or a Unix socket's user and process.
    pub peer: Arc<str>,
}

impl Caller {
    /// The host whose agent calls; `None` when another one does, or nobody knows.
    #[must_use]
    pub fn agent(&self) -> Option<&str> {
        self.named("/slat/agent/")
    }

    /// Whether a certificate says that the server calls.
    #[must_use]
    pub fn is_server(&self) -> bool {
        self.named("/slat/server/").is_some()
    }

    /// Whether a certificate says that a user calls.
    pub(super) fn is_user(&self) -> bool {
        self.named("/slat/user/").is_some()
    }

    /// Who it is, for people: the identity, or else the address.
    #[must_use]
    pub fn who(&self) -> &str {
        self.identity.as_deref().unwrap_or(&self.peer)
    }

    fn named(&self, kind: &str) -> Option<&str> {
        let identity = self.identity.as_deref()?.strip_prefix("spiffe://")?;
        let (_, path) = identity.split_at(identity.find('/')?);
        path.strip_prefix(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_known_by_its_identity_alone() {
        let caller = |identity: Option<&str>| Caller {
            identity: identity.map(Into::into),
            peer: "192.0.2.1:5".into(),
        };
        let agent = caller(Some("spiffe://example.org/slat/agent/host-a"));
        assert_eq!(agent.agent(), Some("host-a"));
        assert!(!agent.is_server());
        assert_eq!(agent.who(), "spiffe://example.org/slat/agent/host-a");
        assert!(caller(Some("spiffe://d/slat/server/s")).is_server());
        assert_eq!(caller(Some("spiffe://d/slat/user/agent")).agent(), None);
        assert_eq!(caller(None).agent(), None);
        assert_eq!(caller(None).who(), "192.0.2.1:5");
    }
}
