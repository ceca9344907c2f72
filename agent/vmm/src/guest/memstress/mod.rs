//! memstress: the guest that writes its memory by a pattern and checks everything it wrote.
//!
//! # One visit
//! A vCPU owns a range of working pages. A visit picks one by the pattern and looks up how often it
//! was written: its *count*, a `u32` in the count table. When that is not 0, the first and the last
//! 16 bytes of the page must be the stamp (page number, count), two little-endian words each;
//! anything else is one error. By the share of visits that write, the visit then writes the stamp
//! of the next count at both ends of the page and the count into the table. So a page that is lost,
//! stale, torn or misplaced is found at its next visit, by the guest itself. A random fill stamps
//! every page with count 1, so that pages are checked even when they were never visited.
//!
//! # Two forms of one program
//! [`run_batch`] is the program in portable Rust over a [`GuestAccess`]; [`super::arch`] has the
//! same in machine code. Both leave the same bytes in memory after the same number of visits (a
//! test holds them together). All that lasts is in guest memory and, for the machine code within a
//! batch, in registers: pausing, saving and loading needs nothing else.
//!
//! # Batches and pacing
//! Work comes in batches of a few visits. Before each batch the vCPU asks whether it may: machine
//! code by a call out of the guest, the doorbell. Whoever runs the vCPU answers through a
//! [`Pacer`], which keeps pages written under the ceiling and leaves an idle guest waiting; its
//! state is rebuilt from the control page after a migration.
//!
//! # Control page (vCPU `i` at `0x10000 + i * 0x1000`), little-endian words
//! | offset | what |
//! |---|---|
//! | `0x000` | magic `SLATMEM1` |
//! | `0x008` | version, 1 |
//! | `0x010`, `0x018` | this vCPU, number of vCPUs |
//! | `0x020` | pattern: 0 sequential, 1 random, 2 hot and cold |
//! | `0x028` | visits that write, of 2^32 |
//! | `0x030` | hot and cold: visits to the hot pages, of 2^32 |
//! | `0x038` | hot and cold: how many of the owned pages are hot |
//! | `0x040`, `0x048` | first owned page, owned pages |
//! | `0x050` | working pages of the VM |
//! | `0x058` | ceiling of the whole VM, bytes a second; all ones: none |
//! | `0x060`, `0x068` | linear address of the count table, of the working pages |
//! | `0x070`, `0x078` | linear addresses from here on, get this added |
//! | `0x080` | visits in a batch |
//! | `0x088` | idle from this many visits on; all ones: never |
//! | `0x100`, `0x108` | state: next owned page (sequential), random number generator |
//! | `0x140` | counter: visits |
//! | `0x148` | counter: pages written |
//! | `0x150` | counter: errors |
//! | `0x158` | page of the first error; all ones: none |

pub(super) mod control;
mod counters;
mod install;
mod pace;
pub(super) mod random;
pub(super) mod step;

pub(crate) use self::{
    control::control_page,
    counters::counters,
    pace::{Pacer, Turn},
    step::{GuestAccess, run_batch},
};
#[cfg(test)]
pub(crate) use self::{control::offset, step::NoMemory};
pub(super) use install::install;
