//! A daemon keeps what it has in memory from other processes of its own user: they can neither
//! trace it nor read it in `/proc`, and it leaves no core dump.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    fs::{Uid, chown},
    process::{Pid, Signal, geteuid, kill_process},
};
use slat_tests::binary;

/// A user without privileges.
const NOBODY: u32 = 65534;

/// Runs `line` in `dir` as nobody, with core dumps as large as they may be.
fn start(dir: &Path, line: &str) -> Child {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit -c $(ulimit -H -c); exec {line}")]);
    shell.current_dir(dir).uid(NOBODY).gid(NOBODY);
    shell.stdin(Stdio::null()).stdout(Stdio::piped());
    shell.stderr(Stdio::null()).spawn().unwrap()
}

/// Whether nobody may look into a process.
fn lets_look(pid: u32) -> bool {
    let mut cat = Command::new("cat");
    cat.arg(format!("/proc/{pid}/environ"));
    cat.uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap()
        .status
        .success()
}

/// Whether a process left a core dump in `dir` when it aborted.
fn leaves_core(mut child: Child, dir: &Path) -> bool {
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::ABORT).unwrap();
    let dumped = child.wait().unwrap().core_dumped();
    let files = fs::read_dir(dir).unwrap().flatten();
    let mut names = files.map(|file| file.file_name().into_encoded_bytes());
    dumped || names.any(|name| name.starts_with(b"core"))
}

#[test]
fn a_daemon_keeps_its_memory_to_itself() {
    if !geteuid().is_root() {
        println!("SKIPPED: only root can start processes of a user without privileges");
        return;
    }
    let home = slat_test_dir::TestDir::new();
    let dir = home.path();
    // By another process: what this one has open for writing the children of other tests have
    // too, and nobody can run it meanwhile.
    let mut copy = Command::new("cp");
    copy.arg(binary::slat().unwrap()).arg(dir.join("slat"));
    assert!(copy.status().unwrap().success());
    chown(dir, Some(Uid::from_raw(NOBODY)), None).unwrap();
    for role in ["server", "agent"] {
        let options = "--insecure-plaintext --listen 127.0.0.1:0 --state-dir";
        let mut daemon = start(dir, &format!("./slat {role} {options} {role}"));
        let mut line = String::new();
        let mut stdout = BufReader::new(daemon.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let looks = lets_look(daemon.id());
        let core = leaves_core(daemon, dir);
        assert!(line.starts_with("listening on "), "{role}: {line:?}");
        assert!(!looks, "another process looked into {role}");
        assert!(!core, "{role} left a core dump");
    }
    // Another program lets them, and leaves one where this machine has any.
    let other = start(dir, "sleep 60");
    let looks = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        let name = fs::read_to_string(format!("/proc/{}/comm", other.id()));
        name.is_ok_and(|name| name == "sleep\n") && lets_look(other.id())
    });
    let core = leaves_core(other, dir);
    assert!(looks, "nobody cannot look into what is nobody's");
    if !core {
        println!("SKIPPED core dumps: this machine leaves none");
    }
}
