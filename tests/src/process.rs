//! Processes under test: daemons that the harness starts, and VM processes that agents start and
//! the harness finds.
//!
//! A daemon is a child and stays one until it is reaped, so its pid is its own. A VM process is
//! found through the flock of its lock file and held by a pidfd opened while the lock was held: a
//! recycled pid is never signalled.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal},
};

use crate::wait::PATIENCE;

/// What a daemon says on standard output when its endpoint is open.
const READY: &str = "listening on ";

/// A server or an agent.
#[derive(Debug)]
pub struct Daemon {
    label: String,
    program: PathBuf,
    args: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    log: PathBuf,
    /// What enters the place it runs in, and its address there.
    before: Vec<String>,
    at: IpAddr,
    child: Option<Child>,
    address: Option<SocketAddr>,
}

impl Daemon {
    /// A daemon that is not running yet. `args` are all but `--listen`.
    #[must_use]
    pub fn new(label: &str, program: &Path, args: Vec<OsString>, log: PathBuf) -> Self {
        Self {
            label: label.to_owned(),
            program: program.to_owned(),
            args,
            environment: Vec::new(),
            log,
            before: Vec::new(),
            at: Ipv4Addr::LOCALHOST.into(),
            child: None,
            address: None,
        }
    }

    /// With these variables besides those of this process.
    #[must_use]
    pub fn with_environment(
        mut self,
        more: impl IntoIterator<Item = (&'static str, OsString)>,
    ) -> Self {
        self.environment.extend(more);
        self
    }

    /// Listens at this address.
    #[must_use]
    pub fn at(mut self, ip: IpAddr) -> Self {
        self.at = ip;
        self
    }

    /// Runs by this command, which becomes it and stays the same process.
    #[must_use]
    pub fn behind(mut self, command: Vec<String>) -> Self {
        self.before = command;
        self
    }

    /// Starts it and waits until it listens. A second start takes the port of the first.
    ///
    /// # Errors
    /// When it ends or says nothing in time.
    pub fn start(&mut self) -> anyhow::Result<SocketAddr> {
        assert!(self.child.is_none(), "{} runs already", self.label);
        let listen = self
            .address
            .unwrap_or_else(|| SocketAddr::new(self.at, 0))
            .to_string();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let mut words = self.before.iter().map(OsString::from);
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg("--").arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        let mut child = command
            .args(&self.args)
            .args(["--listen", &listen])
            .env_remove("RUST_LOG")
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", self.label))?;
        let stdout = child.stdout.take().context("its standard output")?;
        self.child = Some(child);
        let (said, heard) = mpsc::channel();
        // Ends with the daemon's standard output.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix(READY) {
                    // The starter may have lost its patience.
                    drop(said.send(address.trim().to_owned()));
                }
            }
        });
        let address = match heard.recv_timeout(PATIENCE) {
            Ok(address) => address,
            Err(error) => {
                let status = self.kill();
                bail!(
                    "{} did not say \"{READY}IP:PORT\" ({error}); {status:?}",
                    self.label
                );
            }
        };
        let address: SocketAddr = address
            .parse()
            .with_context(|| format!("{} listens on {address:?}", self.label))?;
        self.address = Some(address);
        Ok(address)
    }

    /// Where it listens, or listened last.
    ///
    /// # Panics
    /// When it was never started.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address.expect("a daemon that was started")
    }

    /// Whether it was started and neither killed nor stopped.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// kill -9, and waits for its end. `None` when it does not run.
    pub fn kill(&mut self) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        // A child that has ended already need not be killed.
        drop(child.kill());
        child.wait().ok()
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time (it is killed then) or ends with another code than 0.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let Some(child) = self.child.as_ref() else {
            return Ok(());
        };
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        kill_process(pid, Signal::TERM)?;
        if !wait_end(&pidfd, PATIENCE)? {
            self.kill();
            bail!("{} did not end on SIGTERM", self.label);
        }
        match self.kill() {
            Some(status) if status.success() => Ok(()),
            status => bail!("{} ended on SIGTERM with {status:?}", self.label),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The living process of one VM.
#[derive(Debug)]
pub struct VmProcess {
    pid: u32,
    pidfd: OwnedFd,
}

impl VmProcess {
    /// The process that holds the lock of a VM's directory; `None` when none does.
    ///
    /// # Errors
    /// When the lock cannot be read, or holds no pid.
    pub fn behind(dir: &Path) -> anyhow::Result<Option<Self>> {
        let Some(pid) = lock_holder(dir)? else {
            return Ok(None);
        };
        let raw = Pid::from_raw(pid.cast_signed()).context("pid 0 in a lock file")?;
        let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Still the holder: so the pidfd is of the process that wrote the pid.
        Ok((lock_holder(dir)? == Some(pid)).then_some(Self { pid, pidfd }))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// kill -9, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&self) -> anyhow::Result<()> {
        self.signal(Signal::KILL)?;
        self.wait_end()
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn terminate(&self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)?;
        self.wait_end()
    }

    /// No effect on a process that has ended.
    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// SIGSTOP. Its threads stop soon after, not before this returns.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn suspend(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait_end(&self) -> anyhow::Result<()> {
        if !wait_end(&self.pidfd, PATIENCE)? {
            bail!("VM process {} does not end", self.pid);
        }
        Ok(())
    }
}

