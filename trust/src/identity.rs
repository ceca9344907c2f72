//! What a certificate says about its holder: `spiffe://DOMAIN/slat/KIND/NAME`, the one URI among
//! its subject alternative names. Never an address: hosts are moved and addresses are given anew.
//!
//! An [`Identity`] has been checked: both parts are lower case, so two that mean the same are equal
//! byte by byte, and none holds what a log line, a metric label or a file name could not.

use std::{fmt, str::FromStr};

/// What stands before the domain.
const SCHEME: &str = "spiffe://";
/// What stands between the domain and the kind.
const PATH: &str = "/slat/";
/// Bytes of a name, of a label of a domain, and of a whole domain.
const MAX_NAME: usize = 63;
const MAX_DOMAIN: usize = 253;

/// What the holder of a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The agent of a host; its name is the host's.
    Agent,
    /// A server.
    Server,
    /// A person, or a program that acts for one.
    User,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Agent, Self::Server, Self::User];

    /// As it stands in an identity.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Server => "server",
            Self::User => "user",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Kind {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.word() == text)
            .ok_or_else(|| IdentityError::Kind(shown(text)))
    }
}

/// Who a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    domain: String,
    kind: Kind,
    name: String,
}

/// Why a text is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// It does not have the form.
    #[error(
        "\"{0}\" is no Slat identity: spiffe://DOMAIN/slat/agent/NAME, .../server/NAME or .../user/NAME"
    )]
    Form(String),
    /// Its domain is none.
    #[error(
        "\"{0}\" is no trust domain: lower-case letters, digits, dashes and dots, as a DNS name, at most 253"
    )]
    Domain(String),
    /// Its kind is none.
    #[error("\"{0}\" is no kind of identity: agent, server or user")]
    Kind(String),
    /// Its name is none.
    #[error(
        "\"{0}\" is no name: 1 to 63 lower-case letters, digits, dashes and dots, with a letter or digit first and last"
    )]
    Name(String),
}

/// A text from outside, short and without what a terminal would act on.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .take(120)
        .flat_map(char::escape_default)
        .collect()
}

fn is_letter_or_digit(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// Letters and digits, with `inner` between them.
fn is_word(text: &str, inner: &[u8]) -> bool {
    let bytes = text.as_bytes();
    (1..=MAX_NAME).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| is_letter_or_digit(*byte) || inner.contains(byte))
        && bytes.first().copied().is_some_and(is_letter_or_digit)
        && bytes.last().copied().is_some_and(is_letter_or_digit)
}

impl Identity {
    /// From its parts.
    ///
    /// # Errors
    /// When the domain is not as a DNS name in lower case, or the name is none.
    pub fn new(domain: &str, kind: Kind, name: &str) -> Result<Self, IdentityError> {
        Self::check_domain(domain)?;
        if !is_word(name, b"-.") {
            return Err(IdentityError::Name(shown(name)));
        }
        Ok(Self {
            domain: domain.to_owned(),
            kind,
            name: name.to_owned(),
        })
    }

    /// Whether a text may be a trust domain.
    ///
    /// # Errors
    /// When it is not as a DNS name in lower case.
    pub fn check_domain(domain: &str) -> Result<(), IdentityError> {
        let fits = (1..=MAX_DOMAIN).contains(&domain.len())
            && domain.split('.').all(|label| is_word(label, b"-"));
        if fits {
            Ok(())
        } else {
            Err(IdentityError::Domain(shown(domain)))
        }
    }

    /// The trust domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its name, unique among those of its kind and domain.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{SCHEME}{}{PATH}{}/{}",
            self.domain, self.kind, self.name
        )
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || IdentityError::Form(shown(text));
        let rest = text.strip_prefix(SCHEME).ok_or_else(form)?;
        let (domain, rest) = rest.split_once('/').ok_or_else(form)?;
        let rest = rest.strip_prefix("slat/").ok_or_else(form)?;
        let (kind, name) = rest.split_once('/').ok_or_else(form)?;
        Self::new(domain, kind.parse()?, name)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_three_kinds_are_read_and_written_alike() {
        for kind in Kind::ALL {
            let text = format!("spiffe://example.org/slat/{kind}/host-a.rack1");
            let identity: Identity = text.parse().expect("an identity");
            assert_eq!(identity.kind(), kind);
            assert_eq!(identity.domain(), "example.org");
            assert_eq!(identity.name(), "host-a.rack1");
            assert_eq!(identity.to_string(), text);
        }
    }

    #[test]
    fn what_is_almost_an_identity_is_none() {
        for text in [
            "",
            "spiffe://",
            "spiffe:///slat/agent/a",
            "spiffe://d/slat/agent/",
            "spiffe://d/slat/agent",
            "spiffe://d/slat/agent/a/",
            "spiffe://d/slat/agent/a/b",
            "spiffe://d//slat/agent/a",
            "spiffe://d/slat//agent/a",
            "spiffe://d/slat/Agent/a",
            "spiffe://d/slat/pager/a",
            "spiffe://d/slat/agent/A",
            "spiffe://d/slat/agent/-a",
            "spiffe://d/slat/agent/a-",
            "spiffe://d/slat/agent/.",
            "spiffe://d/slat/agent/..",
            "spiffe://d/slat/agent/a?b",
            "spiffe://d/slat/agent/a#b",
            "spiffe://d/slat/agent/a%61",
            "spiffe://d/slat/agent/a b",
            "spiffe://d/slat/agent/a\n",
            "spiffe://d/slat/agent/\u{e9}",
            "spiffe://D/slat/agent/a",
            "spiffe://d./slat/agent/a",
            "spiffe://.d/slat/agent/a",
            "spiffe://d..e/slat/agent/a",
            "spiffe://-d/slat/agent/a",
            "spiffe://user@d/slat/agent/a",
            "spiffe://d:443/slat/agent/a",
            "SPIFFE://d/slat/agent/a",
            "https://d/slat/agent/a",
            " spiffe://d/slat/agent/a",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text:?} was taken");
        }
        let long = "a".repeat(64);
        assert!(Identity::new("d", Kind::User, &long).is_err());
        assert!(Identity::new("d", Kind::User, &long[1..]).is_ok());
        let long = [&long[1..], &long[1..], &long[1..], &long[1..]].join(".");
        assert!(Identity::new(&long, Kind::User, "a").is_err());
        assert!(Identity::new(&long[2..], Kind::User, "a").is_ok());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_the_same(
            domain in "[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?(\\.[a-z0-9]{1,9}){0,4}",
            kind in prop::sample::select(&Kind::ALL[..]),
            name in "[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?",
        ) {
            let identity = Identity::new(&domain, kind, &name).expect("well formed");
            prop_assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
        }

        /// What is taken has one way to be written: no two texts are one identity.
        #[test]
        fn what_is_taken_is_written_as_it_was(
            text in "(spiffe://)?[a-zA-Z0-9./@: -]{0,8}/slat/(agent|server|user|Agent|x)/[a-zA-Z0-9./%-]{0,66}",
        ) {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,300}") {
            let _ = text.parse::<Identity>();
        }
    }
}
