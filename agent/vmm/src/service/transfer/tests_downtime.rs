//! The limit on downtime: refused where it cannot be met, kept where it can, and what becomes of a
//! switchover that takes longer than predicted. Both sides in one process, over real sockets, a
//! fake guest that writes all the time, and a wire and a disk that are slow when told to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use prost::Message as _;
use slat_proto::{
    Reason,
    model::{MigrationParams, OnOverrun, OnTimeout, PAGE_SIZE, std_duration},
    v1::{
        self, TransferPhase, TransferRole, migration_decision::Action,
        transfer_service_server::TransferService as _,
    },
};
use tokio_stream::StreamExt as _;
use tonic::Request;

use super::tests::{api, ended, endpoint, name, one_stream, prepare, running, start, state};
use crate::{
    fake::{self, FakeVm},
    machine::Machine,
    migration::filter::PageFilter,
};

/// Pages that the guest writes over and over.
const HOT: u64 = 200;

/// A guest that writes its hot pages; they are dirty at every harvest.
struct Guest {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    fn writes(vm: &FakeVm) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (machine, backend) = (Arc::clone(&vm.machine), Arc::clone(&vm.backend));
        let stopped = Arc::clone(&stop);
        // However seldom the thread gets to it: they count as written.
        backend.state().hot = (1000..1000 + HOT).collect();
        let thread = std::thread::spawn(move || {
            let table = machine.memory().table();
            let mut round = 0_u64;
            while !stopped.load(Ordering::SeqCst) {
                {
                    // Held meanwhile: a paused guest writes nothing.
                    let fake = backend.state();
                    if fake.running {
                        for page in 0..HOT {
                            let at = (1000 + page) * PAGE_SIZE;
                            assert!(table.write(at, &round.to_le_bytes()));
                        }
                        round += 1;
                    }
                }
                std::thread::yield_now();
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// A wire that takes so long for a page while the VM is paused, for so many pages.
#[derive(Debug)]
struct Slow {
    machine: Arc<Machine>,
    page: Duration,
    left: AtomicU32,
}

impl PageFilter for Slow {
    fn sends(&self, _slot: u32, _page: u32, _iteration: u32) -> bool {
        if !self.machine.runs() {
            let spent = self
                .left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                    left.checked_sub(1)
                });
            if spent.is_ok() {
                std::thread::sleep(self.page);
            }
        }
        true
    }
}

/// Moves a VM whose guest writes, over a wire that slows down in the blackout for `slow` pages.
async fn over_a_wire_that_slows(
    slow: u32,
    params: &MigrationParams,
) -> (FakeVm, FakeVm, v1::Transfer) {
    let (source, destination) = (running(), fake::empty());
    let (mut from, to) = (endpoint(&source), endpoint(&destination));
    from.filter = Arc::new(Slow {
        machine: Arc::clone(&source.machine),
        page: Duration::from_millis(5),
        left: slow.into(),
    });
    let guest = Guest::writes(&source);
    let prepared = prepare(&source, &to, params).await;
    start(&from, &prepared, params).await;
    let here = ended(&from, TransferRole::Source).await;
    ended(&to, TransferRole::Destination).await;
    drop(guest);
    (source, destination, here)
}

fn actions(side: &v1::Transfer) -> Vec<Action> {
    let progress = side.progress.as_ref().unwrap();
    progress
        .decisions
        .iter()
        .map(v1::MigrationDecision::action)
        .collect()
}

fn ways_back(side: &v1::Transfer) -> usize {
    let back = |action: &&Action| **action == Action::ResumePrecopy;
    actions(side).iter().filter(back).count()
}

/// From the first stopped vCPU until the destination had the last pages.
fn stopped_and_copied(side: &v1::Transfer) -> Duration {
    let progress = side.progress.as_ref().unwrap();
    let parts = progress.downtime_breakdown.as_ref().unwrap();
    std_duration(parts.pause.as_ref()) + std_duration(parts.final_copy.as_ref())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wire_that_slows_in_the_blackout_goes_back_to_precopy_and_then_keeps_the_limit() {
    let params = MigrationParams {
        max_iterations: 1000,
        ..one_stream()
    };
    // 70 pages of 5 ms: more than the limit in one attempt, not in two.
    let (source, destination, here) = over_a_wire_that_slows(70, &params).await;
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    assert!(ways_back(&here) >= 1, "{here:?}");
    assert_eq!(actions(&here).last(), Some(&Action::Switchover));
    assert!(stopped_and_copied(&here) <= params.max_downtime, "{here:?}");
    let progress = here.progress.as_ref().unwrap();
    let back = progress
        .decisions
        .iter()
        .find(|decision| decision.action() == Action::ResumePrecopy)
        .unwrap();
    assert!(back.cause.contains("still expected"), "{back:?}");
    let prediction = progress.prediction.as_ref().unwrap();
    assert!(prediction.total.is_some() && prediction.parts.is_some());
    // The phases say that it went back.
    let phases: Vec<TransferPhase> = here.phase_times.iter().map(|at| at.phase()).collect();
    assert_eq!(
        phases[1..4],
        [
            TransferPhase::Precopy,
            TransferPhase::Switchover,
            TransferPhase::Precopy
        ]
    );
    assert_eq!(state(&destination), v1::vm::State::Running);
    destination.machine.pause().unwrap();
    assert_eq!(
        source.machine.digest().unwrap(),
        destination.machine.digest().unwrap(),
        "no page is lost on the way back"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_that_is_to_finish_finishes_whatever_the_wire_does() {
    let params = MigrationParams {
        on_overrun: OnOverrun::Finish,
        max_downtime: Duration::from_millis(100),
        max_iterations: 1000,
        ..one_stream()
    };
    let (_, destination, here) = over_a_wire_that_slows(u32::MAX, &params).await;
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    assert_eq!(ways_back(&here), 0);
    assert!(stopped_and_copied(&here) > params.max_downtime, "{here:?}");
    assert_eq!(state(&destination), v1::vm::State::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_back_a_few_times_and_then_does_as_it_was_told() {
    for (on_timeout, moves) in [
        (OnTimeout::Cancel, false),
        (OnTimeout::ForceSwitchover, true),
    ] {
        let params = MigrationParams {
            on_timeout,
            max_downtime: Duration::from_millis(60),
            max_iterations: 1000,
            ..one_stream()
        };
        let (source, destination, here) = over_a_wire_that_slows(u32::MAX, &params).await;
        assert_eq!(ways_back(&here), 5, "{here:?}");
        if moves {
            assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
            assert_eq!(actions(&here).last(), Some(&Action::ForceSwitchover));
            assert_eq!(state(&destination), v1::vm::State::Running);
        } else {
            assert_eq!(here.phase(), TransferPhase::Failed, "{here:?}");
            let error = here.error.unwrap();
            assert_eq!(error.reason, Reason::NotConverging.as_str());
            assert!(error.message.contains("5 switchovers"), "{error:?}");
            assert_eq!(state(&source), v1::vm::State::Running);
            assert!(!source.machine.dirty().enabled());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_pacing_holds_the_last_pages_up() {
    let (source, destination) = (fake::created(), fake::empty());
    source.machine.start().unwrap();
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let params = MigrationParams {
        max_bandwidth: Some(1 << 20),
        max_iterations: 1000,
        ..one_stream()
    };
    let guest = Guest::writes(&source);
    let prepared = prepare(&source, &to, &params).await;
    start(&from, &prepared, &params).await;
    let here = ended(&from, TransferRole::Source).await;
    drop(guest);
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    // 800 KiB at 1 MiB/s would be 0.8 s.
    assert!(stopped_and_copied(&here) <= params.max_downtime, "{here:?}");
    let progress = here.progress.unwrap();
    let last = progress.iterations.last().unwrap();
    assert!(last.r#final && last.pages_normal >= HOT, "{last:?}");
    // Before it the cap was kept.
    let bulk = &progress.iterations[0];
    let rate = bulk.bytes_transferred as f64 / std_duration(bulk.duration.as_ref()).as_secs_f64();
    let costs = progress.prediction.unwrap().costs.unwrap();
    assert!(costs.bandwidth_bytes_per_second as f64 > rate, "{costs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_cannot_be_met_is_refused_before_any_page_is_sent() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    // Three appends of 3 ms.
    source.disk.set_slow(Duration::from_millis(3));
    destination.disk.set_slow(Duration::from_millis(3));
    let params = MigrationParams {
        max_downtime: Duration::from_millis(5),
        ..one_stream()
    };
    let prepared = prepare(&source, &to, &params).await;
    start(&from, &prepared, &params).await;
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Failed);
    let error = here.error.unwrap();
    assert_eq!(
        error.reason,
        Reason::DowntimeUnreachable.as_str(),
        "{error:?}"
    );
    let millis = |key: &str| error.metadata[key].parse::<f64>().unwrap();
    assert!(millis("predicted_ms") >= 9.0, "{error:?}");
    assert!(millis("commit_ms") >= 3.0 && millis("resume_ms") >= 3.0);
    assert_eq!(error.metadata["max_downtime_ms"], "5.000");
    assert!(error.advice.contains("--max-downtime"), "{error:?}");
    let progress = here.progress.unwrap();
    assert_eq!(progress.bytes_transferred, 0);
    assert!(progress.iterations.is_empty() && progress.expected_downtime.is_none());
    assert_eq!(state(&source), v1::vm::State::Running);
    // The destination hears why.
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Failed);
    assert_eq!(
        there.error.unwrap().reason,
        Reason::DowntimeUnreachable.as_str()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn five_milliseconds_are_enough_for_a_vm_that_is_idle_or_paused() {
    for paused in [false, true] {
        // A busy machine may take longer at any moment: then it says so, and is asked again.
        let mut moved = false;
        for _ in 0..50 {
            let (source, destination) = (running(), fake::empty());
            if paused {
                source.machine.pause().unwrap();
            }
            let (from, to) = (endpoint(&source), endpoint(&destination));
            let params = MigrationParams {
                max_downtime: Duration::from_millis(5),
                ..one_stream()
            };
            let prepared = prepare(&source, &to, &params).await;
            start(&from, &prepared, &params).await;
            let here = ended(&from, TransferRole::Source).await;
            ended(&to, TransferRole::Destination).await;
            moved = here.phase() == TransferPhase::Completed;
            if moved {
                assert!(stopped_and_copied(&here) <= params.max_downtime);
                let progress = here.progress.unwrap();
                let predicted = progress.prediction.unwrap();
                assert!(
                    std_duration(predicted.total.as_ref()) <= params.max_downtime,
                    "{predicted:?}"
                );
                break;
            }
            let reason = here.error.unwrap().reason;
            let honest = [Reason::DowntimeUnreachable, Reason::NotConverging];
            assert!(
                honest.iter().any(|known| known.as_str() == reason),
                "{reason}"
            );
        }
        assert!(moved, "paused: {paused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_iterations_stay_small_on_disk_and_in_every_message() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    // Never reached, so it iterates until iterations are up.
    source.disk.set_slow(Duration::from_millis(2));
    let params = MigrationParams {
        max_downtime: Duration::from_millis(1),
        max_iterations: 3000,
        on_timeout: OnTimeout::ForceSwitchover,
        ..one_stream()
    };
    let prepared = prepare(&source, &to, &params).await;
    let begun = Instant::now();
    start(&from, &prepared, &params).await;
    let request = v1::WatchTransferRequest {
        migration: name().to_string(),
        role: TransferRole::Source.into(),
    };
    let watched = api(&from).watch_transfer(Request::new(request)).await;
    let mut stream = watched.unwrap().into_inner();
    let (mut whole, mut messages) = (0, 0);
    let mut last = v1::Transfer::default();
    while let Some(Ok(side)) = stream.next().await {
        messages += 1;
        assert!(side.encoded_len() < 64 << 10, "{}", side.encoded_len());
        let progress = side.progress.as_ref().unwrap();
        if progress.histories_omitted {
            assert!(progress.iterations.is_empty() && progress.decisions.is_empty());
        } else {
            whole += 1;
        }
        last = side;
    }
    let seconds = begun.elapsed().as_secs();
    // One a second and one a phase; figures ten times a second and with each phase.
    assert!(whole <= seconds + 8, "{whole} in {seconds} s");
    assert!(messages <= 10 * seconds + 18, "{messages} in {seconds} s");
    assert_eq!(last.phase(), TransferPhase::Completed, "{last:?}");
    let progress = last.progress.unwrap();
    assert_eq!(progress.iterations_done(), 3001);
    assert!(progress.iterations.len() <= 64 && progress.decisions.len() <= 64);
    let kept = source.machine.dir().transfers().unwrap();
    assert!(
        kept[0].encoded_len() < 64 << 10,
        "{}",
        kept[0].encoded_len()
    );
    assert_eq!(kept[0].progress.as_ref().unwrap().iterations_done(), 3001);
}
