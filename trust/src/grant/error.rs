//! Why a grant is refused.

/// Why a grant is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// Not the canonical bytes of a grant of this version.
    #[error("it is no grant: {0}")]
    Malformed(&'static str),
    /// The key that it names is not known, or not in force at that time.
    #[error("it is signed by key {key}, which is not in force here")]
    KeyUnknown {
        /// The key's id, in hexadecimal.
        key: String,
    },
    /// The signature does not fit the bytes.
    #[error("its signature is wrong")]
    Signature,
    /// Its time is over.
    #[error("it ended {late_ms} ms ago")]
    Expired {
        /// How long ago, milliseconds.
        late_ms: u64,
    },
    /// It is for something else.
    #[error("its {what} is {found}, not {wanted}")]
    Other {
        /// Which field.
        what: &'static str,
        /// What stands there.
        found: String,
        /// What should.
        wanted: String,
    },
}
