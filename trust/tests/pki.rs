//! A CA in a directory: what it issues is taken, what it revokes is refused, and its root changes
//! while everything goes on.

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, SystemTime},
};

use common::{handshake, refused};
use slat_test_dir::TestDir;
use slat_trust::{
    Credentials, Expects, Identity, Kind, Refusal, TrustError,
    pki::{Ca, PkiError, Validity},
};

struct World {
    dir: TestDir,
    ca: Ca,
}

fn world() -> World {
    let dir = TestDir::new();
    let ca = Ca::init(&dir.path().join("ca"), "example.org").expect("a CA");
    World { dir, ca }
}

impl World {
    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn issue(&self, kind: Kind, name: &str) -> Credentials {
        let out = self.out(name);
        self.ca.issue(kind, name, None, &out).expect("issued");
        Credentials::load(&out).expect("credentials")
    }
}

fn meet(client: &Credentials, server: &Credentials) -> Result<(), Refusal> {
    let (client, server) = handshake(client.connector(Expects::Anyone), server.acceptor());
    for end in [&server, &client] {
        if end.is_err() {
            return Err(refused(end));
        }
    }
    Ok(())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("metadata").permissions().mode() & 0o7777
}

#[test]
fn what_is_issued_is_taken() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let server = world.issue(Kind::Server, "main");
    let user = world.issue(Kind::User, "ann.b");
    assert_eq!(
        agent.identity().to_string(),
        "spiffe://example.org/slat/agent/host-a"
    );
    for credentials in [&agent, &server, &user] {
        assert_eq!(credentials.trouble(), None);
        assert_eq!(meet(credentials, &server), Ok(()));
    }
    assert_eq!(meet(&server, &agent), Ok(()));
    // A user is no server.
    assert_eq!(
        meet(&agent, &user).expect_err("refused").word(),
        "bad_certificate"
    );
    let days = |it: &Credentials| {
        let left = it.not_after().duration_since(SystemTime::now());
        left.expect("a future").as_secs().div_ceil(24 * 3600)
    };
    assert_eq!((days(&agent), days(&server), days(&user)), (90, 90, 30));
    assert_eq!(mode(&world.out("host-a").join("tls.key")), 0o600);
    assert_eq!(mode(&world.ca.dir().join("ca.key")), 0o600);
    assert_eq!(mode(world.ca.dir()), 0o700);
    let issued = world.ca.issued().expect("records");
    let mut names: Vec<&str> = issued.iter().map(|it| it.identity.name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["ann.b", "host-a", "main"]);
}

#[test]
fn nothing_is_overwritten() {
    let world = world();
    world.issue(Kind::Agent, "host-a");
    let again = world
        .ca
        .issue(Kind::Agent, "host-b", None, &world.out("host-a"));
    assert!(matches!(again, Err(PkiError::Taken(_))), "{again:?}");
    let again = Ca::init(world.ca.dir(), "example.net");
    assert!(matches!(again, Err(PkiError::Exists(_))), "{again:?}");
    assert_eq!(world.ca.domain().expect("a domain"), "example.org");
    let none = Ca::open(&world.out("host-a"));
    assert!(none.is_err(), "{none:?}");
    let none = Ca::open(world.dir.path());
    assert!(matches!(none, Err(PkiError::NoCa(_))), "{none:?}");
    assert!(!world.dir.path().join(".lock").exists());
    let none = Ca::open(&world.out("nowhere"));
    assert!(matches!(none, Err(PkiError::NoCa(_))), "{none:?}");
    let bad = Ca::init(&world.out("new"), "Example.org");
    assert!(matches!(bad, Err(PkiError::Identity(_))), "{bad:?}");
    let bad = world.ca.issue(Kind::User, "../x", None, &world.out("x"));
    assert!(matches!(bad, Err(PkiError::Identity(_))), "{bad:?}");
}

#[test]
fn a_certificate_ends_with_its_root_at_the_latest() {
    let world = world();
    let out = world.out("host-a");
    let validity = Validity::from_now(Duration::from_secs(100 * 365 * 24 * 3600)).expect("a time");
    let issued = world.ca.issue(Kind::Agent, "host-a", Some(validity), &out);
    let root = world.ca.roots().expect("roots")[0].not_after;
    assert_eq!(issued.expect("issued").not_after, root);
    let credentials = Credentials::load(&out).expect("credentials");
    assert_eq!(credentials.not_after(), credentials.ca_not_after());

    let past = Validity {
        not_before: SystemTime::UNIX_EPOCH,
        not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
    };
    let bad = world
        .ca
        .issue(Kind::Agent, "host-b", Some(past), &world.out("host-b"));
    assert!(matches!(bad, Err(PkiError::Time(_))), "{bad:?}");
}

