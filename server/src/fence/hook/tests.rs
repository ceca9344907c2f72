//! The hook as it is run: real programs, one a test.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use slat_test_dir::TestDir;

use super::*;

fn host() -> Fenceable {
    Fenceable {
        host: "hosts/a".into(),
        address: "192.0.2.7:7401".into(),
        incarnation: "start-1".into(),
        uid: "h-1".into(),
    }
}

fn hook(program: impl Into<PathBuf>, timeout: Duration) -> FenceHook {
    FenceHook {
        program: program.into(),
        timeout,
    }
}

/// A shell script with these lines. Another process writes it: a child that another test forks
/// meanwhile would have it open for writing, and nobody could run it until that child is its own
/// program.
fn script(directory: &Path, lines: &str) -> PathBuf {
    let path = directory.join("fence");
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(&path);
    let mut shell = shell.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = shell.stdin.take().unwrap();
    write!(input, "#!/bin/sh\n{lines}\n").unwrap();
    drop(input);
    assert!(shell.wait().unwrap().success());
    path
}

const PATIENCE: Duration = Duration::from_secs(60);

async fn run_script(lines: &str, timeout: Duration) -> Result<Done, HookError> {
    let directory = TestDir::new();
    let hook = hook(script(directory.path(), lines), timeout);
    run(&hook, &host(), "id-1", &CancellationToken::new()).await
}

fn lives(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    // A zombie that nobody has reaped yet does nothing any more.
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn one_that_ends_with_0_is_believed_and_what_it_printed_is_kept() {
    let done = run_script("echo \"$1 is off\"; echo noise >&2", PATIENCE).await;
    assert_eq!(done.unwrap().proof, "a is off");
}

#[tokio::test]
async fn it_knows_the_host_and_nothing_of_the_server() {
    let done = run_script("env; test -t 0 || cat; pwd", PATIENCE)
        .await
        .unwrap();
    let mut said: Vec<&str> = done.proof.lines().collect();
    // What the shell adds itself.
    said.retain(|line| {
        !["PWD=", "OLDPWD=", "SHLVL=", "_=", "PATH="]
            .iter()
            .any(|own| line.starts_with(own))
    });
    said.sort_unstable();
    assert_eq!(
        said,
        [
            "/",
            "SLAT_FENCE_ADDRESS=192.0.2.7:7401",
            "SLAT_FENCE_HOST=a",
            "SLAT_FENCE_ID=id-1",
            "SLAT_FENCE_INCARNATION=start-1",
            "SLAT_FENCE_UID=h-1",
        ]
    );
}

#[tokio::test]
async fn what_an_agent_said_of_itself_does_not_keep_it_from_running() {
    let directory = TestDir::new();
    let hook = hook(script(directory.path(), "env"), PATIENCE);
    let odd = Fenceable {
        address: "unix:/a\0b".into(),
        incarnation: "a\0b".into(),
        uid: "a\nSLAT_FENCE_HOST=b".into(),
        ..host()
    };
    let done = run(&hook, &odd, "id-1", &CancellationToken::new()).await;
    let said = done.unwrap().proof;
    let mut told: Vec<&str> = said.lines().collect();
    told.retain(|line| line.starts_with("SLAT_"));
    told.sort_unstable();
    assert_eq!(told, ["SLAT_FENCE_HOST=a", "SLAT_FENCE_ID=id-1"]);
}

#[tokio::test]
async fn one_that_fails_says_why() {
    let error = run_script("echo proof; echo 'no route to bmc' >&2; exit 3", PATIENCE)
        .await
        .unwrap_err();
    let api = error.to_api(&hook("/bin/fence", PATIENCE), "hosts/a");
    assert_eq!(api.reason, Reason::FenceFailed);
    assert_eq!(api.metadata["said"], "no route to bmc");
    assert!(api.metadata["exit"].contains('3'), "{api}");
    let killed = run_script("kill -9 $$", PATIENCE).await.unwrap_err();
    assert!(matches!(killed, HookError::Failed { .. }), "{killed}");
}

#[tokio::test]
async fn one_that_takes_too_long_is_killed_with_all_that_it_began() {
    let directory = TestDir::new();
    let pid = directory.path().join("pid");
    let lines = format!(
        "sleep 600 & echo $! > {0}.new; mv {0}.new {0}; echo waiting >&2; wait",
        pid.display()
    );
    let hook = hook(script(directory.path(), &lines), Duration::from_secs(3));
    let error = run(&hook, &host(), "id", &CancellationToken::new()).await;
    let Err(HookError::Late { said, took }) = error else {
        panic!("{error:?}");
    };
    assert_eq!(said, "waiting");
    assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(30));
    let began = fs::read_to_string(&pid).unwrap();
    let begun = Instant::now();
    while lives(&began) {
        assert!(begun.elapsed() < Duration::from_secs(10), "its child lives");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_server_that_stops_ends_it() {
    let directory = TestDir::new();
    let hook = hook(script(directory.path(), "exec sleep 600"), PATIENCE * 10);
    let stop = CancellationToken::new();
    stop.cancel();
    let begun = Instant::now();
    let error = run(&hook, &host(), "id", &stop).await.unwrap_err();
    assert!(matches!(error, HookError::Stopped), "{error}");
    assert!(begun.elapsed() < PATIENCE);
}

#[tokio::test]
async fn much_output_is_read_and_little_of_it_kept() {
    let lines = "printf begin; head -c 3000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero | tr '\\0' y >&2; printf end >&2";
    let done = run_script(lines, PATIENCE).await.unwrap();
    assert_eq!(done.proof.len(), PROOF);
    assert!(done.proof.starts_with("beginxxx"));
    let failed = run_script(&format!("{lines}; exit 1"), PATIENCE).await;
    let Err(HookError::Failed { said, .. }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(said.len(), SAID);
    assert!(said.ends_with("yyyend"), "the last of it");
}

#[tokio::test]
async fn output_that_is_no_text_is_kept_as_far_as_it_is_one() {
    let done = run_script("printf 'off \\377\\376 now'", PATIENCE)
        .await
        .unwrap();
    assert_eq!(done.proof, "off \u{fffd}\u{fffd} now");
    let lines = "head -c 4096 /dev/zero | tr '\\0' '\\377'";
    let done = run_script(lines, PATIENCE).await.unwrap();
    assert!(done.proof.len() <= PROOF && !done.proof.is_empty());
}

#[tokio::test]
async fn output_that_others_hold_open_is_not_waited_for() {
    let begun = Instant::now();
    let done = run_script("echo off; sleep 20 & exit 0", PATIENCE)
        .await
        .unwrap();
    assert_eq!(done.proof, "off");
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn one_that_is_not_there_or_no_program_fails() {
    let directory = TestDir::new();
    let stop = CancellationToken::new();
    let missing = hook(directory.path().join("none"), PATIENCE);
    let error = run(&missing, &host(), "id", &stop).await.unwrap_err();
    let api = error.to_api(&missing, "hosts/a");
    assert!(api.metadata["exit"].contains("No such file"), "{api}");
    let plain = script(directory.path(), "echo off");
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    let plain = hook(plain, PATIENCE);
    let error = run(&plain, &host(), "id", &stop).await.unwrap_err();
    assert!(matches!(error, HookError::Run(_)), "{error}");
}
