//! Which VM is meant.
//!
//! A VM is its uid; its name is a label that may collide. Two keys with uids are the same VM when
//! the uids are equal, whatever the names say. A key without one (a caller that knows a name only,
//! a record that an older version wrote) stands for the VM of that name.

use slat_proto::{
    model::{VmName, VmRef},
    v1,
};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmKey {
    name: String,
    uid: String,
}

impl VmKey {
    /// Whether it is the VM of `migration`.
    pub(super) fn is_of(&self, migration: &v1::Migration) -> bool {
        if self.uid.is_empty() || migration.vm_uid.is_empty() {
            self.name == migration.vm
        } else {
            self.uid == migration.vm_uid
        }
    }

    /// For people: `vms/{vm}`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl From<&v1::Vm> for VmKey {
    fn from(vm: &v1::Vm) -> Self {
        Self {
            name: vm.name.clone(),
            uid: vm.uid.clone(),
        }
    }
}

impl From<&v1::Migration> for VmKey {
    fn from(migration: &v1::Migration) -> Self {
        Self {
            name: migration.vm.clone(),
            uid: migration.vm_uid.clone(),
        }
    }
}

impl From<&VmRef> for VmKey {
    fn from(vm: &VmRef) -> Self {
        Self {
            name: vm.name().map_or_else(String::new, ToString::to_string),
            uid: vm.uid().unwrap_or_default().to_owned(),
        }
    }
}

impl From<&VmName> for VmKey {
    fn from(name: &VmName) -> Self {
        Self {
            name: name.to_string(),
            uid: String::new(),
        }
    }
}

impl From<&String> for VmKey {
    fn from(name: &String) -> Self {
        Self {
            name: name.clone(),
            uid: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_decide_and_names_only_where_one_has_none() {
        let key = |name: &str, uid: &str| VmKey {
            name: name.into(),
            uid: uid.into(),
        };
        for (vm, uid, same) in [
            ("vms/web", "1", true),
            ("vms/web", "2", false),
            ("vms/renamed", "1", true),
            ("vms/web", "", true),
            ("vms/renamed", "", false),
        ] {
            let migration = v1::Migration {
                vm: vm.into(),
                vm_uid: uid.into(),
                ..Default::default()
            };
            assert_eq!(key("vms/web", "1").is_of(&migration), same, "{vm} {uid}");
            assert_eq!(key("vms/web", "").is_of(&migration), vm == "vms/web");
        }
    }
}
