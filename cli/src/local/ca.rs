//! A CA for one machine, in a directory: what `slat demo` and `slat up` make so that their server,
//! their agents and their user know each other by certificates.
//!
//! | below the directory | what |
//! |---|---|
//! | `ca` | the CA; its key leaves this directory never |
//! | `server`, `agent-NAME` | the certificates of the processes |
//! | `admin` | the user's, who may do everything |
//!
//! Making it again changes nothing that is there: certificates that end soon are renewed.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use slat_proto::transport::Link;
use slat_trust::{Credentials, Expects, Kind, pki::Ca};

use crate::failure::Failure;

/// The trust domain of such a fleet. It is this machine's alone: another one's CA is another.
const DOMAIN: &str = "slat.local";
/// A certificate that ends sooner is renewed.
const SOON: Duration = Duration::from_secs(14 * 86_400);

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct LocalCa(PathBuf);

impl LocalCa {
    /// Makes it below `dir`, with certificates for a server, these agents and the user. Blocks.
    pub(crate) fn make(dir: &Path, agents: &[&str]) -> Result<Self, Failure> {
        let local = Self(dir.to_owned());
        let at = dir.join("ca");
        // Written last: without it there is none, also after an init that died.
        let ca = if at.join("ca.crt").exists() {
            Ca::open(&at)
        } else {
            Ca::init(&at, DOMAIN)
        };
        let failed = |error: slat_trust::pki::PkiError| {
            let words = format!("cannot make certificates: {error}");
            match error.advice() {
                Some(advice) => Failure::advised(words, advice),
                None => Failure::local(words),
            }
        };
        let ca = ca.map_err(failed)?;
        let server = std::iter::once((Kind::Server, "server", local.server()));
        let user = std::iter::once((Kind::User, "admin", local.admin()));
        let agents = agents
            .iter()
            .map(|name| (Kind::Agent, *name, local.agent(name)));
        for (kind, name, out) in server.chain(user).chain(agents) {
            if !out.join("tls.crt").exists() {
                ca.issue(kind, name, None, &out).map_err(failed)?;
            } else if ends_soon(&out) {
                ca.renew(&out, None).map_err(failed)?;
            }
        }
        Ok(local)
    }

    /// The server's certificate.
    pub(crate) fn server(&self) -> PathBuf {
        self.0.join("server")
    }

    /// An agent's.
    pub(crate) fn agent(&self, name: &str) -> PathBuf {
        self.0.join(format!("agent-{name}"))
    }

    /// The user's.
    pub(crate) fn admin(&self) -> PathBuf {
        self.0.join("admin")
    }

    /// How the user speaks to the fleet's server.
    pub(crate) fn link(&self) -> Result<Link, Failure> {
        self.link_to(Expects::Kinds(&[Kind::Server]))
    }

    /// And to one of its agents.
    pub(crate) fn link_to_agent(&self, name: &str) -> Result<Link, Failure> {
        self.link_to(Expects::Named(Kind::Agent, name.to_owned()))
    }

    fn link_to(&self, expects: Expects) -> Result<Link, Failure> {
        let credentials = Credentials::load(&self.admin());
        let credentials =
            credentials.map_err(|error| Failure::advised(error.to_string(), error.advice()))?;
        Ok(Link::Tls {
            credentials,
            expects,
        })
    }
}

/// Whether the certificate there ends soon, or cannot be read.
fn ends_soon(dir: &Path) -> bool {
    Credentials::load(dir).map_or(true, |credentials| {
        let left = credentials.not_after().duration_since(SystemTime::now());
        left.unwrap_or_default() < SOON
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_found_again() {
        let dir = slat_test_dir::TestDir::new();
        let local = LocalCa::make(dir.path(), &["host-a"]).unwrap();
        let key = std::fs::read(local.server().join("tls.key")).unwrap();
        let again = LocalCa::make(dir.path(), &["host-a", "host-b"]).unwrap();
        assert_eq!(std::fs::read(again.server().join("tls.key")).unwrap(), key);
        for (dir, identity) in [
            (again.server(), "spiffe://slat.local/slat/server/server"),
            (
                again.agent("host-b"),
                "spiffe://slat.local/slat/agent/host-b",
            ),
            (again.admin(), "spiffe://slat.local/slat/user/admin"),
        ] {
            let credentials = Credentials::load(&dir).unwrap();
            assert_eq!(credentials.identity().to_string(), identity);
            assert_eq!(credentials.trouble(), None);
        }
        let expected = |link| match link {
            Link::Tls { expects, .. } => expects,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            expected(again.link().unwrap()),
            Expects::Kinds(&[Kind::Server])
        );
        assert_eq!(
            expected(again.link_to_agent("host-b").unwrap()),
            Expects::Named(Kind::Agent, "host-b".to_owned())
        );
    }

    /// Wherever the first start was killed, the next one makes what is missing.
    #[test]
    fn what_a_kill_left_half_made_is_made() {
        let dir = slat_test_dir::TestDir::new();
        let local = LocalCa::make(dir.path(), &["host-a"]).unwrap();
        let made = |local: &LocalCa| {
            for dir in [local.server(), local.agent("host-a"), local.admin()] {
                let credentials = Credentials::load(&dir).unwrap();
                assert_eq!(credentials.trouble(), None);
            }
        };
        // Between certificate and key of an identity.
        std::fs::remove_file(local.server().join("tls.key")).unwrap();
        made(&LocalCa::make(dir.path(), &["host-a"]).unwrap());
        // Between the key and the certificate of the CA.
        let dir = slat_test_dir::TestDir::new();
        let ca = dir.path().join("ca");
        std::fs::create_dir(&ca).unwrap();
        std::fs::write(ca.join("ca.key"), "").unwrap();
        made(&LocalCa::make(dir.path(), &["host-a"]).unwrap());
    }
}
