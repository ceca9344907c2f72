//! One VM process as the agent holds it: started here, or found again after a restart.
//!
//! A process is known by a pidfd, never by its number alone: signals and the notice of its end go
//! through the pidfd, so a recycled pid is never hit. Whether a directory has a process behind it
//! is decided by the flock on its lock file ([`VmDir`]); [`find`] returns either the living process
//! or the lock itself, held, so that no process can begin in the directory while it is read or
//! removed.
//!
//! The child runs in a session of its own and is not killed when the agent ends. Its standard
//! output is read until the line `ready`; its standard error goes to `<dir>/log`, which
//! the process itself bounds ([`slat_record::rotate`]). It gets no other descriptor: what the agent
//! inherited is closed on exec ([`keep_inherited`]).

mod end;

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _},
    net::IpAddr,
    os::fd::{BorrowedFd, OwnedFd, RawFd},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    io::{FdFlags, fcntl_setfd},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, setsid},
};
use slat_proto::{
    ApiError, Reason,
    model::{HostName, VmName},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest, unix::AsyncFd},
    process::{Child, ChildStdout, Command},
};

use slat_record::{dir::VmDir, rotate, uid::VmUid};

pub(super) use self::end::End;

/// How long a new process may take until it says `ready`.
const READY: Duration = Duration::from_secs(10);
/// A process that was killed is gone within this.
const KILLED: Duration = Duration::from_secs(10);
/// From the moment a process closes its output until it has ended.
const ENDING: Duration = Duration::from_secs(1);
/// How much of a log goes into an error.
const LOG_TAIL: u64 = 1024;
/// Output before `ready` beyond this is not read.
const READY_OUTPUT: u64 = 64 << 10;

/// What a VM process is started with.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    pub(super) program: &'a [OsString],
    pub(super) vm: &'a VmName,
    pub(super) uid: &'a VmUid,
    pub(super) host: &'a HostName,
    pub(super) data_ip: IpAddr,
    /// The VM comes from another host, where it runs.
    pub(super) incoming: bool,
}

impl Launch<'_> {
    /// The process, for people: not to be mistaken for the one that runs the VM elsewhere.
    fn subject(&self) -> String {
        if self.incoming {
            format!("the new process for the incoming {}", self.vm)
        } else {
            format!("the new process of {}", self.vm)
        }
    }
}

/// A living (or just ended) VM process.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    /// Held only to reap it; `None` for a process that another agent started.
    child: Mutex<Option<Child>>,
    /// How that child ended, once it was reaped.
    end: Mutex<Option<End>>,
}

/// What stands behind a directory.
#[derive(Debug)]
pub(super) enum Found {
    /// A process holds the lock.
    Living(Box<Process>),
    /// None does, and none can begin while this is held.
    Dead(DirLock),
}

/// The lock of a directory without a process. Given back on drop, explicitly: a copy of the
/// descriptor in a child that is being forked at this moment would keep it otherwise.
#[derive(Debug)]
pub(super) struct DirLock(File);

impl Drop for DirLock {
    fn drop(&mut self) {
        // The descriptor is ours and open; unlocking it cannot fail in a way that matters after
        // this.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Process {
    /// A process that somebody else started, or the child that this agent has.
    ///
    /// # Errors
    /// When there is none of that number.
    pub(super) fn new(pid: u32, child: Option<Child>) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| io::Error::other(format!("{pid} is no process id")))?;
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK)?;
        // SAFETY: the registered descriptor must stay the one that the runtime was told of: an
        // OwnedFd always names the same open file, and nothing takes it out of the AsyncFd before
        // that is dropped.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self {
            pid,
            pidfd,
            child: Mutex::new(child),
            end: Mutex::default(),
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns when the process has ended; at once when it had.
    pub(super) async fn ended(&self) {
        // An error means the runtime is going away, and whoever waits with it.
        if let Ok(guard) = self.pidfd.readable().await {
            drop(guard);
            let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(own) = child.as_mut() {
                match own.try_wait() {
                    Ok(Some(status)) => {
                        tracing::debug!(pid = self.pid, %status, "VM process ended");
                        *child = None;
                        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
                        *end = Some(status.into());
                    }
                    Ok(None) => {}
                    Err(error) => tracing::debug!(pid = self.pid, %error, "reaping"),
                }
            }
        }
    }

    /// How it ended; `None` while it lives, and when another agent started it.
    pub(super) fn end(&self) -> Option<End> {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it ends by itself about now.
    pub(super) async fn is_ending(&self) -> bool {
        let ended = tokio::time::timeout(ENDING, self.ended());
        ended.await.is_ok()
    }

    /// Whether it has ended, or is about to be reaped.
    pub(super) fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut polled, Some(&none)).is_ok_and(|ready| ready > 0)
    }

    /// Whether a signal has stopped it. False when that cannot be told.
    pub(super) fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // `pid (name) state ...`, and the name may hold anything.
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
    }

    /// Kills the process. Only for processes that own no VM (the caller has read the journal), or
    /// on an operator's order that names the VM by its uid.
    pub(super) fn kill(&self) {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.pid, %error, "cannot kill a VM process"),
        }
    }

    /// Kills the process and waits for its end, bounded.
    pub(super) async fn put_down(&self) {
        self.kill();
        if tokio::time::timeout(KILLED, self.ended()).await.is_err() {
            tracing::error!(pid = self.pid, "a killed VM process does not end");
        }
    }
}

