//! The roles as processes: one ready line, clear refusals, orderly ends. What they do is tested
//! where they live.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// Nothing here takes longer, whatever the machine.
const BOUND: Duration = Duration::from_secs(30);

fn slat() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slat"));
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("SLAT_") {
            command.env_remove(variable);
        }
    }
    command.env("SLAT_INSECURE_PLAINTEXT", "true");
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// A daemon that is killed when the test ends.
struct Daemon {
    child: Child,
    address: SocketAddr,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Daemon {
    fn start(arguments: &[&str], state: &Path) -> Self {
        let mut child = slat()
            .args(arguments)
            .args(["--listen", "127.0.0.1:0", "--state-dir"])
            .arg(state)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line
            .strip_prefix("listening on ")
            .unwrap_or_else(|| panic!("{line:?}"));
        Self {
            address: address.trim().parse().unwrap(),
            child,
            stdout,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// Waits for the end; its exit code, and what else it printed.
    fn ended(mut self) -> (Option<i32>, String) {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < BOUND, "still running");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (status.code(), rest)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already when the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Exit code, standard output and standard error of a command that ends by itself.
fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = slat().args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn each_daemon_says_one_line_and_ends_on_either_signal() {
    for (role, signal) in [("server", Signal::TERM), ("agent", Signal::INT)] {
        let state = slat_test_dir::TestDir::new();
        let daemon = Daemon::start(&[role], state.path());
        assert_ne!(daemon.address.port(), 0);
        daemon.signal(signal);
        assert_eq!(daemon.ended(), (Some(0), String::new()), "{role}");
    }
}

#[test]
fn a_port_in_use_is_one_sentence() {
    let state = slat_test_dir::TestDir::new();
    let first = Daemon::start(&["server"], state.path());
    let address = first.address.to_string();
    for role in ["server", "agent"] {
        let state = slat_test_dir::TestDir::new();
        let state = state.path().to_str().unwrap();
        let (code, stdout, stderr) = run(&[role, "--listen", &address, "--state-dir", state]);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        let sentence = format!("error: cannot start the {role}: {address} is in use");
        assert!(stderr.contains(&sentence), "{stderr}");
    }
}

#[test]
fn without_a_certificate_only_when_asked_for_by_name() {
    for role in ["server", "agent"] {
        let state = slat_test_dir::TestDir::new();
        let path = state.path().join("untouched");
        let output = slat()
            .env_remove("SLAT_INSECURE_PLAINTEXT")
            .args([role, "--listen", "127.0.0.1:0", "--state-dir"])
            .arg(&path)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        for word in ["--tls-dir", "slat up", "--insecure-plaintext"] {
            assert!(stderr.contains(word), "{word}: {stderr}");
        }
        assert!(!path.exists(), "refused before anything is made");
    }
}

#[test]
fn a_silence_that_no_report_can_break_is_refused() {
    let state = slat_test_dir::TestDir::new();
    let path = state.path().join("untouched");
    let server = |silence: &str| {
        let all = ["server", "--listen", "127.0.0.1:0", "--report-interval"];
        let state = ["--state-dir", path.to_str().unwrap()];
        run(&[&all[..], &["2s", "--host-silence", silence], &state].concat())
    };
    for silence in ["3s", "61m", "3"] {
        let (code, stdout, stderr) = server(silence);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
        assert!(stderr.contains("--host-silence"), "{stderr}");
    }
    assert!(!path.exists(), "refused before anything is made");
}

#[test]
fn more_memory_than_the_machine_has_is_refused() {
    let state = slat_test_dir::TestDir::new();
    let path = state.path().join("untouched");
    let listen = "127.0.0.1:0";
    let state_dir = path.to_str().unwrap();
    let agent = |more: &[&str]| {
        let all = ["agent", "--listen", listen, "--state-dir", state_dir];
        run(&[&all, more].concat())
    };
    let (code, stdout, stderr) = agent(&["--memory", "4096TiB"]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    assert!(
        stderr.contains("--memory 4 PiB is more than the "),
        "{stderr}"
    );
    assert!(stderr.contains("next:"), "{stderr}");
    for wrong in [["--data-ports", "7473-7410"], ["--vm-log-size", "1KiB"]] {
        let (code, _, stderr) = agent(&wrong);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains(wrong[0]), "{stderr}");
    }
    assert!(!path.exists(), "refused before anything is made");
}

#[test]
fn a_daemon_ends_with_the_process_it_belongs_to() {
    let states = [slat_test_dir::TestDir::new(), slat_test_dir::TestDir::new()];
    let owner = Daemon::start(&["server"], states[0].path());
    let pid = owner.child.id().to_string();
    let daemon = Daemon::start(&["server", "--die-with", &pid], states[1].path());
    owner.signal(Signal::KILL);
    drop(owner);
    assert_eq!(daemon.ended().0, Some(0));
    let state = states[1].path().to_str().unwrap();
    let listen = "127.0.0.1:0";
    let late = [
        "server",
        "--die-with",
        &pid,
        "--listen",
        listen,
        "--state-dir",
        state,
    ];
    let (code, stdout, stderr) = run(&late);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
}

/// Found out before a host has to be fenced; it may still be put there, so the server starts.
#[test]
fn a_fence_hook_that_cannot_be_run_is_warned_of_at_the_start() {
    let state = slat_test_dir::TestDir::new();
    let log = state.path().join("log");
    let start = |hook: &str| {
        let mut child = slat()
            .args(["server", "--listen", "127.0.0.1:0", "--fence-hook", hook])
            .arg("--state-dir")
            .arg(state.path().join("state"))
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(line.starts_with("listening on"), "{line}");
        std::fs::read_to_string(&log).unwrap()
    };
    let said = start("/nonexistent/hook");
    let words = ["WARN", "/nonexistent/hook", "fence hook cannot be run"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    let said = start("/bin/true");
    assert!(!said.contains("fence hook"), "{said}");
}

#[test]
fn client_commands_end_with_documented_codes() {
    let state = slat_test_dir::TestDir::new();
    let server = Daemon::start(&["server"], state.path());
    let endpoint = server.address.to_string();
    let code = |arguments: &[&str]| {
        let all = [arguments, &["--server", &endpoint]].concat();
        let (code, stdout, stderr) = run(&all);
        (code.unwrap(), stdout, stderr)
    };
    let (ok, stdout, _) = code(&["get", "vms", "-o", "json"]);
    assert_eq!(ok, 0);
    let answer: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        answer,
        serde_json::json!({"vms": [], "unreachable": [], "unreported": []})
    );
    assert_eq!(code(&["get", "vm", "none"]).0, 3);
    assert_eq!(code(&["migrate", "none", "--to", "nowhere"]).0, 3);
    assert_eq!(code(&["create", "vm", "web", "--memory", "3MiB"]).0, 2);
    let (refused, _, stderr) = code(&["create", "vm", "web", "--memory", "8MiB"]);
    assert_eq!(refused, 4, "no host is there: {stderr}");
    assert!(stderr.contains("reason: NO_HOST"), "{stderr}");
    // Without TLS nobody knows which agent answers.
    let (unknown, _, stderr) = code(&["get", "vms", "--agent", "host-a"]);
    assert_eq!(unknown, 2, "{stderr}");
    assert!(stderr.contains("--tls-dir"), "{stderr}");
    let silent = run(&["get", "vms", "--server", "unix:/nonexistent/endpoint"]);
    assert_eq!(silent.0, Some(5));
    assert!(
        silent
            .2
            .contains("unix:/nonexistent/endpoint does not answer"),
        "{}",
        silent.2
    );
}

#[test]
fn an_empty_list_is_no_success_while_a_host_is_silent() {
    let states = [slat_test_dir::TestDir::new(), slat_test_dir::TestDir::new()];
    let server = Daemon::start(&["server"], states[0].path());
    let endpoint = server.address.to_string();
    let agent = Daemon::start(
        &["agent", "--name", "host-a", "--server", &endpoint],
        states[1].path(),
    );
    let started = Instant::now();
    while run(&["get", "hosts", "-o", "name", "--server", &endpoint]).1 != "hosts/host-a\n" {
        assert!(started.elapsed() < BOUND, "the host does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
    agent.signal(Signal::KILL);
    drop(agent);
    server.signal(Signal::KILL);
    drop(server);
    // It remembers the host and has not heard of it: what runs there is not known.
    let server = Daemon::start(&["server"], states[0].path());
    let endpoint = server.address.to_string();
    let (code, stdout, stderr) = run(&["get", "vms", "--server", &endpoint]);
    assert_eq!((code, stdout.as_str()), (Some(5), ""), "{stderr}");
    assert!(stderr.contains("host-a"), "{stderr}");
    assert!(!stderr.contains("no vms"), "{stderr}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let mut child = slat()
        .args(["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    assert_eq!(stderr, "");
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn a_word_that_cannot_be_read_is_shown_harmless() {
    let output = Command::new(env!("CARGO_BIN_EXE_slat"))
        .args(["get", "vm\u{1b}]0;owned\u{7}s\u{202e}"])
        .env("CLICOLOR_FORCE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert!(!text.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{text:?}");
}
