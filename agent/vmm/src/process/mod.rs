//! `slat vm`: one process, one VM.
//!
//! # Life
//! The process takes the lock of the VM's directory (no second process can), opens the journal,
//! serves its endpoint on `vm.sock` and prints one line, `ready`, on standard output once it can be
//! called. It then lives until the machine says that it is over: the VM was deleted, released after
//! a handover, or given up at the destination. It removes the socket and returns. The lock goes
//! with the process, however it ends.
//!
//! A process that finds the journal of a dead one refuses to begin: the memory is gone with it, and
//! running the VM again would be another VM under the same epoch.
//!
//! On `pager.sock` it serves pagers and its host's agent, on threads of their own
//! (`crate::pager`).
//!
//! # SIGTERM
//! SIGTERM stops this VM for good, as the operator's DeleteVm would: vCPUs stopped, the journal
//! ended. An outgoing migration before its commit fails with it, an incoming one before PREPARED is
//! given up. Once RELINQUISHED may be durable at the source, or PREPARED at the destination, the
//! signal is logged and ignored: this process may hold the only copy of the VM. Whoever wants the
//! VM to outlive a restart of the agent does not signal VM processes (`KillMode=process`).
//!
//! # A directory that was removed
//! A side past its point of no return waits to be released, asked or ordered, through the socket
//! and the journal in its directory. When both were removed below it nobody can do that any more,
//! and it would wait for ever. So a process that has been told to end, before or after, ends once
//! its directory is gone (`Machine::forsake`); one that never owned the VM ends without being
//! told. A VM that is owned here runs on, and the log says that its process cannot be found.
//!
//! # Tasks
//! The endpoint's task is owned by its handle and ended by [`run`]; timers in [`run`] remove idle
//! dirty cursors, make huge pages of memory that the guest touched, and say which system calls were
//! refused ([`crate::confine`]).

use std::{
    fs::File,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, PortRange, VmName},
    transport::Endpoint,
    v1::transfer_service_server::TransferServiceServer,
};
use slat_record::{dir::VmDir, uid::VmUid};
use tokio::{
    net::UnixListener,
    signal::unix::{Signal, SignalKind, signal},
    time::MissedTickBehavior,
};

use crate::{
    backend::FaultEvents,
    confine,
    machine::{Exit, Machine, Parts},
    service::{
        copy_service, memory_service, paging_service,
        transfer::{TransferApi, TransferEndpoint},
        vm_service,
    },
};

/// How often idle dirty cursors are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(30);
/// How often huge pages may be made in the background; the work itself is bounded further.
const TIDYING: Duration = Duration::from_millis(500);

/// A lock that is held for so long is another process's.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// How often it is tried.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// What a VM process is told.
#[derive(Clone, Debug)]
pub struct VmProcessConfig {
    /// The VM's directory ([`slat_record::dir`]); made when it is missing.
    pub dir: PathBuf,
    /// The VM's name.
    pub vm: VmName,
    /// The VM's identity; `None`: a created VM gets a new one, a received one brings its own.
    pub uid: Option<VmUid>,
    /// The host it is on.
    pub host: HostName,
    /// Where incoming pages are received.
    pub data_ip: IpAddr,
    /// On which ports; every VM process of the host shares them.
    pub data_ports: PortRange,
    /// Page streams travel in the clear.
    pub insecure_pages: bool,
    /// What counts its guest's page faults where KVM's statistics do not: [`crate::count_faults`],
    /// from before it was confined.
    pub faults: FaultEvents,
}