/// The process behind `dir`, or the lock that proves there is none.
///
/// # Errors
/// When the lock cannot be read, or is held without saying by whom.
pub(super) async fn find(dir: &VmDir) -> io::Result<Found> {
    for _ in 0..50 {
        if let Some(pid) = dir.living_pid()?
            && pid != std::process::id()
        {
            // Between reading the pid and opening it the process may end and its number go to
            // another; the lock, still held under the same number afterwards, says that it did not.
            if let Ok(process) = Process::new(pid, None)
                && dir.living_pid()? == Some(pid)
            {
                return Ok(Found::Living(Box::new(process)));
            }
        } else if let Some(lock) = dir.hold()? {
            return Ok(Found::Dead(DirLock(lock)));
        }
        // A process that has just taken the lock and not yet written its number, or one that is
        // ending.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(io::Error::other(
        "the lock is held by a process that does not say its number",
    ))
}

/// Starts a process in `dir`, which exists, and waits until it is ready. On failure the process is
/// gone; the directory is the caller's to remove.
///
/// # Errors
/// DISK_FULL, DESCRIPTORS_EXHAUSTED, else INTERNAL; with the tail of its log.
pub(super) async fn spawn(launch: &Launch<'_>, dir: &VmDir) -> Result<Process, ApiError> {
    let failed = |what: String| {
        let log = log_tail(dir);
        let last = last_words(&log).unwrap_or_default();
        let subject = launch.subject();
        let message = if last.is_empty() {
            format!("{subject} {what}")
        } else {
            format!("{subject} {what}: {last}")
        };
        ApiError::new(Reason::Internal, message)
            .with("vm", launch.vm)
            .with("op", "spawn")
            .with("log", log)
    };
    let Some((program, arguments)) = launch.program.split_first() else {
        return Err(failed(
            "cannot be started: no program is configured".to_owned(),
        ));
    };
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.log())
        .map_err(|error| {
            failed(format!("cannot be started: its log: {error}")).because_of(&error)
        })?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .arg("--dir")
        .arg(dir.path())
        .args(["--vm", launch.vm.id(), "--uid", launch.uid.as_str()])
        .args(["--host", launch.host.id()])
        .args(["--data-ip", &launch.data_ip.to_string()])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(log)
        .kill_on_drop(false);
    // SAFETY: the closure runs between fork and exec and makes one system call, setsid, which is
    // async-signal-safe; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| setsid().map(drop).map_err(io::Error::from));
    }
    let mut child = command.spawn().map_err(|error| {
        failed(format!("cannot be started: {}: {error}", program.display())).because_of(&error)
    })?;
    let stdout = child.stdout.take();
    let Some(pid) = child.id() else {
        return Err(failed("ended at once".to_owned()));
    };
    // Not yet reaped, so the number is still this child's.
    let process = match Process::new(pid, None) {
        Ok(process) => process,
        Err(error) => {
            drop(child.kill().await);
            return Err(failed(format!("cannot be watched: {error}")).because_of(&error));
        }
    };
    *process.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
    match tokio::time::timeout(READY, ready(stdout)).await {
        Ok(true) => Ok(process),
        Ok(false) => {
            // It has closed its output, so it ends by itself: how, a kill would hide.
            if !process.is_ending().await {
                process.put_down().await;
            }
            // It could not say so itself: its log is on that disk.
            if let Err(error) = try_disk(dir) {
                return Err(unwritable(&launch.subject(), dir, &error)
                    .with("vm", launch.vm)
                    .with("op", "spawn"));
            }
            Err(match process.end() {
                Some(end) => end.tell(failed(format!("ended before it was ready: it {end}"))),
                None => failed("ended before it was ready".to_owned()),
            })
        }
        Err(_) => {
            process.put_down().await;
            Err(failed(format!(
                "was not ready within {} s",
                READY.as_secs()
            )))
        }
    }
}

