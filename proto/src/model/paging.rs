//! Who decides which pages of a guest are mapped, checked.

use std::{fmt, str::FromStr};

use crate::{ApiError, v1};

/// Who decides which pages of a guest are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Paging {
    /// The host's kernel.
    #[default]
    Kernel,
    /// The Common MMU, in a process beside the VM's.
    Agent,
}

impl Paging {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Kernel, Self::Agent];

    /// As a message.
    #[must_use]
    pub fn to_message(self) -> v1::Paging {
        match self {
            Self::Kernel => v1::Paging::Kernel,
            Self::Agent => v1::Paging::Agent,
        }
    }

    /// From a message's field. Who says nothing means `Kernel`.
    ///
    /// # Errors
    /// BAD_PARAMETER for a number that stands for nobody.
    pub fn from_field(value: i32) -> Result<Self, ApiError> {
        match v1::Paging::try_from(value) {
            Ok(v1::Paging::Unspecified | v1::Paging::Kernel) => Ok(Self::Kernel),
            Ok(v1::Paging::Agent) => Ok(Self::Agent),
            Err(_) => Err(ApiError::bad_parameter(
                "spec.paging",
                format_args!("{value} stands for nobody who pages"),
            )),
        }
    }
}

impl fmt::Display for Paging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Agent => "agent",
        })
    }
}

impl FromStr for Paging {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        Self::ALL
            .into_iter()
            .find(|paging| paging.to_string() == text)
            .ok_or_else(|| ApiError::bad_parameter("paging", "is one of kernel, agent"))
    }
}
