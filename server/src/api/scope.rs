//! What a caller who is limited by labels sees and changes: VMs that have all labels of
//! [`Scope::vms`], on hosts that have all of [`Scope::hosts`], those hosts, and their migrations
//! and saves. The rest does not exist for it, by the words in which nothing exists for anybody.
//!
//! What a name stands for is judged again when it is acted on, so that nothing comes between. Who
//! is not limited is never looked at.

use std::collections::HashMap;

use slat_proto::{
    ApiError, Reason,
    model::{Labels, SaveName, VmName, VmRef},
    transport::{Permit, Scope, TracedChannel},
    v1,
};
use tonic::Request;

use super::services::Services;
use crate::fleet::{Owner, no_such_host};

/// What a request's caller is limited to.
pub(super) fn scope_of<T>(request: &Request<T>) -> Scope {
    // Every request that came over an endpoint has a permit; without one it was refused there.
    let permit = request.extensions().get::<Permit>();
    permit
        .map(|permit| permit.scope.clone())
        .unwrap_or_default()
}

fn have(labels: &HashMap<String, String>, wanted: &Labels) -> bool {
    wanted.is_empty() || labels.clone().into_iter().collect::<Labels>().have(wanted)
}

/// Whether what a VM is made of has the labels.
pub(super) fn spec_in(scope: &Scope, spec: Option<&v1::VmSpec>) -> bool {
    scope.vms.is_empty() || spec.is_some_and(|spec| have(&spec.labels, &scope.vms))
}

/// As an agent that has no such save.
pub(super) fn no_such_save(name: &SaveName) -> ApiError {
    ApiError::new(Reason::NoSuchSave, format!("no save {name}"))
        .with("save", name)
        .with("host", name.host())
        .with("advice", "slat get saves says which there are")
}

fn no_such_leftover(host: &str, uid: &str) -> ApiError {
    let words = format!("nothing of {uid} is left on {host}");
    ApiError::new(Reason::NoSuchLeftover, words)
        .with("host", host)
        .with("uid", uid)
        .with("advice", "slat get leftovers says what there is")
}

/// The refusal of a new VM that its own maker would not see.
pub(super) fn must_have(scope: &Scope, spec: &v1::VmSpec) -> Result<(), ApiError> {
    if spec_in(scope, Some(spec)) {
        return Ok(());
    }
    let labels = &scope.vms;
    let words = format!("you may create VMs with the labels {labels} alone");
    Err(ApiError::new(Reason::Permission, words)
        .with("labels", labels)
        .with("advice", format!("add them: --label {labels}")))
}

/// A name that is taken, without a word about who has it.
pub(super) fn taken_unseen(scope: &Scope, vm: &VmName, error: ApiError) -> ApiError {
    if scope.is_all() || error.reason != Reason::VmExists {
        return error;
    }
    ApiError::new(Reason::VmExists, format!("{vm} is a name that is taken"))
        .with("vm", vm)
        .with("advice", "take another name")
}

impl Services {
    /// Whether a host is in a caller's scope.
    pub(super) fn host_in(&self, scope: &Scope, host: &str) -> bool {
        scope.hosts.is_empty()
            || self
                .fleet
                .host(host)
                .is_ok_and(|host| have(&host.labels, &scope.hosts))
    }

    /// NO_SUCH_HOST for a host that is not.
    pub(super) fn check_host(&self, scope: &Scope, host: &str) -> Result<(), ApiError> {
        if self.host_in(scope, host) {
            return Ok(());
        }
        Err(no_such_host(host))
    }

    /// Whether a VM is.
    pub(super) fn vm_in(&self, scope: &Scope, vm: &v1::Vm) -> bool {
        spec_in(scope, vm.spec.as_ref()) && self.host_in(scope, &vm.host)
    }

    /// Whether the VM of this identity is, as far as its labels say.
    fn uid_in(&self, scope: &Scope, uid: &str) -> bool {
        if scope.vms.is_empty() {
            return true;
        }
        let found = VmRef::new("", uid, "").and_then(|vm| self.fleet.find(&vm));
        found.is_ok_and(|vm| spec_in(scope, vm.spec.as_ref()))
    }

    /// The VM that is meant, as last seen, whether its host answers or not.
    pub(super) fn find(&self, scope: &Scope, wanted: &VmRef) -> Result<v1::Vm, ApiError> {
        let found = self.fleet.find(wanted);
        if scope.is_all() {
            return found;
        }
        match found {
            Ok(vm) if self.vm_in(scope, &vm) => Ok(vm),
            // Who sees all that have the name may hear of them.
            Err(error) if error.reason == Reason::NameConflict && self.names_in(scope, wanted) => {
                Err(error)
            }
            Err(error) if error.reason == Reason::BadParameter => Err(error),
            _ => Err(wanted.not_here()),
        }
    }

    fn names_in(&self, scope: &Scope, wanted: &VmRef) -> bool {
        let Some(name) = wanted.name().map(ToString::to_string) else {
            return false;
        };
        let vms = self.fleet.vms().into_iter();
        vms.filter(|vm| vm.name == name)
            .all(|vm| self.vm_in(scope, &vm))
    }