/// A process that could write nothing in its directory.
fn unwritable(subject: &str, dir: &VmDir, error: &io::Error) -> ApiError {
    let path = dir.path().display();
    let full = ApiError::new(Reason::Store, String::new()).because_of(error);
    let why = if full.reason == Reason::DiskFull {
        format!("{path} has no room")
    } else {
        format!("{path} cannot be written: {error}")
    };
    ApiError {
        message: format!("{subject} could not start: {why}"),
        ..full.with("path", path)
    }
}

/// Closes on exec what this process was started with beyond its three standard streams, such as a
/// shell's pipe: VM processes outlive the agent, and whoever waits for the end of that pipe would
/// wait for them. Everything that is opened here is closed on exec anyway.
///
/// # Errors
/// When `/proc` cannot be read.
pub(super) fn keep_inherited() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.parse::<RawFd>().ok());
        let Some(number) = number.filter(|number| *number > 2) else {
            continue;
        };
        // SAFETY: the number is borrowed for one call that reads and closes nothing. Should another
        // thread close it at this moment, the call fails, or sets the flag of a descriptor that has
        // it already.
        let inherited = unsafe { BorrowedFd::borrow_raw(number) };
        match fcntl_setfd(inherited, FdFlags::CLOEXEC) {
            Ok(()) | Err(rustix::io::Errno::BADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether anything can be written beside the VM's files.
fn try_disk(dir: &VmDir) -> io::Result<()> {
    let path = dir.path().join("probe");
    let written = std::fs::write(&path, [0; 4096]);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => written.and(Err(error)),
        _ => written,
    }
}

/// Reads until the line `ready`; false when the output ends before.
async fn ready(stdout: Option<ChildStdout>) -> bool {
    let Some(stdout) = stdout else {
        return false;
    };
    let mut lines = BufReader::new(stdout.take(READY_OUTPUT)).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if line == "ready" {
            return true;
        }
    }
    false
}

/// The last bytes of a VM process's log, whole lines where they fit.
pub(super) fn log_tail(dir: &VmDir) -> String {
    let Ok((text, cut)) = read_tail(dir) else {
        return String::new();
    };
    let tail = String::from_utf8_lossy(&text);
    let tail = tail.trim();
    match tail.split_once('\n') {
        Some((_, whole)) if cut => whole.to_owned(),
        _ => tail.to_owned(),
    }
}

/// The message of the last WARN or ERROR near the end of a VM process's log, whether it logs JSON
/// or text.
pub(super) fn last_fault(dir: &VmDir) -> Option<String> {
    log_tail(dir).lines().rev().find_map(fault)
}

/// What is worth telling of a log's end: its last WARN or ERROR, or what was said there that is no
/// entry of a log, such as a panic.
pub(super) fn last_words(log: &str) -> Option<String> {
    let is_entry = |line: &str| {
        let level = line.split_whitespace().nth(1);
        line.starts_with('{')
            || level.is_some_and(|level| matches!(level, "INFO" | "DEBUG" | "TRACE"))
    };
    let said = |line: &str| fault(line).or_else(|| (!is_entry(line)).then(|| line.to_owned()));
    log.lines().rev().find_map(said)
}

fn fault(line: &str) -> Option<String> {
    let severe = |level: &str| matches!(level, "WARN" | "ERROR");
    if line.starts_with('{') {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        severe(entry.get("level")?.as_str()?).then_some(())?;
        return Some(entry.get("message")?.as_str()?.to_owned());
    }
    // `<time> LEVEL target: message`
    let (_, rest) = line.trim_start().split_once(char::is_whitespace)?;
    let (level, rest) = rest.trim_start().split_once(char::is_whitespace)?;
    let message = rest.split_once(": ").map_or(rest, |(_, message)| message);
    severe(level).then(|| message.trim().to_owned())
}

