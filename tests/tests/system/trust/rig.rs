//! A server and agents with certificates by a CA of the test's own, and a file of users.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use slat_proto::{
    transport::{Address, Link, TracedChannel, connect_by},
    v1::{self, host_service_client::HostServiceClient, vm_service_client::VmServiceClient},
};
use slat_test_dir::TestDir;
use slat_tests::{
    binary,
    process::{Daemon, end_below, leftovers},
    wait::eventually,
};
use slat_trust::{
    Credentials, Expects, Kind,
    pki::{Ca, Validity},
};

/// See the module.
pub(super) struct Secured {
    root: TestDir,
    pub(super) ca: Ca,
    daemons: Vec<(&'static str, Daemon)>,
    finished: bool,
}

/// Speaks as the owner of a certificate, to whoever is there.
pub(super) fn link(credentials: &Credentials) -> Link {
    Link::new(Some(credentials), Expects::Anyone)
}

impl Secured {
    /// A CA; nothing runs yet.
    pub(super) fn new() -> anyhow::Result<Self> {
        let root = TestDir::with_prefix("slat-test-")?;
        let ca = Ca::init(&root.path().join("ca"), "example.org")?;
        Ok(Self {
            root,
            ca,
            daemons: Vec::new(),
            finished: false,
        })
    }

    pub(super) fn root(&self) -> &Path {
        self.root.path()
    }

    fn tls_dir(&self, kind: Kind, name: &str) -> PathBuf {
        self.root().join(format!("tls-{kind:?}-{name}"))
    }

    /// Issues a certificate.
    pub(super) fn issue(
        &self,
        kind: Kind,
        name: &str,
        validity: Option<Validity>,
    ) -> anyhow::Result<Credentials> {
        let dir = self.tls_dir(kind, name);
        self.ca.issue(kind, name, validity, &dir)?;
        Ok(Credentials::load(&dir)?)
    }

    pub(super) fn user(&self, name: &str) -> anyhow::Result<Credentials> {
        self.issue(Kind::User, name, None)
    }

    /// Starts the server and its agents (name, MiB, labels) with these users; returns when all
    /// hosts are READY.
    pub(super) async fn start(
        &mut self,
        users: &str,
        agents: &[(&'static str, u32, &str)],
        admin: &Credentials,
    ) -> anyhow::Result<()> {
        std::fs::write(self.root().join("access.yaml"), users)?;
        self.issue(Kind::Server, "main", None)?;
        let timing = ["--report-interval", "200ms", "--host-silence", "5s"];
        self.begin("server", Kind::Server, "main", &timing.map(String::from))?;
        let server = self.address("server").to_string();
        for (name, mib, labels) in agents {
            self.issue(Kind::Agent, name, None)?;
            let memory = format!("{mib}MiB");
            let options = [
                ["--server", &server],
                ["--memory", &memory],
                ["--data-ports", "0"],
                ["--label", labels],
            ];
            let options: Vec<String> = options.concat().into_iter().map(String::from).collect();
            self.begin(name, Kind::Agent, name, &options)?;
        }
        let hosts = HostServiceClient::new(self.channel("server", admin)?);
        eventually("every host is READY", || {
            let mut hosts = hosts.clone();
            async move {
                let list = hosts.list_hosts(v1::ListHostsRequest::default()).await?;
                let list = list.into_inner().hosts;
                let ready = list.iter().map(v1::Host::state);
                let ready = ready.filter(|state| *state == v1::host::State::Ready);
                ensure!(ready.count() == agents.len(), "{list:?}");
                Ok(())
            }
        })
        .await
    }

    fn begin(
        &mut self,
        label: &'static str,
        kind: Kind,
        name: &str,
        options: &[String],
    ) -> anyhow::Result<()> {
        let role = match kind {
            Kind::Server => "server",
            _ => "agent",
        };
        let path = self.root();
        let mut args: Vec<OsString> = vec![role.into()];
        for (option, value) in [
            ("--tls-dir", self.tls_dir(kind, name)),
            ("--state-dir", path.join(label)),
            ("--access", path.join("access.yaml")),
            ("--audit-log", self.audit_log(label)),
        ] {
            args.extend([option.into(), value.into()]);
        }
        args.extend(options.iter().map(Into::into));
        let log = path.join(format!("{label}.log"));
        let daemon = Daemon::new(label, &binary::slat()?, args, log);
        self.daemons.push((label, daemon));
        let (_, daemon) = self.daemons.last_mut().context("it was just added")?;
        daemon.start().map(drop)
    }

    fn audit_log(&self, label: &str) -> PathBuf {
        self.root().join(format!("{label}.audit"))
    }

    /// What one of them has audited.
    pub(super) fn audited(&self, label: &str) -> anyhow::Result<Vec<Value>> {
        let text = std::fs::read_to_string(self.audit_log(label))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().map(serde_json::from_str);
        Ok(lines.collect::<Result<_, _>>()?)
    }

    /// Where one of them listens.
    pub(super) fn address(&self, label: &str) -> Address {
        let found = self.daemons.iter().find(|(name, _)| *name == label);
        let (_, daemon) = found.unwrap_or_else(|| panic!("no {label} here"));
        Address::Tcp(daemon.address().to_string())
    }

    /// A channel of a caller to one of them.
    pub(super) fn channel(
        &self,
        label: &str,
        caller: &Credentials,
    ) -> anyhow::Result<TracedChannel> {
        Ok(connect_by(&self.address(label), &link(caller))?)
    }

    /// Deletes every VM, and stops everything.
    pub(super) async fn finish(mut self, admin: &Credentials) -> anyhow::Result<()> {
        let mut vms = VmServiceClient::new(self.channel("server", admin)?);
        let list = vms.list_vms(v1::ListVmsRequest::default()).await?;
        for vm in list.into_inner().vms {
            let request = v1::DeleteVmRequest {
                uid: vm.uid,
                ..Default::default()
            };
            vms.delete_vm(request).await?;
        }
        for (_, daemon) in self.daemons.iter_mut().rev() {
            daemon.stop()?;
        }
        let root = self.root.path();
        eventually("no process is left", || async {
            let left = leftovers(root);
            ensure!(left.is_empty(), "{left:#?}");
            Ok(())
        })
        .await?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Secured {
    fn drop(&mut self) {
        for (label, daemon) in &mut self.daemons {
            daemon.kill();
            if !self.finished {
                let log = std::fs::read(self.root.path().join(format!("{label}.log")));
                let log = log.unwrap_or_default();
                let tail = &log[log.len().saturating_sub(4 << 10)..];
                eprintln!("--- {label}\n{}", String::from_utf8_lossy(tail));
            }
        }
        if let Ok(program) = binary::slat()
            && let Err(error) = end_below(self.root.path(), &program)
        {
            eprintln!("{error:#}");
        }
    }
}

/// A time around now.
pub(super) fn within(begins: i64, ends: i64) -> Validity {
    let now = std::time::SystemTime::now();
    let at = |seconds: i64| {
        let distance = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 {
            now - distance
        } else {
            now + distance
        }
    };
    Validity {
        not_before: at(begins),
        not_after: at(ends),
    }
}
