//! Which VM a call means: by identity, by name, or by name and host.
//!
//! A VM is its uid; its name is a label that several VMs may have. A call that names a uid means
//! that one VM wherever it is, and its host is not looked at. A call by name alone means the one VM
//! of that name, if there is only one.

use std::fmt;

use super::name::{HostName, VmName};
use crate::ApiError;

const MAX_UID: usize = 128;

/// Whether a text can be a uid: 1 to 128 visible ASCII characters.
#[must_use]
pub fn is_uid(text: &str) -> bool {
    (1..=MAX_UID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A VM as a request names it. See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRef {
    name: Option<VmName>,
    uid: Option<String>,
    host: Option<HostName>,
}

impl VmRef {
    /// From a request's fields, of which those that are empty say nothing.
    ///
    /// # Errors
    /// BAD_PARAMETER when neither name nor uid is given, or one of them cannot be one.
    pub fn new(name: &str, uid: &str, host: &str) -> Result<Self, ApiError> {
        if !uid.is_empty() && !is_uid(uid) {
            let shown: String = uid
                .chars()
                .take(80)
                .flat_map(char::escape_default)
                .collect();
            return Err(ApiError::bad_parameter(
                "uid",
                format_args!("\"{shown}\" is no uid: 1 to {MAX_UID} visible ASCII characters"),
            )
            .with("value", shown));
        }
        // Without a uid the name is needed: an empty one is refused as any other bad one.
        let name = if name.is_empty() && !uid.is_empty() {
            None
        } else {
            Some(VmName::parse(name)?)
        };
        let host = if host.is_empty() {
            None
        } else {
            Some(HostName::parse(host)?)
        };
        Ok(Self {
            name,
            host: if uid.is_empty() { host } else { None },
            uid: (!uid.is_empty()).then(|| uid.to_owned()),
        })
    }

    /// The one VM of that name.
    #[must_use]
    pub fn named(name: VmName) -> Self {
        Self {
            name: Some(name),
            uid: None,
            host: None,
        }
    }

    /// The name, when one was given.
    #[must_use]
    pub fn name(&self) -> Option<&VmName> {
        self.name.as_ref()
    }

    /// The identity, when one was given.
    #[must_use]
    pub fn uid(&self) -> Option<&str> {
        self.uid.as_deref()
    }

    /// The host it is on, when one was given; never with a uid.
    #[must_use]
    pub fn host(&self) -> Option<&HostName> {
        self.host.as_ref()
    }

    /// Whether a VM of that name and identity can be the one that is meant, its host left aside.
    #[must_use]
    pub fn fits(&self, name: &str, uid: &str) -> bool {
        self.uid.as_deref().is_none_or(|wanted| wanted == uid)
            && self
                .name
                .as_ref()
                .is_none_or(|wanted| name.strip_prefix("vms/") == Some(wanted.id()))
    }

    /// Whether this VM, on this host, is the one meant.
    ///
    /// # Errors
    /// NO_SUCH_VM with what was asked for and what is here (`vm`, `uid`, `found_vm`, `found_uid`).
    pub fn check(&self, name: &VmName, uid: &str, host: &HostName) -> Result<(), ApiError> {
        let same_uid = self.uid().is_none_or(|asked| asked == uid);
        let same_name = self.name().is_none_or(|asked| asked == name);
        let same_host = self.host().is_none_or(|asked| asked == host);
        if same_uid && same_name && same_host {
            return Ok(());
        }
        let error = self.not_here();
        Err(if same_host && (same_name || self.uid.is_some()) {
            error.with("found_vm", name).with("found_uid", uid).with(
                "advice",
                "list the VMs: a name may belong to another one by now",
            )
        } else {
            error
        })
    }

    /// The refusal of a place that has no such VM, with everything that was asked for.
    #[must_use]
    pub fn not_here(&self) -> ApiError {
        let mut error = ApiError::no_such_vm(self);
        error.metadata.remove("vm");
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

impl fmt::Display for VmRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, &self.uid, &self.host) {
            (Some(name), Some(uid), _) => write!(f, "{name} with uid {uid}"),
            (None, Some(uid), _) => write!(f, "with uid {uid}"),
            (Some(name), None, Some(host)) => write!(f, "{name} on {host}"),
            (Some(name), None, None) => name.fmt(f),
            // Never made.
            (None, None, _) => f.write_str("of no name"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reason;

    #[test]
    fn a_uid_is_enough_and_a_name_is_enough_and_nothing_is_not() {
        let by_uid = VmRef::new("", "u-1", "hosts/a").unwrap();
        assert!(by_uid.fits("vms/any", "u-1") && !by_uid.fits("vms/any", "u-2"));
        assert!(by_uid.host().is_none(), "a uid needs no host");
        let by_name = VmRef::new("web", "", "a").unwrap();
        assert!(by_name.fits("vms/web", "u-1") && !by_name.fits("vms/web-2", "u-1"));
        assert_eq!(by_name.host().unwrap().to_string(), "hosts/a");
        let both = VmRef::new("vms/web", "u-1", "").unwrap();
        assert!(both.fits("vms/web", "u-1") && !both.fits("vms/db", "u-1"));
        assert_eq!(both.not_here().metadata["uid"], "u-1");
        for (name, uid, host, field) in [
            ("", "", "", "vm"),
            ("", "", "hosts/a", "vm"),
            ("../x", "u", "", "vm"),
            ("web", "a b", "", "uid"),
            ("web", "\u{1b}[31m", "", "uid"),
            ("web", "", "A", "host"),
        ] {
            let error = VmRef::new(name, uid, host).unwrap_err();
            assert_eq!(error.reason, Reason::BadParameter);
            assert_eq!(error.metadata["field"], field, "{name} {uid} {host}");
        }
        assert!(VmRef::new("", &"u".repeat(129), "").is_err());
    }

    #[test]
    fn the_uid_wins_and_a_name_beside_it_must_be_its_own() {
        let (web, db) = (VmName::parse("web").unwrap(), VmName::parse("db").unwrap());
        let host = HostName::parse("a").unwrap();
        let ask = |name: &str, uid: &str, on: &str, vm: &VmName, is: &str| {
            VmRef::new(name, uid, on).unwrap().check(vm, is, &host)
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
        assert!(VmRef::new("", "", "hosts/a").is_err());
    }
}
