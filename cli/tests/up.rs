//! `slat up` as it is typed: what it starts serves with the certificate it made, and ends with it;
//! VMs stay for the next one; what is wrong is said.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use slat_test_dir::TestDir;

/// Nothing here takes longer, whatever the machine.
const BOUND: Duration = Duration::from_secs(60);
/// Between two looks at what has no events.
const LOOK: Duration = Duration::from_millis(50);

/// A home of its own, with whatever runs below it.
struct Home(TestDir);

impl Home {
    fn new() -> Self {
        Self(TestDir::new())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slat"));
        for (variable, _) in std::env::vars_os() {
            let name = variable.to_string_lossy();
            if name.starts_with("SLAT_") || name.starts_with("XDG_") {
                command.env_remove(&variable);
            }
        }
        command.env("HOME", self.path()).env_remove("RUST_LOG");
        command.current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// `line` typed here; `~` is this home.
    fn slat(&self, line: &str) -> Output {
        let line = line.replace('~', self.path().to_str().unwrap());
        let mut command = self.command();
        command.args(line.split_whitespace()).output().unwrap()
    }

    fn json(&self, line: &str) -> Value {
        let output = self.slat(&format!("{line} -o json"));
        assert!(output.status.success(), "slat {line}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// `slat up` over `<home>/up`, until it says how to go on.
    fn up(&self, line: &str) -> Up {
        let mut command = self.command();
        command.args(["up", "--memory", "128MiB", "--state-dir"]);
        command.arg(self.path().join("up"));
        command.args(line.split_whitespace());
        command.stdout(Stdio::piped());
        let errors = self.path().join("up.errors");
        command.stderr(fs::File::create(&errors).unwrap());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (says, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if says.send(line).is_err() {
                    return;
                }
            }
        });
        let mut lines: Vec<String> = Vec::new();
        while !lines.last().is_some_and(|line| line.starts_with("try ")) {
            match said.recv_timeout(BOUND) {
                Ok(line) => lines.push(line),
                Err(error) => {
                    drop((child.kill(), child.wait()));
                    let said = fs::read_to_string(&errors).unwrap();
                    panic!("{error}: {lines:?}: {said}");
                }
            }
        }
        let server = lines[0].strip_prefix("server").unwrap().trim().to_owned();
        Up {
            child,
            server,
            lines,
            errors,
        }
    }

    /// Processes whose command lines name this home: ids and arguments.
    fn processes(&self) -> Vec<(u32, String)> {
        let home = self.path().to_str().unwrap();
        let all = fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(home).then_some((pid, line))
        })
        .collect()
    }

    fn nothing_runs(&self) {
        eventually("nothing runs", || {
            let left = self.processes();
            left.is_empty().then_some(()).ok_or(format!("{left:?}"))
        });
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // All of it was started here. Nothing is left when the test went well.
        for (pid, _) in self.processes() {
            kill(pid, Signal::KILL);
        }
    }
}

fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    // It may have ended already.
    let _ = kill_process(pid, signal);
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) => assert!(began.elapsed() < BOUND, "still not: {what}: {why}"),
        }
        std::thread::sleep(LOOK);
    }
}

struct Up {
    child: Child,
    server: String,
    lines: Vec<String>,
    errors: PathBuf,
}

impl Up {
    /// Its exit code and standard error, once it has ended.
    fn ended(mut self) -> (Option<i32>, String) {
        let status = eventually("slat up ends", || {
            let ended = self.child.try_wait().unwrap();
            ended.ok_or_else(|| fs::read_to_string(&self.errors).unwrap())
        });
        (status.code(), fs::read_to_string(&self.errors).unwrap())
    }

    fn interrupted(self) {
        kill(self.child.id(), Signal::INT);
        assert_eq!(self.ended(), (Some(0), String::new()));
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Ended and reaped already when the test went well.
        drop((self.child.kill(), self.child.wait()));
    }
}

/// Hosts in that state, by name.
fn hosts_are(home: &Home, server: &str, names: &[&str]) {
    eventually("hosts are READY", || {
        let output = home.slat(&format!("get hosts --server {server} -o json"));
        let said = format!("{output:?}");
        let shown: Value = serde_json::from_slice(&output.stdout).map_err(|_| said.clone())?;
        let hosts = shown["hosts"].as_array().ok_or(said.clone())?;
        let ready = |name: &&str| {
            let name = format!("hosts/{name}");
            hosts
                .iter()
                .any(|host| host["name"] == *name && host["state"] == "STATE_READY")
        };
        let all = hosts.len() == names.len() && names.iter().all(ready);
        all.then_some(()).ok_or(said)
    });
}

