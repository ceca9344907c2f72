//! Who a caller is to Slat.

use std::{fmt, str::FromStr};

use crate::{ApiError, model::Labels};

/// Who a caller is to Slat. The three of users contain each other, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// A user who looks.
    Viewer,
    /// A user who works with VMs.
    Operator,
    /// A user who works with hosts, too.
    Admin,
    /// A host's agent.
    Agent,
    /// The control plane.
    Server,
    /// Whoever may open the Unix socket.
    Local,
    /// Anybody: the endpoint asks for no certificate.
    Open,
}

impl Role {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 7] = [
        Self::Viewer,
        Self::Operator,
        Self::Admin,
        Self::Agent,
        Self::Server,
        Self::Local,
        Self::Open,
    ];

    /// As in errors, logs and the file of users.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
            Self::Agent => "agent",
            Self::Server => "server",
            Self::Local => "local",
            Self::Open => "open",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = ApiError;

    /// One of the three that a user can have.
    fn from_str(text: &str) -> Result<Self, ApiError> {
        match text {
            "viewer" => Ok(Self::Viewer),
            "operator" => Ok(Self::Operator),
            "admin" => Ok(Self::Admin),
            _ => Err(ApiError::bad_parameter(
                "role",
                "is one of viewer, operator, admin",
            )),
        }
    }
}

/// What a user's access is limited to. Without labels: to nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// VMs that have all of these.
    pub vms: Labels,
    /// Hosts that have all of these.
    pub hosts: Labels,
}

impl Scope {
    /// Everything is in it.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.vms.is_empty() && self.hosts.is_empty()
    }
}

/// What a caller may do: in the extensions of every request that reaches a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    /// Who it is to Slat; `None`: a user to whom nobody gave a role.
    pub role: Option<Role>,
    /// What it is limited to.
    pub scope: Scope,
}

impl Permit {
    /// Of a role that nothing limits.
    #[must_use]
    pub fn of(role: Role) -> Self {
        Self {
            role: Some(role),
            scope: Scope::default(),
        }
    }

    /// The role's name, or `none`.
    #[must_use]
    pub fn role_name(&self) -> &'static str {
        self.role.map_or("none", Role::as_str)
    }
}
