//! Live migration by QEMU, as a peer: a guest of as much memory, full of random bytes, goes from
//! one process to another over loopback by `multifd` with four channels.
//!
//! The source's memory is a file in memory that was filled before. The clock starts when the
//! target's process is started, and it has all its memory made first (`prealloc`), as Slat's
//! destination does; it stops when the source says that it has completed and the target that its
//! guest runs. CPU is that of both processes meanwhile, the target's start included. The guest is
//! what the machine's firmware does without a disk.
//!
//! Everything is said over QMP, a line of JSON at a time, on Unix sockets in a directory of its
//! own. Each wait has a bound; dropping a `Machine` ends its process.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{fs::FileExt as _, net::UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::mapping::warm;
use crate::{guest::MIB, scene};

const PROGRAM: &str = "qemu-system-x86_64";
/// Of one answer.
const ANSWER: Duration = Duration::from_secs(60);
/// Of a whole migration, and of a process's start.
const LIMIT: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// A process that uses no more than a tick in this time is at rest.
const REST: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_millis(10);
/// Channels that carry pages.
pub const CHANNELS: u32 = 4;
/// Bytes written at once when memory is filled.
const PIECE: usize = 1 << 20;

/// One migration.
#[derive(Clone, Copy, Debug)]
pub struct QemuRun {
    /// From the target's start until its guest ran.
    pub whole: Duration,
    /// CPU time of both processes.
    pub cpu: Duration,
    /// As QEMU says it.
    pub downtime: Duration,
}

/// QEMU as it is here, and memory that it migrates.
#[derive(Debug)]
pub struct Qemu {
    found: Found,
    memory: File,
    memory_mib: u64,
}

/// QEMU as it is here.
#[derive(Debug)]
pub struct Found {
    version: String,
    accel: &'static str,
}

impl Found {
    /// Fills its guest's memory.
    ///
    /// # Errors
    /// When memory is short.
    pub fn with_memory(self, memory_mib: u64) -> anyhow::Result<Qemu> {
        Ok(Qemu {
            found: self,
            memory: random(memory_mib)?,
            memory_mib,
        })
    }
}

impl Qemu {
    /// Looks for it.
    ///
    /// # Errors
    /// Why there is none, in one line.
    pub fn find() -> Result<Found, String> {
        let said = Command::new(PROGRAM).arg("--version").output();
        let said = said.map_err(|error| format!("{PROGRAM} on PATH: {error}"))?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let is_number = |word: &&str| word.starts_with(|first: char| first.is_ascii_digit());
        let version = said.split_whitespace().find(is_number);
        let version = version.ok_or_else(|| format!("{PROGRAM} does not say its version"))?;
        Ok(Found {
            version: version.to_owned(),
            accel: if scene::kvm_missing().is_none() {
                "kvm"
            } else {
                "tcg"
            },
        })
    }

    /// For a row's name.
    #[must_use]
    pub fn label(&self) -> String {
        format!(
            "QEMU {}, {}, multifd {CHANNELS}, target preallocated",
            self.found.version, self.found.accel
        )
    }

