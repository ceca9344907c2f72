//! A host is deleted by order: the table's part of it, and the guard that a call has meanwhile.
//!
//! It takes seconds: migrations are told first, and that has to be on disk. From the check that
//! allows it the host is marked, and its agent can neither register nor report. So a host that may
//! be deleted stays silent, and nothing is given up of one that is kept. The mark goes with the
//! [`Deletion`], on every way out: when the host is gone, when the order fails, and when its caller
//! goes away.

use std::{sync::Arc, time::Instant};

use slat_proto::{ApiError, v1};

use super::{
    super::{
        errors::{host_in_use, no_such_host},
        table::Table,
    },
    Fleet,
};

impl Table {
    /// Marks a host as being deleted, if it may be. `migrations`: unfinished ones with a side
    /// there. Whoever calls this ends the mark with `Deletions::end`.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_IN_USE.
    pub(in crate::fleet) fn begin_deletion(
        &mut self,
        name: &str,
        give_up: bool,
        migrations: &[String],
        at: Instant,
    ) -> Result<(), ApiError> {
        self.may_delete(name, give_up, migrations, at)?;
        self.deletions.begin(name);
        Ok(())
    }

    /// What was last seen on a host that may be deleted.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_IN_USE.
    pub(in crate::fleet) fn may_delete(
        &self,
        name: &str,
        give_up: bool,
        migrations: &[String],
        at: Instant,
    ) -> Result<Vec<v1::Vm>, ApiError> {
        let host = self.host(name, at).ok_or_else(|| no_such_host(name))?;
        let reports = self.reporting(at).iter().any(|other| other.name == name);
        let mut vms = self.vms(at);
        vms.retain(|vm| vm.host == name);
        let holds = !vms.is_empty() || !migrations.is_empty();
        if reports || (holds && !give_up) {
            return Err(host_in_use(&host, reports, &vms, migrations));
        }
        Ok(vms)
    }
}

/// See the module.
#[must_use]
pub(crate) struct Deletion {
    fleet: Arc<Fleet>,
    host: String,
    give_up: bool,
}

impl Fleet {
    /// Begins to delete a host that does not report. `migrations`: unfinished ones with a side
    /// there.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_IN_USE.
    pub(crate) fn begin_deletion(
        self: &Arc<Self>,
        host: &str,
        give_up: bool,
        migrations: &[String],
    ) -> Result<Deletion, ApiError> {
        let at = Instant::now();
        self.table().begin_deletion(host, give_up, migrations, at)?;
        Ok(Deletion {
            fleet: Arc::clone(self),
            host: host.to_owned(),
            give_up,
        })
    }
}

impl Deletion {
    /// Forgets the host with all that was last seen there. `migrations` as they are by now.
    ///
    /// # Errors
    /// NO_SUCH_HOST: another such order was quicker. HOST_IN_USE: something came to be there that
    /// was not given up.
    pub(crate) fn finish(self, migrations: &[String]) -> Result<Vec<v1::Vm>, ApiError> {
        let (fleet, host) = (&self.fleet, &self.host);
        let vms = fleet.change(|table| {
            let vms = table.may_delete(host, self.give_up, migrations, Instant::now())?;
            table.remove_host(host);
            Ok::<_, ApiError>(vms)
        })?;
        // Still under the mark: an agent that registers again must keep what it brings.
        fleet.channels.remove(host);
        fleet.clocks.forget(host);
        Ok(vms)
    }
}

impl Drop for Deletion {
    fn drop(&mut self) {
        self.fleet.table().deletions.end(&self.host);
    }
}