/// Also how a test of another crate gets such certificates: a root begins five minutes ago.
#[test]
fn what_is_over_or_has_not_begun_can_be_issued() {
    let world = world();
    let server = world.issue(Kind::Server, "main");
    let now = SystemTime::now();
    let minutes = |count: u64| Duration::from_secs(count * 60);
    for (name, not_before, not_after, refusal) in [
        ("late", now - minutes(4), now - minutes(2), Refusal::Expired),
        (
            "early",
            now + minutes(60),
            now + minutes(90),
            Refusal::NotYetValid,
        ),
    ] {
        let validity = Validity {
            not_before,
            not_after,
        };
        let out = world.out(name);
        let issued = world.ca.issue(Kind::Agent, name, Some(validity), &out);
        issued.expect("issued");
        let agent = Credentials::load(&out).expect("credentials");
        assert_eq!(meet(&agent, &server), Err(refusal));
    }
}

#[test]
fn a_renewal_is_another_key_for_the_same_identity() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let out = world.out("host-a");
    let key = fs::read(out.join("tls.key")).expect("a key");
    fs::set_permissions(out.join("tls.key"), fs::Permissions::from_mode(0o640)).expect("chmod");
    let old = world.ca.issued().expect("records");
    let new = world.ca.renew(&out, None).expect("renewed");
    assert_ne!(old[0].serial, new.serial);
    assert_ne!(key, fs::read(out.join("tls.key")).expect("a key"));
    assert!(!out.join(".tls.key.next").exists());
    // The group that could read the key still can.
    assert_eq!(mode(&out.join("tls.key")), 0o640);
    assert!(agent.refresh().expect("a good set"));
    assert_eq!(agent.generation(), 2);
    assert!(!agent.refresh().expect("no change"));
    let records = world.ca.issued().expect("records");
    let replaced = records.iter().find(|it| it.serial == old[0].serial);
    assert_eq!(
        replaced.expect("kept").replaced_by.as_deref(),
        Some(&*new.serial)
    );
    let elsewhere = self::world();
    let bad = elsewhere.ca.renew(&out, None);
    assert!(matches!(bad, Err(PkiError::NotIssuedHere(_))), "{bad:?}");
}

#[test]
fn a_renewed_key_has_the_owner_of_the_old_one() {
    let world = world();
    world.issue(Kind::Agent, "host-a");
    let out = world.out("host-a");
    let chown = |name: &str| std::os::unix::fs::chown(out.join(name), Some(4321), Some(4322));
    if chown("tls.key").is_err() {
        println!("SKIPPED: only root gives files away");
        return;
    }
    world.ca.renew(&out, None).expect("renewed");
    let owner = |name: &str| {
        let metadata = fs::metadata(out.join(name)).expect("metadata");
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("tls.key"), (4321, 4322));
    assert_ne!(owner("tls.crt"), (4321, 4322));
    assert_eq!(mode(&out.join("tls.key")), 0o600);
}

#[test]
fn no_reader_sees_half_a_renewal() {
    let world = world();
    let out = world.out("host-a");
    world
        .ca
        .issue(Kind::Agent, "host-a", None, &out)
        .expect("issued");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0_u32;
            while !is_over.load(Ordering::Acquire) {
                match Credentials::load(&out) {
                    Ok(_) => seen += 1,
                    // It changed each time that it was read, which is said and is no half set.
                    Err(TrustError::Unsettled(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            seen
        });
        for _ in 0..40 {
            world.ca.renew(&out, None).expect("renewed");
        }
        is_over.store(true, Ordering::Release);
        assert!(reader.join().expect("no half set") > 0);
    });
}

#[test]
fn a_renewal_that_dies_leaves_a_set() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let out = world.out("host-a");
    let old_key = fs::read(out.join("tls.key")).expect("a key");
    world.ca.renew(&out, None).expect("renewed");
    // As it stands between the two renames.
    fs::rename(out.join("tls.key"), out.join(".tls.key.next")).expect("a rename");
    fs::write(out.join("tls.key"), old_key).expect("a write");
    common::chmod(&out.join("tls.key"), 0o600);
    assert!(agent.refresh().expect("a good set"));
    let server = world.issue(Kind::Server, "main");
    assert_eq!(meet(&agent, &server), Ok(()));
    Credentials::load(&out).expect("also after a restart");
    world.ca.renew(&out, None).expect("renewed");
    assert!(!out.join(".tls.key.next").exists());
    assert!(agent.refresh().expect("a good set"));
    assert_eq!(meet(&agent, &server), Ok(()));
}