/// Pid in the lock file of a VM's directory while somebody holds the lock.
fn lock_holder(dir: &Path) -> anyhow::Result<Option<u32>> {
    let path = dir.join("lock");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            // Given back at once, not at the close: a child being forked now may hold a copy of the
            // descriptor.
            flock(&file, FlockOperation::Unlock)?;
            Ok(None)
        }
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let text = io::read_to_string(&file)?;
            let pid = text.trim().parse();
            pid.map(Some)
                .with_context(|| format!("{}: {text:?} is no pid", path.display()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether the process behind the pidfd ended within `patience`.
fn wait_end(pidfd: &OwnedFd, patience: Duration) -> anyhow::Result<bool> {
    let timeout = Timespec::try_from(patience)?;
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ends the processes of `program` that name `root`, or a path below it, on their command lines,
/// and says which there were. One that was just being started may show up while others end, so it
/// looks until there are none.
///
/// # Errors
/// When one does not end, or more come all the time.
pub fn end_below(root: &Path, program: &Path) -> anyhow::Result<Vec<String>> {
    let program = program.canonicalize()?;
    let mut ended = Vec::new();
    for _ in 0..ROUNDS {
        let of_program = |(pid, _): &(u32, Vec<u8>)| runs(*pid, &program);
        let found: Vec<_> = processes_below(root).filter(of_program).collect();
        if found.is_empty() {
            return Ok(ended);
        }
        for (pid, line) in found {
            let raw = Pid::from_raw(pid.cast_signed()).context("a process without a number")?;
            let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else {
                continue;
            };
            // Still the same: so the pidfd is of that process, and not of a later one.
            if command_line(pid).as_ref() != Some(&line) || !runs(pid, &program) {
                continue;
            }
            let process = VmProcess { pid, pidfd };
            process.kill()?;
            ended.push(format!("process {pid}: {}", readable(&line)));
        }
    }
    bail!("processes below {} come again: {ended:#?}", root.display())
}

/// How often [`end_below`] looks. What it ends can start no more.
const ROUNDS: usize = 20;

/// Whether a process runs that file, which may have been built anew since.
fn runs(pid: u32, program: &Path) -> bool {
    let file = std::fs::read_link(format!("/proc/{pid}/exe"));
    let file = file.map(|file| file.to_string_lossy().into_owned());
    file.is_ok_and(|file| Path::new(file.trim_end_matches(" (deleted)")) == program)
}

/// A process's arguments, each with a zero after it. A zombie has none.
fn command_line(pid: u32) -> Option<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/cmdline")).ok()
}

fn readable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).replace('\0', " ")
}

/// Processes whose command lines name `root` or what is below it, and not only a neighbour whose
/// name begins alike.
fn processes_below(root: &Path) -> impl Iterator<Item = (u32, Vec<u8>)> {
    let needle = root.as_os_str().as_encoded_bytes().to_vec();
    let names = move |line: &[u8]| {
        let mut places = line.windows(needle.len() + 1);
        places.any(|at| {
            let (last, path) = at.split_last().unwrap_or((&0, &[]));
            path == needle && matches!(last, 0 | b'/')
        })
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(move |entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // A process that ended meanwhile is none.
        let line = command_line(pid)?;
        names(&line).then_some((pid, line))
    })
}

/// Processes that name `root` or what is below it: ids, and arguments with a zero after each.
#[must_use]
pub fn command_lines(root: &Path) -> Vec<(u32, Vec<u8>)> {
    processes_below(root).collect()
}

/// Processes and Unix sockets that name `root`: what a fleet in that directory has left behind.
#[must_use]
pub fn leftovers(root: &Path) -> Vec<String> {
    let needle = root.to_string_lossy().into_owned();
    let process = |(pid, line): (u32, Vec<u8>)| format!("process {pid}: {}", readable(&line));
    let mut found: Vec<String> = processes_below(root).map(process).collect();
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    found.extend(
        sockets
            .lines()
            .filter(|line| line.contains(&needle))
            .map(|line| format!("socket {line}")),
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that names a file, until it is killed.
    fn naming(path: &Path) -> Child {
        std::fs::write(path, "").unwrap();
        let mut tail = Command::new("tail");
        tail.arg("-f").arg(path).stdout(Stdio::null());
        tail.spawn().unwrap()
    }

    #[test]
    fn only_what_names_the_root_and_runs_the_program_is_ended() {
        let home = slat_test_dir::TestDir::new();
        let (root, other) = (home.path().join("a"), home.path().join("ab"));
        for dir in [&root, &other] {
            std::fs::create_dir(dir).unwrap();
        }
        let mut own = naming(&root.join("file"));
        let mut neighbour = naming(&other.join("file"));
        let program = |child: &Child| {
            // It runs its own file a moment after it was started.
            let link = format!("/proc/{}/exe", child.id());
            let own = std::env::current_exe().unwrap();
            let started = std::time::Instant::now();
            loop {
                let file = std::fs::read_link(&link).unwrap();
                if file != own {
                    return file;
                }
                assert!(started.elapsed() < PATIENCE, "it does not start");
                std::thread::yield_now();
            }
        };
        let (tail, _) = (program(&own), program(&neighbour));
        assert!(
            end_below(&root, Path::new("/proc/self/exe"))
                .unwrap()
                .is_empty()
        );
        assert_eq!(leftovers(&root).len(), 1);
        let ended = end_below(&root, &tail).unwrap();
        assert_eq!(ended.len(), 1, "{ended:?}");
        assert!(ended[0].starts_with(&format!("process {}: ", own.id())));
        assert!(!own.wait().unwrap().success());
        assert!(neighbour.try_wait().unwrap().is_none(), "not its own");
        neighbour.kill().unwrap();
        neighbour.wait().unwrap();
    }
}
