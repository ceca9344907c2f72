//! What the kernel's dirty_log_test holds KVM to, through gRPC and with a running guest, in every
//! mode that this host has.
//!
//! # The oracle
//! Harvest k tells set S(k); right after it all memory is read, R(k). Every page that memstress
//! writes gets a stamp that it never had, so a written page differs.
//! * Nothing is lost: a page that is neither in S(k) nor in S(k+1) was not written between harvests
//!   k-1 and k+1, and both R(k-1) and R(k) lie between them: they are equal there.
//! * Nothing is made up: a page in S(k) was written between harvests k-1 and k, so R(k-2) and R(k)
//!   differ there. One page a vCPU may be told of whose write was only about to happen: the kernel
//!   logs a fault before the guest repeats its store, and a vCPU may lose its CPU in between. And
//!   on x86-64 the guest's page tables may be told of: a processor that walks them through nested
//!   tables does so as if it wrote them.

use std::time::Duration;

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, GuestSpec, HostName, MemstressPattern, MemstressSpec, VmName, VmSpec},
    transport::{Address, Endpoint, connect},
    v1::{self, memory_service_client::MemoryServiceClient, vm_service_client::VmServiceClient},
};
use slat_record::dir::VmDir;
use tokio::net::UnixListener;

use super::*;
use crate::{
    backend::{self, FaultEvents, logging_modes},
    fake,
    guest::Layout,
    machine::{Machine, Parts},
    memory::digest_page,
};

const MEMORY: u64 = 16 << 20;
const VCPUS: u32 = 2;
const HARVESTS: usize = 12;
/// Pages that the guest writes from harvest to harvest, at least.
const WRITES: u64 = 600;
const PATIENCE: Duration = Duration::from_secs(60);

/// All memory, as hashes.
fn read(machine: &Machine) -> Vec<u128> {
    let mut page = [0; 4096];
    let table = machine.memory().table();
    let slot = table.slot(0).unwrap();
    (0..slot.spec().pages)
        .map(|number| {
            slot.read_page(number, &mut page);
            digest_page(number, &page)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_mode_tells_what_was_written_and_nothing_else() {
    if let (_, Some(why)) = backend::available() {
        println!("SKIPPED: {why}");
        return;
    }
    for (mode, create) in logging_modes() {
        let dir = slat_test_dir::TestDir::new();
        let machine = Machine::with_parts(
            VmDir::new(dir.path()),
            VmName::parse("web").unwrap(),
            HostName::parse("a").unwrap(),
            Parts {
                create: Arc::new(create),
                oom_score: None,
                ..Parts::real(FaultEvents::default())
            },
        )
        .unwrap();
        let spec = VmSpec {
            memory_bytes: MEMORY,
            vcpus: VCPUS,
            backend: Some(BackendKind::Kvm),
            format: None,
            guest: GuestSpec::Memstress(MemstressSpec {
                pattern: MemstressPattern::Random,
                ..MemstressSpec::default()
            }),
            ..fake::spec()
        };
        match machine.create(spec) {
            Ok(_) => holds(mode, &machine).await,
            Err(error) if error.reason == Reason::CapabilityMissing => {
                println!("SKIPPED: mode {mode}: {error}");
            }
            Err(error) => panic!("{mode}: {error}"),
        }
    }
}

async fn holds(mode: &str, machine: &Arc<Machine>) {
    let socket = machine.dir().socket();
    let endpoint = Endpoint::new()
        .service(vm_service(Arc::clone(machine)))
        .service(memory_service(Arc::clone(machine)))
        .serve_unix(UnixListener::bind(&socket).unwrap())
        .await;
    let channel = connect(&Address::Unix(socket)).unwrap();
    let mut vms = VmServiceClient::new(channel.clone());
    let mut memory = MemoryServiceClient::new(channel);
    let name = || "vms/web".to_owned();
    let request = v1::StartVmRequest {
        name: name(),
        ..Default::default()
    };
    vms.start_vm(request).await.unwrap();

    let mut told: Vec<Vec<bool>> = Vec::new();
    let mut reads = Vec::new();
    let mut batch = 0;
    for number in 0..=HARVESTS {
        if number == HARVESTS {
            let request = v1::PauseVmRequest {
                name: name(),
                ..Default::default()
            };
            vms.pause_vm(request).await.unwrap();
        }
        let request = v1::HarvestDirtyPagesRequest {
            vm: name(),
            acknowledge_batch: batch,
            ..Default::default()
        };
        let answer = memory.harvest_dirty_pages(request).await;
        let answer = answer.map_err(ApiError::from).unwrap().into_inner();
        batch = answer.batch;
        let mut set = vec![false; (MEMORY / 4096) as usize];
        for range in &answer.ranges {
            set[range.gfn as usize..(range.gfn + range.pages) as usize].fill(true);
        }
        told.push(set);
        reads.push(read(machine));
        if number < HARVESTS {
            more_writes(&mut vms).await;
        }
    }
    endpoint.stop().await;

    let tables = (Layout::new(MEMORY).unwrap().support() / 4096) as usize..told[0].len();
    let walked = |page| cfg!(target_arch = "x86_64") && tables.contains(&page);
    // The first harvest made the cursor, so S(0) is empty and says nothing.
    let (mut written, mut all_early) = (0, 0);
    for at in 1..=HARVESTS {
        let mut early = Vec::new();
        for page in 0..told[at].len() {
            let again = told.get(at + 1).is_some_and(|next| next[page]);
            if told[at][page] {
                written += 1;
                if at >= 2 && reads[at - 2][page] == reads[at][page] && !walked(page) {
                    early.push(page);
                }
            } else if !again && at < HARVESTS {
                assert!(
                    reads[at - 1][page] == reads[at][page],
                    "{mode}: a write of page {page} lost by harvest {at}"
                );
            }
        }
        assert!(
            early.len() <= VCPUS as usize,
            "{mode}: pages {early:?} made up in harvest {at}"
        );
        all_early += early.len();
    }
    // Paused, harvested, read: what the last harvest does not have was not written before it.
    for page in 0..told[HARVESTS].len() {
        if !told[HARVESTS][page] {
            assert!(
                reads[HARVESTS - 1][page] == reads[HARVESTS][page],
                "{mode}: a write of page {page} lost in the end"
            );
        }
    }
    println!("{mode}: {written} pages told, {all_early} of them early");
    assert!(written > HARVESTS, "{mode}: {written} pages");
    let counters = machine.snapshot().unwrap().guest_counters.unwrap();
    assert_eq!(counters.errors, 0, "{mode}");
}

/// Until the guest says that it wrote more.
async fn more_writes(vms: &mut VmServiceClient<slat_proto::transport::TracedChannel>) {
    let mut first = None;
    let waiting = async {
        loop {
            let request = v1::GetVmRequest {
                name: "vms/web".to_owned(),
                ..Default::default()
            };
            let vm = vms.get_vm(request).await.unwrap().into_inner();
            assert_eq!(vm.state(), v1::vm::State::Running, "{}", vm.state_message);
            let now = vm.guest_counters.unwrap().pages_written;
            if now > *first.get_or_insert(now) + WRITES {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .expect("the guest writes");
}
