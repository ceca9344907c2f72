//! Both sides in one process over the real software backend and a guest that checks its own memory.
//!
//! The guest is the judge: a page that was lost, stale or torn on the way is found at its next
//! visit, whatever this program's own digests say.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use slat_proto::{
    Reason,
    model::{
        BackendKind, CursorName, Format, GuestSpec, HostName, MemoryBacking, MemstressFill,
        MemstressPattern, MemstressSpec, MigrationName, MigrationParams, OnTimeout, PAGE_SIZE,
        SlotChange, SlotSpec, Verify, VmName, VmSpec,
    },
    v1::{self, TransferPhase, TransferRole, transfer_service_server::TransferService as _},
};
use slat_record::dir::VmDir;
use slat_trust::grant::{Grant, Purpose};
use tonic::Request;

use super::{
    TransferEndpoint,
    tests::{Omit, api},
    tests_expiry::short,
    tests_server as server,
};
use crate::{guest::Layout, handover::side::has_ended, machine::Machine};

const MEMORY: u64 = 16 << 20;
const VCPUS: u32 = 2;
/// Everything here takes a few seconds; a hang is an error.
const PATIENCE: Duration = Duration::from_secs(60);

struct Host {
    machine: Arc<Machine>,
    endpoint: TransferEndpoint,
    _dir: slat_test_dir::TestDir,
}

impl Host {
    fn new(host: &str) -> Self {
        let dir = slat_test_dir::TestDir::new();
        let name = VmName::parse("web").unwrap();
        let machine = Machine::new(
            VmDir::new(dir.path()),
            name.clone(),
            HostName::parse(host).unwrap(),
        )
        .unwrap();
        let endpoint =
            TransferEndpoint::new(Arc::clone(&machine), name, IpAddr::V4(Ipv4Addr::LOCALHOST));
        Self {
            machine,
            endpoint,
            _dir: dir,
        }
    }

    /// With a running guest.
    fn running(host: &str, format: Format, guest: MemstressSpec) -> Self {
        let host = Self::new(host);
        let spec = VmSpec {
            memory_bytes: MEMORY,
            vcpus: VCPUS,
            backend: Some(BackendKind::Software),
            format: Some(format),
            dirty_engine: None,
            backing: MemoryBacking::Auto,
            numa_node: None,
            prefault: false,
            paging: slat_proto::model::Paging::Kernel,
            guest: GuestSpec::Memstress(guest),
            labels: slat_proto::model::Labels::default(),
        };
        host.machine.create(spec).unwrap();
        host.machine.start().unwrap();
        host
    }

    fn vm(&self) -> v1::Vm {
        self.machine.snapshot().unwrap()
    }

    fn counters(&self) -> v1::GuestCounters {
        self.vm().guest_counters.unwrap()
    }

