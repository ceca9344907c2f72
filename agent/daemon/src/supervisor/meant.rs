//! Which VM of this host a request means.
//!
//! The uid wins. By name it is the one VM of that name here; what merely remains of another one (a
//! source that gave its VM away) is meant only when there is no such VM.

use std::sync::Arc;

use slat_proto::{ApiError, Reason, model::VmRef};
use slat_record::uid::VmUid;

use super::{SETTLE, Supervisor};
use crate::registry::{Held, Work};

/// The living VM that a request means; the request then says so to its process, by what that one
/// can be asked by.
macro_rules! living_meant {
    ($supervisor:expr, $request:ident, $name:ident) => {{
        let named = slat_proto::model::VmRef::new(&$request.$name, &$request.uid, &$request.host)?;
        let live = $supervisor.living(&named).await?;
        $request.$name = live.name().to_string();
        $request.uid = live.own_uid();
        $request.host.clear();
        live
    }};
}
pub(crate) use living_meant;

impl Supervisor {
    /// The uid of the VM that is meant.
    ///
    /// # Errors
    /// BAD_PARAMETER; NO_SUCH_VM; NAME_CONFLICT with `uids` and `hosts` when several VMs have that
    /// name.
    pub(crate) async fn meant(self: &Arc<Self>, named: &VmRef) -> Result<VmUid, ApiError> {
        self.reread().await;
        if let Some(uid) = named.uid() {
            let uid = VmUid::parse(uid)?;
            let (name, _) = self.registry.label(&uid).ok_or_else(|| named.not_here())?;
            named.check(&name, uid.as_str(), &self.host)?;
            return Ok(uid);
        }
        let Some(name) = named.name() else {
            return Err(named.not_here());
        };
        if named.host().is_some_and(|host| *host != self.host) {
            return Err(named.not_here());
        }
        let mut found = self.registry.named(name);
        for (_, held) in &found {
            // What is being cleared may be a VM afterwards, or not.
            if let Held::Busy {
                work: Work::Clearing,
                done,
            } = held
            {
                drop(tokio::time::timeout(SETTLE, done.cancelled()).await);
            }
        }
        if found.iter().any(|(_, held)| is_clearing(held)) {
            found = self.registry.named(name);
        }
        let is_vm = |held: &Held| match held {
            Held::Live(live) => !live.gave_away(),
            Held::Dead(dead) => dead.lost().is_some(),
            Held::Busy { .. } => !is_clearing(held),
        };
        let remains = |held: &Held| matches!(held, Held::Live(live) if live.gave_away());
        let uids = [is_vm as fn(&Held) -> bool, remains, is_clearing]
            .into_iter()
            .map(|is_meant| uids_of(&found, is_meant))
            .find(|uids| !uids.is_empty())
            .unwrap_or_default();
        match uids.as_slice() {
            [] => Err(named.not_here()),
            [one] => Ok((*one).clone()),
            several => {
                let list = |of: &dyn Fn(&VmUid) -> String| {
                    let each: Vec<String> = several.iter().map(|uid| of(uid)).collect();
                    each.join(",")
                };
                Err(ApiError::new(
                    Reason::NameConflict,
                    format!("{} VMs here are called {name}", several.len()),
                )
                .with("vm", name)
                .with("uids", list(&ToString::to_string))
                .with("hosts", list(&|_| self.host.to_string()))
                .with("advice", "say which one by its uid"))
            }
        }
    }
}

fn is_clearing(held: &Held) -> bool {
    matches!(
        held,
        Held::Busy {
            work: Work::Clearing,
            ..
        }
    )
}

fn uids_of(found: &[(VmUid, Held)], is_meant: impl Fn(&Held) -> bool) -> Vec<&VmUid> {
    let meant = found.iter().filter(|(_, held)| is_meant(held));
    meant.map(|(uid, _)| uid).collect()
}
