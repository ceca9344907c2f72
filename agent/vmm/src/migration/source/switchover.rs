//! The blackout: vCPUs stop, the last pages and the state go, COMMIT is said. Each part is
//! measured.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    model::{Verify, proto_duration},
    v1::{self, TransferPhase},
};

use super::{
    super::{
        cpu_time::thread_cpu_time,
        socket::broken_off,
        wire::{Kind, WireError},
    },
    parts::SourceDriver,
    work::{Blackout, Work},
};
use crate::{
    handover::{payload::Resumed, state::VmState},
    memory::MemoryDigest,
};

impl SourceDriver {
    /// Stops the vCPUs, sends the last pages and the state.
    pub(super) fn switch_over(&self, work: &mut Work) -> Result<(), ApiError> {
        let begun = Instant::now();
        let started = work.started();
        let Some(precopied) = work.precopied.take() else {
            return Err(ApiError::new(Reason::Internal, "switchover before precopy"));
        };
        let link = work.link()?;
        let left = self.machine.enter_switchover(self.side.migration())?;
        let paused = begun.elapsed();
        self.side.enter(TransferPhase::Switchover);
        let last = self.last_iteration(&self.cursor()?, precopied.iteration)?;
        self.send_iteration(link, last, true, &precopied.convergence, started)?;
        let copied = begun.elapsed();

        let digest = match self.params.verify {
            // The VM stands still meanwhile: a cancel does not wait for its end.
            Verify::BeforeCommit => Some(
                MemoryDigest::unless(
                    &self.machine.memory().table(),
                    threads(),
                    link.shared.breaker.flag(),
                )
                .ok_or_else(|| WireError::Io(broken_off()))?,
            ),
            Verify::None | Verify::AfterCommit => None,
        };
        let vcpus = self.machine.backend()?.save_state().map_err(|error| {
            ApiError::new(
                Reason::StateSave,
                format!("vCPU state could not be read: {error}"),
            )
        })?;
        let state = VmState {
            left,
            digest: digest.clone(),
            vcpus,
            // Nobody changes slots while the VM migrates.
            generation: self.machine.memory().table().generation(),
        };
        link.send(Kind::State, 0, &state.encode(self.versions.protocol))?;
        work.blackout = Some(Blackout {
            begun,
            paused,
            copied,
            ready: copied,
            committed: copied,
            resumed: copied,
            digest,
        });
        Ok(())
    }

    pub(super) fn await_ready(&self, work: &mut Work) -> Result<(), ApiError> {
        work.link()?.receive(Kind::Ready)?;
        if let Some(blackout) = &mut work.blackout {
            blackout.ready = blackout.begun.elapsed();
        }
        Ok(())
    }

    /// Says COMMIT; the answer ends the downtime.
    pub(super) fn commit(&self, work: &mut Work) -> Result<Resumed, ApiError> {
        let link = work.link()?;
        link.send(Kind::Commit, 0, &[])?;
        let (_, payload) = link.receive(Kind::Resumed)?;
        let resumed = Resumed::decode(&payload)?;
        if let Some(blackout) = &mut work.blackout {
            blackout.resumed = blackout.begun.elapsed();
        }
        Ok(resumed)
    }

    /// Publishes what the blackout was made of.
    pub(super) fn publish_downtime(&self, work: &Work, resumed: &Resumed) {
        let (Some(blackout), Some(link)) = (&work.blackout, &work.link) else {
            return;
        };
        let cpu = link
            .shared
            .counters
            .cpu_nanos
            .load(std::sync::atomic::Ordering::Relaxed);
        self.side.update(|progress| {
            progress.remaining_bytes = 0;
            // A VM that could not be started there is still down.
            progress.downtime = resumed.as_it_was.then(|| proto_duration(blackout.resumed));
            progress.downtime_breakdown = Some(v1::DowntimeBreakdown {
                pause: Some(proto_duration(blackout.paused)),
                final_copy: Some(proto_duration(blackout.copied - blackout.paused)),
                state: Some(proto_duration(blackout.ready - blackout.copied)),
                commit: Some(proto_duration(blackout.committed - blackout.ready)),
                resume: Some(proto_duration(blackout.resumed - blackout.committed)),
            });
            progress.transfer_time = Some(proto_duration(work.transfer.elapsed()));
            progress.cpu_time = Some(proto_duration(
                Duration::from_nanos(cpu) + thread_cpu_time(),
            ));
        });
    }

    pub(super) fn digest(&self) -> MemoryDigest {
        MemoryDigest::of(&self.machine.memory().table(), threads())
    }
}

fn threads() -> usize {
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8)
}
