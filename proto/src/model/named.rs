//! Which VM a request means: by its identity, or by a name and perhaps a host.
//!
//! The uid wins: a name with another uid names no VM. A host is looked at only without a uid.

use super::{HostName, VmName};
use crate::error::{ApiError, Reason};

/// What a request says of the VM it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedVm {
    /// Its name; `None` only beside a uid.
    pub name: Option<VmName>,
    /// Its identity.
    pub uid: Option<String>,
    /// The host it is on; `None` beside a uid.
    pub host: Option<HostName>,
}

impl NamedVm {
    /// From a request's fields, each empty when it was not given.
    ///
    /// # Errors
    /// BAD_PARAMETER when a field is malformed, or neither name nor uid is there.
    pub fn of(name: &str, uid: &str, host: &str) -> Result<Self, ApiError> {
        let uid = (!uid.is_empty()).then(|| uid.to_owned());
        // Without a uid an empty name is refused as a malformed one.
        let name = if uid.is_some() && name.is_empty() {
            None
        } else {
            Some(VmName::parse(name)?)
        };
        let host = if uid.is_some() || host.is_empty() {
            None
        } else {
            Some(HostName::parse(host)?)
        };
        Ok(Self { name, uid, host })
    }

    /// Whether this VM is the one meant.
    ///
    /// # Errors
    /// NO_SUCH_VM with what was asked for and what is here (`vm`, `uid`, `found_vm`, `found_uid`).
    pub fn check(&self, name: &VmName, uid: &str, host: &HostName) -> Result<(), ApiError> {
        let same_uid = self.uid.as_deref().is_none_or(|asked| asked == uid);
        let same_name = self.name.as_ref().is_none_or(|asked| asked == name);
        let same_host = self.host.as_ref().is_none_or(|asked| asked == host);
        if same_uid && same_name && same_host {
            return Ok(());
        }
        let error = self.nowhere();
        Err(if same_host && (same_name || self.uid.is_some()) {
            error.with("found_vm", name).with("found_uid", uid).with(
                "advice",
                "list the VMs: a name may belong to another one by now",
            )
        } else {
            error
        })
    }

    /// NO_SUCH_VM: nothing here is meant.
    #[must_use]
    pub fn nowhere(&self) -> ApiError {
        let what = match (&self.name, &self.uid) {
            (Some(name), Some(uid)) => format!("no VM {name} with uid {uid} here"),
            (None, Some(uid)) => format!("no VM with uid {uid} here"),
            (Some(name), None) => format!("no VM {name} here"),
            (None, None) => "no such VM here".to_owned(),
        };
        let mut error = ApiError::new(Reason::NoSuchVm, what);
        if let Some(name) = &self.name {
            error = error.with("vm", name);
        }
        if let Some(uid) = &self.uid {
            error = error.with("uid", uid);
        }
        if let Some(host) = &self.host {
            error = error.with("host", host);
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uid_wins_and_a_name_beside_it_must_be_its_own() {
        let (web, db) = (VmName::parse("web").unwrap(), VmName::parse("db").unwrap());
        let host = HostName::parse("a").unwrap();
        let ask = |name: &str, uid: &str, on: &str, vm: &VmName, is: &str| {
            NamedVm::of(name, uid, on).unwrap().check(vm, is, &host)
        };
        ask("vms/web", "", "", &web, "u1").unwrap();
        ask("vms/web", "", "hosts/a", &web, "u1").unwrap();
        ask("vms/web", "u1", "", &web, "u1").unwrap();
        ask("", "u1", "", &web, "u1").unwrap();
        // A host beside a uid is not looked at.
        ask("", "u1", "hosts/b", &web, "u1").unwrap();
        let error = ask("vms/web", "u1", "", &web, "u2").unwrap_err();
        assert_eq!(error.reason, Reason::NoSuchVm);
        assert_eq!(error.metadata["uid"], "u1");
        assert_eq!(error.metadata["found_uid"], "u2");
        assert!(ask("vms/web", "u1", "", &db, "u1").is_err());
        assert!(ask("vms/web", "", "hosts/b", &web, "u1").is_err());
        assert!(ask("vms/web", "", "", &db, "u1").is_err());
        assert!(NamedVm::of("", "", "hosts/a").is_err());
    }
}
