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
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use slat_proto::{
    ApiError,
    transport::{Address, TracedChannel, connect},
    v1::{
        self, Backend, MigrationPhase, host_service_client::HostServiceClient,
        memory_service_client::MemoryServiceClient,
        migration_service_client::MigrationServiceClient, vm_service_client::VmServiceClient,
    },
};
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt as _;
use tonic::Code;

use crate::{
    binary,
    clock::Clocks,
    journals::Keeper,
    process::{Daemon, VmProcess, leftovers},
    wait::{PATIENCE, eventually},
};

mod deaths;

/// How much of a log is shown when a test fails.
const LOG_TAIL: usize = 12 << 10;
/// Before a broken watch is opened again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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

/// How often agents report: 200 ms, or as many as SLAT_REPORT_MILLIS says. A host that misses a few
/// reports cannot be used, and a busy emulated one misses those that are due so soon.
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
        let program = binary::slat()?;
        let path = root.path();
        let mut args: Vec<OsString> = vec!["server".into(), "--state-dir".into()];
        args.push(path.join("server").into());
        let interval = format!("{}ms", interval.as_millis());
        args.extend(["--report-interval".into(), interval.into()]);
        let journals = Keeper::start(path)?;
        let server = Daemon::new("server", &program, args, path.join("server.log"));
        // A fleet from here on: what fails now shows its logs.
        let mut fleet = Self {
            backend: layout.backend,
            root,
            server,
            hosts: Vec::new(),
            clocks: None,
            journals,
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
        let mut args: Vec<OsString> = vec!["agent".into(), "--state-dir".into()];
        args.push(state.clone().into());
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
        let mut daemon =
            Daemon::new(name, &binary::slat()?, args, log).with_environment(environment);
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

    /// VMs behind an endpoint.
    #[must_use]
    pub fn vms(&self, endpoint: &Address) -> VmServiceClient<TracedChannel> {
        VmServiceClient::new(channel(endpoint))
    }

    /// Memory behind an endpoint.
    #[must_use]
    pub fn memory(&self, endpoint: &Address) -> MemoryServiceClient<TracedChannel> {
        MemoryServiceClient::new(channel(endpoint))
    }

    /// Hosts behind an endpoint.
    #[must_use]
    pub fn hosts(&self, endpoint: &Address) -> HostServiceClient<TracedChannel> {
        HostServiceClient::new(channel(endpoint))
    }

    /// Migrations of the fleet.
    #[must_use]
    pub fn migrations(&self) -> MigrationServiceClient<TracedChannel> {
        MigrationServiceClient::new(channel(&self.server()))
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

    /// One VM as an endpoint shows it.
    ///
    /// # Errors
    /// What the endpoint answers.
    pub async fn vm(&self, endpoint: &Address, name: &str) -> Result<v1::Vm, ApiError> {
        let request = v1::GetVmRequest {
            name: name.into(),
            ..Default::default()
        };
        Ok(self.vms(endpoint).get_vm(request).await?.into_inner())
    }

    /// Creates and starts a VM through the server, which chooses where `host` is empty; returns
    /// when its guest has written something (an idle one: when it runs).
    ///
    /// # Errors
    /// What the server answers.
    pub async fn run_vm(&self, id: &str, host: &str, spec: v1::VmSpec) -> anyhow::Result<v1::Vm> {
        let idle = matches!(&spec.guest, Some(v1::vm_spec::Guest::Memstress(memstress))
            if memstress.dirty_rate_bytes_per_second == Some(0));
        let mut client = self.vms(&self.server());
        let vm = client
            .create_vm(v1::CreateVmRequest {
                vm_id: id.into(),
                spec: Some(spec),
                host: match host {
                    "" => String::new(),
                    host => format!("hosts/{host}"),
                },
                validate_only: false,
            })
            .await?
            .into_inner();
        client
            .start_vm(v1::StartVmRequest {
                name: vm.name.clone(),
                ..Default::default()
            })
            .await?;
        self.vm_until(&self.server(), &vm.name, "it runs and writes", |vm| {
            vm.state() == v1::vm::State::Running && (idle || pages_written(vm) > 0)
        })
        .await
    }

    /// Asks for a migration.
    ///
    /// # Errors
    /// What the server answers.
    pub async fn migrate(
        &self,
        vm: &str,
        host: &str,
        params: v1::MigrationParams,
    ) -> Result<v1::Migration, ApiError> {
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: vm.into(),
                destination: format!("hosts/{host}"),
                params: Some(params),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(self
            .migrations()
            .create_migration(request)
            .await?
            .into_inner())
    }

    /// Asks for a migration and waits until pages flow.
    ///
    /// # Errors
    /// When it ends before, or does not begin.
    pub async fn migrate_until_precopy(
        &self,
        vm: &str,
        host: &str,
        params: v1::MigrationParams,
    ) -> anyhow::Result<v1::Migration> {
        let migration = self.migrate(vm, host, params).await?;
        self.migration_until(&migration.name, "pages flow", |migration| {
            migration.phase() == MigrationPhase::PrecopyActive
                && migration
                    .progress
                    .as_ref()
                    .is_some_and(|progress| progress.bytes_transferred > 1 << 20)
        })
        .await
    }

    /// Waits until the server knows a migration that somebody else asks for, and pages flow.
    ///
    /// # Errors
    /// When it does not show up or ends before.
    pub async fn migration_until_exists(&self, name: &str) -> anyhow::Result<v1::Migration> {
        eventually(&format!("{name} exists"), || async {
            let request = v1::GetMigrationRequest { name: name.into() };
            self.migrations().get_migration(request).await?;
            Ok(())
        })
        .await?;
        self.migration_until(name, "pages flow", |migration| {
            migration.phase() == MigrationPhase::PrecopyActive
        })
        .await
    }

    /// Watches a migration until `found`; watches again when the server goes away and comes back.
    ///
    /// # Errors
    /// When it ends otherwise, or not in time.
    pub async fn migration_until(
        &self,
        name: &str,
        what: &str,
        mut found: impl FnMut(&v1::Migration) -> bool,
    ) -> anyhow::Result<v1::Migration> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = None;
        let watch = async {
            loop {
                let request = v1::WatchMigrationRequest { name: name.into() };
                let mut stream = match self.migrations().watch_migration(request).await {
                    Ok(stream) => stream.into_inner(),
                    Err(status) if status.code() == Code::Unavailable => {
                        tokio::time::sleep(LOOK_AGAIN).await;
                        continue;
                    }
                    Err(status) => return Err(status.into()),
                };
                while let Some(item) = stream.next().await {
                    let Ok(migration) = item else { break };
                    if found(&migration) {
                        return Ok(migration);
                    }
                    let over = ended(migration.phase());
                    last = Some(migration);
                    if over {
                        bail!("it ended otherwise");
                    }
                }
            }
        };
        match timeout_at(deadline, watch).await {
            Ok(Ok(migration)) => Ok(migration),
            Ok(Err(error)) => {
                Err(error.context(format!("{name}, until {what}: last was {last:#?}")))
            }
            Err(_) => bail!(
                "{name}: after {} s still not: {what}: {last:#?}",
                PATIENCE.as_secs()
            ),
        }
    }

    /// Waits for a migration's end in `phase`.
    ///
    /// # Errors
    /// When it ends otherwise, or not in time.
    pub async fn migration_ends(
        &self,
        name: &str,
        phase: MigrationPhase,
    ) -> anyhow::Result<v1::Migration> {
        self.migration_until(name, &format!("{phase:?}"), |migration| {
            migration.phase() == phase
        })
        .await
    }

    /// Migrates and waits for COMPLETED.
    ///
    /// # Errors
    /// When it does not complete.
    pub async fn migrate_and_wait(
        &self,
        vm: &str,
        host: &str,
        params: v1::MigrationParams,
    ) -> anyhow::Result<v1::Migration> {
        let migration = self.migrate(vm, host, params).await?;
        self.migration_ends(&migration.name, MigrationPhase::Completed)
            .await
    }

    /// Watches a VM at an endpoint until `found`; watches again when the stream breaks.
    ///
    /// # Errors
    /// When it is not found in time, with the VM as last seen.
    pub async fn vm_until(
        &self,
        endpoint: &Address,
        name: &str,
        what: &str,
        mut found: impl FnMut(&v1::Vm) -> bool,
    ) -> anyhow::Result<v1::Vm> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = String::from("nothing");
        let watch = async {
            loop {
                let request = v1::WatchVmRequest {
                    name: name.into(),
                    ..Default::default()
                };
                match self.vms(endpoint).watch_vm(request).await {
                    Ok(stream) => {
                        let mut stream = stream.into_inner();
                        while let Some(Ok(vm)) = stream.next().await {
                            if found(&vm) {
                                return vm;
                            }
                            last = format!("{vm:#?}");
                        }
                    }
                    Err(status) => last = format!("{status:?}"),
                }
                // The stream of a VM that moves away ends; it can be watched again where it went.
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        match timeout_at(deadline, watch).await {
            Ok(vm) => Ok(vm),
            Err(_) => bail!(
                "{name} at {endpoint}: after {} s still not: {what}: {last}",
                PATIENCE.as_secs()
            ),
        }
    }

    /// Proves that the guest runs on `host` and is sound: the VM is RUNNING there without a
    /// migration or dirty logging, its guest writes on from where it is now, and has found no
    /// error.
    ///
    /// # Errors
    /// When one of these is not so.
    pub async fn runs_soundly_on(&self, vm: &str, host: &str) -> anyhow::Result<v1::Vm> {
        let home = format!("hosts/{host}");
        let now = self
            .vm_until(
                &self.server(),
                vm,
                &format!("RUNNING on {host}, quiet"),
                |vm| {
                    vm.state() == v1::vm::State::Running
                        && vm.host == home
                        && vm.migration.is_empty()
                        && !vm.dirty_logging
                },
            )
            .await?;
        let before = pages_written(&now);
        let after = self
            .vm_until(&self.server(), vm, "the guest writes on", |vm| {
                pages_written(vm) > before + 100
            })
            .await?;
        let counters = after.guest_counters.context("no guest counters")?;
        ensure!(counters.errors == 0, "the guest found errors: {after:#?}");
        ensure!(after.host == home, "{after:#?}");
        Ok(after)
    }

    /// Waits until a host's VM directory is gone.
    ///
    /// # Errors
    /// When it stays.
    pub async fn vm_dir_gone(&self, host: &str, vm: &str) -> anyhow::Result<()> {
        eventually(&format!("{vm} is gone from {host}"), || async {
            let dir = self.vm_dir(host, vm);
            ensure!(!dir.exists(), "{:?}", list(&dir));
            Ok(())
        })
        .await
    }

    /// Waits until an agent and the server agree that VMs take `bytes` of a host's memory.
    ///
    /// # Errors
    /// When they do not.
    pub async fn memory_used(&self, host: &str, bytes: u64) -> anyhow::Result<()> {
        for endpoint in [self.agent(host), self.server()] {
            eventually(
                &format!("{bytes} bytes of {host} used, at {endpoint}"),
                || async {
                    let request = v1::GetHostRequest {
                        name: format!("hosts/{host}"),
                    };
                    let host = self.hosts(&endpoint).get_host(request).await?.into_inner();
                    ensure!(host.memory_used_bytes == bytes, "{host:?}");
                    Ok(())
                },
            )
            .await?;
        }
        Ok(())
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

    /// Every migration that the server has.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn all_migrations(&self) -> anyhow::Result<Vec<v1::Migration>> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListMigrationsRequest {
                page_size: 1000,
                page_token,
                ..Default::default()
            };
            let list = self.migrations().list_migrations(request).await?;
            let list = list.into_inner();
            all.extend(list.migrations);
            page_token = list.next_page_token;
            if page_token.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Ends everything at once.
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

fn channel(endpoint: &Address) -> TracedChannel {
    connect(endpoint).expect("the address of an endpoint")
}

fn pages_written(vm: &v1::Vm) -> u64 {
    vm.guest_counters
        .map_or(0, |counters| counters.pages_written)
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
