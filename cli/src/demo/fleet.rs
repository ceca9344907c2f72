//! The demo's fleet: one server, two agents, a temporary directory; and how all of it ends.
//!
//! [`Fleet::stop`] begins gently and ends with force: delete the VM through the API, let the VM
//! processes end, SIGTERM to the daemons, SIGKILL after a bound, then the VM processes that still
//! hold a lock below this directory. Each step is bounded. It returns every step that should not
//! have been needed: something was left behind.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use slat_proto::{ApiError, Reason, model::VmName, transport::Address, v1};
use tempfile::TempDir;

use super::{child::Daemon, sweep};
use crate::{client::Client, failure::Failure, term::out};

/// The two hosts.
pub(super) const HOSTS: [&str; 2] = ["host-a", "host-b"];
/// The VM's name.
pub(super) const VM: &str = "demo";

/// A VM must be deletable within this time, a migration to cancel included.
const DELETE: Duration = Duration::from_secs(15);
/// A deleted VM's processes end within this time.
const ENDED: Duration = Duration::from_secs(5);
/// Longest path of a Unix socket, without its final zero.
const SOCKET_PATH: usize = 107;

/// What the demo started.
#[derive(Debug)]
pub(super) struct Fleet {
    dir: Option<TempDir>,
    server: Option<Daemon>,
    agents: Vec<Daemon>,
    vm: bool,
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
            vm: false,
        };
        let socket = fleet.path(HOSTS[0]).join("vms").join(VM).join("vm.sock");
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
        let arguments = |role: &str, state: PathBuf| -> Vec<OsString> {
            vec![
                role.into(),
                "--listen".into(),
                "127.0.0.1:0".into(),
                "--state-dir".into(),
                state.into_os_string(),
            ]
        };
        let mut server = arguments("server", self.path("server"));
        server.extend(["--report-interval".into(), "500ms".into()]);
        let server = Daemon::start("the server", server, self.path("server.log")).await?;
        let address = server.address();
        self.server = Some(server);
        for host in HOSTS {
            let mut agent = arguments("agent", self.path(host));
            agent.extend(["--server".into(), address.to_string().into()]);
            agent.extend(["--name".into(), host.into()]);
            // The host's own range is for its agent.
            agent.extend(["--data-ports".into(), "0".into()]);
            agent.extend(["--memory".into(), memory.to_string().into()]);
            let log = self.path(&format!("{host}.log"));
            self.agents.push(Daemon::start(host, agent, log).await?);
        }
        Ok(())
    }

    /// The server's address.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.server.as_ref().map(Daemon::address)
    }

    /// The agents' names and addresses.
    pub(super) fn agents(&self) -> Vec<(String, SocketAddr)> {
        self.agents
            .iter()
            .map(|agent| (agent.name().to_owned(), agent.address()))
            .collect()
    }

    /// Remembers that a VM may exist from now on.
    pub(super) fn expect_vm(&mut self) {
        self.vm = true;
    }

    /// Says what the daemons and the VM's processes warned of, when something went wrong.
    pub(super) fn say_trouble(&self) {
        let mut logs = vec![self.path("server.log")];
        for host in HOSTS {
            logs.push(self.path(&format!("{host}.log")));
            logs.push(self.path(host).join("vms").join(VM).join("log"));
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
        if std::mem::take(&mut self.vm) {
            if let Err(error) = self.delete_vm().await {
                left.push(format!("the VM could not be deleted: {error}"));
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

    /// Through the server, and through the agents where the server does not answer.
    async fn delete_vm(&self) -> Result<(), ApiError> {
        let agents = self.agents.iter().map(Daemon::address);
        let mut result = Ok(());
        for endpoint in self.address().into_iter().chain(agents) {
            let deleted = tokio::time::timeout(DELETE, delete_at(endpoint)).await;
            result = deleted.unwrap_or_else(|_| {
                Err(ApiError::new(
                    Reason::PeerUnreachable,
                    format!("{endpoint} took too long"),
                ))
            });
            if result.is_ok() {
                break;
            }
        }
        result
    }
}

/// Deletes the VM at one address, cancelling the migration in its way.
async fn delete_at(endpoint: SocketAddr) -> Result<(), ApiError> {
    let client = client(endpoint)?;
    let name = VmName::from_id(VM)?.to_string();
    loop {
        let request = v1::DeleteVmRequest {
            name: name.clone(),
            ..Default::default()
        };
        let error = match client.vms().delete_vm(request).await {
            Ok(_) => return Ok(()),
            Err(status) => ApiError::from(status),
        };
        match error.reason {
            Reason::NoSuchVm => return Ok(()),
            Reason::MigrationInProgress => {
                if let Some(migration) = error.metadata.get("migration") {
                    let name = migration.clone();
                    let request = v1::CancelMigrationRequest { name };
                    // Refused when it is past the point of no return; then it ends by itself.
                    if let Err(status) = client.migrations().cancel_migration(request).await {
                        tracing::debug!(%status, "cancel");
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            _ => return Err(error),
        }
    }
}

/// A client of the server or agent at `address`.
pub(super) fn client(address: SocketAddr) -> Result<Client, ApiError> {
    Client::new(&Address::Tcp(address.to_string()))
        .map_err(|_| ApiError::bad_parameter("address", format_args!("{address} is no address")))
}
