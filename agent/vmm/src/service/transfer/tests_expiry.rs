//! Grants that end before the VM has changed its owner: whatever blocks then, the source's VM runs
//! on and the destination goes away.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use slat_proto::{
    model::BackendKind,
    v1::{self, TransferPhase, TransferRole, transfer_service_server::TransferService as _},
};
use slat_record::journal::{Journal, Ownership};
use slat_trust::grant::Grant;
use tonic::Request;

use super::{
    tests::{api, ended, endpoint, one_stream, prepare_request, running, start_request, state},
    tests_hostile::ByHand,
    tests_server as server,
};
use crate::{fake, handover::preamble, migration::wire::Kind};

/// How long the grants here last: longer than a machine under load takes to begin a side. By when a
/// side must have noticed; any hang is an error.
pub(super) const LASTS: Duration = Duration::from_secs(8);
const NOTICED: Duration = Duration::from_secs(60);

/// The same grant, which ends soon.
pub(super) fn short(grant: Grant) -> v1::SignedGrant {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    server::signed(&Grant {
        not_after_ms: (now + LASTS).as_millis() as u64,
        ..grant
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_blocked_when_its_grant_ends_runs_its_vm_on() {
    // Before the memory is there, and in the middle of pages that nobody takes.
    for populated in [3, 100] {
        let source = running();
        let from = endpoint(&source);
        server::describe(&from, &super::tests::name());
        let destination = ByHand::new(&from);
        let prepared = destination.prepared();
        let request = v1::StartOutgoingRequest {
            grant: Some(short(server::send(&from.uid(), &prepared))),
            ..start_request(&from, &prepared, &one_stream())
        };
        let begun = Instant::now();
        api(&from)
            .start_outgoing(Request::new(request))
            .await
            .unwrap();
        let (mut control, data) = destination.connections();
        control.say(Kind::Populated, populated);
        let here = ended(&from, TransferRole::Source).await;
        assert!(begun.elapsed() < LASTS + NOTICED, "{:?}", begun.elapsed());
        assert_eq!(here.phase(), TransferPhase::Failed, "{here:?}");
        assert_eq!(here.error.unwrap().reason, "GRANT_EXPIRED");
        assert_eq!(state(&source), v1::vm::State::Running);
        assert!(!source.machine.dirty().enabled());
        assert_eq!(control.abort().reason, slat_proto::Reason::GrantExpired);
        drop(data);
        let journal = Journal::read(&source.machine.dir().journal()).unwrap();
        assert_eq!(journal.unwrap().ownership, Ownership::Owner { epoch: 1 });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_source_does_not_come_before_its_grant_ends_goes_away() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let preamble = preamble::describe(BackendKind::Software, Vec::new());
    let request = v1::PrepareIncomingRequest {
        grant: Some(short(server::receive(
            &source.machine.uid().unwrap(),
            v1::PageChannel::Tls,
        ))),
        ..prepare_request(&source, &to, &one_stream(), preamble)
    };
    api(&to)
        .prepare_incoming(Request::new(request))
        .await
        .unwrap();
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Failed);
    assert_eq!(there.error.unwrap().reason, "GRANT_EXPIRED");
    let journal = Journal::read(&destination.machine.dir().journal()).unwrap();
    assert!(matches!(
        journal.unwrap().ownership,
        Ownership::Aborted { .. }
    ));
}
