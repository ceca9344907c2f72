//! Independent walkers: emulated hardware translates tables that the MMU built, and must answer as
//! the software does.
//!
//! * [`guest`] drives the real MMU and dumps its tables; [`image`] walks such a dump by the
//!   format's `decode` alone.
//! * [`patch`] lays entries over the dump that the MMU never writes; [`ask`] makes questions about
//!   all of it.
//! * [`cpu`] starts an emulator with the dump, the questions ([`query`]) and a bare-metal program
//!   of `tests/oracles/`, and reads its answers ([`answer`]); [`judge`] compares.
//! * [`fetch`] names the packages that the emulators come from.
//! * [`run`] is one format's proof, [`list`] all of them.
//!
//! Everything random comes from one seed.

pub mod answer;
pub mod ask;
pub mod cpu;
pub mod fetch;
pub mod format;
pub mod guest;
pub mod image;
pub mod judge;
pub mod layout;
pub mod list;
pub mod patch;
pub mod query;
pub mod rng;
pub mod run;
