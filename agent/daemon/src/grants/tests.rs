//! Keys and used grants over restarts, and every way in which a grant is not for this.

use std::time::Duration;

use slat_proto::model::{MigrationName, key_message};
use slat_test_dir::TestDir;
use slat_trust::grant::{GrantKey, Party, Signer};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn later() -> SystemTime {
    now() + DAY
}

fn in_a_month() -> SystemTime {
    now() + DAY * 40
}

fn key(signer: &Signer, ends: SystemTime) -> v1::GrantKey {
    key_message(&GrantKey {
        public_key: signer.public_key(),
        not_before: now() - HOUR,
        not_after: ends,
    })
}

fn side(role: Role, migration: &str) -> SideKey {
    let migration = MigrationName::parse(&format!("migrations/{migration}")).unwrap();
    SideKey { migration, role }
}

fn party(host: &str) -> Party {
    Party {
        host: host.to_owned(),
        incarnation: format!("{host}-1"),
    }
}

fn grant(purpose: Purpose, migration: &str) -> Grant {
    let parties = (party("a"), party("b"));
    Grant::new(purpose, migration, ("u1", 7), parties, now(), HOUR).unwrap()
}

fn signed(signer: &Signer, grant: &Grant) -> Option<v1::SignedGrant> {
    Some((&signer.sign(grant).unwrap()).into())
}

fn open(dir: &TestDir, host: &str, clock: fn() -> SystemTime) -> Grants {
    let name = HostName::parse(host).unwrap();
    Grants::open(dir.path(), &name, &format!("{host}-1"), clock).unwrap()
}

fn step(purpose: Purpose, side: &SideKey) -> Step<'_> {
    Step {
        purpose,
        side,
        vm_uid: Some("u1"),
        epoch: Some(7),
    }
}

/// As an announcement is taken in.
async fn hear(grants: &Grants, keys: &[v1::GrantKey]) {
    if grants.learn(keys) {
        grants.save_keys().await;
    }
}

async fn reason(grants: &Grants, field: Option<&v1::SignedGrant>, step: Step<'_>) -> Reason {
    grants.accept(field, step).await.unwrap_err().reason
}

#[tokio::test]
async fn keys_survive_a_restart_without_a_server() {
    let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
    let first = open(&dir, "b", now);
    let to = side(Role::Destination, "m1");
    let leave = signed(&signer, &grant(Purpose::Receive, "m1"));
    let unknown = reason(&first, leave.as_ref(), step(Purpose::Receive, &to)).await;
    assert_eq!(unknown, Reason::GrantKeyUnknown);
    hear(&first, &[key(&signer, now() + DAY)]).await;
    drop(first);
    let again = open(&dir, "b", now);
    assert_eq!(again.keys(), [key(&signer, now() + DAY)]);
    let taken = again.accept(leave.as_ref(), step(Purpose::Receive, &to));
    taken.await.unwrap();
    drop(again);
    // Nobody renewed it: it is over.
    let late = open(&dir, "b", later);
    assert!(late.keys().is_empty());
    assert_eq!(
        reason(&late, leave.as_ref(), step(Purpose::Receive, &to)).await,
        Reason::GrantKeyUnknown
    );
}

#[tokio::test]
async fn keys_that_cannot_be_written_count_and_are_written_later() {
    let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
    let grants = open(&dir, "b", now);
    let in_its_way = dir.path().join(keys::FILE).join("x");
    std::fs::create_dir_all(&in_its_way).unwrap();
    let told = [key(&signer, now() + DAY)];
    for _ in 0..2 {
        hear(&grants, &told).await;
        assert_eq!(grants.keys(), told);
    }
    std::fs::remove_dir_all(dir.path().join(keys::FILE)).unwrap();
    hear(&grants, &told).await;
    drop(grants);
    assert_eq!(open(&dir, "b", now).keys(), told);
}

