//! The files of an identity while they change: what is whole comes into force, what is not leaves
//! the old set there and is told.

mod common;

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixListener},
    path::Path,
    process::Command,
    time::Duration,
};

use common::{Ca, DAY, Wanted, chmod, handshake, uri, write_key, write_set};
use slat_test_dir::TestDir;
use slat_trust::{Credentials, Expects, TrustError};
use time::OffsetDateTime;

fn host(name: &str) -> Wanted {
    Wanted::new(&uri("agent", name))
}

/// The old set is in force, says why the new one is not, and works; with what is put right, the
/// new one is.
fn keeps_the_old(
    credentials: &Credentials,
    spoil: impl FnOnce(&Path),
    mend: impl FnOnce(&Path),
    says: &str,
) {
    let (identity, generation) = (credentials.identity(), credentials.generation());
    let dir = credentials.dir();
    spoil(dir);
    for _ in 0..2 {
        let error = credentials.refresh().expect_err("a bad set").to_string();
        assert!(error.contains(says), "{error}");
        assert_eq!(credentials.trouble(), Some(error));
    }
    assert_eq!(credentials.identity(), identity);
    assert_eq!(credentials.generation(), generation);
    let ends = handshake(
        credentials.connector(Expects::Anyone),
        credentials.acceptor(),
    );
    assert_eq!(ends, (Ok(()), Ok(())));
    mend(dir);
    credentials.refresh().expect("a good set");
    assert_eq!(credentials.trouble(), None);
}

#[test]
fn a_good_set_comes_into_force() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let clone = credentials.clone();
    let (acceptor, connector) = (
        credentials.acceptor(),
        credentials.connector(Expects::Anyone),
    );
    assert!(!credentials.refresh().expect("no change"));
    ca.fill(dir.path(), &host("b"));
    assert_eq!(
        credentials.identity().name(),
        "a",
        "not before it is looked at"
    );
    assert!(credentials.refresh().expect("a good set"));
    assert_eq!(clone.identity().name(), "b");
    assert_eq!(clone.generation(), 2);
    // What began with the old set ends with it.
    assert_eq!(handshake(connector, acceptor), (Ok(()), Ok(())));
    // The same content written anew is no new set.
    let pem = fs::read(dir.path().join("tls.crt")).expect("tls.crt");
    fs::write(dir.path().join("tls.crt"), pem).expect("tls.crt");
    assert!(!credentials.refresh().expect("no change"));
}

#[test]
fn whatever_is_broken_keeps_the_old() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let good = |dir: &Path| ca.fill(dir, &host("a"));
    for name in ["ca.crt", "tls.crt", "tls.key"] {
        let remove = |dir: &Path| fs::remove_file(dir.join(name)).expect("removed");
        keeps_the_old(&credentials, remove, good, "is missing");
        let empty = |dir: &Path| fs::write(dir.join(name), "").expect("written");
        keeps_the_old(&credentials, empty, good, "holds no");
        let cut = |dir: &Path| {
            let pem = fs::read(dir.join(name)).expect("read");
            fs::write(dir.join(name), &pem[..pem.len() / 2]).expect("written");
        };
        keeps_the_old(&credentials, cut, good, name);
        let large = |dir: &Path| {
            fs::write(dir.join(name), vec![b'A'; 10 << 20]).expect("written");
        };
        keeps_the_old(&credentials, large, good, "bytes, which no such file has");
        let directory = |dir: &Path| {
            fs::remove_file(dir.join(name)).expect("removed");
            fs::create_dir(dir.join(name)).expect("made");
        };
        let mend = |dir: &Path| {
            fs::remove_dir(dir.join(name)).expect("removed");
            good(dir);
        };
        keeps_the_old(&credentials, directory, mend, "no regular file");
    }
    let other_key = |dir: &Path| write_key(&dir.join("tls.key"), &ca.issue(&host("a")).1);
    keeps_the_old(&credentials, other_key, good, "does not belong");
    let not_der = |dir: &Path| {
        let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        fs::write(dir.join("tls.crt"), pem).expect("written");
    };
    keeps_the_old(&credentials, not_der, good, "cannot be understood");
}