/// The second one gets no further than its new key, as on a disk that is full.
#[test]
fn a_renewal_that_dies_after_one_that_died_leaves_a_set() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let out = world.out("host-a");
    let old_key = fs::read_to_string(out.join("tls.key")).expect("a key");
    world.ca.renew(&out, None).expect("renewed");
    fs::rename(out.join("tls.key"), out.join(".tls.key.next")).expect("a rename");
    common::write_key(&out.join("tls.key"), &old_key);
    let in_the_way = out.join(".tls.crt.new");
    fs::create_dir(&in_the_way).expect("a directory");
    let bad = world.ca.renew(&out, None);
    assert!(matches!(bad, Err(PkiError::Write { .. })), "{bad:?}");
    assert!(agent.refresh().expect("a good set"));
    Credentials::load(&out).expect("also after a restart");
    fs::remove_dir(&in_the_way).expect("removed");
    world.ca.renew(&out, None).expect("renewed");
    Credentials::load(&out).expect("credentials");
    assert!(!out.join(".tls.key.next").exists());
}

#[test]
fn what_is_revoked_is_refused() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let server = world.issue(Kind::Server, "main");
    let publish = || {
        world.ca.publish(server.dir()).expect("published");
        server.refresh().expect("a good set")
    };
    let revoked = world.ca.revoke("agent/host-a").expect("revoked");
    assert_eq!(revoked.len(), 1);
    assert_eq!(revoked[0].identity, agent.identity());
    assert_eq!(
        revoked[0].serial,
        world.ca.holds(agent.dir()).expect("a record").serial
    );
    assert_eq!(meet(&agent, &server), Ok(()), "not before it is published");
    assert!(publish());
    assert_eq!(meet(&agent, &server), Err(Refusal::Revoked));
    let again = world.ca.renew(agent.dir(), None);
    assert!(matches!(again, Err(PkiError::Revoked(_))), "{again:?}");

    // One issued later is good, and stays good when the list is written again.
    let out = world.out("anew");
    world
        .ca
        .issue(Kind::Agent, "host-a", None, &out)
        .expect("issued");
    let anew = Credentials::load(&out).expect("credentials");
    publish();
    assert_eq!(meet(&anew, &server), Ok(()));
    assert_eq!(meet(&agent, &server), Err(Refusal::Revoked));

    // By serial, and again by identity: all until now.
    let user = world.issue(Kind::User, "ann");
    let issued = world.ca.issued().expect("records");
    let serial = issued.iter().find(|it| it.identity == user.identity());
    let serial = &serial.expect("a record").serial;
    assert_eq!(world.ca.revoke(serial).expect("revoked").len(), 1);
    let identity: Identity = anew.identity();
    let revoked = world.ca.revoke(&identity.to_string()).expect("revoked");
    assert_eq!(revoked.len(), 2);
    publish();
    assert_eq!(meet(&user, &server), Err(Refusal::Revoked));
    assert_eq!(meet(&anew, &server), Err(Refusal::Revoked));
    for unknown in ["agent/host-b", "00ff", "../../etc/passwd", ""] {
        let bad = world.ca.revoke(unknown);
        assert!(matches!(bad, Err(PkiError::Unknown(_))), "{bad:?}");
    }
}

/// Two CAs for one domain, as after a new start: the trust of one is not the other's to write.
#[test]
fn the_trust_of_another_ca_is_published_over_only_by_force() {
    let (world, other) = (world(), self::world());
    let agent = world.issue(Kind::Agent, "host-a");
    let trusted = || fs::read(agent.dir().join("ca.crt")).expect("ca.crt");
    let before = trusted();
    let bad = other.ca.publish(agent.dir());
    let Err(error @ PkiError::OthersTrust(_)) = bad else {
        panic!("{bad:?}");
    };
    assert!(error.advice().expect("advice").contains("--force"));
    assert_eq!(trusted(), before);
    other.ca.publish_by_force(agent.dir()).expect("forced");
    let now = fs::read(other.ca.dir().join("ca.crt")).expect("ca.crt");
    assert_eq!(trusted(), now);
    // Another domain is refused whatever is asked for.
    let elsewhere = Ca::init(&world.out("net"), "example.net").expect("a CA");
    for bad in [
        elsewhere.publish(agent.dir()),
        elsewhere.publish_by_force(agent.dir()),
    ] {
        assert!(matches!(bad, Err(PkiError::OtherDomain { .. })), "{bad:?}");
    }
}

