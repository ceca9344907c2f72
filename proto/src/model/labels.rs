//! Labels of VMs and hosts, checked: what their owners call them by, and what a user's access may
//! be limited to.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    str::FromStr,
};

use crate::ApiError;

/// Labels of one object.
const MOST: usize = 32;
/// Characters of a key or a value.
const LONGEST: usize = 63;

/// Keys and values. Empty is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Checks a message's field, which is called `field` in errors.
    ///
    /// # Errors
    /// BAD_PARAMETER for too many, or for a key or a value that cannot be one.
    pub fn from_field(field: &str, labels: &HashMap<String, String>) -> Result<Self, ApiError> {
        let bad = |words: String| Err(ApiError::bad_parameter(field, words));
        if labels.len() > MOST {
            return bad(format!("{} labels; at most {MOST}", labels.len()));
        }
        for (key, value) in labels {
            if key.is_empty() || !is_word(key, true) {
                return bad(format!(
                    "\"{}\" is no key: 1 to {LONGEST} of a-z, 0-9, - _ . /",
                    shown(key)
                ));
            }
            if !is_word(value, false) {
                return bad(format!(
                    "\"{}\" is no value: at most {LONGEST} of a-z, 0-9, - _ .",
                    shown(value)
                ));
            }
        }
        Ok(Self(labels.clone().into_iter().collect()))
    }

    /// As a message's field.
    #[must_use]
    pub fn to_field(&self) -> HashMap<String, String> {
        self.0.clone().into_iter().collect()
    }

    /// Whether all of `wanted` are among these.
    #[must_use]
    pub fn have(&self, wanted: &Self) -> bool {
        wanted
            .0
            .iter()
            .all(|(key, value)| self.0.get(key) == Some(value))
    }

    /// No label.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, String)> for Labels {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (key, value)) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma}{key}={value}")?;
        }
        Ok(())
    }
}

impl FromStr for Labels {
    type Err = ApiError;

    /// As `team=web,tier=front`; empty for none.
    fn from_str(text: &str) -> Result<Self, ApiError> {
        let mut labels = HashMap::new();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                let words = format!("\"{}\" is not KEY=VALUE", shown(pair));
                return Err(ApiError::bad_parameter("labels", words));
            };
            if labels.insert(key.to_owned(), value.to_owned()).is_some() {
                let words = format!("\"{}\" is there twice", shown(key));
                return Err(ApiError::bad_parameter("labels", words));
            }
        }
        Self::from_field("labels", &labels)
    }
}

fn is_word(text: &str, slash: bool) -> bool {
    let fits = |byte: u8| {
        byte.is_ascii_lowercase()
            || byte.is_ascii_digit()
            || matches!(byte, b'-' | b'_' | b'.')
            || (slash && byte == b'/')
    };
    text.len() <= LONGEST && text.bytes().all(fits)
}

fn shown(text: &str) -> String {
    text.chars()
        .take(80)
        .flat_map(char::escape_default)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_as_they_are_written() {
        let labels: Labels = "team=web,slat.dev/tier=front".parse().unwrap();
        assert_eq!(labels.to_string(), "slat.dev/tier=front,team=web");
        let again = Labels::from_field("labels", &labels.to_field()).unwrap();
        assert_eq!(again, labels);
        assert!("".parse::<Labels>().unwrap().is_empty());
    }

    #[test]
    fn what_is_no_label_is_refused() {
        let long = "x".repeat(64);
        for text in [
            "team",
            "=web",
            "Team=web",
            "team=We b",
            "a=b,a=c",
            &format!("a={long}"),
        ] {
            assert!(text.parse::<Labels>().is_err(), "{text}");
        }
        let many: String = (0..33).map(|n| format!("k{n}=v,")).collect();
        assert!(many.parse::<Labels>().is_err());
    }

    #[test]
    fn all_that_is_wanted_has_to_be_there() {
        let labels: Labels = "team=web,tier=front".parse().unwrap();
        for (wanted, have) in [
            ("", true),
            ("team=web", true),
            ("team=db", false),
            ("rack=1", false),
        ] {
            assert_eq!(labels.have(&wanted.parse().unwrap()), have, "{wanted}");
        }
    }
}