#[test]
fn it_serves_by_the_certificate_it_placed_and_ends_whole() {
    let home = Home::new();
    let up = home.up("--listen 127.0.0.1:0 --agent host-a --agent host-b");
    assert!(up.lines[1].starts_with("host-a "), "{:?}", up.lines);
    hosts_are(&home, &up.server, &["host-a", "host-b"]);
    let placed = fs::canonicalize(home.path().join(".config/slat/tls")).unwrap();
    let admin = fs::canonicalize(home.path().join("up/trust/admin")).unwrap();
    assert_eq!(placed, admin);
    let certificate = up.lines.iter().find(|line| line.starts_with("certificate"));
    assert!(certificate.unwrap().contains(".config/slat/tls"));

    // Two hosts of one machine, and a VM between them.
    let server = format!("--server {}", up.server);
    let create = "create vm web --backend software --memory 16MiB --host host-a";
    home.json(&format!("{create} {server}"));
    let moved = home.json(&format!("migrate web --to host-b {server}"));
    assert_eq!(moved["phase"], "MIGRATION_PHASE_COMPLETED", "{moved:#}");
    home.json(&format!("delete vm web {server}"));

    // An agent's certificate is none of a server; who wants the agent names it.
    let agent = up.lines[1].strip_prefix("host-a").unwrap().trim();
    let vms = format!("get vms --server {agent}");
    let said = refused(&home, &vms, 4);
    let words = ["agent/host-a", "server", "--agent host-a"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    refused(&home, &format!("{vms} --agent host-b"), 4);
    refused(&home, &format!("get hosts {server} --agent host-a"), 4);
    let shown = home.json(&format!("{vms} --agent host-a"));
    assert_eq!(shown["vms"].as_array().unwrap().len(), 0, "{shown:#}");

    // Without the certificate nobody is let in.
    let foreign = Home::new();
    let refused = foreign.slat(&format!("get hosts {server}"));
    assert!(!refused.status.success());
    up.interrupted();
    home.nothing_runs();
}

#[test]
fn vms_stay_for_the_next_one() {
    let home = Home::new();
    let up = home.up("--listen 127.0.0.1:0 --agent host-a");
    hosts_are(&home, &up.server, &["host-a"]);
    let create = "create vm web --backend software --memory 16MiB";
    home.json(&format!("{create} --server {}", up.server));
    let before = home.json(&format!("get vm web --server {}", up.server));
    up.interrupted();
    let vm = eventually("the VM's process alone is left", || {
        match home.processes().as_slice() {
            [(pid, line)] if line.contains(" vm ") => Ok(*pid),
            others => Err(format!("{others:?}")),
        }
    });

    let up = home.up("--listen 127.0.0.1:0 --agent host-a");
    let after = eventually("the VM runs", || {
        let line = format!("get vm web -o json --server {}", up.server);
        let output = home.slat(&line);
        let said = format!("{output:?}");
        let vm: Value = serde_json::from_slice(&output.stdout).map_err(|_| said.clone())?;
        (vm["state"] == "STATE_RUNNING").then_some(vm).ok_or(said)
    });
    assert!(before["uid"].is_string());
    assert_eq!(before["uid"], after["uid"]);
    assert_eq!(after["pid"], vm, "the same process");
    hosts_are(&home, &up.server, &["host-a"]);
    home.json(&format!("delete vm web --server {}", up.server));
    up.interrupted();
    home.nothing_runs();
}

fn refused(home: &Home, line: &str, code: i32) -> String {
    let output = home.slat(line);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "slat {line}: {said}");
    assert_eq!(output.stdout, b"");
    said
}

#[test]
fn a_second_one_says_what_is_wrong_and_harms_nobody() {
    let home = Home::new();
    let up = home.up("--listen 127.0.0.1:0 --agent host-a");
    hosts_are(&home, &up.server, &["host-a"]);
    let log = fs::read(home.path().join("up/server.log")).unwrap();

    let other = Home::new();
    let line = format!("up --state-dir ~/up --listen {}", up.server);
    let said = refused(&other, &line, 1);
    assert!(said.contains(&format!("{} is in use", up.server)), "{said}");
    other.nothing_runs();

    let said = refused(&home, "up --state-dir ~/up --listen 127.0.0.1:0", 1);
    let words = ["another slat up", "/up", "--state-dir"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    let now = fs::read(home.path().join("up/server.log")).unwrap();
    assert!(now.starts_with(&log), "its log was overwritten");
    hosts_are(&home, &up.server, &["host-a"]);
    up.interrupted();
    home.nothing_runs();
}

/// Names that the directory has for something else.
#[test]
fn a_host_may_have_any_name() {
    let home = Home::new();
    let names = ["server", "trust", "hosts"];
    let agents: String = names
        .iter()
        .map(|name| format!(" --agent {name}"))
        .collect();
    let up = home.up(&format!("--listen 127.0.0.1:0{agents}"));
    hosts_are(&home, &up.server, &names);
    up.interrupted();
    home.nothing_runs();
    for name in names {
        assert!(home.path().join("up/hosts").join(name).is_dir(), "{name}");
        let log = home.path().join(format!("up/hosts/{name}.log"));
        assert!(log.is_file(), "{name}");
    }
}

#[test]
fn ports_that_are_none_are_refused_before_anything_is_made() {
    let home = Home::new();
    let said = refused(&home, "up --state-dir ~/up --listen 127.0.0.1:65535", 2);
    assert!(
        said.contains("65535") && said.contains("lower port"),
        "{said}"
    );
    assert!(!home.path().join("up").exists());
}

#[test]
fn two_hosts_of_one_name_are_refused_before_anything_is_made() {
    let home = Home::new();
    let said = refused(&home, "up --state-dir ~/up --agent a --agent a", 2);
    assert!(said.contains("two hosts have the same name"), "{said}");
    assert!(!home.path().join("up").exists());
}

#[test]
fn a_daemon_that_is_killed_ends_it_and_is_named() {
    for role in ["server", "agent"] {
        let home = Home::new();
        let up = home.up("--listen 127.0.0.1:0 --agent host-a");
        let daemon = home.processes().into_iter().find(|(_, line)| {
            let mut words = line.split(' ');
            words.nth(1) == Some(role)
        });
        kill(daemon.unwrap().0, Signal::KILL);
        let (code, said) = up.ended();
        assert_eq!(code, Some(1), "{said}");
        let (name, log) = match role {
            "server" => ("the server ended", "server.log"),
            _ => ("host-a ended", "host-a.log"),
        };
        assert_eq!(said.matches(name).count(), 1, "once: {said}");
        assert!(said.contains("SIGKILL") && said.contains(log), "{said}");
        home.nothing_runs();
    }
}
