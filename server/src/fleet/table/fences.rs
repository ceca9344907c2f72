//! Fenced hosts: which start of an agent is over, and what that means for what it had. Plain data,
//! as the table.
//!
//! A fence names the incarnation that was heard of last. That one is refused from then on, whatever
//! it says: nothing that it saw is true any more. A later start of the agent is welcome, and what
//! it reports takes the place of what is kept here.

use std::time::Instant;

use slat_proto::{ApiError, v1};

use super::{
    super::{
        errors::{host_fenced, host_reports, no_such_host},
        fenced::{Fenceable, fenced_words},
    },
    HostEntry, Table,
};

impl HostEntry {
    /// Whether the start of its agent that was heard of last is over.
    pub(in crate::fleet) fn is_fenced(&self) -> bool {
        let fence = self.host.fence.as_ref();
        fence.is_some_and(|fence| fence.incarnation == self.last_incarnation)
    }
}

impl Table {
    /// A host that may be fenced: with `force` also one whose agent reports, or may be about to
    /// after a restart of the server.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_IN_USE.
    pub(in crate::fleet) fn may_fence(
        &self,
        name: &str,
        force: bool,
        at: Instant,
    ) -> Result<Fenceable, ApiError> {
        let entry = self.hosts.get(name).ok_or_else(|| no_such_host(name))?;
        if entry.contact.holds_name(at, self.silence) && !force {
            return Err(host_reports(name, entry.contact.reports(at, self.silence)));
        }
        Ok(Fenceable {
            host: entry.host.name.clone(),
            address: entry.host.address.clone(),
            incarnation: entry.last_incarnation.clone(),
            uid: entry.host.uid.clone(),
        })
    }

    /// Whether the last start of a host's agent is fenced.
    pub(in crate::fleet) fn is_fenced(&self, name: &str) -> bool {
        self.hosts.get(name).is_some_and(HostEntry::is_fenced)
    }

    /// A host's last fence; `stored`: only one that is on disk.
    pub(in crate::fleet) fn fence_of(&self, name: &str, stored: bool) -> Option<v1::Fence> {
        let entry = self.hosts.get(name)?;
        let fence = entry.host.fence.clone();
        fence.filter(|_| entry.fence_stored || !stored)
    }

    /// The hook did its work: nothing of that incarnation runs any more. Not on disk yet.
    ///
    /// # Errors
    /// NO_SUCH_HOST: it was deleted meanwhile.
    pub(in crate::fleet) fn fence(&mut self, name: &str, fence: v1::Fence) -> Result<(), ApiError> {
        let entry = self.hosts.get_mut(name).ok_or_else(|| no_such_host(name))?;
        // An agent that was started meanwhile is not what the fence is about.
        if fence.incarnation == entry.last_incarnation {
            for uid in entry.records.end(&fenced_words(name, &fence)) {
                self.unsaved.vm(name, uid);
            }
        }
        entry.host.fence = Some(fence);
        entry.fence_stored = false;
        self.unsaved.host(name);
        Ok(())
    }

    /// The fence of this id is on disk.
    pub(in crate::fleet) fn fence_is_stored(&mut self, name: &str, id: &str) {
        if let Some(entry) = self.hosts.get_mut(name)
            && entry
                .host
                .fence
                .as_ref()
                .is_some_and(|fence| fence.id == id)
        {
            entry.fence_stored = true;
        }
    }

    /// Refuses the start of an agent that is over.
    ///
    /// # Errors
    /// HOST_FENCED.
    pub(in crate::fleet) fn refuse_fenced(
        &self,
        name: &str,
        incarnation: &str,
    ) -> Result<(), ApiError> {
        let fence = self
            .hosts
            .get(name)
            .and_then(|entry| entry.host.fence.as_ref());
        match fence {
            Some(fence) if fence.incarnation == incarnation => Err(host_fenced(name, fence)),
            _ => Ok(()),
        }
    }
}
