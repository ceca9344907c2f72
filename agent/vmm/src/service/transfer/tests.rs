//! Both sides in one process, over real sockets and journals and a fake backend; and a source made
//! by hand, for everything that an honest source never does.

use std::{
    io::Read as _,
    net::{IpAddr, Ipv4Addr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use slat_proto::{
    Reason,
    model::{BackendKind, MigrationName, MigrationParams, OnTimeout, PAGE_SIZE, Verify, VmName},
    v1::{self, TransferPhase, TransferRole, transfer_service_server::TransferService as _},
};
use slat_record::journal::Ownership;
use tonic::Request;

use super::{TransferApi, TransferEndpoint};
use crate::{
    fake::{self, FakeVm},
    handover::{payload::encode_slots, preamble, side::has_ended, state::VmState},
    machine::Switchover,
    migration::filter::PageFilter,
    migration::wire::{
        FrameReader, FrameWriter, HEADER, Hello, Kind, Run, StreamRole, TICKET, encode_runs,
    },
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Everything here takes well under a second; a hang is an error.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn name() -> MigrationName {
    MigrationName::parse("m1").unwrap()
}

pub(super) fn endpoint(vm: &FakeVm) -> TransferEndpoint {
    TransferEndpoint::new(
        Arc::clone(&vm.machine),
        VmName::parse("web").unwrap(),
        LOOPBACK,
    )
}

/// What its callers see.
pub(super) fn api(endpoint: &TransferEndpoint) -> TransferApi {
    TransferApi::new(Arc::new(endpoint.clone()))
}

/// Waits until a side is in a phase that `done` accepts.
async fn wait(
    endpoint: &TransferEndpoint,
    role: TransferRole,
    done: impl Fn(&v1::Transfer) -> bool,
) -> v1::Transfer {
    let side = endpoint.find(&name(), role).unwrap();
    let mut version = side.watch();
    let waiting = async {
        loop {
            version.mark_unchanged();
            let transfer = side.transfer();
            if done(&transfer) {
                return transfer;
            }
            version.changed().await.unwrap();
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(transfer) => transfer,
        Err(_) => panic!(
            "{role:?} stays in {:?}: {:?}",
            side.phase(),
            side.transfer()
        ),
    }
}

pub(super) async fn ended(endpoint: &TransferEndpoint, role: TransferRole) -> v1::Transfer {
    wait(endpoint, role, |transfer| has_ended(transfer.phase())).await
}

async fn prepare(
    vm: &FakeVm,
    to: &TransferEndpoint,
    params: &MigrationParams,
) -> v1::PrepareIncomingResponse {
    let preamble = preamble::describe(BackendKind::Software, Vec::new());
    prepare_from(vm, to, params, preamble).await
}

/// As `prepare`, from a source that says this of itself.
async fn prepare_from(
    vm: &FakeVm,
    to: &TransferEndpoint,
    params: &MigrationParams,
    preamble: v1::Preamble,
) -> v1::PrepareIncomingResponse {
    let slots = vm
        .machine
        .memory()
        .table()
        .slots()
        .iter()
        .map(|slot| slot.spec().to_message())
        .collect();
    let request = v1::PrepareIncomingRequest {
        migration: name().to_string(),
        vm: vm.machine.snapshot(),
        slots,
        params: Some(params.to_message()),
        source_agent_address: String::new(),
        preamble: Some(preamble),
    };
    api(to)
        .prepare_incoming(Request::new(request))
        .await
        .unwrap()
        .into_inner()
}

pub(super) async fn start(
    from: &TransferEndpoint,
    prepared: &v1::PrepareIncomingResponse,
    params: &MigrationParams,
) {
    let request = v1::StartOutgoingRequest {
        migration: name().to_string(),
        vm: "vms/web".into(),
        data_address: prepared.data_address.clone(),
        ticket: prepared.ticket.clone(),
        params: Some(params.to_message()),
        epoch: 1,
        versions: prepared.versions,
    };
    api(from)
        .start_outgoing(Request::new(request))
        .await
        .unwrap();
}

/// A running VM whose pages are not all zero.
pub(super) fn running() -> FakeVm {
    let vm = fake::created();
    vm.machine.start().unwrap();
    let table = vm.machine.memory().table();
    for page in (0..table.pages()).step_by(3) {
        assert!(table.write(page * PAGE_SIZE + 8, &page.to_le_bytes()));
    }
    vm
}

fn ownership(vm: &FakeVm) -> Ownership {
    slat_record::journal::Journal::read(&vm.machine.dir().journal())
        .unwrap()
        .unwrap()
        .ownership
}

fn state(vm: &FakeVm) -> v1::vm::State {
    vm.machine.snapshot().unwrap().state()
}

/// Writes pages of the fake guest, in a scattered order, while its vCPUs run.
fn writer(vm: &FakeVm, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (machine, backend, stop) = (
        Arc::clone(&vm.machine),
        Arc::clone(&vm.backend),
        Arc::clone(stop),
    );
    std::thread::spawn(move || {
        let table = machine.memory().table();
        let mut writes = 0_u64;
        while !stop.load(Ordering::SeqCst) {
            let page = writes.wrapping_mul(0x9e37_79b9_7f4a_7c15) % table.pages();
            {
                let mut fake = backend.state();
                if !fake.running {
                    std::thread::yield_now();
                    continue;
                }
                assert!(table.write(page * PAGE_SIZE, &writes.to_le_bytes()));
                let slot = fake.slots.get_mut(&0).unwrap();
                if slot.logging {
                    slot.dirty.insert(page);
                }
            }
            writes += 1;
        }
        writes
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writing_vm_moves_whole() {
    for verify in [Verify::AfterCommit, Verify::BeforeCommit] {
        let (source, destination) = (running(), fake::empty());
        let (from, to) = (endpoint(&source), endpoint(&destination));
        let params = MigrationParams {
            verify,
            streams: 3,
            ..MigrationParams::default()
        };
        let stop = Arc::new(AtomicBool::new(false));
        let guest = writer(&source, &stop);
        let prepared = prepare(&source, &to, &params).await;
        start(&from, &prepared, &params).await;
        let there = ended(&to, TransferRole::Destination).await;
        let here = ended(&from, TransferRole::Source).await;
        stop.store(true, Ordering::SeqCst);
        assert!(guest.join().unwrap() > 0);
        assert_eq!(there.phase(), TransferPhase::Completed, "{there:?}");
        assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
        let progress = here.progress.unwrap();
        assert_eq!(
            progress.verification(),
            v1::Verification::Match,
            "{verify:?}"
        );
        assert!(
            progress.downtime.is_some() && progress.iterations.len() >= 2,
            "{progress:?}"
        );
        assert_eq!(state(&source), v1::vm::State::Relinquished);
        assert_eq!(state(&destination), v1::vm::State::Running);
        assert_eq!(
            ownership(&source),
            Ownership::Relinquished {
                migration: "m1".into(),
                epoch: 1
            }
        );
        assert_eq!(ownership(&destination), Ownership::Owner { epoch: 2 });
        assert_eq!(destination.machine.snapshot().unwrap().epoch, 2);
        assert!(
            source.machine.resume().is_err(),
            "a relinquished VM never runs again"
        );
        destination.machine.pause().unwrap();
        assert_eq!(
            source.machine.digest().unwrap(),
            destination.machine.digest().unwrap()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_speak_the_older_protocol() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let params = MigrationParams {
        verify: Verify::BeforeCommit,
        ..MigrationParams::default()
    };
    let mut older = preamble::describe(BackendKind::Software, Vec::new());
    older.protocol = Some(v1::VersionRange { min: 1, max: 1 });
    let prepared = prepare_from(&source, &to, &params, older).await;
    assert_eq!(prepared.versions.unwrap().protocol, 1);
    start(&from, &prepared, &params).await;
    let there = ended(&to, TransferRole::Destination).await;
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(there.phase(), TransferPhase::Completed, "{there:?}");
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    let verification = here.progress.unwrap().verification();
    assert_eq!(verification, v1::Verification::Match);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_left_out_is_found() {
    // Never sent at all: found before READY whatever `verify` says.
    // Its last write not sent: found by the digests, before the commit or after it.
    for (from_iteration, verify) in [
        (0, Verify::None),
        (1, Verify::BeforeCommit),
        (1, Verify::AfterCommit),
    ] {
        let (source, destination) = (running(), fake::empty());
        let (mut from, to) = (endpoint(&source), endpoint(&destination));
        from.filter = Arc::new(Omit {
            slot: 0,
            page: 100,
            from: from_iteration,
        });
        let params = MigrationParams {
            verify,
            // Slow enough that the write below comes after the page was sent in the bulk iteration
            // and before the last.
            max_bandwidth: Some(20 << 20),
            ..MigrationParams::default()
        };
        let prepared = prepare(&source, &to, &params).await;
        start(&from, &prepared, &params).await;
        if from_iteration > 0 {
            wait(&from, TransferRole::Source, |transfer| {
                transfer
                    .progress
                    .as_ref()
                    .is_some_and(|progress| progress.pages_normal + progress.pages_zero > 600)
            })
            .await;
            assert!(
                source
                    .machine
                    .memory()
                    .table()
                    .write(100 * PAGE_SIZE, b"later")
            );
            source.backend.guest_writes(0, 100);
        }
        let here = ended(&from, TransferRole::Source).await;
        match (from_iteration, verify) {
            (1, Verify::AfterCommit) => {
                assert_eq!(here.phase(), TransferPhase::Completed);
                assert_eq!(
                    here.progress.unwrap().verification(),
                    v1::Verification::Mismatch
                );
            }
            _ => {
                assert_eq!(here.phase(), TransferPhase::Failed, "{here:?}");
                let reason = if from_iteration == 0 {
                    "STREAM_CORRUPT"
                } else {
                    "DIGEST_MISMATCH"
                };
                assert_eq!(here.error.unwrap().reason, reason);
                assert_eq!(state(&source), v1::vm::State::Running);
                assert!(
                    !source.machine.dirty().enabled(),
                    "dirty logging stays on after a failure"
                );
                let there = ended(&to, TransferRole::Destination).await;
                assert_eq!(there.error.unwrap().reason, reason);
                assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_leaves_the_vm_where_it_is_and_a_retry_works() {
    let source = running();
    let from = endpoint(&source);
    let slow = MigrationParams {
        max_bandwidth: Some(1 << 20),
        ..MigrationParams::default()
    };
    {
        let destination = fake::empty();
        let to = endpoint(&destination);
        let prepared = prepare(&source, &to, &slow).await;
        start(&from, &prepared, &slow).await;
        wait(&from, TransferRole::Source, |transfer| {
            transfer
                .progress
                .as_ref()
                .is_some_and(|progress| progress.pages_normal > 0)
        })
        .await;
        let cancel = || {
            Request::new(v1::CancelTransferRequest {
                migration: "m1".into(),
                role: TransferRole::Source.into(),
                error: None,
            })
        };
        api(&from).cancel_transfer(cancel()).await.unwrap();
        api(&from).cancel_transfer(cancel()).await.unwrap();
        let here = ended(&from, TransferRole::Source).await;
        assert_eq!(here.phase(), TransferPhase::Cancelled);
        assert_eq!(here.error.unwrap().reason, "CANCELLED_BY_USER");
        let there = ended(&to, TransferRole::Destination).await;
        assert_eq!(there.phase(), TransferPhase::Cancelled, "{there:?}");
        assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
        assert_eq!(state(&source), v1::vm::State::Running);
        assert!(!source.machine.dirty().enabled());
        api(&from).cancel_transfer(cancel()).await.unwrap();
    }
    let release = v1::ReleaseTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
    };
    api(&from)
        .release_transfer(Request::new(release))
        .await
        .unwrap();
    let destination = fake::empty();
    let to = endpoint(&destination);
    let fast = MigrationParams::default();
    let prepared = prepare(&source, &to, &fast).await;
    start(&from, &prepared, &fast).await;
    assert_eq!(
        ended(&from, TransferRole::Source).await.phase(),
        TransferPhase::Completed
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn time_that_is_up_ends_a_pass_or_lets_it_end_as_the_user_chose() {
    for on_timeout in [OnTimeout::Cancel, OnTimeout::ForceSwitchover] {
        let (source, destination) = (running(), fake::empty());
        let (from, to) = (endpoint(&source), endpoint(&destination));
        let params = MigrationParams {
            // The bulk iteration takes more than two seconds.
            max_bandwidth: Some(1 << 20),
            max_total_time: Duration::from_secs(1),
            on_timeout,
            ..MigrationParams::default()
        };
        let prepared = prepare(&source, &to, &params).await;
        start(&from, &prepared, &params).await;
        let here = ended(&from, TransferRole::Source).await;
        let progress = here.progress.clone().unwrap();
        if on_timeout == OnTimeout::Cancel {
            assert_eq!(here.phase(), TransferPhase::Failed);
            assert_eq!(here.error.unwrap().reason, "COMPLETION_TIMEOUT");
            assert!(
                progress.iterations.is_empty(),
                "it waited for the iteration to end"
            );
            assert_eq!(progress.decisions.len(), 1);
            assert_eq!(state(&source), v1::vm::State::Running);
            assert!(!source.machine.dirty().enabled());
        } else {
            assert_eq!(here.phase(), TransferPhase::Completed, "{:?}", here.error);
        }
    }
}

/// A source made by hand.
/// Leaves a page out of every iteration from one on.
#[derive(Debug)]
pub(super) struct Omit {
    pub(super) slot: u32,
    pub(super) page: u32,
    pub(super) from: u32,
}

impl PageFilter for Omit {
    fn sends(&self, slot: u32, page: u32, iteration: u32) -> bool {
        (slot, page) != (self.slot, self.page) || iteration < self.from
    }
}

struct ByHand {
    control: (TcpStream, FrameWriter, FrameReader),
    data: (TcpStream, FrameWriter),
}

fn introduce(
    prepared: &v1::PrepareIncomingResponse,
    role: StreamRole,
) -> (TcpStream, FrameWriter, FrameReader) {
    let ticket: [u8; TICKET] = prepared.ticket.as_slice().try_into().unwrap();
    let mut stream = TcpStream::connect(&prepared.data_address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut writer = FrameWriter::new(2, 1);
    let mut reader = FrameReader::new(2, 1);
    writer
        .send(
            &mut stream,
            Kind::Hello,
            0,
            &Hello { ticket, role }.encode(),
        )
        .unwrap();
    assert_eq!(reader.frame(&mut stream).unwrap().0.kind, Kind::HelloAck);
    (stream, writer, reader)
}

impl ByHand {
    fn connect(prepared: &v1::PrepareIncomingResponse) -> Self {
        let control = introduce(prepared, StreamRole::Control);
        let (stream, writer, _) = introduce(prepared, StreamRole::Data(0));
        Self {
            control,
            data: (stream, writer),
        }
    }

    fn control(&mut self, kind: Kind, payload: &[u8]) {
        self.control
            .1
            .send(&mut self.control.0, kind, 0, payload)
            .unwrap();
    }

    fn zero(&mut self, slot: u32, run: Run) {
        let mut payload = Vec::new();
        encode_runs(&[run], &mut payload);
        let mut frame = self
            .data
            .1
            .header(Kind::Zero, slot, 1, payload.len() as u32)
            .to_vec();
        frame.extend_from_slice(&payload);
        std::io::Write::write_all(&mut self.data.0, &frame).unwrap();
    }

    /// Everything up to READY.
    fn until_ready(&mut self, vm: &FakeVm) {
        let table = vm.machine.memory().table();
        self.control(Kind::SlotTable, &encode_slots(&table));
        self.zero(
            0,
            Run {
                page: 0,
                pages: table.pages() as u32,
            },
        );
        self.data
            .1
            .send(&mut self.data.0, Kind::IterEnd, 0, &[])
            .unwrap();
        assert_eq!(self.answer(), Kind::IterAck);
        let state = VmState {
            left: Switchover {
                run: true,
                never_ran: false,
            },
            digest: None,
            vcpus: b"fake vCPUs".to_vec(),
        };
        self.control(Kind::State, &state.encode(2));
        assert_eq!(self.answer(), Kind::Ready);
    }

    /// The next frame that is not about populating.
    fn answer(&mut self) -> Kind {
        loop {
            let kind = self.control.2.frame(&mut self.control.0).unwrap().0.kind;
            if kind != Kind::Populated {
                return kind;
            }
        }
    }
}

pub(super) fn one_stream() -> MigrationParams {
    MigrationParams {
        streams: 1,
        ..MigrationParams::default()
    }
}

async fn resolve(to: &TransferEndpoint, decision: v1::resolve_transfer_request::Decision) {
    let request = v1::ResolveTransferRequest {
        migration: "m1".into(),
        decision: decision.into(),
    };
    api(to)
        .resolve_transfer(Request::new(request))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_after_ready_is_doubt_until_somebody_knows() {
    use v1::resolve_transfer_request::Decision;
    for decision in [Decision::Commit, Decision::Abort] {
        let (source, destination) = (running(), fake::empty());
        let to = endpoint(&destination);
        let prepared = prepare(&source, &to, &one_stream()).await;
        let mut by_hand = ByHand::connect(&prepared);
        by_hand.until_ready(&source);
        wait(&to, TransferRole::Destination, |transfer| {
            transfer.phase() == TransferPhase::Ready
        })
        .await;
        let cancel = v1::CancelTransferRequest {
            migration: "m1".into(),
            role: TransferRole::Destination.into(),
            error: None,
        };
        let refused = api(&to)
            .cancel_transfer(Request::new(cancel))
            .await
            .unwrap_err();
        assert_eq!(
            slat_proto::ApiError::from(refused).reason,
            Reason::PastPointOfNoReturn
        );
        drop(by_hand);
        // Longer than the destination asks around: it must not decide by itself.
        let waited = tokio::time::timeout(
            Duration::from_millis(1500),
            ended(&to, TransferRole::Destination),
        );
        assert!(waited.await.is_err(), "a timer decided");
        assert_eq!(
            ownership(&destination),
            Ownership::Prepared {
                migration: "m1".into(),
                epoch: 2
            }
        );
        assert!(destination.machine.resume().is_err());
        resolve(&to, decision).await;
        let there = ended(&to, TransferRole::Destination).await;
        if decision == Decision::Commit {
            assert_eq!(there.phase(), TransferPhase::Completed);
            assert_eq!(ownership(&destination), Ownership::Owner { epoch: 2 });
            assert_eq!(state(&destination), v1::vm::State::Running);
        } else {
            assert_eq!(there.phase(), TransferPhase::Failed);
            assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
            assert!(destination.machine.resume().is_err());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_commit_after_ready_is_as_good_as_silence() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.until_ready(&source);
    by_hand.control(Kind::State, &[7; 4096]);
    // Not read any more: as if it had not been said.
    by_hand.control(Kind::Commit, &[]);
    let waited = tokio::time::timeout(
        Duration::from_millis(500),
        ended(&to, TransferRole::Destination),
    );
    assert!(waited.await.is_err());
    resolve(&to, v1::resolve_transfer_request::Decision::Abort).await;
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Failed);
    assert_eq!(destination.backend.state().runs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_state_nobody_writes_the_memory() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.until_ready(&source);
    // READY was said for the memory as it was checked.
    let table = destination.machine.memory().table();
    assert!(table.write(0, b"checked"));
    let mut payload = Vec::new();
    encode_runs(&[Run { page: 0, pages: 1 }], &mut payload);
    let (stream, writer) = &mut by_hand.data;
    let mut late = writer
        .header(Kind::Zero, 0, 1, payload.len() as u32)
        .to_vec();
    late.extend_from_slice(&payload);
    late.extend_from_slice(&writer.header(Kind::IterEnd, 0, 1, 0));
    // Refused at once, or lost in the kernel: there is nobody left to read it.
    drop(std::io::Write::write_all(stream, &late));
    let mut byte = [0];
    assert!(
        matches!(stream.read(&mut byte), Ok(0) | Err(_)),
        "the stream is still open"
    );
    by_hand.control(Kind::Commit, &[]);
    ended(&to, TransferRole::Destination).await;
    let mut memory = [0; 7];
    assert!(table.read(0, &mut memory));
    assert_eq!(&memory, b"checked");
}

#[tokio::test(flavor = "multi_thread")]
async fn state_during_an_iteration_is_refused() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let params = MigrationParams {
        streams: 2,
        ..MigrationParams::default()
    };
    let prepared = prepare(&source, &to, &params).await;
    let mut by_hand = ByHand::connect(&prepared);
    let (_second, ..) = introduce(&prepared, StreamRole::Data(1));
    let table = source.machine.memory().table();
    by_hand.control(Kind::SlotTable, &encode_slots(&table));
    wait(&to, TransferRole::Destination, |transfer| {
        transfer.phase() == TransferPhase::Precopy
    })
    .await;
    let (stream, writer) = &mut by_hand.data;
    let pages = table.pages() as u32;
    let mut payload = Vec::new();
    encode_runs(&[Run { page: 0, pages }], &mut payload);
    let mut frames = writer
        .header(Kind::Zero, 0, 1, payload.len() as u32)
        .to_vec();
    frames.extend_from_slice(&payload);
    frames.extend_from_slice(&writer.header(Kind::IterEnd, 0, 0, 0));
    std::io::Write::write_all(stream, &frames).unwrap();
    wait(&to, TransferRole::Destination, |transfer| {
        transfer.progress.as_ref().unwrap().pages_zero >= u64::from(pages)
    })
    .await;
    by_hand.control(Kind::State, &[0; 8]);
    let there = ended(&to, TransferRole::Destination).await;
    let error = there.error.unwrap();
    assert_eq!(error.reason, "STREAM_CORRUPT");
    assert!(error.message.contains("during"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_before_ready_and_decisions_before_ready_do_nothing_good() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.control(
        Kind::SlotTable,
        &encode_slots(&source.machine.memory().table()),
    );
    resolve(&to, v1::resolve_transfer_request::Decision::Commit).await;
    by_hand.control(Kind::Commit, &[]);
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Failed);
    assert_eq!(there.error.unwrap().reason, "STREAM_CORRUPT");
    assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
    assert_eq!(destination.backend.state().runs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_frame_ends_the_side_with_its_reason() {
    type Bad = fn(&mut ByHand, u64);
    let cases: [(&str, Bad); 7] = [
        ("PAGE_OUT_OF_SLOT", |by_hand, pages| {
            by_hand.zero(
                0,
                Run {
                    page: pages as u32,
                    pages: 1,
                },
            )
        }),
        ("PAGE_OUT_OF_SLOT", |by_hand, _| {
            by_hand.zero(9, Run { page: 0, pages: 1 })
        }),
        ("PAGE_OUT_OF_SLOT", |by_hand, _| {
            by_hand.zero(
                0,
                Run {
                    page: u32::MAX,
                    pages: u32::MAX,
                },
            )
        }),
        ("STREAM_CORRUPT", |by_hand, _| {
            by_hand
                .data
                .1
                .send(&mut by_hand.data.0, Kind::IterEnd, 7, &[])
                .unwrap();
        }),
        ("STREAM_CORRUPT", |by_hand, _| {
            by_hand
                .data
                .1
                .send(&mut by_hand.data.0, Kind::State, 0, &[0; 8])
                .unwrap();
        }),
        ("STREAM_CORRUPT", |by_hand, _| {
            std::io::Write::write_all(&mut by_hand.data.0, &[b'X'; HEADER]).unwrap();
        }),
        ("CONNECTION_LOST", |by_hand, _| {
            by_hand.data.0.shutdown(std::net::Shutdown::Both).unwrap();
        }),
    ];
    for (reason, bad) in cases {
        let (source, destination) = (running(), fake::empty());
        let to = endpoint(&destination);
        let prepared = prepare(&source, &to, &one_stream()).await;
        let mut by_hand = ByHand::connect(&prepared);
        let table = source.machine.memory().table();
        by_hand.control(Kind::SlotTable, &encode_slots(&table));
        bad(&mut by_hand, table.pages());
        let there = ended(&to, TransferRole::Destination).await;
        assert_eq!(there.phase(), TransferPhase::Failed);
        assert_eq!(there.error.unwrap().reason, reason);
        assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_without_the_ticket_cannot_disturb() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let params = MigrationParams {
        max_bandwidth: Some(16 << 20),
        ..MigrationParams::default()
    };
    let prepared = prepare(&source, &to, &params).await;
    let mut silent = Vec::new();
    let mut knock = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(&prepared.data_address).unwrap();
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        silent.push(stream);
    };
    let wrong = Hello {
        ticket: [0; TICKET],
        role: StreamRole::Control,
    }
    .encode();
    let mut hello = Vec::new();
    FrameWriter::new(2, 1)
        .send(&mut hello, Kind::Hello, 0, &wrong)
        .unwrap();
    knock(b"GET / HTTP/1.1\r\n\r\n");
    knock(&hello);
    knock(&[0xff; 4096]);
    start(&from, &prepared, &params).await;
    for _ in 0..40 {
        knock(&hello[..10]);
        knock(b"");
    }
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    // A peer with a wrong ticket is closed without a word.
    let mut byte = [0];
    silent[1].set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(silent[1].read(&mut byte), Ok(0) | Err(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_commit_is_unanswered_stays_stopped_until_released() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let params = one_stream();
    let prepared = prepare(&source, &to, &params).await;
    // The destination journals OWNED and then its VM's vCPUs do not start: owned all the same.
    destination.backend.state().fail.push("run");
    start(&from, &prepared, &params).await;
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Completed);
    assert_eq!(ownership(&destination), Ownership::Owner { epoch: 2 });
    assert_eq!(state(&destination), v1::vm::State::Paused);
    assert_eq!(there.error.unwrap().reason, "KVM_IOCTL");
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Completed);
    assert!(
        here.progress.unwrap().downtime.is_none(),
        "it is still down"
    );
    assert!(source.machine.resume().is_err());
    let release = v1::ReleaseTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
    };
    api(&from)
        .release_transfer(Request::new(release))
        .await
        .unwrap();
    assert_eq!(ownership(&source), Ownership::Ended);
}
