//! Hosts that are being deleted by order, which stay silent meanwhile. Plain data, as the table.

use std::collections::HashMap;

use slat_proto::ApiError;

use super::super::errors::host_being_deleted;

/// Calls that delete a host, counted by its name: the mark goes with the last of them.
#[derive(Default)]
pub(in crate::fleet) struct Deletions(HashMap<String, usize>);

impl Deletions {
    /// A call begins; whoever says so says when it has ended.
    pub(in crate::fleet) fn begin(&mut self, host: &str) {
        *self.0.entry(host.to_owned()).or_default() += 1;
    }

    /// One of the calls has ended.
    pub(in crate::fleet) fn end(&mut self, host: &str) {
        if let Some(calls) = self.0.get_mut(host) {
            *calls = calls.saturating_sub(1);
            if *calls == 0 {
                self.0.remove(host);
            }
        }
    }

    /// Refuses an agent whose host is being deleted.
    ///
    /// # Errors
    /// HOST_DELETED.
    pub(super) fn refuse(&self, host: &str) -> Result<(), ApiError> {
        if self.0.contains_key(host) {
            return Err(host_being_deleted(host));
        }
        Ok(())
    }
}
