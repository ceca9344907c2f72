//! From the state's arrival to the running VM: check, PREPARED, READY, OWNED, run.

use slat_proto::{
    ApiError, Reason,
    transport::connect,
    v1::{self, TransferPhase, transfer_service_client::TransferServiceClient},
};

use super::{
    super::wire::{Header, Kind, WireError},
    parts::DestinationDriver,
    work::{Work, was_told},
};
use crate::handover::{
    payload::Resumed,
    protocol::{
        Written,
        destination::{Input, Standing},
    },
    state::VmState,
};

/// How long a question to the source's agent may take.
const ASK_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(3);

/// What a destination waits for whose append fails, for `Transfer.waiting_for`.
const NOT_OWNED: &str = "its journal to be written (OWNED; the VM stands still meanwhile)";

impl DestinationDriver {
    /// Everything has arrived: is it all, is it right, does it load.
    pub(super) fn check(&self, work: &mut Work) -> Result<(), ApiError> {
        self.side.enter(TransferPhase::Switchover);
        if let Some((slot, page)) = work.link.intake.first_missing() {
            return Err(ApiError::new(
                Reason::StreamCorrupt,
                format!("slot {slot}, page {page:#x} was never sent"),
            )
            .with("slot", slot)
            .with("page", page));
        }
        let bytes = std::mem::take(&mut work.state);
        let state = VmState::decode(&bytes)?;
        if let Some(theirs) = &state.digests {
            compare(&work.link.intake.digests(), theirs)?;
            // Known here first: the source may never come to tell it.
            self.side
                .update(|progress| progress.set_verification(v1::Verification::Match));
        }
        self.machine.load(self.side.migration(), &state.vcpus)?;
        self.machine.go_on_counting(state.generation);
        work.left = state.left;
        Ok(())
    }

    pub(super) fn journal_prepared(&self, work: &mut Work) -> Written {
        match self.machine.prepare(self.side.migration()) {
            Ok(()) => Written::Durable,
            Err(error) => {
                let written = written(&error);
                work.fault.get_or_insert(error);
                written
            }
        }
    }

    /// PREPARED is durable: from here on only knowledge ends the side.
    pub(super) fn say_ready(&self, work: &mut Work) -> Option<Input> {
        self.side.enter(TransferPhase::Ready);
        let said = work.link.say(Kind::Ready, 0, &[]);
        said.err().map(|error| {
            tracing::warn!(%error, migration = %self.side.migration(), "READY could not be said");
            Input::LinkLost
        })
    }

    /// A frame, or the connection's end, after READY.
    pub(super) fn control_in_doubt(
        &self,
        frame: Result<(Header, Vec<u8>), ApiError>,
        work: &mut Work,
    ) -> Option<Input> {
        match frame {
            Ok((header, _)) if header.kind == Kind::Commit => Some(Input::CommitHeard),
            Err(error) if was_told(&error) => {
                work.fault.get_or_insert(error);
                Some(Input::AbortHeard)
            }
            other => {
                // Never the payload: it may be long, and it is the guest's.
                let what = match &other {
                    Ok((header, _)) => format!("{:?} instead of Commit", header.kind),
                    Err(error) => error.to_string(),
                };
                tracing::warn!(what, migration = %self.side.migration(),
                    "in doubt: nothing more to hear from the source after READY; asking its agent");
                Some(Input::LinkLost)
            }
        }
    }

    /// What the source's agent knows.
    pub(super) fn ask(&self) -> Standing {
        let Some(address) = &self.source_agent else {
            return Standing::Unknown;
        };
        let request = v1::GetTransferRequest {
            migration: self.side.migration().to_string(),
            role: v1::TransferRole::Source.into(),
            grant: Some(self.grant.clone()),
            ..Default::default()
        };
        let answer = self.runtime.block_on(async {
            let channel = connect(address).ok()?;
            let mut client = TransferServiceClient::new(channel);
            let call = tokio::time::timeout(ASK_TIMEOUT, client.get_transfer(request));
            call.await.ok()?.ok()
        });
        match answer.map(|answer| answer.into_inner().phase()) {
            Some(TransferPhase::Relinquished | TransferPhase::Completed) => Standing::Relinquished,
            Some(TransferPhase::Failed | TransferPhase::Cancelled) => Standing::Ended,
            _ => Standing::Unknown,
        }
    }

    pub(super) fn journal_owned(&self, work: &Work) -> Written {
        match self.machine.own(self.side.migration(), work.left) {
            Ok(()) => {
                self.side.wait_for(None);
                Written::Durable
            }
            Err(error) => {
                self.side.wait_for(Some((NOT_OWNED, &error)));
                tracing::error!(%error, migration = %self.side.migration(), "OWNED could not be journalled; trying again");
                written(&error)
            }
        }
    }

    /// OWNED is durable: the VM runs as it ran at the source, and the source hears of it.
    pub(super) fn run_vm(&self, work: &mut Work) {
        if let Err(error) = self.machine.run_owned(self.side.migration(), work.left) {
            tracing::error!(%error, migration = %self.side.migration(), "the VM is owned here but could not be run");
            work.trouble = Some(error);
        }
        let resumed = Resumed {
            as_it_was: work.trouble.is_none(),
            digests: work.link.intake.digests(),
        };
        if let Err(error) = work.link.say(Kind::Resumed, 0, &resumed.encode()) {
            tracing::info!(%error, migration = %self.side.migration(), "the source did not hear RESUMED; the server will tell it");
        }
    }
}

/// Whether an append that failed may be durable all the same.
fn written(error: &ApiError) -> Written {
    // The journal's own failures; a full disk and a full descriptor table have names of their own.
    if matches!(
        error.reason,
        Reason::Journal | Reason::DiskFull | Reason::DescriptorsExhausted
    ) {
        Written::Unknown
    } else {
        Written::Refused
    }
}

/// Whether both ends have the same memory.
fn compare(ours: &[(u32, u128)], theirs: &[(u32, u128)]) -> Result<(), ApiError> {
    if let Some((wrong, _)) = ours
        .iter()
        .zip(theirs)
        .find(|(ours, theirs)| ours != theirs)
    {
        return Err(ApiError::new(
            Reason::DigestMismatch,
            format!("memory of slot {} differs from the source's", wrong.0),
        )
        .with("slot", wrong.0)
        .with(
            "advice",
            "the VM runs on at the source; report this with the logs of both hosts",
        ));
    }
    if ours.len() != theirs.len() {
        return Err(WireError::corrupt(
            "digests",
            format!("{} for {} slots", theirs.len(), ours.len()),
        )
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;

    use slat_record::journal::JournalError;

    use super::*;

    #[test]
    fn a_journal_that_a_full_disk_refuses_may_be_durable_whatever_the_error_is_called() {
        for (kind, reason) in [
            (io::ErrorKind::StorageFull, Reason::DiskFull),
            (io::ErrorKind::QuotaExceeded, Reason::DiskFull),
            (io::ErrorKind::Other, Reason::Journal),
        ] {
            let error = ApiError::from(JournalError::Io {
                path: "/vm/journal".into(),
                source: kind.into(),
            });
            assert_eq!(error.reason, reason);
            assert_eq!(written(&error), Written::Unknown);
            assert_eq!(error.metadata["path"], "/vm/journal");
        }
        let refused = ApiError::new(Reason::StaleEpoch, "not the owner");
        assert_eq!(written(&refused), Written::Refused);
    }
}