#[tokio::test]
async fn a_file_that_makes_no_sense_is_begun_anew() {
    for nonsense in [
        "",
        "{",
        "{}",
        r#"{"keys":[{"public_key":"ff"}]}"#,
        r#"{"grants":7}"#,
    ] {
        let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
        for file in [keys::FILE, USED] {
            std::fs::write(dir.path().join(file), nonsense).unwrap();
        }
        let grants = open(&dir, "b", now);
        assert!(grants.keys().is_empty(), "{nonsense}");
        hear(&grants, &[key(&signer, now() + DAY)]).await;
        let leave = signed(&signer, &grant(Purpose::Receive, "m1"));
        let to = side(Role::Destination, "m1");
        let taken = grants.accept(leave.as_ref(), step(Purpose::Receive, &to));
        taken.await.unwrap();
        drop(grants);
        assert_eq!(open(&dir, "b", now).keys().len(), 1, "{nonsense}");
    }
}

#[tokio::test]
async fn keys_overlap_while_they_rotate_and_one_that_is_told_no_more_is_over() {
    let dir = TestDir::new();
    let [old, new, leaked] = std::array::from_fn(|_| Signer::generate().unwrap());
    let grants = open(&dir, "b", now);
    let to = side(Role::Destination, "m1");
    let receive = || step(Purpose::Receive, &to);
    hear(
        &grants,
        &[key(&leaked, now() + DAY), key(&old, now() + DAY)],
    )
    .await;
    hear(&grants, &[key(&new, now() + DAY), key(&old, now() + DAY)]).await;
    for signer in [&old, &new] {
        let leave = signed(signer, &grant(Purpose::Receive, "m1"));
        grants.accept(leave.as_ref(), receive()).await.unwrap();
    }
    let leave = signed(&leaked, &grant(Purpose::Receive, "m1"));
    let refused = reason(&grants, leave.as_ref(), receive()).await;
    assert_eq!(refused, Reason::GrantKeyUnknown);
    // A server that knows of no keys takes none away.
    hear(&grants, &[]).await;
    assert_eq!(grants.keys().len(), 2);
    // What is over is remembered for who asks, for a month.
    let from = side(Role::Source, "m1");
    let source = open(&dir, "a", later);
    source.may_ask(leave.as_ref(), &from, Some("b")).unwrap();
    let source = open(&dir, "a", in_a_month);
    hear(&source, &[key(&new, in_a_month() + DAY)]).await;
    let forgotten = source.may_ask(leave.as_ref(), &from, Some("b"));
    assert_eq!(forgotten.unwrap_err().reason, Reason::GrantKeyUnknown);
}

#[tokio::test]
async fn who_asks_how_a_source_stands_shows_what_it_received_by() {
    let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
    let grants = open(&dir, "a", later);
    hear(&grants, &[key(&signer, later() + DAY)]).await;
    let from = side(Role::Source, "m1");
    // Long over, and another start of either agent: a question changes nothing.
    let right = signed(&signer, &grant(Purpose::Receive, "m1"));
    for asking in [Some("b"), None] {
        let shown = grants.may_ask(right.as_ref(), &from, asking).unwrap();
        assert_eq!(shown.vm_uid, "u1");
    }
    let ask = |field: &Option<v1::SignedGrant>, side: &SideKey, asking| {
        let refused = grants.may_ask(field.as_ref(), side, Some(asking));
        refused.unwrap_err().reason
    };
    assert_eq!(ask(&right, &from, "c"), Reason::Permission);
    assert_eq!(
        ask(&right, &side(Role::Destination, "m1"), "b"),
        Reason::Permission
    );
    assert_eq!(
        ask(&right, &side(Role::Source, "m2"), "b"),
        Reason::GrantInvalid
    );
    assert_eq!(ask(&None, &from, "b"), Reason::GrantInvalid);
    let other = signed(&signer, &grant(Purpose::Send, "m1"));
    assert_eq!(ask(&other, &from, "b"), Reason::GrantInvalid);
    let elsewhere = Grant {
        source: party("c"),
        ..grant(Purpose::Receive, "m1")
    };
    assert_eq!(
        ask(&signed(&signer, &elsewhere), &from, "b"),
        Reason::GrantInvalid
    );
    let foreign = Signer::generate().unwrap();
    let unknown = signed(&foreign, &grant(Purpose::Receive, "m1"));
    assert_eq!(ask(&unknown, &from, "b"), Reason::GrantKeyUnknown);
    let mut flipped = right.clone().unwrap();
    flipped.signature[3] ^= 1;
    assert_eq!(ask(&Some(flipped), &from, "b"), Reason::GrantInvalid);
}

