//! A server and its agents in a directory of their own.
//!
//! ```text
//! <root>/server/          state of the server        <root>/server.log
//! <root>/host-a/          state of an agent          <root>/host-a.log
//! <root>/host-a/vms/<uid>/    one VM (lock, journal, log)
//! ```
//! Every process of the fleet has a path below the root on its command line, so what is left of it
//! can be found in `/proc`.

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use slat_proto::{
    transport::{Address, Link, TracedChannel, connect_by},
    v1::{
        self, Backend, MigrationPhase, host_service_client::HostServiceClient,
        memory_service_client::MemoryServiceClient,
        migration_service_client::MigrationServiceClient, vm_service_client::VmServiceClient,
    },
};

use crate::{
    binary,
    clock::Clocks,
    journals::Keeper,
    process::{Daemon, VmProcess, end_below, leftovers},
    wait::eventually,
};

pub mod certificates;
mod copies;
mod deaths;
mod migrating;
mod networks;
mod running;
mod scraping;

use certificates::Certificates;
use networks::Networks;

/// How long a host may be quiet. Three reports, which are due so soon here, are missed by an agent
/// that waits for a processor, and its host must not be lost to a test for that.
const HOST_SILENCE: Duration = Duration::from_secs(3);

/// The server's hook that fences hosts, below the fleet's root.
pub const FENCE_HOOK: &str = "fence-hook";

/// How much of a log is shown when a test fails.
const LOG_TAIL: usize = 12 << 10;

/// What a fleet consists of.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Of the VMs that the test makes.
    pub backend: Backend,
    /// Name and memory in MiB of each host.
    pub hosts: Vec<(&'static str, u64)>,
    /// Each host has a wall clock of its own, which can be set ([`Fleet::clocks`]).
    pub own_clocks: bool,
}

impl Layout {
    /// `host-a` and `host-b`, 512 MiB each.
    #[must_use]
    pub fn two(backend: Backend) -> Self {
        Self {
            backend,
            hosts: vec![("host-a", 512), ("host-b", 512)],
            own_clocks: false,
        }
    }
}

/// How the processes of a fleet are protected and placed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Protection {
    /// By TLS, with certificates that `slat pki` makes ([`Fleet::certificates`]).
    pub tls: bool,
    /// Each agent in a network namespace of its own. Where none can be made that is said, and
    /// agents have this machine's network.
    pub namespaces: bool,
}

#[derive(Debug)]
struct Host {
    name: &'static str,
    state: PathBuf,
    daemon: Daemon,
}

/// A running fleet.
#[derive(Debug)]
pub struct Fleet {
    backend: Backend,
    root: slat_test_dir::TestDir,
    server: Daemon,
    hosts: Vec<Host>,
    clocks: Option<Clocks>,
    journals: Keeper,
    certificates: Option<Certificates>,
    /// Behind the processes in it.
    networks: Option<Networks>,
    finished: bool,
}

/// Whether a migration has ended.
#[must_use]
pub fn ended(phase: MigrationPhase) -> bool {
    matches!(
        phase,
        MigrationPhase::Completed | MigrationPhase::Cancelled | MigrationPhase::Failed
    )
}

/// How often agents report: 200 ms, or as many as SLAT_REPORT_MILLIS says, for emulated hosts.
fn report_interval() -> anyhow::Result<Duration> {
    let millis = match std::env::var("SLAT_REPORT_MILLIS") {
        Ok(millis) => millis.parse().context("SLAT_REPORT_MILLIS")?,
        Err(_) => 200,
    };
    Ok(Duration::from_millis(millis))
}

impl Fleet {
    /// Starts the server and every agent; returns when all hosts are READY.
    ///
    /// # Errors
    /// When a process does not start, or a host does not show up.
    pub async fn start(layout: Layout) -> anyhow::Result<Self> {
        let root = slat_test_dir::TestDir::with_prefix("slat-test-")?;
        Self::start_in(root, layout, report_interval()?).await
    }

