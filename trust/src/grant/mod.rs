//! Grants: leave for one step of one migration, signed by the server with Ed25519.
//!
//! A [`Grant`] says which VM may go from which agent's start to which other's, with which epoch and
//! until when, and which keys protect the pages. What is signed is its canonical bytes, after a
//! domain tag: one grant has one form, and a form that would encode in another way is refused.
//! [`Signer`] signs, [`KeyRing`] verifies; keys overlap while they rotate.
//!
//! # What a valid signature does not say
//! That the grant is for who received it, that it is not used up, that the VM's epoch is still the
//! one it names. [`Grant::check`] compares the first; whoever keeps the used ids and the journal
//! asks the others.

mod bytes;
mod error;
mod key;
mod signed;

pub use error::GrantError;
pub use key::{GrantKey, KEY_ID, KeyRing, Signer};
pub use signed::{Checked, Grant, Party, Purpose, Signed};
