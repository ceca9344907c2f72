//! The demo's fleet: one server, two agents, a temporary directory; and how all of it ends.
//!
//! [`Fleet::stop`] begins gently and ends with force: delete the VMs through the API, those that
//! others made on this fleet meanwhile too, let the VM processes end, SIGTERM to the daemons,
//! SIGKILL after a bound, then the VM processes that still hold a lock below this directory. Each
//! step is bounded. It returns every step that should not have been needed: something was left
//! behind.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use slat_proto::{ApiError, Reason, transport::Address, v1};
use tempfile::TempDir;

use super::sweep;
use crate::{
    client::Client,
    failure::Failure,
    local::{Daemon, LocalCa},
    term::out,
};

/// The two hosts.
pub(super) const HOSTS: [&str; 2] = ["host-a", "host-b"];
/// The VM's name.
pub(super) const VM: &str = "demo";

/// All VMs must be deletable within this time, migrations to cancel included.
const DELETE: Duration = Duration::from_secs(15);
/// A deleted VM's processes end within this time.
const ENDED: Duration = Duration::from_secs(5);
/// Between two looks at what is left to delete.
const AGAIN: Duration = Duration::from_millis(100);
/// Longest path of a Unix socket, without its final zero.
const SOCKET_PATH: usize = 107;
/// Length of a VM's uid.
const UID: usize = 36;

/// What the demo started.
#[derive(Debug)]
pub(super) struct Fleet {
    dir: Option<TempDir>,
    server: Option<Daemon>,
    agents: Vec<Daemon>,
    ca: Option<LocalCa>,
}

impl Fleet {
    /// Its directory, nothing else yet.
    pub(super) fn new() -> Result<Self, Failure> {
        let dir = tempfile::Builder::new()
            .prefix("slat-demo-")
            .tempdir()
            .map_err(|error| {
                Failure::advised(
                    format!("cannot make a temporary directory: {error}"),
                    "say where with TMPDIR",
                )
            })?;
        let fleet = Self {
            dir: Some(dir),
            server: None,
            agents: Vec::new(),
            ca: None,
        };
        // A VM's directory is called by its uid.
        let uid = "0".repeat(UID);
        let socket = fleet.path(HOSTS[0]).join("vms").join(uid).join("vm.sock");
        if socket.as_os_str().len() > SOCKET_PATH {
            return Err(Failure::advised(
                format!("{} is too long for a Unix socket", socket.display()),
                "set TMPDIR to a shorter path, such as /tmp",
            ));
        }
        Ok(fleet)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir
            .as_ref()
            .map_or_else(PathBuf::new, |dir| dir.path().join(name))
    }

    fn states(&self) -> Vec<PathBuf> {
        HOSTS.iter().map(|host| self.path(host)).collect()
    }

    /// Starts the server, then an agent for each host with `memory` bytes for VMs.
    pub(super) async fn start(&mut self, memory: u64) -> Result<(), Failure> {
        let trust = self.path("trust");
        let made = tokio::task::spawn_blocking(move || LocalCa::make(&trust, &HOSTS)).await;
        let ca =
            made.map_err(|error| Failure::local(format!("making certificates: {error}")))??;
        let arguments = |role: &str, tls: PathBuf, state: PathBuf| -> Vec<OsString> {
            vec![
                role.into(),
                "--tls-dir".into(),
                tls.into_os_string(),
                "--listen".into(),
                "127.0.0.1:0".into(),
                "--state-dir".into(),
                state.into_os_string(),
            ]
        };
        let mut server = arguments("server", ca.server(), self.path("server"));
        server.extend(["--report-interval".into(), "500ms".into()]);
        let server = Daemon::start("the server", server, self.path("server.log")).await?;
        let address = server.address();
        self.server = Some(server);
        for host in HOSTS {
            let mut agent = arguments("agent", ca.agent(host), self.path(host));
            agent.extend(["--server".into(), address.to_string().into()]);
            agent.extend(["--name".into(), host.into()]);
            // The host's own range is for its agent.
            agent.extend(["--data-ports".into(), "0".into()]);
            agent.extend(["--memory".into(), format!("{memory}B").into()]);
            let log = self.path(&format!("{host}.log"));
            self.agents.push(Daemon::start(host, agent, log).await?);
        }
        self.ca = Some(ca);
        Ok(())
    }