#[tokio::test]
async fn a_grant_is_used_for_one_side_and_not_after_its_release() {
    let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
    let grants = open(&dir, "b", now);
    hear(&grants, &[key(&signer, now() + DAY)]).await;
    let to = side(Role::Destination, "m1");
    let receive = || step(Purpose::Receive, &to);
    let before = |purpose, seconds: u64| {
        let issued_ms = file::millis(now()) - seconds * 1000;
        let grant = Grant {
            issued_ms,
            ..grant(purpose, "m1")
        };
        signed(&signer, &grant)
    };
    let [used, never] = std::array::from_fn(|_| before(Purpose::Receive, 1));
    for _ in 0..2 {
        grants.accept(used.as_ref(), receive()).await.unwrap();
    }
    // The server asked again: a newer one for the same side.
    let again = before(Purpose::Receive, 0);
    grants.accept(again.as_ref(), receive()).await.unwrap();
    drop(grants);
    let grants = open(&dir, "b", now);
    grants.accept(used.as_ref(), receive()).await.unwrap();
    grants.released(&to).await;
    for over in [&used, &never] {
        let refused = reason(&grants, over.as_ref(), receive()).await;
        assert_eq!(refused, Reason::GrantUsed);
    }
    drop(grants);
    let grants = open(&dir, "b", now);
    for over in [&used, &never] {
        let refused = reason(&grants, over.as_ref(), receive()).await;
        assert_eq!(refused, Reason::GrantUsed, "after a restart");
    }
    // A migration of that name that was begun after it.
    let anew = before(Purpose::Receive, 0);
    grants.accept(anew.as_ref(), receive()).await.unwrap();
}

#[tokio::test]
async fn a_side_that_never_began_is_over_too_once_it_was_released() {
    let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
    let grants = open(&dir, "b", now);
    hear(&grants, &[key(&signer, in_a_month() + DAY)]).await;
    let to = side(Role::Destination, "m1");
    let never = Grant {
        issued_ms: file::millis(now()) - 1,
        not_after_ms: file::millis(now() + DAY * 30) - 1,
        ..grant(Purpose::Receive, "m1")
    };
    let never = signed(&signer, &never);
    grants.released(&to).await;
    drop(grants);
    for clock in [now as fn() -> SystemTime, later] {
        let grants = open(&dir, "b", clock);
        let refused = reason(&grants, never.as_ref(), step(Purpose::Receive, &to)).await;
        assert_eq!(refused, Reason::GrantUsed);
        // Of another side nothing is said.
        let other = side(Role::Destination, "m2");
        let leave = Grant {
            not_after_ms: file::millis(later() + DAY),
            ..grant(Purpose::Receive, "m2")
        };
        let leave = signed(&signer, &leave);
        let taken = grants.accept(leave.as_ref(), step(Purpose::Receive, &other));
        taken.await.unwrap();
    }
}

#[test]
fn releases_are_bounded_and_what_is_forgotten_is_refused_by_its_time() {
    let at = file::millis(now());
    let receive = |migration: &str, issued_ms| Grant {
        issued_ms,
        not_after_ms: at + used::LONGEST_MS,
        ..grant(Purpose::Receive, migration)
    };
    let kept: Vec<_> = (0..used::MOST as u64)
        .map(|number| {
            serde_json::json!({
                "migration": format!("m{number}"),
                "source": false,
                "at_ms": at + number,
                "until_ms": at + number + used::LONGEST_MS,
            })
        })
        .collect();
    let mut used = Used::from_json(&serde_json::json!({ "grants": [], "released": kept })).unwrap();
    let last = side(Role::Destination, &format!("m{}", used::MOST));
    used.release(&last, at + used::MOST as u64);
    let now = at + used::MOST as u64 + 1;
    let text = used.to_json().to_string();
    assert_eq!(text.matches("at_ms").count(), used::MOST);
    assert_eq!(Used::from_json(&used.to_json()).unwrap(), used);
    // The oldest is forgotten, and what was signed before it is refused all the same.
    for (migration, issued_ms, taken) in [
        ("m0", at - 1, Err(Refused::Used)),
        ("new", at - 1, Err(Refused::Used)),
        ("m1", at, Err(Refused::Used)),
        ("m0", at, Ok(true)),
        ("new", now, Ok(true)),
    ] {
        let grant = receive(migration, issued_ms);
        let side = side(Role::Destination, migration);
        assert_eq!(
            used.take(&grant, &side, now),
            taken,
            "{migration} {issued_ms}"
        );
    }
}

