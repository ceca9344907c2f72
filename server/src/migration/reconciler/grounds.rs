//! What a migration's decisions stand on beside its sides' own words: fences of hosts, and
//! deletions.

use slat_proto::v1;

use super::{
    super::{
        calls::JOURNAL,
        errors::{host_fenced, host_forgotten},
        protocol::{Input, Side},
    },
    Reconciler,
};

impl Reconciler {
    /// Feeds the fences of its hosts that came after it had begun. They are with the hosts on disk
    /// by the time that anybody is told.
    pub(super) fn look_for_fences(&mut self) {
        let durable = self.protocol.durable();
        for (side, known) in [
            (Side::Source, durable.source_fenced),
            (Side::Destination, durable.destination_fenced),
        ] {
            let host = self.caller.subject.host(side);
            let fence = self.context.fleet.stored_fence(host);
            if !known && self.record.is_cut_by(side, fence.as_ref()) {
                tracing::warn!(migration = %self.name(), %host, fence = %fence.unwrap_or_default().id,
                    "a side's host was fenced");
                self.feed(Input::HostFenced(side));
            }
        }
    }

    /// What a commit that is told to the destination stands on: the source's word, from its
    /// journal, or the fence of its host.
    pub(super) fn ground(&self) -> String {
        let durable = self.protocol.stored();
        if durable.committed || !durable.source_fenced {
            return JOURNAL.to_owned();
        }
        let fence = self.context.fleet.stored_fence(&self.caller.subject.source);
        format!("fence {}", fence.unwrap_or_default().id)
    }

    /// Why the source is to end its side.
    pub(super) fn error_for_source(&self) -> v1::MigrationError {
        let (subject, side) = (&self.caller.subject, Side::Destination);
        let (phase, at) = (self.record.migration().phase(), v1::VmLocation::Source);
        if self.protocol.durable().destination_fenced {
            host_fenced(phase, at, subject, side, false)
        } else if self.protocol.is_forgotten(side) {
            host_forgotten(phase, at, subject, side, false)
        } else {
            self.texts.for_source(phase)
        }
    }
}
