//! Keys over time and over restarts, and what is signed by them.

use std::{
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicU64, Ordering},
};

use slat_proto::model::{key_from_message, signed_grant};
use slat_test_dir::TestDir;
use slat_trust::grant::{Checked, GrantError, KeyRing};

use super::*;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// A clock that a test sets, in seconds.
#[derive(Clone)]
struct Hands(Arc<AtomicU64>);

impl Hands {
    fn at(day: u64) -> Self {
        Self(Arc::new(AtomicU64::new((20_000 + day) * DAY)))
    }

    fn pass(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.load(Ordering::SeqCst))
    }

    fn clock(&self) -> Clock {
        let own = self.clone();
        Arc::new(move || own.now())
    }
}

fn party(host: &str) -> Party {
    Party {
        host: host.to_owned(),
        incarnation: format!("{host}-1"),
    }
}

fn about() -> About {
    About {
        migration: "m1".to_owned(),
        vm_uid: "u1".to_owned(),
        epoch: 7,
        source: party("a"),
        destination: party("b"),
        source_key: [1; 32],
        destination_key: [2; 32],
        ahead_ms: 0,
    }
}

/// A ring that has heard what is announced.
fn ring(grants: &Grants) -> KeyRing {
    let mut ring = KeyRing::default();
    let keys = grants.announced(0);
    ring.learn(keys.iter().map(|key| key_from_message(key).unwrap()));
    ring
}

fn verified(
    ring: &KeyRing,
    signed: &v1::SignedGrant,
    now: SystemTime,
) -> Result<Grant, GrantError> {
    ring.verify(&signed_grant(Some(signed)).unwrap(), now)
}

fn send(grants: &Grants) -> v1::SignedGrant {
    let total = Duration::from_secs(HOUR);
    grants.side(Purpose::Send, &about(), total).unwrap()
}

fn signing_key(grants: &Grants) -> Vec<u8> {
    send(grants).key_id
}

#[test]
fn what_is_signed_says_who_what_and_how_long() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let grants = Grants::open(dir.path(), hands.clock()).unwrap();
    let ring = ring(&grants);
    let signed = send(&grants);
    let grant = verified(&ring, &signed, hands.now()).unwrap();
    let right = Checked {
        purpose: Some(Purpose::Send),
        migration: Some("m1"),
        vm_uid: Some("u1"),
        epoch: Some(7),
        source: Some(("a", Some("a-1"))),
        destination: Some(("b", Some("b-1"))),
    };
    grant.check(&right).unwrap();
    assert_eq!(
        (grant.source_key, grant.destination_key),
        ([1; 32], [2; 32])
    );
    let lasts = grant.not_after().duration_since(hands.now()).unwrap();
    assert_eq!(lasts, Duration::from_secs(HOUR) + MARGIN);

    let decided = grants.decision(true, &about(), "fence 9").unwrap();
    let grant = verified(&ring, &decided, hands.now()).unwrap();
    assert_eq!(
        (grant.purpose, grant.ground.as_str()),
        (Purpose::Commit, "fence 9")
    );
    let lasts = grant.not_after().duration_since(hands.now()).unwrap();
    assert_eq!(lasts, DECISION);
    let decided = grants.decision(false, &about(), "journal").unwrap();
    let grant = verified(&ring, &decided, hands.now()).unwrap();
    assert_eq!(grant.purpose, Purpose::Abort);
}

#[test]
fn a_grant_has_the_time_of_the_host_that_reads_it_and_no_endless_life() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let grants = Grants::open(dir.path(), hands.clock()).unwrap();
    let ahead = About {
        ahead_ms: 7_200_000,
        ..about()
    };
    let total = Duration::MAX;
    let signed = grants.side(Purpose::Receive, &ahead, total).unwrap();
    let theirs = hands.now() + Duration::from_secs(7200);
    let grant = verified(&ring(&grants), &signed, theirs).unwrap();
    assert_eq!(grant.not_after(), theirs + LONGEST);
    // The keys are told with a margin, and moved by whole days beyond it.
    let told = grants.announced(7_200_000);
    assert_eq!(told, grants.announced(0));
    let days = i64::try_from(5 * DAY).unwrap() * 1000;
    let moved = grants.announced(-days);
    let by = |keys: &[v1::GrantKey]| keys[0].not_before.unwrap().seconds;
    assert_eq!(by(&told) - by(&moved), days / 1000);
}