    /// The same below `root`, with agents that report every `interval`.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub async fn start_in(
        root: slat_test_dir::TestDir,
        layout: Layout,
        interval: Duration,
    ) -> anyhow::Result<Self> {
        Self::start_protected(root, layout, interval, Protection::default()).await
    }

    /// The same by TLS, in namespaces, or both.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub async fn start_by(layout: Layout, protection: Protection) -> anyhow::Result<Self> {
        let root = slat_test_dir::TestDir::with_prefix("slat-test-")?;
        Self::start_protected(root, layout, report_interval()?, protection).await
    }

    async fn start_protected(
        root: slat_test_dir::TestDir,
        layout: Layout,
        interval: Duration,
        protection: Protection,
    ) -> anyhow::Result<Self> {
        let program = binary::slat()?;
        let path = root.path();
        let certificates = protection.tls.then(|| Certificates::make(path));
        let certificates = certificates.transpose()?;
        let networks = protection.namespaces.then(Networks::make);
        let networks = networks.and_then(|made| {
            made.inspect_err(|why| println!("SKIPPED namespaces: {why:#}"))
                .ok()
        });
        let mut args: Vec<OsString> = vec!["server".into()];
        args.extend(protected(certificates.as_ref(), certificates::SERVER));
        args.extend(["--state-dir".into(), path.join("server").into()]);
        let silence = HOST_SILENCE.max(interval * 3);
        for (option, time) in [("--report-interval", interval), ("--host-silence", silence)] {
            args.extend([option.into(), format!("{}ms", time.as_millis()).into()]);
        }
        // Not there unless the test puts it there.
        args.extend(["--fence-hook".into(), path.join(FENCE_HOOK).into()]);
        let journals = Keeper::start(path)?;
        let mut server = Daemon::new("server", &program, args, path.join("server.log"));
        if let Some(networks) = &networks {
            server = server.at(networks.outside().into());
        }
        // A fleet from here on: what fails now shows its logs.
        let mut fleet = Self {
            backend: layout.backend,
            root,
            server,
            hosts: Vec::new(),
            clocks: None,
            journals,
            certificates,
            networks,
            finished: false,
        };
        if layout.own_clocks {
            fleet.clocks = Some(Clocks::build(fleet.root.path())?);
        }
        fleet.server.start()?;
        for (name, memory_mib) in layout.hosts {
            fleet.begin_host(name, memory_mib, &["--data-ports", "0"])?;
        }
        fleet.hosts_ready().await?;
        Ok(fleet)
    }

    /// Starts one more agent, with these options besides the usual ones; returns when its host is
    /// READY.
    ///
    /// # Errors
    /// When it does not start, or does not show up.
    pub async fn add_host(
        &mut self,
        name: &'static str,
        memory_mib: u64,
        options: &[&str],
    ) -> anyhow::Result<()> {
        self.begin_host(name, memory_mib, options)?;
        self.hosts_ready().await
    }

    /// Fleets of other tests are on this machine too: what they must not share is among `options`.
    fn begin_host(
        &mut self,
        name: &'static str,
        memory_mib: u64,
        options: &[&str],
    ) -> anyhow::Result<()> {
        let state = self.root.path().join(name);
        let mut args: Vec<OsString> = vec!["agent".into()];
        if let Some(certificates) = &self.certificates {
            certificates.issue("agent", name)?;
        }
        args.extend(protected(self.certificates.as_ref(), name));
        args.extend(["--state-dir".into(), state.clone().into()]);
        args.extend(["--name".into(), name.into()]);
        args.extend(["--server".into(), self.server.address().to_string().into()]);
        args.extend(["--memory".into(), format!("{memory_mib}MiB").into()]);
        args.extend(options.iter().map(Into::into));
        let log = self.root.path().join(format!("{name}.log"));
        if let Some(clocks) = &self.clocks {
            clocks.set(name, 0)?;
        }
        // A system call that nobody listed shall not pass unseen, and a VM that ends does not.
        let strict = ("SLAT_VM_SECCOMP", OsString::from("kill"));
        let environment = self.clocks.iter().flat_map(|one| one.environment(name));
        let environment = environment.chain([strict]);
        let (mut at, mut before) = (IpAddr::from(Ipv4Addr::LOCALHOST), Vec::new());
        if let Some(networks) = &mut self.networks {
            let (address, inside) = networks.add(name)?;
            (at, before) = (address.into(), inside.into());
        }
        let mut daemon = Daemon::new(name, &binary::slat()?, args, log)
            .with_environment(environment)
            .behind(before)
            .at(at);
        let started = daemon.start();
        self.hosts.push(Host {
            name,
            state,
            daemon,
        });
        started.map(drop)
    }

    /// The hosts' own clocks; `None` where all have this machine's.
    #[must_use]
    pub fn clocks(&self) -> Option<&Clocks> {
        self.clocks.as_ref()
    }

    /// Backend of the VMs that the test is to make.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The directory of everything.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    fn host(&self, name: &str) -> &Host {
        let found = self.hosts.iter().find(|host| host.name == name);
        found.unwrap_or_else(|| panic!("no host {name} in this fleet"))
    }

    fn host_mut(&mut self, name: &str) -> &mut Host {
        let found = self.hosts.iter_mut().find(|host| host.name == name);
        found.unwrap_or_else(|| panic!("no host {name} in this fleet"))
    }

    // Endpoints. A new channel each time: none outlives the process it was opened to.

    /// The server's endpoint.
    #[must_use]
    pub fn server(&self) -> Address {
        Address::Tcp(self.server.address().to_string())
    }

    /// An agent's endpoint.
    #[must_use]
    pub fn agent(&self, host: &str) -> Address {
        Address::Tcp(self.host(host).daemon.address().to_string())
    }

    /// The certificates, where the fleet speaks TLS.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn certificates(&self) -> &Certificates {
        let certificates = self.certificates.as_ref();
        certificates.expect("a fleet that speaks TLS")
    }

    /// How the test speaks to the fleet, by the files as they are now.
    fn link(&self) -> Link {
        let link = |certificates: &Certificates| {
            let link = certificates.link(certificates::ADMIN);
            link.expect("the test's own certificate")
        };
        self.certificates.as_ref().map_or(Link::Plain, link)
    }

    fn channel(&self, endpoint: &Address) -> TracedChannel {
        connect_by(endpoint, &self.link()).expect("the address of an endpoint")
    }

    /// VMs behind an endpoint.
    #[must_use]
    pub fn vms(&self, endpoint: &Address) -> VmServiceClient<TracedChannel> {
        VmServiceClient::new(self.channel(endpoint))
    }

    /// Memory behind an endpoint.
    #[must_use]
    pub fn memory(&self, endpoint: &Address) -> MemoryServiceClient<TracedChannel> {
        MemoryServiceClient::new(self.channel(endpoint))
    }

    /// Hosts behind an endpoint.
    #[must_use]
    pub fn hosts(&self, endpoint: &Address) -> HostServiceClient<TracedChannel> {
        HostServiceClient::new(self.channel(endpoint))
    }

    /// Migrations of the fleet.
    #[must_use]
    pub fn migrations(&self) -> MigrationServiceClient<TracedChannel> {
        MigrationServiceClient::new(self.channel(&self.server()))
    }

    // What tests do all the time.

    /// Waits until the server shows every running agent READY.
    ///
    /// # Errors
    /// When one does not show up.
    pub async fn hosts_ready(&self) -> anyhow::Result<()> {
        let wanted = self
            .hosts
            .iter()
            .filter(|host| host.daemon.is_running())
            .count();
        eventually("every host is READY", || async {
            let hosts = self
                .hosts(&self.server())
                .list_hosts(v1::ListHostsRequest::default())
                .await?
                .into_inner()
                .hosts;
            let ready = hosts
                .iter()
                .filter(|host| host.state() == v1::host::State::Ready)
                .count();
            ensure!(ready >= wanted, "{hosts:?}");
            Ok(())
        })
        .await
    }

    // The end.

    /// Deletes every VM, stops everything in order and proves that nothing is left.
    ///
    /// # Errors
    /// When something is.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        let server = self.server();
        // A page at a time: what was deleted is in no list any more.
        loop {
            let list = v1::ListVmsRequest::default();
            let vms = self.vms(&server).list_vms(list).await?.into_inner().vms;
            if vms.is_empty() {
                break;
            }
            for vm in vms {
                let request = v1::DeleteVmRequest {
                    uid: vm.uid.clone(),
                    ..Default::default()
                };
                self.vms(&server)
                    .delete_vm(request)
                    .await
                    .with_context(|| format!("deleting {vm:#?}"))?;
            }
        }
        for host in &self.hosts {
            self.memory_used(host.name, 0).await?;
            let vms = host.state.join("vms");
            eventually("no VM directory is left", || async {
                let left = list(&vms);
                ensure!(left.is_empty(), "{left:?}");
                Ok(())
            })
            .await?;
        }
        for host in &mut self.hosts {
            host.daemon.stop()?;
        }
        self.server.stop()?;
        let root = self.root.path();
        eventually("no process or socket is left", || async {
            let left = leftovers(root);
            ensure!(left.is_empty(), "{left:#?}");
            Ok(())
        })
        .await?;
        let explained = self.journals.explain().map_err(anyhow::Error::msg)?;
        eprintln!("{explained} journals explained");
        self.finished = true;
        Ok(())
    }

    /// Ends everything at once: daemons, VMs' processes, and whatever else of `slat` names the
    /// root: pagers, writers, and a VM's process that has no lock yet.
    pub fn end_all(&mut self) {
        self.server.kill();
        for host in &mut self.hosts {
            // First the agent: it could start another.
            host.daemon.kill();
            for dir in list(&host.state.join("vms")) {
                match VmProcess::behind(&dir) {
                    Ok(Some(process)) => {
                        if let Err(error) = process.kill() {
                            eprintln!("{}: {error:#}", dir.display());
                        }
                    }
                    Ok(None) => {}
                    Err(error) => eprintln!("{}: {error:#}", dir.display()),
                }
            }
        }
        match binary::slat().and_then(|program| end_below(self.root.path(), &program)) {
            Ok(ended) => ended.iter().for_each(|one| eprintln!("ended: {one}")),
            Err(error) => eprintln!("{}: {error:#}", self.root.path().display()),
        }
    }

    fn print_logs(&self) {
        let mut logs = vec![self.root().join("server.log")];
        for host in &self.hosts {
            logs.push(self.root().join(format!("{}.log", host.name)));
            logs.extend(
                list(&host.state.join("vms"))
                    .into_iter()
                    .map(|dir| dir.join("log")),
            );
        }
        for path in logs {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let tail = &bytes[bytes.len().saturating_sub(LOG_TAIL)..];
            eprintln!("--- {}\n{}", path.display(), String::from_utf8_lossy(tail));
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if !self.finished {
            self.print_logs();
        }
        self.end_all();
        let left = leftovers(self.root.path());
        if !left.is_empty() && !std::thread::panicking() {
            panic!("left behind: {left:#?}");
        }
    }
}

/// Options by which a daemon knows its callers.
fn protected(certificates: Option<&Certificates>, name: &str) -> Vec<OsString> {
    match certificates {
        Some(certificates) => vec!["--tls-dir".into(), certificates.dir(name).into()],
        None => vec!["--insecure-plaintext".into()],
    }
}

/// Entries of a directory; empty when there is none.
fn list(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}