#[test]
fn a_bad_list_keeps_the_old() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let remove = |dir: &Path| fs::remove_file(dir.join("crl.pem")).expect("removed");
    let list = |content: Vec<u8>| {
        move |dir: &Path| fs::write(dir.join("crl.pem"), content).expect("written")
    };
    keeps_the_old(&credentials, list(Vec::new()), remove, "holds no");
    keeps_the_old(&credentials, list(vec![b'\n'; 10 << 20]), remove, "bytes");
    let not_der = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    let says = "cannot be understood";
    keeps_the_old(&credentials, list(not_der.into()), remove, says);
    // Of another CA with the same name: it would stop every handshake.
    let forged = Ca::new("root").revoke(&[1]);
    keeps_the_old(&credentials, list(forged.into()), remove, "not signed by");
    // Of a CA that nobody here knows, and of the own one.
    let lists = Ca::new("other").revoke(&[7]) + &ca.revoke(&[1]);
    list(lists.into())(dir.path());
    assert!(credentials.refresh().expect("a good set"));
    assert_eq!(credentials.trouble(), None);
}

#[test]
fn a_key_that_everybody_reads_is_refused_with_advice() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    let key = dir.path().join("tls.key");
    for mode in [0o644, 0o604, 0o602, 0o601] {
        chmod(&key, mode);
        let error = Credentials::load(dir.path()).expect_err("open to all");
        assert!(matches!(error, TrustError::KeyOpenToAll { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{mode:04o}")));
        assert!(error.advice().contains("chmod o="), "{}", error.advice());
    }
    for mode in [0o600, 0o400, 0o640] {
        chmod(&key, mode);
        Credentials::load(dir.path()).expect("credentials");
    }
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let (open, close) = (|_: &Path| chmod(&key, 0o644), |_: &Path| chmod(&key, 0o600));
    keeps_the_old(&credentials, open, close, "open to every user");
}

#[test]
fn a_key_of_another_owner_is_told() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    if rustix::process::geteuid().is_root() {
        println!("SKIPPED: root reads every key");
        return;
    }
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let key = dir.path().join("tls.key");
    let (close, open) = (|_: &Path| chmod(&key, 0o000), |_: &Path| chmod(&key, 0o600));
    keeps_the_old(&credentials, close, open, "cannot be read");
}

#[test]
fn nothing_is_waited_for() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    let path = dir.path().join("crl.pem");
    let kind = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).expect("a pipe");
    let error = Credentials::load(dir.path()).expect_err("a pipe");
    assert!(matches!(error, TrustError::NotAFile(_)), "{error}");
    fs::remove_file(&path).expect("removed");
    let _socket = UnixListener::bind(&path).expect("a socket");
    let error = Credentials::load(dir.path()).expect_err("a socket");
    assert!(matches!(error, TrustError::Read { .. }), "{error}");
    fs::remove_file(&path).expect("removed");
    symlink("/dev/zero", &path).expect("a link");
    let error = Credentials::load(dir.path()).expect_err("a device");
    assert!(matches!(error, TrustError::NotAFile(_)), "{error}");
}

/// As the kubelet does: files are links into `..data`, which is a link to a directory with a time
/// for a name, and is replaced by a rename.
#[test]
fn a_swap_of_links_is_seen() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    let fill = |nth: &str, name: &str| {
        let data = dir.path().join(nth);
        fs::create_dir(&data).expect("made");
        ca.fill(&data, &host(name));
        let temporary = dir.path().join("..data_tmp");
        symlink(nth, &temporary).expect("a link");
        fs::rename(temporary, dir.path().join("..data")).expect("a rename");
    };
    fill("..2026_01", "a");
    for name in ["ca.crt", "tls.crt", "tls.key"] {
        symlink(Path::new("..data").join(name), dir.path().join(name)).expect("a link");
    }
    let credentials = Credentials::load(dir.path()).expect("credentials");
    fill("..2026_02", "b");
    fs::remove_dir_all(dir.path().join("..2026_01")).expect("removed");
    assert!(credentials.refresh().expect("a good set"));
    assert_eq!(credentials.identity().name(), "b");
    // Half a swap: nothing where the links lead.
    fs::remove_dir_all(dir.path().join("..2026_02")).expect("removed");
    let error = credentials.refresh().expect_err("nothing there");
    assert!(matches!(error, TrustError::Missing(_)), "{error}");
    fill("..2026_03", "c");
    assert!(credentials.refresh().expect("a good set"));
    assert_eq!(credentials.identity().name(), "c");
}

#[test]
fn a_leaf_that_names_nobody_is_no_credential() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    let mut wanted = host("a");
    wanted.uris.clear();
    ca.fill(dir.path(), &wanted);
    let error = Credentials::load(dir.path()).expect_err("no URI");
    assert!(
        matches!(error, TrustError::NotOneIdentity { found: 0, .. }),
        "{error}"
    );
    wanted.uris = vec![uri("agent", "a"), uri("agent", "b")];
    ca.fill(dir.path(), &wanted);
    let error = Credentials::load(dir.path()).expect_err("two URIs");
    assert!(
        matches!(error, TrustError::NotOneIdentity { found: 2, .. }),
        "{error}"
    );
    wanted.uris = vec!["spiffe://example.org/ns/a".to_owned()];
    ca.fill(dir.path(), &wanted);
    let error = Credentials::load(dir.path()).expect_err("another's URI");
    assert!(matches!(error, TrustError::Identity { .. }), "{error}");
    assert!(error.advice().contains("slat pki issue"));
}