    /// Waits until the counters say so.
    async fn until(&self, done: impl Fn(&v1::GuestCounters) -> bool) {
        let waiting = async {
            while !done(&self.counters()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            panic!("the guest never came to that: {:?}", self.vm());
        }
    }

    async fn until_written(&self, pages: u64) {
        let goal = self.counters().pages_written + pages;
        self.until(|counters| counters.pages_written >= goal).await;
    }
}

/// Moves the VM as migration `id` and returns both sides as they ended.
async fn migrate(
    id: &str,
    from: &Host,
    to: &Host,
    params: &MigrationParams,
) -> (v1::Transfer, v1::Transfer) {
    begin(id, from, to, params, |grant| server::signed(&grant)).await;
    let there = ended(&to.endpoint, id, TransferRole::Destination).await;
    let here = ended(&from.endpoint, id, TransferRole::Source).await;
    (here, there)
}

/// Begins to move the VM; `sign` signs the leave to send it.
async fn begin(
    id: &str,
    from: &Host,
    to: &Host,
    params: &MigrationParams,
    sign: impl FnOnce(Grant) -> v1::SignedGrant,
) {
    let table = from.machine.memory().table();
    let (uid, epoch) = (from.machine.uid().unwrap(), from.vm().epoch);
    let described = v1::DescribeOutgoingRequest {
        migration: format!("migrations/{id}"),
        vm: "vms/web".into(),
        epoch,
        ..Default::default()
    };
    let described = api(&from.endpoint)
        .describe_outgoing(Request::new(described))
        .await;
    let described = described.unwrap().into_inner();
    let hosts = (from.machine.host().id(), to.machine.host().id());
    let mut leave = server::grant(Purpose::Receive, id, (&uid, epoch), hosts);
    leave.source_key = described.channel_key.as_slice().try_into().unwrap();
    let request = v1::PrepareIncomingRequest {
        migration: format!("migrations/{id}"),
        vm: from.machine.snapshot(),
        slots: table
            .slots()
            .iter()
            .map(|slot| slot.spec().to_message())
            .collect(),
        params: Some(params.to_message()),
        source_agent_address: String::new(),
        validate_only: false,
        send_time: None,
        preamble: described.preamble,
        grant: Some(server::signed(&leave)),
        grant_keys: server::keys(),
    };
    let prepared = api(&to.endpoint)
        .prepare_incoming(Request::new(request))
        .await;
    let prepared = prepared.unwrap().into_inner();
    let mut leave = server::grant(Purpose::Send, id, (&uid, epoch), hosts);
    leave.source_key = described.channel_key.as_slice().try_into().unwrap();
    leave.destination_key = prepared.channel_key.as_slice().try_into().unwrap();
    let request = v1::StartOutgoingRequest {
        migration: format!("migrations/{id}"),
        vm: "vms/web".into(),
        data_address: prepared.data_address,
        ticket: prepared.ticket,
        params: Some(params.to_message()),
        epoch: from.vm().epoch,
        versions: prepared.versions,
        channel: prepared.channel,
        grant: Some(sign(leave)),
        grant_keys: server::keys(),
        ..Default::default()
    };
    let started = api(&from.endpoint)
        .start_outgoing(Request::new(request))
        .await;
    started.unwrap();
}

async fn ended(endpoint: &TransferEndpoint, id: &str, role: TransferRole) -> v1::Transfer {
    let side = endpoint
        .find(&MigrationName::parse(id).unwrap(), role)
        .unwrap();
    let mut version = side.watch();
    let waiting = async {
        loop {
            version.mark_unchanged();
            let transfer = side.transfer();
            if has_ended(transfer.phase()) {
                return transfer;
            }
            version.changed().await.unwrap();
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(transfer) => transfer,
        Err(_) => panic!("{role:?} does not end: {:?}", side.transfer()),
    }
}

/// Several rounds and then the move, however fast the guest writes on a busy machine.
fn params(verify: Verify) -> MigrationParams {
    MigrationParams {
        verify,
        streams: 2,
        max_iterations: 4,
        on_timeout: OnTimeout::ForceSwitchover,
        ..MigrationParams::default()
    }
}

fn completed(id: &str, (here, there): &(v1::Transfer, v1::Transfer)) -> v1::MigrationProgress {
    assert_eq!(there.phase(), TransferPhase::Completed, "{id}: {there:?}");
    assert_eq!(here.phase(), TransferPhase::Completed, "{id}: {here:?}");
    here.progress.clone().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writing_guest_moves_and_finds_nothing_wrong() {
    for (format, verify) in [
        (Format::Ept4, Verify::AfterCommit),
        (Format::Sv39x4, Verify::BeforeCommit),
        (Format::Sv48x4, Verify::BeforeCommit),
        (Format::Sv57x4, Verify::AfterCommit),
        (Format::Ept5, Verify::BeforeCommit),
        (Format::Npt4, Verify::AfterCommit),
        (Format::Npt5, Verify::BeforeCommit),
        (Format::Ept4NoAd, Verify::AfterCommit),
        (Format::Ept5NoAd, Verify::BeforeCommit),
        (Format::Arm64Ipa40, Verify::AfterCommit),
        (Format::Arm64Ipa48, Verify::BeforeCommit),
    ] {
        let guest = MemstressSpec {
            pattern: MemstressPattern::HotCold {
                hot_percent: 10,
                hot_visit_percent: 80,
            },
            write_percent: 80,
            fill: MemstressFill::Random,
            ..MemstressSpec::default()
        };
        let mut from = Host::running("a", format, guest);
        from.until_written(2000).await;
        // There and back again: what arrived must also leave well.
        for id in ["m1", "m2"] {
            let to = Host::new("b");
            let before = from.counters();
            let sides = migrate(id, &from, &to, &params(verify)).await;
            let progress = completed(id, &sides);
            assert_eq!(progress.verification(), v1::Verification::Match, "{format}");
            assert!(progress.iterations.len() >= 2, "{progress:?}");
            assert_eq!(to.vm().state(), v1::vm::State::Running);
            assert_eq!(to.vm().spec.unwrap().format(), format.to_message());
            // Visits all of its memory by chance several times over.
            to.until_written(3 * before.pages).await;
            let after = to.counters();
            assert_eq!(after.errors, 0, "{format} {after:?}");
            assert!(after.pages_written > before.pages_written);
            let stats = to.vm().mmu_stats.unwrap();
            assert!(stats.faults_taken > Some(0), "{stats:?}");
            assert!(from.vm().mmu_stats.unwrap().dirty_pages_harvested > Some(0));
            assert!(from.machine.resume().is_err(), "the source runs no more");
            from = to;
        }
        from.machine.delete().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_itself_finds_a_page_whose_last_writes_were_left_out() {
    let guest = MemstressSpec {
        pattern: MemstressPattern::HotCold {
            hot_percent: 1,
            hot_visit_percent: 90,
        },
        ..MemstressSpec::default()
    };
    let mut from = Host::running("a", Format::Ept4, guest);
    let to = Host::new("b");
    from.until_written(1000).await;
    // One of the hot pages, written many times in every batch. The bulk iteration sends it; no
    // later write of it is sent.
    let working_page = 5;
    let layout = Layout::new(MEMORY).unwrap();
    let page = layout.working_page(working_page) / PAGE_SIZE;
    from.endpoint.filter = Arc::new(Omit {
        slot: 0,
        page: u32::try_from(page).unwrap(),
        from: 1,
    });
    // Slow enough for some batches during the bulk iteration.
    let params = MigrationParams {
        max_bandwidth: Some(64 << 20),
        ..params(Verify::None)
    };
    let sides = migrate("m1", &from, &to, &params).await;
    completed("m1", &sides);
    assert_eq!(from.counters().errors, 0);
    to.until(|counters| counters.errors > 0).await;
    assert_eq!(to.counters().first_error_page, working_page);
    to.machine.delete().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_callers_hold_do_not_come_again() {
    let mut from = Host::running("a", Format::Ept4, MemstressSpec::default());
    let stale = from.machine.list_slots().unwrap().generation;
    let slot = SlotSpec::new(7, 1 << 20, 16, false).unwrap();
    let create = [SlotChange::Create(slot)];
    let table = from.machine.update_slots(&create, stale).unwrap().table;
    let present = table.generation();
    let backup = CursorName::from_id("backup").unwrap();
    let read = |host: &Host, acknowledge| {
        host.machine
            .dirty()
            .read_api(&backup, acknowledge, crate::memory::Share::Runs(usize::MAX))
    };
    let mut old = read(&from, 0).unwrap().batch;
    let delete = [SlotChange::Delete { slot: 7 }];
    // There and back again.
    for id in ["m1", "m2"] {
        let to = Host::new("b");
        completed(id, &migrate(id, &from, &to, &params(Verify::None)).await);
        let error = to.machine.update_slots(&delete, stale).unwrap_err();
        assert_eq!(error.reason, Reason::StaleGeneration, "{id}");
        assert_eq!(to.machine.list_slots().unwrap().generation, present, "{id}");
        let gone = read(&to, old).unwrap_err();
        assert_eq!(gone.reason, Reason::NoSuchCursor, "{id}");
        let made = read(&to, 0).unwrap();
        assert!(made.created && made.batch > old, "{id}");
        let gone = read(&to, old).unwrap_err();
        assert_eq!(gone.reason, Reason::NoSuchCursor, "{id}: made again since");
        old = read(&to, made.batch).unwrap().batch;
        from = to;
    }
    let table = from.machine.update_slots(&delete, present).unwrap().table;
    assert_eq!(table.generation(), present + 1);
    from.machine.delete().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_ends_while_the_guest_writes_leaves_it_whole_at_its_source() {
    let guest = MemstressSpec {
        pattern: MemstressPattern::Random,
        fill: MemstressFill::Random,
        ..MemstressSpec::default()
    };
    let (from, to) = (Host::running("a", Format::Ept4, guest), Host::new("b"));
    let params = MigrationParams {
        // The first iteration takes longer than the grant lasts.
        max_bandwidth: Some(1 << 20),
        ..params(Verify::BeforeCommit)
    };
    begin("m1", &from, &to, &params, short).await;
    let here = ended(&from.endpoint, "m1", TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Failed, "{here:?}");
    assert_eq!(here.error.unwrap().reason, "GRANT_EXPIRED");
    let there = ended(&to.endpoint, "m1", TransferRole::Destination).await;
    assert_eq!(there.error.unwrap().reason, "GRANT_EXPIRED", "it was told");
    // It visits its pages again, and each is as it was left.
    from.until_written(20_000).await;
    assert_eq!(from.counters().errors, 0);
    // And goes whole when it has leave.
    let to = Host::new("b");
    completed(
        "m2",
        &migrate("m2", &from, &to, &self::params(Verify::BeforeCommit)).await,
    );
    to.until_written(5_000).await;
    assert_eq!(to.counters().errors, 0);
}