/// The end of the log, and whether there is more before it. Just after a rotation most of it is in
/// the older file.
fn read_tail(dir: &VmDir) -> io::Result<(Vec<u8>, bool)> {
    let (newest, cut) = end_of(&dir.log(), LOG_TAIL)?;
    let wanted = LOG_TAIL.saturating_sub(newest.len() as u64);
    if cut || wanted == 0 {
        return Ok((newest, true));
    }
    let (older, cut) = end_of(&rotate::old(&dir.log()), wanted)?;
    Ok(([older, newest].concat(), cut))
}

/// At most `length` bytes of the end of a file, and whether there is more before them; nothing of a
/// file that is not there.
fn end_of(path: &Path, length: u64) -> io::Result<(Vec<u8>, bool)> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), false)),
        opened => opened?,
    };
    let start = file.metadata()?.len().saturating_sub(length);
    file.seek(io::SeekFrom::Start(start))?;
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text)?;
    Ok((text, start > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_room_is_not_mistaken_for_the_one_that_runs_the_vm() {
        let vm = VmName::from_id("a1").unwrap();
        let (uid, host) = (VmUid::fresh(), HostName::parse("b").unwrap());
        let mut launch = Launch {
            program: &[],
            vm: &vm,
            uid: &uid,
            host: &host,
            data_ip: IpAddr::from([127, 0, 0, 1]),
            incoming: true,
        };
        let dir = VmDir::new("/state/vms/u");
        let full = io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        let error = unwritable(&launch.subject(), &dir, &full);
        assert_eq!(error.reason, Reason::DiskFull);
        assert_eq!(
            error.message,
            "the new process for the incoming vms/a1 could not start: /state/vms/u has no room"
        );
        assert_eq!(error.metadata["path"], "/state/vms/u");
        assert!(error.metadata["advice"].contains("free space"));
        launch.incoming = false;
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = unwritable(&launch.subject(), &dir, &denied);
        assert_eq!(error.reason, Reason::Store);
        assert!(
            error.message.starts_with(
                "the new process of vms/a1 could not start: /state/vms/u cannot be written: "
            ),
            "{error}"
        );
    }

    #[test]
    fn the_last_fault_of_a_log_is_told_and_nothing_else() {
        let folder = slat_test_dir::TestDir::new();
        let dir = VmDir::new(folder.path());
        assert_eq!(last_fault(&dir), None);
        let info = r#"{"timestamp":"t","level":"INFO","message":"ready","target":"slat"}"#;
        let error = r#"{"timestamp":"t","level":"ERROR","message":"vCPU 0: EFAULT","vcpu":0}"#;
        let told = |text: &str| {
            std::fs::write(dir.log(), text).unwrap();
            last_fault(&dir)
        };
        assert_eq!(told(&format!("{info}\n{info}\n")), None);
        let after = format!("{info}\n{error}\n{info}\n");
        assert_eq!(told(&after).as_deref(), Some("vCPU 0: EFAULT"));
        let text = "2026-01-01T00:00:00Z  WARN slat_vmm::machine: slow: disk\n2026-01-01T00:00:01Z  INFO slat: ok\n";
        assert_eq!(told(text).as_deref(), Some("slow: disk"));
        assert_eq!(told("no log line at all\n"), None);
        let words = last_words(&format!("panicked\n{info}\n"));
        assert_eq!(words.as_deref(), Some("panicked"));
        assert_eq!(last_words(&after).as_deref(), Some("vCPU 0: EFAULT"));
        assert_eq!(last_words(info), None);
        assert_eq!(last_words(text).as_deref(), Some("slow: disk"));
        // Just rotated: the fault is in the older file.
        assert_eq!(
            told(&format!("{error}\n")).as_deref(),
            Some("vCPU 0: EFAULT")
        );
        rotate::rotate(&dir.log()).unwrap();
        assert_eq!(last_fault(&dir).as_deref(), Some("vCPU 0: EFAULT"));
        assert_eq!(
            told(&format!("{info}\n")).as_deref(),
            Some("vCPU 0: EFAULT")
        );
    }
}
