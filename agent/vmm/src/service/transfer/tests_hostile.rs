//! A destination that is slow, silent or spiteful, and two migrations that meet: the source must
//! end in time, say so, and mix nothing up.

use std::{
    io::Read as _,
    net::TcpListener,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::MigrationName,
    v1::{self, TransferPhase, TransferRole, transfer_service_server::TransferService as _},
};
use tonic::Request;

use super::{
    TransferEndpoint,
    tests::{PATIENCE, api, ended, endpoint, name, one_stream, running, start, start_request},
    tests_server as server,
};
use crate::migration::{
    channel::Channel,
    stream::{Inlet, Outlet},
    wire::{FrameReader, FrameWriter, Hello, Kind, StreamRole, WireError},
};

/// Within this a cancel has to act, whatever the destination does.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A destination made by hand.
pub(super) struct ByHand {
    pub(super) listener: TcpListener,
    channel: Channel,
}

/// One of its connections.
pub(super) struct Connection {
    inlet: Inlet,
    outlet: Outlet,
    writer: FrameWriter,
    reader: FrameReader,
    role: StreamRole,
}

impl ByHand {
    pub(super) fn new(from: &TransferEndpoint) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (own, peer) = (&server::DESTINATION, server::SOURCE.fingerprint());
        let binding = server::binding(&from.uid(), own.fingerprint());
        let channel = Channel::destination([7; 32], own, peer, binding).unwrap();
        Self { listener, channel }
    }

    /// What it would have answered to PrepareIncoming.
    pub(super) fn prepared(&self) -> v1::PrepareIncomingResponse {
        v1::PrepareIncomingResponse {
            data_address: self.listener.local_addr().unwrap().to_string(),
            ticket: vec![7; 32],
            versions: Some(v1::ChosenVersions {
                protocol: 3,
                state: 1,
            }),
            channel_key: server::DESTINATION.fingerprint().to_vec(),
            channel: v1::PageChannel::Tls.into(),
            ..v1::PrepareIncomingResponse::default()
        }
    }

    fn accept(&self) -> Connection {
        let (socket, _) = self.listener.accept().unwrap();
        let until = Instant::now() + PATIENCE;
        let (mut inlet, mut outlet) = self.channel.accept(socket, until).unwrap();
        inlet.socket().set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = FrameReader::new(3, 1);
        let mut writer = FrameWriter::new(3, 1);
        let (header, payload) = reader.frame(&mut inlet).unwrap();
        assert_eq!(header.kind, Kind::Hello);
        let Hello { shows, role } = Hello::decode(&payload).unwrap();
        assert!(self.channel.admits(&inlet, role, &shows).unwrap());
        writer.send(&mut outlet, Kind::HelloAck, 0, &[]).unwrap();
        Connection {
            inlet,
            outlet,
            writer,
            reader,
            role,
        }
    }

    /// The control connection and one data stream, up to the slot table.
    pub(super) fn connections(&self) -> (Connection, Connection) {
        let (mut control, data) = (self.accept(), self.accept());
        assert_eq!(control.role, StreamRole::Control);
        assert_eq!(data.role, StreamRole::Data(0));
        loop {
            match control.hear() {
                Kind::Echo => control.tell(Kind::EchoAck, &1000_u64.to_le_bytes()),
                kind => {
                    assert_eq!(kind, Kind::SlotTable);
                    return (control, data);
                }
            }
        }
    }
}

impl Connection {
    fn hear(&mut self) -> Kind {
        self.reader.frame(&mut self.inlet).unwrap().0.kind
    }

    fn tell(&mut self, kind: Kind, payload: &[u8]) {
        self.writer
            .send(&mut self.outlet, kind, 0, payload)
            .unwrap();
    }

    pub(super) fn say(&mut self, kind: Kind, count: u32) {
        self.writer
            .send(&mut self.outlet, kind, count, &[])
            .unwrap();
    }

    /// Why the source gave up, by its own word.
    pub(super) fn abort(&mut self) -> ApiError {
        match self.reader.frame(&mut self.inlet) {
            Err(WireError::Aborted(error)) => error,
            other => panic!("no Abort: {other:?}"),
        }
    }

    /// Until nothing more can come.
    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        self.inlet.read_to_end(&mut rest).is_ok()
    }
}

async fn cancel(from: &TransferEndpoint) {
    let request = v1::CancelTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
        error: None,
    };
    api(from)
        .cancel_transfer(Request::new(request))
        .await
        .unwrap();
}

