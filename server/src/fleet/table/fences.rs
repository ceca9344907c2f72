//! Fenced hosts: which start of an agent is over, and what that means for what it had. Plain data,
//! as the table.
//!
//! A fence names the incarnation that was heard of last. That one is refused from then on, whatever
//! it says: nothing that it saw is true any more. A later start of the agent is welcome, and what
//! it reports takes the place of what is kept here. When it is started before the hook has ended,
//! nobody knows which start the hook has ended: that is no fence.

use std::time::Instant;

use slat_proto::{ApiError, v1};

use super::{
    super::{
        errors::{host_being_fenced, host_fenced, host_reports, no_such_host, started_anew},
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

    /// A fence of a host begins; whoever says so says when it has ended. One at a time.
    pub(in crate::fleet) fn fence_begins(&mut self, name: &str) {
        self.fencing.insert(name.to_owned());
    }

    /// The fence that was begun has ended.
    pub(in crate::fleet) fn fence_ends(&mut self, name: &str) {
        self.fencing.remove(name);
    }

    /// The last fences of the hosts of a migration that is to begin, by their ids; empty: none.
    /// Which start of an agent a fence that runs is about is not known before it has ended, so
    /// nothing may begin there meanwhile.
    ///
    /// # Errors
    /// HOST_FENCED.
    pub(in crate::fleet) fn begin_after(&self, hosts: [&str; 2]) -> Result<[String; 2], ApiError> {
        if let Some(host) = hosts.into_iter().find(|host| self.fencing.contains(*host)) {
            return Err(host_being_fenced(host));
        }
        Ok(hosts.map(|host| self.fence_of(host, false).unwrap_or_default().id))
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
    /// NO_SUCH_HOST: it was deleted meanwhile. FENCE_FAILED: its agent was started anew.
    pub(in crate::fleet) fn fence(&mut self, name: &str, fence: v1::Fence) -> Result<(), ApiError> {
        let entry = self.hosts.get_mut(name).ok_or_else(|| no_such_host(name))?;
        // The hook may have been done with the host before that start, which then runs.
        if fence.incarnation != entry.last_incarnation {
            return Err(started_anew(name, &fence, &entry.last_incarnation));
        }
        for uid in entry.records.end(&fenced_words(name, &fence)) {
            self.unsaved.vm(name, uid);
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use slat_proto::Reason;

    use super::*;

    fn register(table: &mut Table, incarnation: &str) {
        let host = v1::Host {
            name: "hosts/a".into(),
            incarnation: incarnation.into(),
            ..Default::default()
        };
        table.register(host, Instant::now()).unwrap();
    }

    fn fence(incarnation: &str, id: &str) -> v1::Fence {
        v1::Fence {
            incarnation: incarnation.into(),
            id: id.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_proof_about_an_earlier_start_is_none() {
        let mut table = Table::new(Duration::from_secs(1), Duration::from_secs(3));
        register(&mut table, "1");
        table.fence("hosts/a", fence("1", "first")).unwrap();
        register(&mut table, "2");
        register(&mut table, "3");
        let refused = table.fence("hosts/a", fence("2", "second")).unwrap_err();
        assert_eq!(refused.reason, Reason::FenceFailed);
        assert_eq!(refused.metadata["found"], "3");
        let known = table.fence_of("hosts/a", false).unwrap();
        assert_eq!(known.id, "first", "the last proof stays");
        table.refuse_fenced("hosts/a", "2").unwrap();
        assert!(!table.is_fenced("hosts/a"));
        table.fence("hosts/a", fence("3", "third")).unwrap();
        assert!(table.is_fenced("hosts/a"));
    }

    #[test]
    fn nothing_begins_with_a_host_while_its_fence_runs() {
        let mut table = Table::new(Duration::from_secs(1), Duration::from_secs(3));
        register(&mut table, "1");
        let none = ["hosts/a", "hosts/b"];
        assert_eq!(table.begin_after(none).unwrap(), ["", ""]);
        table.fence_begins("hosts/a");
        for hosts in [none, ["hosts/b", "hosts/a"]] {
            let refused = table.begin_after(hosts).unwrap_err();
            assert_eq!(refused.reason, Reason::HostFenced);
            assert_eq!(refused.metadata["host"], "hosts/a");
        }
        table.begin_after(["hosts/b", "hosts/c"]).unwrap();
        table.fence("hosts/a", fence("1", "first")).unwrap();
        table.fence_ends("hosts/a");
        // On disk or not: what begins now is not what it ended.
        assert_eq!(table.begin_after(none).unwrap(), ["first", ""]);
    }
}