/// Every pair meets, whatever each of them has been given yet.
#[test]
fn a_root_is_replaced_while_everything_goes_on() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let server = world.issue(Kind::Server, "main");
    let all_meet = |others: &[&Credentials]| {
        for credentials in [&agent, &server].iter().chain(others) {
            credentials.refresh().expect("a good set");
            assert_eq!(credentials.trouble(), None);
        }
        for other in [&agent, &server].iter().chain(others) {
            assert_eq!(meet(other, &server), Ok(()), "{other:?}");
            assert_eq!(meet(&server, other), Ok(()), "{other:?}");
        }
    };
    let old = world.ca.roots().expect("roots")[0].serial.clone();
    let new = world.ca.rotate().expect("a new root");
    assert_ne!(old, new.serial);
    all_meet(&[]);
    // Nobody but the newcomer knows the new root.
    let newcomer = world.issue(Kind::Agent, "host-b");
    all_meet(&[&newcomer]);
    // A second rotation before the first one is over.
    world.ca.rotate().expect("a new root");
    let third = world.issue(Kind::Agent, "host-c");
    all_meet(&[&newcomer, &third]);

    let bad = world.ca.retire(false);
    assert!(matches!(bad, Err(PkiError::InUse { .. })), "{bad:?}");
    let advice = bad.expect_err("in use").advice();
    assert!(advice.expect("advice").contains("renew"));
    world.ca.renew(agent.dir(), None).expect("renewed");
    all_meet(&[&newcomer, &third]);
    // An old root's list can be written as long as it is trusted.
    let stolen = world.issue(Kind::User, "stolen");
    world.ca.revoke("user/stolen").expect("revoked");
    for credentials in [&server, &newcomer, &third] {
        world.ca.renew(credentials.dir(), None).expect("renewed");
        all_meet(&[&newcomer, &third]);
    }
    assert_eq!(meet(&stolen, &server), Err(Refusal::Revoked));
    let retired = world.ca.retire(false).expect("nothing depends on them");
    assert_eq!(retired.len(), 2);
    assert_eq!(retired[1].serial, old);
    assert_eq!(world.ca.roots().expect("roots").len(), 1);
    for credentials in [&agent, &server, &newcomer, &third] {
        world.ca.publish(credentials.dir()).expect("published");
        all_meet(&[&newcomer, &third]);
        world.ca.renew(credentials.dir(), None).expect("renewed");
        all_meet(&[&newcomer, &third]);
    }
    assert!(
        fs::read_dir(world.ca.dir().join("old"))
            .expect("old")
            .next()
            .is_none()
    );
    let bad = world.ca.retire(false);
    assert!(matches!(bad, Err(PkiError::NothingToRetire)), "{bad:?}");
}

#[test]
fn a_retired_root_vouches_for_nobody() {
    let world = world();
    let agent = world.issue(Kind::Agent, "host-a");
    let server = world.issue(Kind::Server, "main");
    world.ca.rotate().expect("a new root");
    world.ca.renew(server.dir(), None).expect("renewed");
    let retired = world.ca.retire(true).expect("forced");
    assert_eq!(retired.len(), 1);
    world.ca.publish(server.dir()).expect("published");
    server.refresh().expect("a good set");
    assert_eq!(meet(&agent, &server), Err(Refusal::UnknownCa));
}

#[test]
fn a_retirement_that_dies_leaves_no_key() {
    let world = world();
    let dir = world.ca.dir();
    world.ca.rotate().expect("a new root");
    world.ca.rotate().expect("a new root");
    let names = || {
        let found = fs::read_dir(dir.join("old")).expect("old");
        let names = found.map(|it| it.expect("an entry").file_name().into_string());
        let mut names: Vec<String> = names.map(|it| it.expect("text")).collect();
        names.sort();
        names
    };
    let kept = names();
    assert_eq!(kept.len(), 2);
    let trusted = fs::read_to_string(dir.join("ca.crt")).expect("ca.crt");
    let roots: Vec<&str> = trusted
        .split_inclusive("-----END CERTIFICATE-----\n")
        .collect();
    let crosses = |world: &World| fs::read_to_string(world.ca.dir().join("cross.crt"));
    let count = |text: &str| text.matches("BEGIN CERTIFICATE").count();
    // Whole, nothing goes.
    Ca::open(dir).expect("a CA");
    assert_eq!(names(), kept);
    assert_eq!(count(&crosses(&world).expect("crosses")), 2);
    // Half written by one who died: a key, too.
    fs::write(dir.join("old/.00.key.new"), "").expect("a write");
    // Without its oldest root, which no command does, then with the first alone.
    fs::write(dir.join("ca.crt"), roots[..2].concat()).expect("a write");
    Ca::open(dir).expect("a CA");
    let second = world.ca.roots().expect("roots")[1].serial.clone();
    assert_eq!(names(), [format!("{second}.key")]);
    assert_eq!(count(&crosses(&world).expect("crosses")), 1);
    fs::write(dir.join("ca.crt"), roots[0]).expect("a write");
    Ca::open(dir).expect("a CA");
    assert_eq!(names(), [""; 0]);
    assert!(crosses(&world).is_err(), "nothing vouches for it any more");
    let agent = world.issue(Kind::Agent, "host-a");
    let own = fs::read_to_string(agent.dir().join("tls.crt")).expect("tls.crt");
    assert_eq!(count(&own), 1);
}