    /// A VM's owner and the way to its agent.
    pub(super) fn route(
        &self,
        scope: &Scope,
        vm: &VmRef,
    ) -> Result<(Owner, TracedChannel), ApiError> {
        // Before the owner's host is said to be silent.
        self.find(scope, vm)?;
        let owner = self.fleet.owner(vm)?;
        if !self.vm_in(scope, &owner.vm) {
            return Err(vm.not_here());
        }
        if owner.vm.kept_by_server {
            return Err(nothing_left(&owner.vm));
        }
        let channel = self.fleet.channel(&owner.host.name)?;
        Ok((owner, channel))
    }

    /// Without other VMs of its name that the caller does not see.
    pub(super) fn as_seen(&self, scope: &Scope, mut vm: v1::Vm) -> v1::Vm {
        if !scope.is_all() {
            vm.conflicts
                .retain(|other| self.uid_in(scope, &other.uid) && self.host_in(scope, &other.host));
        }
        vm
    }

    /// Whether a migration is of a VM in scope, and its hosts are.
    pub(super) fn migration_in(&self, scope: &Scope, migration: &v1::Migration) -> bool {
        self.host_in(scope, &migration.source)
            && self.host_in(scope, &migration.destination)
            && self.uid_in(scope, &migration.vm_uid)
    }

    /// Whether what is left somewhere is of a VM in scope.
    pub(super) fn leftover_in(&self, scope: &Scope, left: &v1::Leftover) -> bool {
        self.host_in(scope, &left.host) && self.uid_in(scope, &left.uid)
    }

    /// NO_SUCH_HOST or NO_SUCH_LEFTOVER for what is not.
    pub(super) fn check_leftover(
        &self,
        scope: &Scope,
        host: &str,
        uid: &str,
    ) -> Result<(), ApiError> {
        self.check_host(scope, host)?;
        if self.uid_in(scope, uid) {
            return Ok(());
        }
        Err(no_such_leftover(host, uid))
    }

    /// Refuses what would end VMs on a host that its caller does not see.
    pub(super) fn check_all_on(&self, scope: &Scope, host: &str) -> Result<(), ApiError> {
        self.check_host(scope, host)?;
        let vms = self.fleet.vms().into_iter();
        let mut others = vms.filter(|vm| vm.host == host && !self.vm_in(scope, vm));
        if scope.vms.is_empty() || others.next().is_none() {
            return Ok(());
        }
        let words = format!("{host} has VMs that are not yours");
        Err(ApiError::new(Reason::Permission, words)
            .with("host", host)
            .with("advice", "ask somebody who is not limited by labels"))
    }
}

/// The refusal of what only an agent could do with a VM of which no agent has anything.
fn nothing_left(vm: &v1::Vm) -> ApiError {
    ApiError::new(
        Reason::VmState,
        format!("{} is LOST: nothing of it is left on any host", vm.name),
    )
    .with("vm", &vm.name)
    .with("uid", &vm.uid)
    .with("state", "LOST")
    .with("vm_location", "LOST")
    .with("advice", "delete the VM and create it anew")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(labels: &str) -> v1::VmSpec {
        v1::VmSpec {
            labels: labels.parse::<Labels>().unwrap().to_field(),
            ..Default::default()
        }
    }

    fn scope(vms: &str) -> Scope {
        Scope {
            vms: vms.parse().unwrap(),
            ..Scope::default()
        }
    }

    #[test]
    fn a_vm_is_in_scope_with_all_labels_and_not_with_some() {
        let both = scope("team=web,tier=front");
        assert!(spec_in(&both, Some(&spec("team=web,tier=front,x=y"))));
        for other in ["", "team=web", "team=web,tier=back", "team=db,tier=front"] {
            assert!(!spec_in(&both, Some(&spec(other))), "{other}");
            let refused = must_have(&both, &spec(other)).unwrap_err();
            assert_eq!(refused.reason, Reason::Permission);
        }
        assert!(!spec_in(&both, None), "nobody knows its labels");
        assert!(spec_in(&Scope::default(), None));
        must_have(&Scope::default(), &spec("")).unwrap();
    }

    #[test]
    fn a_name_that_is_taken_says_no_more_to_who_is_limited() {
        let vm = VmName::from_id("web").unwrap();
        let error = || ApiError::new(Reason::VmExists, "on hosts/a").with("host", "hosts/a");
        let told = taken_unseen(&scope("team=web"), &vm, error());
        assert_eq!(told.reason, Reason::VmExists);
        assert!(!format!("{told:?}").contains("hosts/a"), "{told:?}");
        let told = taken_unseen(&Scope::default(), &vm, error());
        assert_eq!(told.metadata["host"], "hosts/a");
        let other = ApiError::new(Reason::NoHost, "none fits");
        let told = taken_unseen(&scope("team=web"), &vm, other);
        assert_eq!(told.reason, Reason::NoHost);
    }

    #[test]
    fn a_request_without_a_permit_is_not_limited_here() {
        // The endpoint refuses such a request.
        assert!(scope_of(&Request::new(())).is_all());
        let mut request = Request::new(());
        request.extensions_mut().insert(Permit {
            role: None,
            scope: scope("team=web"),
        });
        assert_eq!(scope_of(&request), scope("team=web"));
    }
}