/// Why a VM process could not begin or had to end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmProcessError {
    /// Another process has the VM.
    #[error("{vm}: process {pid} has it (lock in {dir})", dir = dir.display())]
    Locked {
        /// The VM.
        vm: VmName,
        /// The other process; 0 when it did not say.
        pid: u32,
        /// The VM's directory.
        dir: PathBuf,
    },
    /// The VM cannot begin here: above all, the journal of a dead process.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// A file or a socket.
    #[error("{what} {path}: {source}", path = path.display())]
    Io {
        /// What was done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Runs one VM process until its VM is over. See the module.
///
/// # Errors
/// `Locked`, `Api` with the journal's reason, `Io`. Nothing is left behind but the journal.
pub async fn run(config: VmProcessConfig) -> Result<(), VmProcessError> {
    let mut terminate = terminate(&config.dir)?;
    let uid = config.uid.clone();
    let faults = config.faults.clone();
    if let Some(why) = faults.why_not() {
        tracing::info!(vm = %config.vm, why, "page faults of VMs on KVM are not counted");
    }
    let machine = |dir, vm, host| {
        Machine::with_parts(
            dir,
            vm,
            host,
            Parts {
                uid,
                ..Parts::real(faults)
            },
        )
    };
    serve(&config, machine, &mut terminate, || {
        let mut out = io::stdout();
        // Whoever started the process may have gone; the VM does not depend on being heard.
        if let Err(error) = writeln!(out, "ready").and_then(|()| out.flush()) {
            tracing::warn!(%error, "nobody reads standard output");
        }
    })
    .await
}

fn terminate(dir: &Path) -> Result<Signal, VmProcessError> {
    signal(SignalKind::terminate()).map_err(|source| VmProcessError::Io {
        what: "catching SIGTERM in",
        path: dir.to_owned(),
        source,
    })
}

async fn serve(
    config: &VmProcessConfig,
    machine: impl FnOnce(VmDir, VmName, HostName) -> Result<Arc<Machine>, ApiError>,
    terminate: &mut Signal,
    ready: impl FnOnce(),
) -> Result<(), VmProcessError> {
    let dir = VmDir::new(&config.dir);
    let io_error = |what, path: &Path| {
        let path = path.to_owned();
        move |source| VmProcessError::Io { what, path, source }
    };
    // Guest memory passes through this endpoint: its directory is the owner's alone.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir.path())
        .map_err(io_error("making", dir.path()))?;
    let lock = take_lock(&dir).await;
    let Some(lock) = lock.map_err(io_error("locking", dir.path()))? else {
        return Err(VmProcessError::Locked {
            vm: config.vm.clone(),
            pid: dir.living_pid().ok().flatten().unwrap_or(0),
            dir: config.dir.clone(),
        });
    };
    let machine = machine(dir.clone(), config.vm.clone(), config.host.clone())?;

    // With the lock held, a socket that is there is a dead process's.
    let socket = dir.socket();
    remove(&socket).map_err(io_error("removing the old socket", &socket))?;
    let listener = UnixListener::bind(&socket).map_err(io_error("listening on", &socket))?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .map_err(io_error("guarding", &socket))?;
    let pagers = dir.path().join(slat_paging::SOCKET);
    remove(&pagers).map_err(io_error("removing the old socket", &pagers))?;
    let paging = machine.serve_pagers(&pagers).map_err(|error| {
        drop(remove(&socket));
        io_error("listening on", &pagers)(error)
    })?;
    let endpoint = endpoint(config, &machine).serve_unix(listener).await;
    ready();
    tracing::info!(vm = %config.vm, dir = %config.dir.display(), "VM process ready");

    let removed = || dir.is_removed(&lock).unwrap_or(false);
    let exit = live(&machine, terminate, removed).await;
    tracing::info!(vm = %config.vm, ?exit, "VM process ends");
    // No new caller from here on; those being answered get their answer.
    let removed = remove(&socket).map_err(io_error("removing", &socket));
    let no_pagers = remove(&pagers).map_err(io_error("removing", &pagers));
    endpoint.stop().await;
    // It waits for threads, which end at once.
    tokio::task::spawn_blocking(move || drop(paging)).await.ok();
    drop(lock);
    removed.and(no_pagers)
}

/// The lock of the VM's directory. Whoever asks which process lives there holds it for a moment; a
/// process that lives holds it for good.
async fn take_lock(dir: &VmDir) -> io::Result<Option<File>> {
    let begun = Instant::now();
    loop {
        let lock = dir.lock()?;
        if lock.is_some() || begun.elapsed() > LOCK_PATIENCE {
            return Ok(lock);
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
}

/// What this process serves.
fn endpoint(config: &VmProcessConfig, machine: &Arc<Machine>) -> Endpoint {
    let transfers = TransferEndpoint::new(Arc::clone(machine), config.vm.clone(), config.data_ip)
        .on_ports(config.data_ports)
        .in_the_clear(config.insecure_pages);
    Endpoint::new()
        .service(TransferServiceServer::new(TransferApi::new(Arc::new(
            transfers,
        ))))
        .service(vm_service(Arc::clone(machine)))
        .service(memory_service(Arc::clone(machine)))
        .service(paging_service(Arc::clone(machine)))
        .service(copy_service(Arc::clone(machine)))
}

/// Until the machine is over. `removed` says whether the VM's directory is gone.
async fn live(machine: &Arc<Machine>, terminate: &mut Signal, removed: impl Fn() -> bool) -> Exit {
    // SIGTERM came. What it could not end is ended when the directory goes.
    let mut told = false;
    let mut said = false;
    let exited = machine.exited();
    tokio::pin!(exited);
    let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
    let mut tidying = tokio::time::interval(TIDYING);
    tidying.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            exit = &mut exited => return exit,
            _ = terminate.recv() => {
                told = true;
                if let Err(error) = on_machine(machine, Machine::stop).await {
                    tracing::error!(%error, reason = %error.reason, vm = %machine.name(), "SIGTERM refused");
                }
            }
            _ = tidying.tick() => {
                if removed() && !machine.is_over() {
                    let forsake = move |machine: &Machine| Ok(machine.forsake(told));
                    let ends = on_machine(machine, forsake).await.unwrap_or(false);
                    if ends || !said {
                        said = true;
                        tracing::error!(
                            vm = %machine.name(), ends,
                            "the VM's directory was removed below its process: nobody can find it; SIGTERM ends it"
                        );
                    }
                }
                for refused in confine::newly_refused() {
                    tracing::error!(
                        call = refused.number, times = refused.times,
                        "a system call that is not listed was refused; please report it, with this number"
                    );
                }
                let tidy = |machine: &Machine| {
                    machine.make_huge_pages();
                    Ok(())
                };
                if let Err(error) = on_machine(machine, tidy).await {
                    tracing::error!(%error, "memory keeps its small pages");
                }
            }
            _ = housekeeping.tick() => {
                let expire = |machine: &Machine| Ok(machine.dirty().expire_idle(Instant::now()));
                if let Err(error) = on_machine(machine, expire).await {
                    tracing::error!(%error, "idle dirty cursors stay");
                }
            }
        }
    }
}

async fn on_machine<T: Send + 'static>(
    machine: &Arc<Machine>,
    call: impl FnOnce(&Machine) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let machine = Arc::clone(machine);
    tokio::task::spawn_blocking(move || call(&machine))
        .await
        .map_err(|error| ApiError::new(Reason::Internal, format!("a call failed: {error}")))?
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