#[test]
fn a_rotation_that_dies_is_finished_or_forgotten() {
    let world = world();
    let dir = world.ca.dir();
    let old_key = fs::read(dir.join("ca.key")).expect("a key");
    world.ca.rotate().expect("a new root");
    // Died before the key took its place.
    fs::rename(dir.join("ca.key"), dir.join(".ca.key.next")).expect("a rename");
    common::write_key(
        &dir.join("ca.key"),
        std::str::from_utf8(&old_key).expect("PEM"),
    );
    let agent = world.issue(Kind::Agent, "host-a");
    assert_eq!(agent.trouble(), None);
    assert!(!dir.join(".ca.key.next").exists());
    // Died before the root was trusted.
    common::write_key(
        &dir.join(".ca.key.next"),
        std::str::from_utf8(&old_key).expect("PEM"),
    );
    world.issue(Kind::Agent, "host-b");
    assert!(!dir.join(".ca.key.next").exists());
    // Another's key is no key.
    common::write_key(
        &dir.join("ca.key"),
        std::str::from_utf8(&old_key).expect("PEM"),
    );
    let bad = world
        .ca
        .issue(Kind::Agent, "host-c", None, &world.out("host-c"));
    assert!(matches!(bad, Err(PkiError::Read(_))), "{bad:?}");
}

#[test]
fn a_ca_whose_key_everybody_reads_issues_nothing() {
    let world = world();
    common::chmod(&world.ca.dir().join("ca.key"), 0o604);
    let bad = world
        .ca
        .issue(Kind::Agent, "host-a", None, &world.out("host-a"));
    let Err(PkiError::Read(error @ TrustError::KeyOpenToAll { .. })) = bad else {
        panic!("{bad:?}");
    };
    assert!(error.to_string().contains("0604"), "{error}");
    assert!(error.advice().contains("chmod"));
}

#[test]
fn many_commands_at_once_lose_nothing() {
    let world = world();
    thread::scope(|scope| {
        for nth in 0..8 {
            let (ca, out) = (&world.ca, world.out(&format!("host-{nth}")));
            scope.spawn(move || {
                ca.issue(Kind::Agent, &format!("host-{nth}"), None, &out)
                    .expect("issued");
            });
        }
    });
    assert_eq!(world.ca.issued().expect("records").len(), 8);
}

#[test]
fn a_damaged_record_is_named() {
    let world = world();
    world.issue(Kind::Agent, "host-a");
    let path = world.ca.dir().join("issued").join("00.json");
    fs::write(&path, "{}").expect("a write");
    let bad = world.ca.issued();
    assert!(matches!(bad, Err(PkiError::Record { .. })), "{bad:?}");
}

#[test]
fn openssl_agrees() {
    let Ok(version) = Command::new("openssl").arg("version").output() else {
        println!("SKIPPED: no openssl here");
        return;
    };
    assert!(version.status.success());
    let world = world();
    world.issue(Kind::Agent, "host-a");
    world.ca.rotate().expect("a new root");
    let agent = world.issue(Kind::Agent, "host-b");
    let verify = |more: &[&str], name: &str| {
        let out = world.out(name);
        let mut command = Command::new("openssl");
        command.arg("verify").arg("-x509_strict");
        command.arg("-CAfile").arg(world.ca.dir().join("ca.crt"));
        command.args(more).arg("-CRLfile");
        command.arg(world.ca.dir().join("crl.pem"));
        command.arg(out.join("tls.crt"));
        let output = command.output().expect("openssl");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    for name in ["host-a", "host-b"] {
        for purpose in ["sslclient", "sslserver"] {
            let (is_good, said) = verify(&["-crl_check", "-purpose", purpose], name);
            assert!(is_good, "{said}");
        }
    }
    world.ca.revoke("agent/host-b").expect("revoked");
    let (is_good, said) = verify(&["-crl_check"], "host-b");
    assert!(!is_good && said.contains("revoked"), "{said}");
    drop(agent);
}
