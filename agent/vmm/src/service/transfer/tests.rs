//! Both sides in one process, over real sockets and journals and a fake backend; and a source made
//! by hand, for everything that an honest source never does.

mod by_hand;

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

use super::{
    TransferApi, TransferEndpoint,
    tests_server::{self as server, Both},
};
use crate::{
    fake::{self, FakeVm},
    handover::{payload::encode_slots, preamble, side::has_ended, state::VmState},
    machine::Switchover,
    migration::filter::PageFilter,
    migration::wire::{
        FrameReader, FrameWriter, HEADER, Hello, Kind, Run, StreamRole, TICKET, WireError,
        encode_runs,
    },
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Everything here takes well under a second; a hang is an error.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn name() -> MigrationName {
    MigrationName::parse("m1").unwrap()
}

pub(super) fn endpoint(vm: &FakeVm) -> TransferEndpoint {
    let endpoint = TransferEndpoint::new(
        Arc::clone(&vm.machine),
        VmName::parse("web").unwrap(),
        LOOPBACK,
    );
    server::describe(&endpoint, &name());
    endpoint
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

pub(super) async fn prepare(
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
    let request = prepare_request(vm, to, params, preamble);
    api(to)
        .prepare_incoming(Request::new(request))
        .await
        .unwrap()
        .into_inner()
}

/// What a server asks of the destination.
pub(super) fn prepare_request(
    vm: &FakeVm,
    to: &TransferEndpoint,
    params: &MigrationParams,
    mut preamble: v1::Preamble,
) -> v1::PrepareIncomingRequest {
    preamble.channels = preamble::channels(to.insecure_pages);
    let grant = server::receive(
        &vm.machine.uid().unwrap(),
        preamble.channels().next().unwrap(),
    );
    let slots = vm
        .machine
        .memory()
        .table()
        .slots()
        .iter()
        .map(|slot| slot.spec().to_message())
        .collect();
    v1::PrepareIncomingRequest {
        migration: name().to_string(),
        vm: vm.machine.snapshot(),
        slots,
        params: Some(params.to_message()),
        source_agent_address: String::new(),
        validate_only: false,
        send_time: None,
        preamble: Some(preamble),
        grant: Some(server::signed(&grant)),
        grant_keys: server::keys(),
    }
}

pub(super) async fn start(
    from: &TransferEndpoint,
    prepared: &v1::PrepareIncomingResponse,
    params: &MigrationParams,
) {
    server::describe(from, &name());
    api(from)
        .start_outgoing(Request::new(start_request(from, prepared, params)))
        .await
        .unwrap();
}

/// What a server asks of the source.
pub(super) fn start_request(
    from: &TransferEndpoint,
    prepared: &v1::PrepareIncomingResponse,
    params: &MigrationParams,
) -> v1::StartOutgoingRequest {
    v1::StartOutgoingRequest {
        migration: name().to_string(),
        vm: "vms/web".into(),
        data_address: prepared.data_address.clone(),
        ticket: prepared.ticket.clone(),
        params: Some(params.to_message()),
        epoch: 1,
        versions: prepared.versions,
        grant: Some(server::signed(&server::send(&from.uid(), prepared))),
        grant_keys: server::keys(),
        channel: prepared.channel,
        ..Default::default()
    }
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

pub(super) fn state(vm: &FakeVm) -> v1::vm::State {
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
    for (verify, clear) in [
        (Verify::AfterCommit, false),
        (Verify::BeforeCommit, false),
        (Verify::AfterCommit, true),
    ] {
        let (source, destination) = (running(), fake::empty());
        let from = endpoint(&source).in_the_clear(clear);
        let to = endpoint(&destination).in_the_clear(clear);
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
        for path in [&here, &there].map(|side| side.progress.clone().unwrap().path.unwrap()) {
            use v1::page_path::Protection;
            assert!(!path.message.is_empty() || path.protection() == Protection::KernelTls);
            assert_eq!(path.protection() == Protection::None, clear, "{path:?}");
            assert_eq!(path.cipher.is_empty(), clear, "{path:?}");
        }
        let memory = there.progress.as_ref().unwrap();
        assert!(memory.total_bytes > 0);
        assert_eq!(memory.populated_bytes, memory.total_bytes);
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
    older.protocol = Some(v1::VersionRange { min: 1, max: 2 });
    let prepared = prepare_from(&source, &to, &params, older).await;
    assert_eq!(prepared.versions.unwrap().protocol, 2);
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
async fn time_that_is_up_ends_an_iteration_or_lets_it_end_as_the_user_chose() {
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

pub(super) fn one_stream() -> MigrationParams {
    MigrationParams {
        streams: 1,
        ..MigrationParams::default()
    }
}

/// A request that is delivered once more after its side ended and was released begins nothing: the
/// server may have called the migration cancelled on the strength of that end.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_arrives_again_after_its_release_begins_nothing() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let slow = MigrationParams {
        max_bandwidth: Some(1 << 20),
        ..MigrationParams::default()
    };
    let prepared = prepare(&source, &to, &slow).await;
    let first = start_request(&from, &prepared, &slow);
    let began = api(&from).start_outgoing(Request::new(first.clone())).await;
    began.unwrap();
    let cancel = v1::CancelTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
        error: None,
    };
    api(&from)
        .cancel_transfer(Request::new(cancel))
        .await
        .unwrap();
    ended(&from, TransferRole::Source).await;
    let release = v1::ReleaseTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
    };
    api(&from)
        .release_transfer(Request::new(release))
        .await
        .unwrap();
    // By another grant as well: the destination is gone, and so is its ticket.
    let other = start_request(&from, &prepared, &slow);
    for (request, reason) in [(first, Reason::GrantUsed), (other, Reason::GrantInvalid)] {
        let late = api(&from).start_outgoing(Request::new(request)).await;
        let refused = slat_proto::ApiError::from(late.unwrap_err());
        assert_eq!(refused.reason, reason, "{refused}");
    }
    assert!(from.find(&name(), TransferRole::Source).is_err());
    assert_eq!(state(&source), v1::vm::State::Running);
}
