//! `slat pki` as it is typed: a CA, what it gives out, what it says, and what it refuses.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;
use slat_test_dir::TestDir;

/// What a command ended with, printed, and said.
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

/// `line` typed in `dir`, with a home there.
fn slat(dir: &Path, line: &str) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slat"));
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("SLAT_") || name.starts_with("XDG_") {
            command.env_remove(&variable);
        }
    }
    let output = command
        .args(line.split_whitespace())
        .env("HOME", dir)
        .env_remove("RUST_LOG")
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Ended {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn done(dir: &Path, line: &str) -> String {
    let ended = slat(dir, line);
    assert_eq!(ended.code, 0, "slat {line}: {}", ended.stderr);
    ended.stdout
}

fn json(dir: &Path, line: &str) -> Value {
    let text = done(dir, &format!("{line} -o json"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn refused(dir: &Path, line: &str, code: i32, says: &[&str]) {
    let ended = slat(dir, line);
    assert_eq!(ended.code, code, "slat {line}: {}", ended.stderr);
    assert_eq!(ended.stdout, "");
    for words in says {
        assert!(
            ended.stderr.contains(words),
            "slat {line}: {}",
            ended.stderr
        );
    }
}

#[test]
fn a_ca_from_its_first_root_to_its_second() {
    let dir = TestDir::new();
    let dir = dir.path();
    let text = done(dir, "pki init --domain example.org");
    assert!(text.contains("the CA of example.org"), "{text}");
    assert!(dir.join(".config/slat/pki/ca.key").exists());
    for (kind, name) in [("server", "main"), ("agent", "host-a"), ("user", "ann")] {
        let text = done(dir, &format!("pki issue {kind} {name} --out {name}-tls"));
        let identity = format!("spiffe://example.org/slat/{kind}/{name}");
        assert!(text.contains(&identity), "{text}");
        for file in ["ca.crt", "tls.crt", "tls.key", "crl.pem"] {
            assert!(dir.join(format!("{name}-tls")).join(file).exists());
        }
    }
    let mode = fs::metadata(dir.join("main-tls/tls.key")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);

    // The soonest to end first; whole names and serial numbers under -o wide too.
    let table = done(dir, "pki list");
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("IDENTITY"), "{table}");
    assert!(lines[1].starts_with("user/ann"), "{table}");
    assert!(lines[1].contains("29 days"), "{table}");
    assert_eq!(lines.len(), 4);
    let names = done(dir, "pki list -o name");
    let mut names: Vec<&str> = names.lines().collect();
    // The two others end in the same second, or in that after it.
    names[1..].sort_unstable();
    assert_eq!(names, ["user/ann", "agent/host-a", "server/main"]);
    assert!(done(dir, "pki list -o wide").contains("REVOKED"));

    let listed = json(dir, "pki list");
    assert_eq!(listed["roots"].as_array().unwrap().len(), 1);
    let serial = |name: &str| {
        let listed = json(dir, "pki list");
        let all = listed["certificates"].as_array().unwrap().clone();
        let found = all.into_iter().find(|it| {
            let identity = it["identity"].as_str().unwrap();
            identity.ends_with(name) && it["state"] == "valid"
        });
        found.unwrap()["serial"].as_str().unwrap().to_owned()
    };
    let old = serial("host-a");
    let text = done(dir, "pki renew --out host-a-tls --within 30d");
    assert!(text.contains("not yet"), "{text}");
    assert_eq!(serial("host-a"), old);
    let text = done(
        dir,
        "pki renew --out host-a-tls --out main-tls --lifetime 8h",
    );
    assert!(text.contains("host-a-tls: agent/host-a renewed"), "{text}");
    assert!(text.contains("main-tls: server/main renewed"), "{text}");
    assert_ne!(serial("host-a"), old);
    assert_eq!(done(dir, "pki list").lines().count(), 4);
    assert_eq!(done(dir, "pki list --all").lines().count(), 6);

    let text = done(dir, "pki revoke user/ann");
    assert!(
        text.contains("user/ann") && text.contains("publish"),
        "{text}"
    );
    let listed = json(dir, "pki list");
    let states = listed["certificates"].as_array().unwrap();
    let revoked = states.iter().find(|it| it["state"] == "revoked").unwrap();
    assert!(revoked["revoked"].as_str().unwrap().ends_with('Z'));
    refused(
        dir,
        "pki renew --out ann-tls",
        1,
        &["revoked", "slat pki issue"],
    );
    let before = fs::read(dir.join("main-tls/crl.pem")).unwrap();
    done(dir, "pki publish --out main-tls");
    assert_ne!(before, fs::read(dir.join("main-tls/crl.pem")).unwrap());

    let rotated = json(dir, "pki rotate");
    assert_eq!(rotated["root"]["issues"], true);
    refused(dir, "pki retire", 1, &["in use", "renew them first"]);
    done(dir, "pki renew --out host-a-tls --out main-tls");
    let text = done(dir, "pki retire");
    assert!(text.contains("no longer trusted"), "{text}");
    assert_eq!(json(dir, "pki list")["roots"].as_array().unwrap().len(), 1);
}

#[test]
fn what_cannot_be_is_said_with_what_to_do() {
    let dir = TestDir::new();
    let dir = dir.path();
    refused(dir, "pki list", 1, &["no CA", "slat pki init --dir"]);
    refused(dir, "pki init --domain Example", 2, &["no trust domain"]);
    done(dir, "pki init --dir ca --domain example.org");
    refused(
        dir,
        "pki init --dir ca --domain example.org",
        1,
        &["already", "slat pki rotate"],
    );
    refused(
        dir,
        "pki issue agent Host_A --dir ca --out x",
        2,
        &["\"Host_A\" is no name"],
    );
    refused(
        dir,
        "pki issue agent a --dir ca --out x --lifetime 1s",
        2,
        &["too short"],
    );
    done(dir, "pki issue agent a --dir ca --out x");
    refused(
        dir,
        "pki issue agent b --dir ca --out x",
        1,
        &["already", "slat pki renew --out x"],
    );
    refused(dir, "pki revoke agent/b --dir ca", 1, &["slat pki list"]);
    refused(dir, "pki retire --dir ca", 1, &["no root"]);
    // Another CA's directory is not written into unless that is meant.
    done(dir, "pki init --dir other --domain example.org");
    let publish = "pki publish --dir other --out x";
    refused(dir, publish, 1, &["not issued by this CA", "--force"]);
    let trusted = |of: &str| fs::read(dir.join(of)).unwrap();
    assert_eq!(trusted("x/ca.crt"), trusted("ca/ca.crt"));
    done(dir, &format!("{publish} --force"));
    assert_eq!(trusted("x/ca.crt"), trusted("other/ca.crt"));
    done(dir, "pki publish --dir ca --out x --force");
    // The others are renewed although one cannot be.
    let ended = slat(dir, "pki renew --dir ca --out nowhere --out x --out none");
    assert_eq!(ended.code, 1);
    assert!(
        ended.stdout.contains("x: agent/a renewed"),
        "{}",
        ended.stdout
    );
    for dir in ["nowhere", "none"] {
        assert!(ended.stderr.contains(dir), "{}", ended.stderr);
    }
    // Under json, errors are.
    let ended = slat(dir, "pki revoke agent/b --dir ca -o json");
    let error: Value = serde_json::from_str(ended.stderr.trim()).unwrap();
    assert_eq!(error["error"]["exitCode"], 1);
    assert!(
        error["error"]["advice"]
            .as_str()
            .unwrap()
            .contains("slat pki list")
    );
    // A key that everybody reads.
    let key = dir.join("ca/ca.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refused(dir, "pki list --dir ca", 1, &["mode 0644", "chmod o="]);
}

#[test]
fn an_end_that_is_the_roots_is_noted() {
    let dir = TestDir::new();
    let dir = dir.path();
    done(dir, "pki init --dir ca --domain example.org");
    let ended = slat(dir, "pki issue user a --dir ca --out a --lifetime 36500d");
    assert_eq!(ended.code, 0);
    assert!(
        ended.stderr.contains("with the CA's root"),
        "{}",
        ended.stderr
    );
    let ended = slat(dir, "pki issue user b --dir ca --out b");
    assert_eq!((ended.code, &*ended.stderr), (0, ""));
}