    /// The server's address.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.server.as_ref().map(Daemon::address)
    }

    /// Where the certificate is by which a user speaks to this fleet.
    pub(super) fn admin(&self) -> Option<PathBuf> {
        self.ca.as_ref().map(LocalCa::admin)
    }

    /// A client of the server or of an agent of this fleet.
    pub(super) fn client(&self, address: SocketAddr) -> Result<Client, Failure> {
        let mut agents = self.agents.iter();
        let agent = agents.find(|agent| agent.address() == address);
        let link = match (&self.ca, agent) {
            (Some(ca), Some(agent)) => ca.link_to_agent(agent.name())?,
            (Some(ca), None) => ca.link()?,
            (None, _) => return Err(Failure::local("the fleet has not started")),
        };
        Client::new(&Address::Tcp(address.to_string()), &link)
    }

    /// The agents' names and addresses.
    pub(super) fn agents(&self) -> Vec<(String, SocketAddr)> {
        self.agents
            .iter()
            .map(|agent| (agent.name().to_owned(), agent.address()))
            .collect()
    }

    /// Says what the daemons and the VM's processes warned of, when something went wrong.
    pub(super) fn say_trouble(&self) {
        let mut logs = vec![self.path("server.log")];
        for host in HOSTS {
            logs.push(self.path(&format!("{host}.log")));
            let vms = std::fs::read_dir(self.path(host).join("vms"));
            let dirs = vms.into_iter().flatten().flatten();
            logs.extend(dirs.map(|dir| dir.path().join("log")));
        }
        for log in logs {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let warned = |line: &&str| {
                ["WARN", "ERROR", "panicked"]
                    .iter()
                    .any(|word| line.contains(word))
            };
            let lines: Vec<&str> = text.lines().filter(warned).collect();
            for line in &lines[lines.len().saturating_sub(10)..] {
                let name = log.strip_prefix(self.path("")).unwrap_or(&log);
                out::say(format!("  {}: {line}", name.display()));
            }
        }
    }

    /// Ends everything. What is returned should not have been there.
    pub(super) async fn stop(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        let states = self.states();
        if !self.agents.is_empty() {
            if let Err(error) = self.delete_vms().await {
                left.push(format!("a VM could not be deleted: {error}"));
            }
            // Those that remain are swept below, once the daemons cannot start others.
            sweep::all_ended(&states, ENDED).await;
        }
        let daemons: Vec<Daemon> = self.agents.drain(..).chain(self.server.take()).collect();
        for daemon in &daemons {
            daemon.terminate();
        }
        for daemon in daemons {
            left.extend(daemon.join().await);
        }
        left.extend(sweep::sweep(&states, ENDED).await);
        if let Some(dir) = self.dir.take() {
            let path = dir.path().to_owned();
            if let Err(error) = dir.close() {
                left.push(format!("{} could not be removed: {error}", path.display()));
            }
        }
        left
    }

    /// Deletes every VM of this fleet, whoever made it, until no agent has one.
    async fn delete_vms(&self) -> Result<(), ApiError> {
        let client = |address| self.client(address).map_err(no_client);
        let server = self.address().map(client).transpose()?;
        let mut agents = Vec::new();
        for agent in &self.agents {
            agents.push(client(agent.address())?);
        }
        let deleted = tokio::time::timeout(DELETE, async {
            let mut last = None;
            loop {
                let mut found = false;
                for agent in &agents {
                    for vm in vms(agent).await? {
                        found = true;
                        last = delete(agent, server.as_ref(), vm).await.err().or(last);
                    }
                }
                if !found {
                    return Ok(last);
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
        match deleted.await {
            Ok(ended) => ended.map(drop),
            Err(_) => Err(ApiError::new(
                Reason::PeerUnreachable,
                format!("that took longer than {} s", DELETE.as_secs()),
            )),
        }
    }
}

/// The VMs that an agent has.
async fn vms(agent: &Client) -> Result<Vec<v1::Vm>, ApiError> {
    let request = v1::ListVmsRequest {
        page_size: 1000,
        ..Default::default()
    };
    Ok(agent.vms().list_vms(request).await?.into_inner().vms)
}

/// Deletes one VM at its agent; cancels the migration in its way, kills a process that does not
/// answer.
async fn delete(agent: &Client, server: Option<&Client>, vm: v1::Vm) -> Result<(), ApiError> {
    let mut request = v1::DeleteVmRequest {
        name: vm.name,
        uid: vm.uid,
        ..Default::default()
    };
    let error = match agent.vms().delete_vm(request.clone()).await {
        Ok(_) => return Ok(()),
        Err(status) => ApiError::from(status),
    };
    match (error.reason, server, error.metadata.get("migration")) {
        (Reason::MigrationInProgress, Some(server), Some(migration)) => {
            let name = migration.clone();
            let request = v1::CancelMigrationRequest { name };
            // Refused when it is past the point of no return; then it ends by itself.
            server.migrations().cancel_migration(request).await?;
            Ok(())
        }
        (Reason::VmUnreachable, _, _) => {
            request.force = true;
            agent.vms().delete_vm(request).await?;
            Ok(())
        }
        _ => Err(error),
    }
}

fn no_client(failure: Failure) -> ApiError {
    ApiError::new(Reason::Internal, failure.render())
}
