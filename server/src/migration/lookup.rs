//! Which VM of the fleet a request means: by uid, by name and source, or by name alone.
//!
//! The one place where migrations turn a name into a VM.

use slat_proto::{
    ApiError, Reason,
    model::{HostName, VmName},
};

use crate::fleet::{Fleet, Owner};

/// A VM as a request names it. At least one of `name` and `uid` is there.
#[derive(Clone, Debug)]
pub(crate) struct WantedVm {
    pub(crate) name: Option<VmName>,
    pub(crate) uid: String,
    pub(crate) source: Option<HostName>,
}

impl WantedVm {
    /// # Errors
    /// NO_SUCH_VM; NAME_CONFLICT when several have that name and nothing tells them apart;
    /// HOST_UNREACHABLE when its host does not answer.
    pub(super) fn find(&self, fleet: &Fleet) -> Result<Owner, ApiError> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => {
                let found = fleet.vms().into_iter().find(|vm| vm.uid == self.uid);
                let found = found.ok_or_else(|| self.unknown())?;
                VmName::parse(&found.name)?
            }
        };
        let owner = fleet.owner(&name)?;
        let other_uid = !self.uid.is_empty() && owner.vm.uid != self.uid;
        let other_host = self
            .source
            .as_ref()
            .is_some_and(|source| source.to_string() != owner.host.name);
        if other_uid || (self.uid.is_empty() && other_host) {
            return Err(self
                .unknown()
                .with("found_uid", owner.vm.uid)
                .with("found_host", owner.host.name));
        }
        Ok(owner)
    }

    fn unknown(&self) -> ApiError {
        let name = self.name.as_ref().map(ToString::to_string);
        let mut text = format!("no VM {}", name.as_deref().unwrap_or_default());
        if !self.uid.is_empty() {
            text = format!("{} with uid {}", text.trim_end(), self.uid);
        } else if let Some(source) = &self.source {
            text = format!("{text} on {source}");
        }
        let mut error = ApiError::new(Reason::NoSuchVm, text);
        if let Some(name) = name {
            error = error.with("vm", name);
        }
        if !self.uid.is_empty() {
            error = error.with("uid", &self.uid);
        }
        if let Some(source) = &self.source {
            error = error.with("source", source);
        }
        error.with("advice", "slat get vms shows each VM with its uid and host")
    }
}
