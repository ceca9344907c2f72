//! Grants and keys that are not right, one by one: at either end of a migration, and at its data
//! port. Whatever is refused changes nothing, and the migration that has leave goes on.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, SystemTime},
};

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, MigrationParams},
    v1::{
        self, TransferPhase, TransferRole, resolve_transfer_request::Decision,
        transfer_service_server::TransferService as _,
    },
};
use slat_trust::grant::{Grant, Purpose, Signer};
use tonic::Request;

use super::{
    TransferEndpoint,
    tests::{
        PATIENCE, api, ended, endpoint, name, one_stream, prepare, prepare_request, running, start,
        start_request, state,
    },
    tests_server as server,
};
use crate::{
    fake::{self, FakeVm},
    handover::preamble,
    migration::{
        channel::Channel,
        wire::{FrameWriter, Hello, Kind, StreamRole, TICKET},
    },
};

/// One thing that is wrong with a grant, and how it is refused.
type Wrong = (&'static str, fn(&mut Grant), Reason);

/// The same of its keys: always GRANT_INVALID.
type WrongKey = (&'static str, fn(&mut Grant));

const WRONG: [Wrong; 7] = [
    (
        "purpose",
        |grant| grant.purpose = Purpose::Abort,
        Reason::GrantInvalid,
    ),
    (
        "migration",
        |grant| grant.migration = "m2".to_owned(),
        Reason::GrantInvalid,
    ),
    (
        "VM",
        |grant| grant.vm_uid = "another".to_owned(),
        Reason::GrantInvalid,
    ),
    ("epoch", |grant| grant.epoch = 2, Reason::GrantInvalid),
    (
        "source",
        |grant| grant.source.host = "c".to_owned(),
        Reason::GrantInvalid,
    ),
    (
        "destination",
        |grant| grant.destination.host = "c".to_owned(),
        Reason::GrantInvalid,
    ),
    (
        "time",
        |grant| grant.not_after_ms = grant.issued_ms - 1,
        Reason::GrantExpired,
    ),
];

/// What nobody signed so, or nobody whose signature counts.
fn badly_signed(right: &Grant) -> Vec<(v1::SignedGrant, Vec<v1::GrantKey>, Reason)> {
    let mut flipped = server::signed(right);
    let middle = flipped.grant.len() / 2;
    flipped.grant[middle] ^= 1;
    let mut torn = server::signed(right);
    torn.signature[63] ^= 1;
    let foreign = Signer::generate().unwrap();
    let by_foreign = (&foreign.sign(right).unwrap()).into();
    let mut old = server::public(&server::SIGNER);
    old.not_after = Some((SystemTime::now() - Duration::from_secs(1)).into());
    vec![
        (flipped, server::keys(), Reason::GrantInvalid),
        (torn, server::keys(), Reason::GrantInvalid),
        (by_foreign, server::keys(), Reason::GrantKeyUnknown),
        (server::signed(right), vec![old], Reason::GrantKeyUnknown),
        (server::signed(right), Vec::new(), Reason::GrantKeyUnknown),
        (
            v1::SignedGrant::default(),
            server::keys(),
            Reason::GrantKeyUnknown,
        ),
    ]
}

fn asked(vm: &FakeVm, to: &TransferEndpoint) -> v1::PrepareIncomingRequest {
    let preamble = preamble::describe(BackendKind::Software, Vec::new());
    prepare_request(vm, to, &one_stream(), preamble)
}

async fn prepares(
    to: &TransferEndpoint,
    request: v1::PrepareIncomingRequest,
) -> Result<v1::PrepareIncomingResponse, ApiError> {
    let answer = api(to).prepare_incoming(Request::new(request)).await;
    Ok(answer?.into_inner())
}

async fn starts(
    from: &TransferEndpoint,
    request: v1::StartOutgoingRequest,
) -> Result<v1::Transfer, ApiError> {
    let answer = api(from).start_outgoing(Request::new(request)).await;
    Ok(answer?.into_inner())
}

fn refused<T: std::fmt::Debug>(what: &str, answer: Result<T, ApiError>, reason: Reason) {
    let error = answer.expect_err(what);
    assert_eq!(error.reason, reason, "{what}: {error}");
    assert!(!error.metadata["advice"].is_empty(), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_receives_by_exactly_its_grant() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let uid = source.machine.uid().unwrap();
    let right = server::receive(&uid, v1::PageChannel::Tls);
    let with = |grant: Option<v1::SignedGrant>| v1::PrepareIncomingRequest {
        grant,
        ..asked(&source, &to)
    };
    refused(
        "none",
        prepares(&to, with(None)).await,
        Reason::GrantInvalid,
    );
    for (what, change, reason) in WRONG {
        let mut grant = right.clone();
        change(&mut grant);
        if what == "source" {
            // Whose grant it is, is not the destination's to know: the source's agent looks.
            continue;
        }
        let answer = prepares(&to, with(Some(server::signed(&grant)))).await;
        refused(what, answer, reason);
    }
    for (grant, grant_keys, reason) in badly_signed(&right) {
        let request = v1::PrepareIncomingRequest {
            grant_keys,
            ..with(Some(grant))
        };
        refused("signature", prepares(&to, request).await, reason);
    }
    let keys: [WrongKey; 2] = [
        ("no key of the source", |grant| grant.source_key = [0; 32]),
        ("a key of the destination", |grant| {
            grant.destination_key = [7; 32]
        }),
    ];
    for (what, change) in keys {
        let mut grant = right.clone();
        change(&mut grant);
        let answer = prepares(&to, with(Some(server::signed(&grant)))).await;
        refused(what, answer, Reason::GrantInvalid);
    }
    assert!(
        destination.machine.snapshot().is_none(),
        "nothing was built"
    );

    let first = with(Some(server::signed(&right)));
    let answer = prepares(&to, first.clone()).await.unwrap();
    // Again, and by a newer grant.
    let again = prepares(&to, first.clone()).await.unwrap();
    assert_eq!(answer.channel_key, again.channel_key);
    assert_eq!(answer.channel(), v1::PageChannel::Tls);
    let mut newer = server::receive(&uid, v1::PageChannel::Tls);
    newer.destination_key = answer.channel_key.as_slice().try_into().unwrap();
    let again = prepares(&to, with(Some(server::signed(&newer))))
        .await
        .unwrap();
    assert_eq!(answer.data_address, again.data_address);
    newer.source_key = [9; 32];
    let other = prepares(&to, with(Some(server::signed(&newer)))).await;
    refused("another source", other, Reason::GrantInvalid);

    // Once the side has ended it is used up.
    let cancel = v1::CancelTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Destination.into(),
        error: None,
    };
    api(&to)
        .cancel_transfer(Request::new(cancel))
        .await
        .unwrap();
    ended(&to, TransferRole::Destination).await;
    let release = v1::ReleaseTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Destination.into(),
    };
    api(&to)
        .release_transfer(Request::new(release))
        .await
        .unwrap();
    refused("used", prepares(&to, first).await, Reason::GrantUsed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_sends_by_exactly_its_grant() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let prepared = prepare(&source, &to, &one_stream()).await;
    let right = server::send(&from.uid(), &prepared);
    let with = |grant: Option<v1::SignedGrant>| v1::StartOutgoingRequest {
        grant,
        ..start_request(&from, &prepared, &one_stream())
    };
    refused(
        "none",
        starts(&from, with(None)).await,
        Reason::GrantInvalid,
    );
    for (what, change, reason) in WRONG {
        let mut grant = right.clone();
        change(&mut grant);
        if what == "destination" {
            continue;
        }
        let answer = starts(&from, with(Some(server::signed(&grant)))).await;
        refused(what, answer, reason);
    }
    for (grant, grant_keys, reason) in badly_signed(&right) {
        let request = v1::StartOutgoingRequest {
            grant_keys,
            ..with(Some(grant))
        };
        refused("signature", starts(&from, request).await, reason);
    }
    let keys: [WrongKey; 3] = [
        ("another process's key", |grant| grant.source_key = [7; 32]),
        ("no key", |grant| grant.source_key = [0; 32]),
        ("no key of the destination", |grant| {
            grant.destination_key = [0; 32]
        }),
    ];
    for (what, change) in keys {
        let mut grant = right.clone();
        change(&mut grant);
        let answer = starts(&from, with(Some(server::signed(&grant)))).await;
        refused(what, answer, Reason::GrantInvalid);
    }
    // The grant that the destination has is not the source's.
    let theirs = server::receive(&from.uid(), v1::PageChannel::Tls);
    let answer = starts(&from, with(Some(server::signed(&theirs)))).await;
    refused("the destination's", answer, Reason::GrantInvalid);
    // Nobody talks it into the clear.
    let clear = v1::StartOutgoingRequest {
        channel: v1::PageChannel::Plain.into(),
        ..with(Some(server::signed(&right)))
    };
    refused(
        "in the clear",
        starts(&from, clear).await,
        Reason::GrantInvalid,
    );
    assert!(
        from.find(&name(), TransferRole::Source).is_err(),
        "nothing has begun"
    );
    assert!(!source.machine.dirty().enabled());

    starts(&from, with(Some(server::signed(&right))))
        .await
        .unwrap();
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    let grant = Some(crate::handover::leave::tests_mark(&right));
    let entries = slat_record::journal::contents(&source.machine.dir().journal());
    assert!(
        entries.unwrap().entries.iter().any(|entry| matches!(
            entry,
            slat_record::journal::Entry::Relinquished { grant: by, .. } if *by == grant
        )),
        "the journal says by what"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_stands_on_its_own_grant_or_on_an_order() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    prepare(&source, &to, &one_stream()).await;
    let uid = to.uid();
    let ask = async |decision: Decision, grant: Option<v1::SignedGrant>, ordered| {
        let request = v1::ResolveTransferRequest {
            migration: "m1".into(),
            decision: decision.into(),
            grant,
            grant_keys: server::keys(),
            ordered,
        };
        let answer = api(&to).resolve_transfer(Request::new(request)).await;
        answer.map(drop).map_err(ApiError::from)
    };
    let right = server::grant(Purpose::Commit, "m1", (&uid, 1), ("a", "a"));
    refused(
        "none",
        ask(Decision::Commit, None, false).await,
        Reason::GrantInvalid,
    );
    for (what, change, reason) in WRONG {
        let mut grant = right.clone();
        change(&mut grant);
        if what == "source" {
            continue;
        }
        let answer = ask(Decision::Commit, Some(server::signed(&grant)), false).await;
        refused(what, answer, reason);
    }
    let received = server::receive(&uid, v1::PageChannel::Tls);
    let answer = ask(Decision::Commit, Some(server::signed(&received)), false).await;
    refused("that by which it receives", answer, Reason::GrantInvalid);
    let answer = ask(Decision::Abort, Some(server::signed(&right)), false).await;
    refused("the other decision", answer, Reason::GrantInvalid);
    ask(Decision::Commit, Some(server::signed(&right)), false)
        .await
        .unwrap();
    assert_eq!(
        to.find(&name(), TransferRole::Destination).unwrap().phase(),
        TransferPhase::Preparing,
        "nothing was promised yet"
    );
    ask(Decision::Abort, None, true).await.unwrap();
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_that_were_started_differently_have_no_channel() {
    for clear in [false, true] {
        let (source, destination) = (running(), fake::empty());
        let to = endpoint(&destination).in_the_clear(clear);
        let mut request = asked(&source, &to);
        let preamble = request.preamble.as_mut().unwrap();
        preamble.channels = preamble::channels(!clear);
        let error = prepares(&to, request).await.unwrap_err();
        assert_eq!(error.reason, Reason::CapabilityMissing, "{error}");
        assert_eq!(error.metadata["capability"], "PAGE_CHANNEL_TLS");
        assert_eq!(error.metadata["vm_location"], "SOURCE");
        assert!(destination.machine.snapshot().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_has_one_key_for_a_migration_and_another_for_the_next() {
    let source = running();
    let from = endpoint(&source);
    let describe = async |id: &str| {
        let request = v1::DescribeOutgoingRequest {
            migration: id.to_owned(),
            vm: "vms/web".into(),
            epoch: 1,
            ..Default::default()
        };
        let answer = api(&from).describe_outgoing(Request::new(request)).await;
        answer.unwrap().into_inner()
    };
    let first = describe("m7").await;
    assert_eq!(first.channel_key.len(), 32);
    assert_eq!(first.preamble.unwrap().channels, preamble::channels(false));
    assert_eq!(describe("m7").await.channel_key, first.channel_key);
    assert_ne!(describe("m8").await.channel_key, first.channel_key);
    let from = endpoint(&source).in_the_clear(true);
    let request = v1::DescribeOutgoingRequest {
        migration: "m7".into(),
        vm: "vms/web".into(),
        epoch: 1,
        ..Default::default()
    };
    let clear = api(&from).describe_outgoing(Request::new(request)).await;
    assert!(clear.unwrap().into_inner().channel_key.is_empty());
}

/// A ClientHello of TLS 1.2 and nothing later.
fn tls_1_2() -> Vec<u8> {
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.extend_from_slice(&[0, 0, 2, 0xc0, 0x2b, 1, 0, 0, 22]);
    hello.extend_from_slice(&[
        0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3, 0, 11, 0, 2, 1, 0,
    ]);
    let mut record = vec![
        22,
        3,
        1,
        0,
        hello.len() as u8 + 4,
        1,
        0,
        0,
        hello.len() as u8,
    ];
    record.extend_from_slice(&hello);
    record
}

/// What a peer hears that sends `bytes` to the data port and nothing more.
fn knock(prepared: &v1::PrepareIncomingResponse, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(&prepared.data_address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(bytes).unwrap();
    let mut heard = Vec::new();
    // Closed in the middle of what was sent: as good.
    if let Err(error) = socket.read_to_end(&mut heard) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    heard
}

fn plain_hello(prepared: &v1::PrepareIncomingResponse) -> Vec<u8> {
    let mut bytes = Vec::new();
    let hello = Hello {
        shows: prepared.ticket.as_slice().try_into().unwrap(),
        role: StreamRole::Control,
    };
    let mut writer = FrameWriter::new(3, 1);
    writer
        .send(&mut bytes, Kind::Hello, 0, &hello.encode())
        .unwrap();
    bytes
}

/// Nobody is let in by `channel` who shows what `shows` makes of the right token.
fn not_let_in(
    what: &str,
    prepared: &v1::PrepareIncomingResponse,
    channel: &Channel,
    role: StreamRole,
    shows: impl FnOnce([u8; TICKET]) -> [u8; TICKET],
) {
    let Ok((mut both, token)) = server::open(prepared, channel, role) else {
        return;
    };
    let heard = server::hello(&mut both, shows(token), role);
    assert!(heard.is_err(), "{what}: let in");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_is_let_in_at_a_port_that_is_protected() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let params = MigrationParams {
        verify: slat_proto::model::Verify::BeforeCommit,
        ..one_stream()
    };
    let prepared = prepare(&source, &to, &params).await;
    let (control, data) = (StreamRole::Control, StreamRole::Data(0));
    let trying = {
        let prepared = prepared.clone();
        tokio::task::spawn_blocking(move || {
            // In the clear, with the right ticket.
            assert!(knock(&prepared, &plain_hello(&prepared)).len() < 16);
            // An older TLS: refused with the alert for it.
            let alert = knock(&prepared, &tls_1_2());
            assert_eq!(alert.last(), Some(&70), "protocol_version: {alert:?}");
            let mine = server::source_channel(&prepared, &server::SOURCE);
            // Another key than the grant's.
            let other = server::source_channel(&prepared, &server::key());
            not_let_in("another key", &prepared, &other, control, |token| token);
            // The right key, for another migration: it is bound to what the grants say.
            let peer = prepared.channel_key.as_slice().try_into().unwrap();
            let ticket = prepared.ticket.as_slice().try_into().unwrap();
            let stolen = Channel::source(ticket, &server::SOURCE, peer, [7; 32]).unwrap();
            not_let_in("another migration", &prepared, &stolen, control, |token| {
                token
            });
            let binding = server::binding(&prepared.transfer.as_ref().unwrap().vm_uid, peer);
            let guess = Channel::source([0; TICKET], &server::SOURCE, peer, binding).unwrap();
            not_let_in("another ticket", &prepared, &guess, control, |token| token);
            // The ticket itself is not what is shown.
            not_let_in("the ticket", &prepared, &mine, control, |_| ticket);
            // What another connection showed is worth nothing here.
            let (_first, replayed) = server::open(&prepared, &mine, control).unwrap();
            not_let_in("replayed", &prepared, &mine, control, |_| replayed);
            // Nor what this one shows as another stream.
            let (mut both, token) = server::open(&prepared, &mine, control).unwrap();
            assert!(
                server::hello(&mut both, token, data).is_err(),
                "another number"
            );
        })
    };
    trying.await.unwrap();
    // Nothing of it reached the migration.
    start(&from, &prepared, &params).await;
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    let verified = here.progress.unwrap().verification();
    assert_eq!(verified, v1::Verification::Match);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_number_is_good_once() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let trying = tokio::task::spawn_blocking(move || {
        let mine = server::source_channel(&prepared, &server::SOURCE);
        let mut first = Vec::new();
        for role in [StreamRole::Control, StreamRole::Data(0)] {
            let (mut both, token) = server::open(&prepared, &mine, role).unwrap();
            server::hello(&mut both, token, role).unwrap();
            first.push(both);
        }
        for role in [
            StreamRole::Control,
            StreamRole::Data(0),
            StreamRole::Data(1),
        ] {
            not_let_in("once more", &prepared, &mine, role, |token| token);
        }
    });
    trying.await.unwrap();
    drop(source);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_the_clear_does_not_understand_tls() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination).in_the_clear(true);
    let prepared = prepare(&source, &to, &one_stream()).await;
    assert_eq!(prepared.channel(), v1::PageChannel::Plain);
    assert!(prepared.channel_key.is_empty());
    let trying = tokio::task::spawn_blocking(move || {
        let ticket = prepared.ticket.as_slice().try_into().unwrap();
        let channel = Channel::source(ticket, &server::SOURCE, [7; 32], [7; 32]).unwrap();
        assert!(server::open(&prepared, &channel, StreamRole::Control).is_err());
    });
    trying.await.unwrap();
}

/// At the address of the destination stands somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_gives_nothing_to_who_has_not_the_key_of_its_grant() {
    for speaks_tls in [true, false] {
        let source = running();
        let from = endpoint(&source);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let prepared = v1::PrepareIncomingResponse {
            data_address: listener.local_addr().unwrap().to_string(),
            ticket: vec![7; 32],
            versions: Some(v1::ChosenVersions {
                protocol: 3,
                state: 1,
            }),
            channel_key: server::DESTINATION.fingerprint().to_vec(),
            channel: v1::PageChannel::Tls.into(),
            ..Default::default()
        };
        let impostor = Channel::destination(
            [7; 32],
            &server::key(),
            server::SOURCE.fingerprint(),
            [7; 32],
        )
        .unwrap();
        let listening = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            if speaks_tls {
                let until = std::time::Instant::now() + PATIENCE;
                assert!(impostor.accept(socket, until).is_err());
            } else {
                // The answer of one that speaks in the clear.
                let mut answer = Vec::new();
                let mut writer = FrameWriter::new(3, 1);
                writer.send(&mut answer, Kind::HelloAck, 0, &[]).unwrap();
                socket.write_all(&answer).unwrap();
                let mut heard = Vec::new();
                drop(socket.read_to_end(&mut heard));
                assert!(
                    !heard.windows(32).any(|window| window == [7; 32]),
                    "the ticket was told"
                );
            }
        });
        start(&from, &prepared, &one_stream()).await;
        let here = ended(&from, TransferRole::Source).await;
        assert_eq!(here.phase(), TransferPhase::Failed);
        let reason = here.error.unwrap().reason;
        let wanted = if speaks_tls {
            "IDENTITY_WRONG"
        } else {
            "TLS_UNEXPECTED"
        };
        assert_eq!(reason, wanted);
        assert_eq!(state(&source), v1::vm::State::Running);
        listening.join().unwrap();
    }
    drop(Arc::clone(&server::SOURCE));
}
