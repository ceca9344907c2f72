//! Which VM a command is about: a name, and where several VMs have it, a uid or a host.

use std::{fmt, str::FromStr};

use slat_proto::model::{HostName, VmName};

use crate::failure::Failure;

/// A VM's identity, or a leftover's: what the API calls `uid`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uid(String);

impl FromStr for Uid {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // A leftover that cannot be read goes by its name on disk, so more than UUIDs are uids.
        let fits = (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err("no uid: 1 to 128 printable characters, as -o wide shows it".to_owned())
        }
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What tells VMs of one name apart.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Which {
    /// The VM's identity, in place of its name or where several have it (get vms -o wide shows it)
    #[arg(long, value_name = "UID")]
    pub(crate) uid: Option<Uid>,
    /// Of several VMs of that name the one on this host, as host-a
    #[arg(long, value_name = "HOST", conflicts_with = "uid")]
    pub(crate) host: Option<HostName>,
}

/// One VM on the command line.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct VmTarget {
    /// The VM, as web; may be left out with --uid
    #[arg(required_unless_present = "uid", value_name = "VM")]
    pub(crate) vm: Option<VmName>,
    #[command(flatten)]
    pub(crate) which: Which,
}

impl VmTarget {
    /// `vms/web`; empty when only the uid is known.
    pub(crate) fn name(&self) -> String {
        self.vm.as_ref().map(VmName::to_string).unwrap_or_default()
    }

    /// As it is typed: `web`, `web --host host-a`, `--uid UID`.
    pub(crate) fn typed(&self) -> String {
        let mut words: Vec<String> = self.vm.iter().map(|vm| vm.id().to_owned()).collect();
        words.extend(self.which.uid.iter().map(|uid| format!("--uid {uid}")));
        words.extend(
            self.which
                .host
                .iter()
                .map(|host| format!("--host {}", host.id())),
        );
        words.join(" ")
    }

    /// Empty when not given.
    pub(crate) fn uid(&self) -> String {
        self.which
            .uid
            .as_ref()
            .map(Uid::to_string)
            .unwrap_or_default()
    }

    /// `hosts/host-a`; empty when not given.
    pub(crate) fn host(&self) -> String {
        self.which
            .host
            .as_ref()
            .map(HostName::to_string)
            .unwrap_or_default()
    }
}

/// As in `delete vms/web on host-a`.
impl fmt::Display for VmTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.vm, &self.which.uid) {
            (Some(vm), Some(uid)) => write!(f, "{vm} ({uid})")?,
            (Some(vm), None) => write!(f, "{vm}")?,
            (None, uid) => write!(f, "the VM {}", uid.as_ref().map_or("", |uid| &uid.0))?,
        }
        match &self.which.host {
            Some(host) => write!(f, " on {}", host.id()),
            None => Ok(()),
        }
    }
}

/// Several VMs: names, or one uid.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct VmTargets {
    /// Their names, as web db; may be left out with --uid
    #[arg(required_unless_present = "uid", value_name = "VM")]
    names: Vec<VmName>,
    #[command(flatten)]
    which: Which,
}

impl VmTargets {
    /// One after the other.
    ///
    /// # Errors
    /// A usage error for several names and one uid.
    pub(crate) fn each(self) -> Result<Vec<VmTarget>, Failure> {
        if self.which.uid.is_some() && self.names.len() > 1 {
            return Err(Failure::Usage(
                "--uid names one VM: give at most one name with it".into(),
            ));
        }
        let which = self.which;
        if self.names.is_empty() {
            return Ok(vec![VmTarget { vm: None, which }]);
        }
        let target = |vm| VmTarget {
            vm: Some(vm),
            which: which.clone(),
        };
        Ok(self.names.into_iter().map(target).collect())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        targets: VmTargets,
    }

    fn each(line: &str) -> Result<Vec<String>, Failure> {
        let words = std::iter::once("x").chain(line.split_whitespace());
        let targets = Line::parse_from(words).targets.each()?;
        Ok(targets.iter().map(VmTarget::to_string).collect())
    }

    #[test]
    fn a_uid_a_host_or_a_name_selects_a_vm() {
        assert_eq!(each("web db").unwrap(), ["vms/web", "vms/db"]);
        assert_eq!(each("web --host a").unwrap(), ["vms/web on a"]);
        assert_eq!(each("web --uid u-1").unwrap(), ["vms/web (u-1)"]);
        assert_eq!(each("--uid u-1").unwrap(), ["the VM u-1"]);
        assert_eq!(each("web db --uid u-1").unwrap_err().exit_code(), 2);
        for line in ["", "--host a", "web --uid u --host a", "--uid a\u{1b}b"] {
            let words = std::iter::once("x").chain(line.split_whitespace());
            assert!(Line::try_parse_from(words).is_err(), "{line}");
        }
    }
}