    /// One migration.
    ///
    /// # Errors
    /// When QEMU does not do what it is told.
    pub fn migrate(&self) -> anyhow::Result<QemuRun> {
        let dir = slat_test_dir::TestDir::with_prefix("slat-bench-")?;
        let fd = self.memory.as_raw_fd();
        let own = std::process::id();
        let size = self.memory_mib;
        let from = format!(
            "memory-backend-file,id=ram,size={size}M,share=on,mem-path=/proc/{own}/fd/{fd}"
        );
        let mut source = Machine::start(self, &dir.path().join("source"), &from, &[])?;
        source.configure()?;
        let spent = source.rests()?;

        let threads = thread::available_parallelism().map_or(1, usize::from);
        let to = format!(
            "memory-backend-ram,id=ram,size={size}M,prealloc=on,prealloc-threads={threads}"
        );
        warm(usize::try_from(size * MIB)?)?;
        let begun = Instant::now();
        let arguments = ["-incoming", "defer"];
        let mut target = Machine::start(self, &dir.path().join("target"), &to, &arguments)?;
        target.configure()?;
        target.call("migrate-incoming", &json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let listens = target.call("query-migrate", &Value::Null)?;
        let port = listens["socket-address"][0]["port"].as_str();
        let port = port.with_context(|| format!("where the target listens: {listens}"))?;
        source.call(
            "migrate",
            &json!({ "uri": format!("tcp:127.0.0.1:{port}") }),
        )?;
        let done = source.until("query-migrate", |answer| match answer["status"].as_str() {
            Some("failed" | "cancelled") => bail!("QEMU's migration: {answer}"),
            status => Ok(status == Some("completed")),
        })?;
        target.until("query-status", |answer| Ok(answer["status"] == "running"))?;
        let whole = begun.elapsed();
        let cpu = source.cpu()?.saturating_sub(spent) + target.cpu()?;
        let downtime = done["downtime"].as_u64().context("no downtime")?;
        Ok(QemuRun {
            whole,
            cpu,
            downtime: Duration::from_millis(downtime),
        })
    }
}

/// A file in memory, full of random bytes.
fn random(memory_mib: u64) -> anyhow::Result<File> {
    let file = File::from(memfd_create("slat-bench-qemu", MemfdFlags::CLOEXEC)?);
    file.set_len(memory_mib * MIB)?;
    let mut random = fastrand::Rng::with_seed(7);
    let mut piece = vec![0; PIECE];
    for at in 0..memory_mib * MIB / PIECE as u64 {
        random.fill(&mut piece);
        file.write_all_at(&piece, at * PIECE as u64)?;
    }
    Ok(file)
}

/// One process of QEMU and its control socket.
struct Machine {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Machine {
    fn start(qemu: &Qemu, socket: &Path, memory: &str, more: &[&str]) -> anyhow::Result<Self> {
        let cpu: &[&str] = if qemu.found.accel == "kvm" {
            &["-cpu", "qemu64,-sse3"]
        } else {
            &[]
        };
        let mut child = Command::new(PROGRAM)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-vga",
                "none",
            ])
            .args([
                "-machine",
                &format!("pc,accel={},memory-backend=ram", qemu.found.accel),
            ])
            .args(cpu)
            .args(["-m", &format!("{}M", qemu.memory_mib), "-object", memory])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    let ended = child.try_wait()?;
                    if ended.is_some() || begun.elapsed() > LIMIT {
                        drop(child.kill());
                        drop(child.wait());
                        bail!("QEMU does not start: {ended:?}, {error}");
                    }
                }
            }
            thread::sleep(LOOK_EVERY);
        };
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut machine = Self {
            child,
            control: BufReader::new(stream),
        };
        machine.line().context("QMP's greeting")?;
        machine.call("qmp_capabilities", &Value::Null)?;
        Ok(machine)
    }

    fn configure(&mut self) -> anyhow::Result<()> {
        let multifd = json!([{ "capability": "multifd", "state": true }]);
        self.call(
            "migrate-set-capabilities",
            &json!({ "capabilities": multifd }),
        )?;
        let parameters = json!({
            "multifd-channels": CHANNELS,
            // More than any loopback has.
            "max-bandwidth": 1_u64 << 40,
            // Slat's own default.
            "downtime-limit": 300,
        });
        self.call("migrate-set-parameters", &parameters)?;
        Ok(())
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        ensure!(
            self.control.read_line(&mut line)? > 0,
            "QEMU has closed its socket"
        );
        Ok(serde_json::from_str(&line)?)
    }

    /// One command's answer; events before it are passed over.
    fn call(&mut self, command: &str, arguments: &Value) -> anyhow::Result<Value> {
        let mut order = json!({ "execute": command });
        if !arguments.is_null() {
            order["arguments"] = arguments.clone();
        }
        self.control
            .get_mut()
            .write_all(format!("{order}\n").as_bytes())?;
        let begun = Instant::now();
        loop {
            let mut answer = self.line().with_context(|| command.to_owned())?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            ensure!(begun.elapsed() < LIMIT, "QEMU does not answer {command}");
        }
    }

    fn until(
        &mut self,
        command: &str,
        done: impl Fn(&Value) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Value> {
        let begun = Instant::now();
        loop {
            let answer = self.call(command, &Value::Null)?;
            if done(&answer)? {
                return Ok(answer);
            }
            ensure!(begun.elapsed() < LIMIT, "QEMU is still at {answer}");
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until the firmware has nothing more to do: what it does is not the migration's.
    /// Returns the process's CPU time then.
    fn rests(&self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let mut spent = self.cpu()?;
        loop {
            thread::sleep(REST);
            let now = self.cpu()?;
            if now.saturating_sub(spent) <= TICK {
                return Ok(now);
            }
            spent = now;
            ensure!(
                begun.elapsed() < LIMIT,
                "QEMU's guest does not come to rest"
            );
        }
    }

    /// CPU time of the process so far, threads that have ended included.
    fn cpu(&self) -> anyhow::Result<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        cpu_of(&text).context("the process's CPU time")
    }
}

/// User and system time in `/proc/PID/stat`.
fn cpu_of(stat: &str) -> Option<Duration> {
    // The second field is the program's name, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    let second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_nanos(ticks * 1_000_000_000 / second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_whatever_the_program_is_called() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194304 100 0 0 0 30 12 0 0 20 0 3 0 5 1 1 1";
        let second = rustix::param::clock_ticks_per_second();
        assert_eq!(
            cpu_of(stat),
            Some(Duration::from_nanos(42_000_000_000 / second))
        );
        assert_eq!(cpu_of("7 (x) S 1"), None);
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(cpu_of(&own).is_some());
    }

    #[test]
    fn memory_is_filled_with_bytes_that_differ() {
        let file = random(2).unwrap();
        let mut words = [[0; 8]; 2];
        file.read_exact_at(&mut words[0], 4096).unwrap();
        file.read_exact_at(&mut words[1], MIB + 4096).unwrap();
        assert_ne!(words[0], words[1]);
    }
}
