//! `cargo xtask lab`: emulated hosts with KVM as on hardware and a network between them, booted in
//! seconds on any x86-64 machine, and Slat tested on them.
//!
//! * [`machine`] says what the two kinds of host are made of, [`kind`] which a lab has; packages
//!   are fetched by name, once.
//! * [`programs`] builds what is tested; [`image`] puts it into a first file system ([`archive`],
//!   [`modules`]).
//! * [`host`] starts and ends an emulator, [`network`] joins them, [`console`] runs commands on
//!   one; [`hosts`] is all of them.
//! * [`fleet`] runs a server and agents there and asks them ([`answer`]); [`tests`] are the tests,
//!   [`suite`] those that run inside a host.
//! * [`options`] is what can be asked for, [`run()`] does it.
//!
//! Everything is below `target/lab`: packages and the image of a machine in the folder of its
//! name, consoles and logs of the last run in the folder of the lab's kind. What is built for
//! RISC-V is in `target/riscv64`. One lab of a kind runs at a time there.

mod answer;
mod archive;
mod console;
mod fleet;
mod host;
mod hosts;
mod image;
mod kind;
mod machine;
mod modules;
mod network;
mod options;
mod programs;
mod run;
mod suite;
mod tests;

pub(crate) use self::{
    options::Options,
    run::{bounded, build_ahead, run, will_fit},
};
