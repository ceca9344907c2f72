//! Directories for `--tls-dir` that are not what they have to be: each is refused in one sentence,
//! with what to do, before anything is made.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use slat_test_dir::TestDir;

fn slat(dir: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slat"));
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("SLAT_") || name.starts_with("XDG_") {
            command.env_remove(&variable);
        }
    }
    command.args(line.split_whitespace()).env("HOME", dir);
    command.env_remove("RUST_LOG").current_dir(dir);
    command.stdin(Stdio::null()).output().unwrap()
}

/// A CA, and a directory each for a server, an agent and a user.
struct Files(TestDir);

impl Files {
    fn make() -> Self {
        let made = Self(TestDir::new());
        made.done("pki init --dir ca --domain example.org");
        for (kind, name) in [("server", "main"), ("agent", "host-a"), ("user", "ann")] {
            made.done(&format!("pki issue {kind} {name} --dir ca --out {kind}"));
        }
        made
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn done(&self, line: &str) {
        let output = slat(self.0.path(), line);
        assert!(output.status.success(), "slat {line}: {output:?}");
    }

    /// One sentence and one line of advice that have these words; nothing is made.
    fn refused(&self, line: &str, words: &[&str]) {
        let output = slat(self.0.path(), line);
        let said = String::from_utf8(output.stderr).unwrap();
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "slat {line}: {code:?} {said}");
        assert_eq!(output.stdout, b"", "slat {line}");
        let lines: Vec<&str> = said.lines().collect();
        let [sentence, advice] = lines.as_slice() else {
            panic!("slat {line}: {said}");
        };
        assert!(sentence.starts_with("error: "), "slat {line}: {said}");
        assert!(advice.starts_with("  next: "), "slat {line}: {said}");
        for word in words {
            assert!(said.contains(word), "slat {line}: no {word:?}: {said}");
        }
        assert!(!self.path("state").exists(), "slat {line} made something");
    }

    /// The same of every command that reads the directory of its kind.
    fn refused_everywhere(&self, words: &[&str]) {
        self.refused(
            "server --listen 127.0.0.1:0 --state-dir state --tls-dir server",
            words,
        );
        self.refused(
            "agent --listen 127.0.0.1:0 --state-dir state --tls-dir agent",
            words,
        );
        self.refused("get hosts --server 127.0.0.1:1 --tls-dir user", words);
    }

    fn each(&self, change: impl Fn(PathBuf)) {
        for kind in ["server", "agent", "user"] {
            change(self.path(kind));
        }
    }
}

#[test]
fn a_directory_that_is_not_there_or_not_whole() {
    let files = Files::make();
    files.each(|dir| fs::remove_file(dir.join("tls.key")).unwrap());
    files.refused_everywhere(&["tls.key", "slat pki issue"]);
    files.each(|dir| fs::remove_dir_all(dir).unwrap());
    files.refused_everywhere(&["ca.crt", "slat pki issue"]);
}

#[test]
fn a_key_of_another_certificate() {
    let files = Files::make();
    files.done("pki issue user other --dir ca --out other");
    let other = files.path("other/tls.key");
    files.each(|dir| {
        fs::copy(&other, dir.join("tls.key")).unwrap();
    });
    files.refused_everywhere(&["tls.key", "slat pki renew --out"]);
}

#[test]
fn a_key_that_everybody_can_read() {
    let files = Files::make();
    files.each(|dir| {
        let open = fs::Permissions::from_mode(0o644);
        fs::set_permissions(dir.join("tls.key"), open).unwrap();
    });
    files.refused_everywhere(&["tls.key", "644", "chmod o="]);
}

#[test]
fn a_file_that_is_no_pem_and_its_contents_are_not_shown() {
    let files = Files::make();
    files.each(|dir| {
        let key = fs::read_to_string(dir.join("tls.key")).unwrap();
        let broken = key.replace("PRIVATE KEY", "SECRET");
        fs::write(dir.join("tls.key"), broken).unwrap();
    });
    files.refused_everywhere(&["tls.key"]);
    let key = fs::read_to_string(files.path("user/tls.key")).unwrap();
    let output = slat(files.0.path(), "get hosts --tls-dir user");
    let said = String::from_utf8(output.stderr).unwrap();
    let shows = |line: &str| line.len() >= 16 && said.contains(&line[..16]);
    let secret = key.lines().filter(|line| !line.starts_with("--"));
    assert!(!secret.into_iter().any(shows), "{said}");
}

#[test]
fn a_certificate_of_another_kind_or_name() {
    let files = Files::make();
    let line = |role: &str, dir: &str| {
        format!("{role} --listen 127.0.0.1:0 --state-dir state --tls-dir {dir}")
    };
    for dir in ["agent", "user"] {
        files.refused(
            &line("server", dir),
            &["which is no server", "slat pki issue server NAME"],
        );
    }
    for dir in ["server", "user"] {
        files.refused(
            &line("agent", dir),
            &["which is no agent", "slat pki issue agent NAME"],
        );
    }
    files.refused(
        &line("agent --name host-b", "agent"),
        &[
            "--name host-b",
            "spiffe://example.org/slat/agent/host-a",
            "slat pki issue agent host-b",
        ],
    );
}
