//! Certificates of a fleet that speaks TLS, made as an operator makes them: by `slat pki`.
//!
//! ```text
//! <root>/pki/             the CA
//! <root>/tls/server/      the server's directory (--tls-dir)
//! <root>/tls/host-a/      an agent's
//! <root>/tls/admin/       the user's, who is the test
//! ```

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use slat_proto::transport::Link;
use slat_trust::{Credentials, Expects, Kind};

use crate::binary;

/// The trust domain.
pub const DOMAIN: &str = "fleet.example";
/// The user that is the test.
pub const ADMIN: &str = "admin";
/// The server's name.
pub const SERVER: &str = "server";

/// See the module.
#[derive(Clone, Debug)]
pub struct Certificates(PathBuf);

impl Certificates {
    /// Makes a CA below `root`, and certificates for a server and the user.
    ///
    /// # Errors
    /// When the command refuses.
    pub fn make(root: &Path) -> anyhow::Result<Self> {
        let made = Self(root.to_owned());
        made.pki(&["init", "--domain", DOMAIN])?;
        made.issue("server", SERVER)?;
        made.issue("user", ADMIN)?;
        Ok(made)
    }

    /// The directory of a holder: a host, [`SERVER`], or a user.
    #[must_use]
    pub fn dir(&self, name: &str) -> PathBuf {
        self.0.join("tls").join(name)
    }

    /// The same as a command's argument.
    ///
    /// # Panics
    /// When the path is no text.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        let dir = self.dir(name);
        dir.to_str().expect("a path in UTF-8").to_owned()
    }

    /// Issues a certificate into the directory of `name`.
    ///
    /// # Errors
    /// When the command refuses.
    pub fn issue(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        std::fs::create_dir_all(self.0.join("tls"))?;
        self.pki(&["issue", kind, name, "--out", &self.path(name)])
            .map(drop)
    }

    /// `slat pki ARGUMENTS` with this CA; what it printed.
    ///
    /// # Errors
    /// When it refuses, with what it said.
    pub fn pki(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(binary::slat()?)
            .arg("pki")
            .args(arguments)
            .arg("--dir")
            .arg(self.0.join("pki"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "slat pki {arguments:?}: {}: {said}",
            output.status
        );
        String::from_utf8(output.stdout).context("it prints text")
    }

    /// How the holder of `name`'s directory speaks to servers and agents, by the files there now.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn link(&self, name: &str) -> anyhow::Result<Link> {
        let credentials = Credentials::load(&self.dir(name))?;
        let expects = Expects::Kinds(&[Kind::Server, Kind::Agent]);
        Ok(Link::Tls {
            credentials,
            expects,
        })
    }
}
