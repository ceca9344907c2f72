//! What a caller may do at an endpoint: its role by method, denied by default, within its limits.
//!
//! | file | what |
//! |---|---|
//! | `role` | who a caller is to Slat, and what limits a user |
//! | `table` | which role may call which method |
//! | `limits` | how often, and over how many connections |
//! | `layer` | refuses what the table does not allow, before a service sees it |
//! | `lasting` | ends a user's answers that last, when what the user may do changes |
//!
//! Agents and servers have their role by their certificate. A user's comes from the endpoint's
//! [`Users`]; without any, the user `admin` is an admin, and nobody else has a role.

mod lasting;
mod layer;
mod limits;
mod role;
mod table;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use slat_trust::{Identity, Kind};
use tokio::sync::watch;

use self::limits::{Limits, rate};
pub(super) use self::{
    layer::AccessGuard,
    limits::Place,
    table::{Right, right, right_of_path},
};
pub use self::{
    role::{Permit, Role, Scope},
    table::{access_table, role_may},
};
use super::caller::Caller;
use crate::ApiError;

/// Users and what they may, by the name in their certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Users(BTreeMap<String, Permit>);

impl Default for Users {
    /// The user `admin` is an admin.
    fn default() -> Self {
        Self::from_iter([("admin".to_owned(), Permit::of(Role::Admin))])
    }
}

impl FromIterator<(String, Permit)> for Users {
    fn from_iter<I: IntoIterator<Item = (String, Permit)>>(users: I) -> Self {
        Self(users.into_iter().collect())
    }
}

#[derive(Default)]
struct Inner {
    /// A leaf lock, held for one look or for one replacement.
    users: RwLock<Users>,
    /// Told when they were replaced.
    replaced: watch::Sender<()>,
    limits: Arc<Limits>,
}

/// What callers of an endpoint may do. Clones share it.
#[derive(Clone, Default)]
pub struct Access(Arc<Inner>);

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").finish_non_exhaustive()
    }
}

impl Access {
    /// Replaces what users may do. It counts from the next call on; answers that last, to a user
    /// for whom something changed, end.
    pub fn set_users(&self, users: Users) {
        *self.0.users.write().unwrap_or_else(PoisonError::into_inner) = users;
        self.0.replaced.send_replace(());
    }

    /// Returns when a user may something else than `permit`; nothing for who has its role by its
    /// certificate, or has none.
    fn changes(
        &self,
        caller: &Caller,
        permit: &Permit,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        if !caller.is_user() {
            return None;
        }
        let (access, caller, permit) = (self.clone(), caller.clone(), permit.clone());
        let mut replaced = access.0.replaced.subscribe();
        Some(async move {
            while access.permit_now(&caller, &permit) == permit {
                if replaced.changed().await.is_err() {
                    // `access` has the sender.
                    return;
                }
            }
        })
    }

    /// What an identity may.
    pub(super) fn permit(&self, identity: &Identity) -> Permit {
        match identity.kind() {
            Kind::Agent => Permit::of(Role::Agent),
            Kind::Server => Permit::of(Role::Server),
            Kind::User => {
                let users = self.0.users.read().unwrap_or_else(PoisonError::into_inner);
                users.0.get(identity.name()).cloned().unwrap_or(Permit {
                    role: None,
                    scope: Scope::default(),
                })
            }
        }
    }

    /// What a caller may now: of a user, what it is given now.
    pub(super) fn permit_now(&self, caller: &Caller, at_first: &Permit) -> Permit {
        let identity = caller.identity.as_deref();
        let identity = identity.and_then(|identity| identity.parse::<Identity>().ok());
        match identity {
            Some(identity) if identity.kind() == Kind::User => self.permit(&identity),
            _ => at_first.clone(),
        }
    }

    /// Takes a place for a connection of `who`; `None` when it has too many.
    pub(super) fn connection(&self, who: &Arc<str>, permit: &Permit) -> Option<Place> {
        self.0.limits.connection(who, rate(permit.role))
    }

    /// Takes one call of a caller with an identity.
    fn call(&self, caller: &Caller, permit: &Permit) -> Result<(), ApiError> {
        match &caller.identity {
            Some(identity) => self
                .0
                .limits
                .call(identity, rate(permit.role), Instant::now()),
            None => Ok(()),
        }
    }
}
