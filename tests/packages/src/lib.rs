//! Programs out of Debian's packages, for tests: emulators, kernels, compilers. They are unpacked
//! into a directory of the build and run from there; nothing is installed.
//!
//! * [`Store`] fetches [`Set`]s of packages by name, once.
//! * [`Root`] is what was unpacked; its programs run by their own loader.
//! * [`program`] runs a program for a bounded time.

pub mod program;
mod root;
mod store;

pub use root::{Root, write_program};
pub use store::{Release, Set, Store};