#[test]
fn a_decision_is_heard_whatever_is_kept() {
    let at = file::millis(now());
    let kept: Vec<_> = (0..used::MOST)
        .map(|number| {
            serde_json::json!({
                "id": format!("{number:032x}"),
                "migration": format!("m{number}"),
                "source": false,
                "issued_ms": at,
                "not_after_ms": file::millis(now() + HOUR),
            })
        })
        .collect();
    let mut used = Used::from_json(&serde_json::json!({ "grants": kept, "released": [] })).unwrap();
    let of = side(Role::Destination, "more");
    let full = used.take(&grant(Purpose::Receive, "more"), &of, at);
    assert_eq!(full, Err(Refused::TooMany));
    for purpose in [Purpose::Commit, Purpose::Abort] {
        let decision = grant(purpose, "m1");
        let of = side(Role::Destination, "m1");
        assert_eq!(used.take(&decision, &of, at), Ok(false));
        assert_eq!(
            used.to_json()["grants"].as_array().unwrap().len(),
            used::MOST
        );
        // Of a side that is over none is.
        let mut released = used.clone();
        released.release(&of, at + 1);
        assert_eq!(released.take(&decision, &of, at + 1), Err(Refused::Used));
    }
}

#[test]
fn what_is_kept_is_bounded_and_goes_with_its_grants() {
    let mut used = Used::default();
    let at = file::millis(now());
    for number in 0..used::MOST {
        let migration = format!("m{number}");
        let grant = grant(Purpose::Send, &migration);
        assert_eq!(
            used.take(&grant, &side(Role::Source, &migration), at),
            Ok(true)
        );
    }
    let one_more = grant(Purpose::Send, "more");
    let of = side(Role::Source, "more");
    assert_eq!(used.take(&one_more, &of, at), Err(Refused::TooMany));
    let read = Used::from_json(&used.to_json()).unwrap();
    assert_eq!(read, used);
    // Another side may not have its id.
    let first = side(Role::Source, "m0");
    used.release(&first, at);
    let hour = file::millis(now() + HOUR);
    assert_eq!(used.take(&one_more, &of, hour), Ok(true));
    assert_eq!(
        used.take(&one_more, &side(Role::Source, "m9"), at),
        Err(Refused::Used)
    );
    // The others are over, and so is what was released.
    let more = grant(Purpose::Send, "m0");
    assert_eq!(used.take(&more, &first, hour), Ok(true));
}

#[tokio::test]
async fn a_decision_needs_no_disk_and_a_side_does() {
    let (dir, signer) = (TestDir::new(), Signer::generate().unwrap());
    let grants = open(&dir, "b", now);
    hear(&grants, &[key(&signer, now() + DAY)]).await;
    let to = side(Role::Destination, "m1");
    // A folder is where the file is to be.
    std::fs::create_dir_all(dir.path().join(USED).join("in-its-way")).unwrap();
    let leave = signed(&signer, &grant(Purpose::Receive, "m1"));
    let refused = reason(&grants, leave.as_ref(), step(Purpose::Receive, &to)).await;
    assert_eq!(refused, Reason::Store);
    let decision = signed(&signer, &grant(Purpose::Commit, "m1"));
    let taken = grants.accept(decision.as_ref(), step(Purpose::Commit, &to));
    taken.await.unwrap();
}