/// Cancels; the source has to end at once, with its VM running as before.
async fn cancel_acts(from: &TransferEndpoint) {
    let begun = Instant::now();
    cancel(from).await;
    let here = ended(from, TransferRole::Source).await;
    assert!(
        begun.elapsed() < AT_ONCE,
        "it took {:?}: {here:?}",
        begun.elapsed()
    );
    assert_eq!(here.phase(), TransferPhase::Cancelled);
    assert_eq!(
        from.machine.snapshot().unwrap().state(),
        v1::vm::State::Running
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_acts_while_the_destination_does_not_let_the_source_in() {
    let source = running();
    let from = endpoint(&source);
    // The kernel takes the connection; nobody answers its Hello.
    let destination = ByHand::new(&from);
    start(&from, &destination.prepared(), &one_stream()).await;
    let (_held, _) = destination.listener.accept().unwrap();
    cancel_acts(&from).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_acts_while_the_source_tries_again() {
    let source = running();
    let from = endpoint(&source);
    let destination = ByHand::new(&from);
    start(&from, &destination.prepared(), &one_stream()).await;
    for _ in 0..3 {
        drop(destination.listener.accept().unwrap());
    }
    cancel_acts(&from).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_acts_while_the_destination_populates() {
    let source = running();
    let from = endpoint(&source);
    let destination = ByHand::new(&from);
    start(&from, &destination.prepared(), &one_stream()).await;
    let (mut control, mut data) = destination.connections();
    control.say(Kind::Populated, 3);
    cancel_acts(&from).await;
    assert_eq!(control.abort().reason, Reason::CancelledByUser);
    assert!(control.is_closed() && data.is_closed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_never_has_its_memory_is_told_and_let_go() {
    let source = running();
    let from = endpoint(&source);
    let destination = ByHand::new(&from);
    let params = slat_proto::model::MigrationParams {
        max_total_time: Duration::from_secs(1),
        ..one_stream()
    };
    start(&from, &destination.prepared(), &params).await;
    let (mut control, mut data) = destination.connections();
    let telling = std::thread::spawn(move || {
        while control
            .writer
            .send(&mut control.outlet, Kind::Populated, 3, &[])
            .is_ok()
        {
            std::thread::sleep(Duration::from_millis(100));
            if control.inlet.readable(Duration::ZERO).unwrap() {
                break;
            }
        }
        control
    });
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.error.unwrap().reason, "COMPLETION_TIMEOUT");
    let mut control = telling.join().unwrap();
    assert_eq!(control.abort().reason, Reason::CompletionTimeout);
    assert!(control.is_closed() && data.is_closed());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_migration_waits_for_the_end_of_the_one_that_runs() {
    let source = running();
    let from = endpoint(&source);
    let destination = ByHand::new(&from);
    start(&from, &destination.prepared(), &one_stream()).await;
    let first = from.find(&name(), TransferRole::Source).unwrap();
    // As in the moment between the VM's release and the last record: the machine is free, the side
    // has not ended.
    source.machine.end_outgoing(&name()).unwrap();
    let prepared = destination.prepared();
    let m2 = MigrationName::parse("m2").unwrap();
    server::describe(&from, &m2);
    let leave = slat_trust::grant::Grant {
        migration: "m2".into(),
        ..server::send(&from.uid(), &prepared)
    };
    let request = v1::StartOutgoingRequest {
        migration: m2.to_string(),
        // Each migration has a ticket of its own.
        ticket: vec![0x5a; prepared.ticket.len()],
        grant: Some(server::signed(&leave)),
        ..start_request(&from, &prepared, &one_stream())
    };
    let refused = api(&from)
        .start_outgoing(Request::new(request))
        .await
        .unwrap_err();
    let refused = ApiError::from(refused);
    assert_eq!(refused.reason, Reason::MigrationInProgress);
    assert_eq!(refused.metadata["migration"], "migrations/m1");
    assert!(from.find(&name(), TransferRole::Source).is_ok());
    drop(first.cancel(None));
}

#[test]
fn a_side_that_is_forgotten_takes_no_other_with_it() {
    let source = running();
    let from = endpoint(&source);
    let side = |id: &str| {
        std::sync::Arc::new(crate::handover::side::Side::new(
            &MigrationName::parse(id).unwrap(),
            (source.machine.name(), "u".into()),
            1,
            0,
        ))
    };
    from.sides().outgoing = Some(side("m2"));
    from.sides().remove(&name(), TransferRole::Source);
    assert!(from.sides().outgoing.is_some(), "m2 runs on unseen");
    from.sides()
        .remove(&MigrationName::parse("m2").unwrap(), TransferRole::Source);
    assert!(from.sides().outgoing.is_none());
}

/// Plays the destination up to COMMIT, then is gone without a word.
fn takes_commit_and_dies(destination: &ByHand) {
    let (mut control, mut data) = destination.connections();
    control.say(Kind::Populated, 100);
    let acknowledging = {
        let (mut writer, mut outlet) = (control.writer, control.outlet);
        std::thread::spawn(move || {
            while let Ok((header, _)) = data.reader.frame(&mut data.inlet) {
                if header.kind == Kind::IterEnd {
                    writer
                        .send(&mut outlet, Kind::IterAck, header.count, &[])
                        .unwrap();
                }
                // Nothing follows the final iteration but the state, on the control connection.
                if header.kind == Kind::IterEnd && header.count > 0 {
                    break;
                }
            }
            (writer, outlet, data)
        })
    };
    let heard = |control: &mut FrameReader, inlet: &mut Inlet| control.frame(inlet).unwrap().0.kind;
    assert_eq!(heard(&mut control.reader, &mut control.inlet), Kind::State);
    let (mut writer, mut outlet, _data) = acknowledging.join().unwrap();
    writer.send(&mut outlet, Kind::Ready, 0, &[]).unwrap();
    assert_eq!(heard(&mut control.reader, &mut control.inlet), Kind::Commit);
}

fn adopt_request(uid: &str, epoch: u64) -> Request<v1::AdoptTransferRequest> {
    Request::new(v1::AdoptTransferRequest {
        migration: "m1".into(),
        vm_uid: uid.into(),
        epoch,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_nobody_answers_for_is_taken_back_on_an_order_and_runs_above_the_other_epoch() {
    let source = running();
    let from = endpoint(&source);
    let uid = source.machine.uid().unwrap();
    let destination = ByHand::new(&from);
    start(&from, &destination.prepared(), &one_stream()).await;
    let early = api(&from).adopt_transfer(adopt_request(&uid, 3)).await;
    assert_eq!(
        ApiError::from(early.unwrap_err()).reason,
        Reason::VmState,
        "it was not given away"
    );
    tokio::task::spawn_blocking(move || takes_commit_and_dies(&destination))
        .await
        .unwrap();
    // The coordinator notices that no answer comes, and leaves.
    let side = from.sides().outgoing.clone().unwrap();
    let left = async {
        while !side.has_left() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, left).await.unwrap();
    assert_eq!(side.phase(), TransferPhase::Relinquished);
    assert_eq!(
        source.machine.resume().unwrap_err().reason,
        Reason::StaleEpoch
    );

    let refusal = |asked: Result<_, tonic::Status>| ApiError::from(asked.unwrap_err()).reason;
    let asked = api(&from).adopt_transfer(adopt_request("another", 3)).await;
    assert_eq!(refusal(asked.map(drop)), Reason::NoSuchVm);
    let asked = api(&from).adopt_transfer(adopt_request(&uid, 2)).await;
    assert_eq!(
        refusal(asked.map(drop)),
        Reason::StaleEpoch,
        "the destination may have that epoch"
    );
    source.disk.set_broken(true);
    let asked = api(&from).adopt_transfer(adopt_request(&uid, 3)).await;
    assert_eq!(refusal(asked.map(drop)), Reason::Journal);
    assert!(
        source.machine.resume().is_err(),
        "nothing runs before the entry is durable"
    );
    source.disk.set_broken(false);

    for _ in 0..2 {
        let adopted = api(&from).adopt_transfer(adopt_request(&uid, 3)).await;
        let adopted = adopted.unwrap().into_inner();
        let (vm, side) = (adopted.vm.unwrap(), adopted.transfer.unwrap());
        assert_eq!((vm.state(), vm.epoch), (v1::vm::State::Paused, 3));
        assert!(!vm.dirty_logging && vm.migration.is_empty());
        assert_eq!(
            (side.phase(), side.vm_uid.as_str()),
            (TransferPhase::Cancelled, uid.as_str())
        );
    }
    let entries = slat_record::journal::contents(&source.machine.dir().journal())
        .unwrap()
        .entries;
    let epoch = 3;
    assert_eq!(
        entries.last(),
        Some(&slat_record::journal::Entry::Adopted { uid, epoch })
    );
    assert_eq!(
        source.machine.dir().transfers().unwrap()[0].phase(),
        TransferPhase::Cancelled,
        "what is on disk says so too"
    );
    // It is a VM like any other.
    assert_eq!(
        source.machine.resume().unwrap().state(),
        v1::vm::State::Running
    );
    let release = v1::ReleaseTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
    };
    api(&from)
        .release_transfer(Request::new(release))
        .await
        .unwrap();
    assert_eq!(
        source.machine.snapshot().unwrap().state(),
        v1::vm::State::Running,
        "a release ends the side, not the VM"
    );
    source.machine.delete().unwrap();
}
