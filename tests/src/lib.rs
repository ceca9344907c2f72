//! The harness of the whole-system tests: real processes, real sockets, a guest that checks its own
//! memory.
//!
//! * [`binary`] finds or builds the `slat` under test, once.
//! * [`fleet`] starts a server and agents in a directory of their own, kills and restarts them, and
//!   ends them.
//! * [`process`] holds the daemons and the VM processes behind an agent, by pidfd.
//! * [`wait`] waits for what a watch stream or a file shows, never longer than [`wait::PATIENCE`],
//!   never "a while".
//! * [`guest`] writes VM specs and migration parameters down.
//! * [`slots`] writes slot changes down, and a guest that uses a slot that was added to it.
//! * [`memory_file`] reads guest memory where the VM's process has it.
//! * [`reserved`] has pages set aside for hugetlb memory, and given back.
//! * [`data_port`] sends a destination's data port what breaks the protocol.
//! * [`journals`] keeps every journal that a fleet writes and has them explained by the machines.
//! * [`handover`] kills a target process between the commit and its answer.
//! * [`mod@bench`] measures migrations and calls beside something plain.
//! * [`explorer`] explores the handover: both sides, the server, and all that may go wrong between
//!   them.
//! * [`oracle`] has page tables walked by emulated hardware (`cargo xtask oracles`).
//! * [`soak`] does random things and compares what is said with what is true (`cargo xtask soak`).
//! * [`scene`] runs one test on one backend and shows every log when it fails.
//!
//! The tests are in `tests/system/`. They see Slat as an operator does: the program, its API, its
//! directories and `/proc`.
//!
//! # Invariants
//! A [`fleet::Fleet`] that is dropped has ended every process it started, VM processes included,
//! whatever happened before. A test that passes has also proved that nothing was left: no process,
//! no socket, no VM directory, no reserved memory.

pub mod bench;
pub mod binary;
pub mod clock;
pub mod data_port;
pub mod disk;
pub mod explorer;
pub mod fleet;
pub mod guest;
pub mod handover;
pub mod journals;
pub mod memory_file;
pub mod oracle;
pub mod process;
pub mod reserved;
pub mod scene;
pub mod slots;
pub mod soak;
pub mod stalling;
pub mod wait;

pub use fleet::{Fleet, Layout};