#[test]
fn keys_survive_a_restart_and_are_nobody_else_s() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let first = Grants::open(dir.path(), hands.clock()).unwrap();
    let key = signing_key(&first);
    drop(first);
    let keys = dir.path().join(DIRECTORY);
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&keys), 0o700);
    let files: Vec<_> = std::fs::read_dir(&keys)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    assert_eq!(mode(&files[0]), 0o600);
    // Opened up by somebody, beside what a crash left and what is no key.
    std::fs::set_permissions(&files[0], std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(keys.join("1-2.new"), b"half").unwrap();
    std::fs::write(keys.join("1-9000000000000.key"), b"no key").unwrap();
    let again = Grants::open(dir.path(), hands.clock()).unwrap();
    assert_eq!(signing_key(&again), key);
    assert_eq!(again.announced(0).len(), 1);
    assert_eq!(mode(&files[0]), 0o600);
    assert!(!keys.join("1-2.new").exists());
}

#[test]
fn a_successor_is_told_two_days_before_it_signs_and_the_last_grants_outlive_their_key() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let grants = Grants::open(dir.path(), hands.clock()).unwrap();
    let first = signing_key(&grants);
    hands.pass(5 * DAY - 1);
    grants.tend().unwrap();
    assert_eq!(grants.announced(0).len(), 1);
    hands.pass(1);
    grants.tend().unwrap();
    assert_eq!(
        grants.announced(0).len(),
        2,
        "announced, and not signing yet"
    );
    assert_eq!(signing_key(&grants), first);
    // An agent that reported then and never again until the last moment.
    let heard = ring(&grants);
    hands.pass(2 * DAY - 1);
    grants.tend().unwrap();
    let last = send(&grants);
    assert_eq!(last.key_id, first);
    hands.pass(1);
    grants.tend().unwrap();
    let second = send(&grants);
    assert_ne!(second.key_id, first);
    for grant in [&last, &second] {
        verified(&heard, grant, hands.now()).unwrap();
        verified(&ring(&grants), grant, hands.now()).unwrap();
    }
    // Only its public half is left of the first.
    let names = file::names(&grants.directory).unwrap();
    let publics = names.iter().filter(|name| name.ends_with(".pub"));
    assert_eq!(publics.count(), 1, "{names:?}");
    drop(grants);
    let again = Grants::open(dir.path(), hands.clock()).unwrap();
    assert_eq!(again.announced(0).len(), 2);
    // In the end nothing is left.
    hands.pass(60 * DAY);
    again.tend().unwrap();
    let names = file::names(&again.directory).unwrap();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(again.announced(0).len(), 1);
    let late = verified(&ring(&again), &last, hands.now()).unwrap_err();
    assert!(matches!(late, GrantError::KeyUnknown { .. }), "{late}");
}

#[test]
fn many_rotations_announce_no_more_than_an_agent_reads() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let grants = Grants::open(dir.path(), hands.clock()).unwrap();
    for _ in 0..40 {
        let heard = ring(&grants);
        hands.pass(DAY);
        grants.tend().unwrap();
        let told = grants.announced(0).len();
        assert!((1..=ANNOUNCED).contains(&told), "{told}");
        verified(&heard, &send(&grants), hands.now()).unwrap();
    }
}

#[test]
fn a_key_that_is_taken_away_is_replaced_at_once_and_told_no_more() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let grants = Grants::open(dir.path(), hands.clock()).unwrap();
    let leaked = send(&grants);
    for name in file::names(&grants.directory).unwrap() {
        file::remove(&grants.directory, &name).unwrap();
    }
    hands.pass(1);
    grants.tend().unwrap();
    assert_ne!(signing_key(&grants), leaked.key_id);
    let unknown = verified(&ring(&grants), &leaked, hands.now()).unwrap_err();
    assert!(
        matches!(unknown, GrantError::KeyUnknown { .. }),
        "{unknown}"
    );
}

#[test]
fn a_directory_that_cannot_be_used_leaves_the_keys_that_there_are() {
    let (dir, hands) = (TestDir::new(), Hands::at(0));
    let grants = Grants::open(dir.path(), hands.clock()).unwrap();
    let key = signing_key(&grants);
    std::fs::remove_dir_all(&grants.directory).unwrap();
    hands.pass(8 * DAY);
    assert!(grants.tend().is_err());
    assert_eq!(signing_key(&grants), key);
    let heard = ring(&grants);
    verified(&heard, &send(&grants), hands.now()).unwrap();
}