#[test]
fn several_roots_are_trusted_and_the_earliest_end_is_told() {
    let dir = TestDir::new();
    let now = OffsetDateTime::now_utc();
    let (first, second) = (
        Ca::between("first", now - DAY, now + 2 * DAY),
        Ca::between("second", now - DAY, now + 5 * DAY),
    );
    let both = format!("# of two CAs\n{}\n{}", second.pem, first.pem);
    let end = |ca: &Ca, name: &str| {
        let own = dir.path().join(name);
        fs::create_dir(&own).expect("made");
        let (certificate, key) = ca.issue(&host(name));
        write_set(&own, &both, &certificate, &key);
        Credentials::load(&own).expect("credentials")
    };
    let (a, b) = (end(&first, "a"), end(&second, "b"));
    for (client, server) in [(&a, &b), (&b, &a)] {
        let ends = handshake(client.connector(Expects::Anyone), server.acceptor());
        assert_eq!(ends, (Ok(()), Ok(())));
    }
    let within = |time: std::time::SystemTime, wanted: OffsetDateTime| {
        let wanted = std::time::SystemTime::from(wanted);
        let off = time.duration_since(wanted);
        off.unwrap_or_else(|early| early.duration()) < Duration::from_secs(2)
    };
    assert!(within(a.ca_not_after(), now + 2 * DAY));
    assert!(within(a.not_after(), now + DAY));
}

#[test]
fn nothing_of_a_key_is_shown() {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    ca.fill(dir.path(), &host("a"));
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let key = fs::read_to_string(dir.path().join("tls.key")).expect("a key");
    let secret: Vec<&str> = key.lines().filter(|line| !line.contains("--")).collect();
    let mut shown = format!("{credentials:?} {:?}", credentials.acceptor());
    // A key that is cut in its middle, or is given for something else.
    for bad in [
        key.replace(secret[1], "***"),
        key.replace("PRIVATE KEY", "SECRET"),
        key.replace("-----END", "=====END"),
        key.replace('A', "B"),
    ] {
        write_key(&dir.path().join("tls.key"), &bad);
        let error = Credentials::load(dir.path()).expect_err("a bad key");
        shown += &format!("{error} {error:?} {}", error.advice());
    }
    for line in secret {
        assert!(!shown.contains(line), "{shown}");
    }
}

/// CAs that Slat did not make: RSA, P-384 and Ed25519 roots, an intermediate, keys in each form.
#[test]
fn files_of_openssl_are_taken() {
    let dir = TestDir::new();
    if !Command::new("openssl")
        .arg("version")
        .output()
        .is_ok_and(|it| it.status.success())
    {
        println!("SKIPPED: no openssl here");
        return;
    }
    let script = include_str!("openssl.sh");
    for (kind, key) in [
        ("rsa", "-algorithm RSA -pkeyopt rsa_keygen_bits:2048"),
        ("p384", "-algorithm EC -pkeyopt ec_paramgen_curve:P-384"),
        ("p256", "-algorithm EC -pkeyopt ec_paramgen_curve:P-256"),
        ("ed25519", "-algorithm ED25519"),
    ] {
        let own = dir.path().join(kind);
        fs::create_dir(&own).expect("made");
        let output = Command::new("sh")
            .args(["-ec", script])
            .env("KEY", key)
            .env("URI", uri("agent", kind))
            .current_dir(&own)
            .output()
            .expect("sh");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kind}: {said}");
        let credentials = Credentials::load(&own).expect("credentials");
        assert_eq!(credentials.trouble(), None, "{kind}");
        assert_eq!(credentials.identity().name(), kind);
        let again = || {
            let ends = handshake(
                credentials.connector(Expects::Exactly(credentials.identity())),
                credentials.acceptor(),
            );
            assert_eq!(ends, (Ok(()), Ok(())), "{kind}");
        };
        again();
        // The same key as older programs write it.
        if own.join("traditional.key").exists() {
            fs::rename(own.join("traditional.key"), own.join("tls.key")).expect("a rename");
            assert!(credentials.refresh().expect("a good set"));
            again();
        }
        fs::rename(own.join("revoked.pem"), own.join("crl.pem")).expect("a rename");
        assert!(credentials.refresh().expect("a good set"));
        let trouble = credentials.trouble().expect("revoked");
        assert!(trouble.contains("revoked"), "{trouble}");
    }
}
