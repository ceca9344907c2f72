//! Resource names (AIP-122): `vms/{vm}`, `hosts/{host}`, `migrations/{migration}`.
//!
//! The id is DNS-like: lower-case letters, digits, dashes, 1 to 63, beginning with a letter or
//! digit and not ending with a dash. Nothing else reaches a file name, a metric label or a log
//! line.

use std::{collections::BTreeSet, fmt, str::FromStr};

use crate::ApiError;

fn check_id(field: &str, id: &str) -> Result<(), ApiError> {
    let fits = (1..=63).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !id.starts_with('-')
        && !id.ends_with('-');
    if fits {
        return Ok(());
    }
    let shown: String = id.chars().take(80).flat_map(char::escape_default).collect();
    Err(ApiError::bad_parameter(
        field,
        format_args!(
            "\"{shown}\" is no name: 1 to 63 lower-case letters, digits and dashes, with a letter or digit first and last"
        ),
    )
    .with("value", shown))
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $prefix:literal, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(String);

        impl $type {
            /// From the bare id.
            ///
            /// # Errors
            /// BAD_PARAMETER when it is not DNS-like.
            pub fn from_id(id: &str) -> Result<Self, ApiError> {
                check_id($field, id)?;
                Ok(Self(id.to_owned()))
            }

            /// From the full name, or from the bare id.
            ///
            /// # Errors
            /// BAD_PARAMETER when it is neither.
            pub fn parse(name: &str) -> Result<Self, ApiError> {
                Self::from_id(name.strip_prefix($prefix).unwrap_or(name))
            }

            /// The bare id.
            #[must_use]
            pub fn id(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl FromStr for $type {
            type Err = ApiError;
            fn from_str(text: &str) -> Result<Self, ApiError> {
                Self::parse(text)
            }
        }
    };
}

name_type!(
    /// `vms/{vm}`.
    VmName, "vms/", "vm"
);
name_type!(
    /// `hosts/{host}`.
    HostName, "hosts/", "host"
);
name_type!(
    /// `migrations/{migration}`.
    MigrationName, "migrations/", "migration"
);
name_type!(
    /// A dirty-log reader's name within a VM.
    CursorName, "cursors/", "cursor"
);

/// `hosts/{host}/saves/{save}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaveName {
    host: HostName,
    save: String,
}

impl SaveName {
    /// Of a save on a host, from its bare id.
    ///
    /// # Errors
    /// BAD_PARAMETER when the id is not DNS-like.
    pub fn new(host: HostName, save: &str) -> Result<Self, ApiError> {
        check_id("save", save)?;
        let save = save.to_owned();
        Ok(Self { host, save })
    }

    /// From the full name.
    ///
    /// # Errors
    /// BAD_PARAMETER when it is none.
    pub fn parse(name: &str) -> Result<Self, ApiError> {
        let parts = name.strip_prefix("hosts/");
        let parts = parts.and_then(|rest| rest.split_once("/saves/"));
        let Some((host, save)) = parts else {
            let shown: String = name
                .chars()
                .take(160)
                .flat_map(char::escape_default)
                .collect();
            let what = format_args!("\"{shown}\" is not of the form hosts/HOST/saves/SAVE");
            return Err(ApiError::bad_parameter("save", what).with("value", &shown));
        };
        Self::new(HostName::from_id(host)?, save)
    }

    /// Where the file is.
    #[must_use]
    pub fn host(&self) -> &HostName {
        &self.host
    }

    /// The bare id, unique on its host.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.save
    }
}

impl fmt::Display for SaveName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/saves/{}", self.host, self.save)
    }
}

impl FromStr for SaveName {
    type Err = ApiError;
    fn from_str(text: &str) -> Result<Self, ApiError> {
        Self::parse(text)
    }
}

/// Children of a fork at most.
const MOST_CHILDREN: usize = 32;

/// The names of a fork's children.
///
/// # Errors
/// BAD_PARAMETER when there is none, more than 32, one that is no name, or one twice.
pub fn children_of(ids: &[String]) -> Result<Vec<VmName>, ApiError> {
    let bad = |words: String| ApiError::bad_parameter("vm_ids", words);
    if ids.is_empty() || ids.len() > MOST_CHILDREN {
        let (found, most) = (ids.len(), MOST_CHILDREN);
        return Err(bad(format!("{found} names, 1 to {most} can be"))
            .with("found", found)
            .with("most", most));
    }
    let names: Vec<VmName> = ids
        .iter()
        .map(|id| VmName::from_id(id))
        .collect::<Result<_, _>>()?;
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(name.id())) {
        Some(twice) => Err(bad(format!("{} is there twice", twice.id())).with("value", twice.id())),
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reason;

    #[test]
    fn names_parse_with_and_without_their_collection() {
        for text in ["web-1", "vms/web-1"] {
            let name: VmName = text.parse().unwrap();
            assert_eq!(name.id(), "web-1");
            assert_eq!(name.to_string(), "vms/web-1");
        }
    }

    #[test]
    fn a_save_is_named_with_its_host() {
        let save: SaveName = "hosts/h1/saves/web-1".parse().unwrap();
        assert_eq!((save.host().id(), save.id()), ("h1", "web-1"));
        assert_eq!(save.to_string(), "hosts/h1/saves/web-1");
        for text in [
            "web-1",
            "hosts/h1",
            "hosts//saves/a",
            "hosts/h1/saves/../x",
            "saves/a",
        ] {
            let error = SaveName::parse(text).unwrap_err();
            assert_eq!(error.reason, Reason::BadParameter, "{text}");
        }
    }

    #[test]
    fn a_fork_has_children_of_different_names() {
        let of = |ids: &[&str]| {
            let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
            children_of(&ids).map(|names| names.len())
        };
        assert_eq!(of(&["a", "b"]).unwrap(), 2);
        let many: Vec<String> = (0..33).map(|at| format!("a-{at}")).collect();
        assert!(children_of(&many).is_err());
        for wrong in [&[][..], &["a", "b", "a"], &["a", ""]] {
            assert_eq!(of(wrong).unwrap_err().reason, Reason::BadParameter);
        }
    }

    #[test]
    fn nothing_else_is_a_name() {
        let long = "a".repeat(64);
        for text in [
            "", "-a", "a-", "A", "a/b", "../x", "a.b", "ü", "a b", "vms/", "hosts/a", &long,
        ] {
            let error = VmName::parse(text).unwrap_err();
            assert_eq!(error.reason, Reason::BadParameter, "{text}");
            assert_eq!(error.metadata["field"], "vm");
        }
    }
}
