//! The identity of a VM, as it names a directory.
//!
//! A uid comes from another host or from an API caller, and becomes a path: only characters that
//! mean nothing to a file system are taken, and no more than a socket's path can bear.

use std::fmt;

use slat_proto::ApiError;

/// Longest uid, bytes.
const MAX: usize = 63;

/// A VM's identity: 1 to 63 of `a-z`, `0-9` and `-`, with a letter or digit first and last.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmUid(String);

impl VmUid {
    /// A new one that no other VM has.
    #[must_use]
    pub fn fresh() -> Self {
        Self(uuid::Uuid::now_v7().to_string())
    }

    /// Checks a uid that came from outside.
    ///
    /// # Errors
    /// BAD_PARAMETER.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let sound = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let fits = (1..=MAX).contains(&text.len())
            && text.bytes().all(sound)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if !fits {
            return Err(ApiError::bad_parameter(
                "uid",
                format_args!(
                    "\"{}\" is no VM's identity: 1 to {MAX} lower-case letters, digits and dashes",
                    text.escape_default().take(2 * MAX).collect::<String>()
                ),
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for VmUid {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_leave_the_folder_is_refused() {
        for text in ["u", "0197-ab", &VmUid::fresh().to_string(), &"x".repeat(63)] {
            assert_eq!(VmUid::parse(text).unwrap().as_str(), text);
        }
        for text in [
            "",
            "..",
            "a/b",
            "a\0",
            "a b",
            "é",
            "A",
            "-a",
            &"x".repeat(64),
        ] {
            assert!(VmUid::parse(text).is_err(), "{text}");
        }
    }
}
