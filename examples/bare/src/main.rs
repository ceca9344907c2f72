//! A stand-in hypervisor: how to embed the Common MMU where there is no operating system.
//!
//! It uses `slat-mmu` and `slat-arch` and nothing else. Read the files in this order; the first
//! three are what you write yourself, the fourth is how you use what you get:
//!
//! | file | what | yours? |
//! |---|---|---|
//! | `frames` | where page tables live: a [`TableMemory`](slat_mmu::TableMemory) | write it |
//! | `host` | who flushes TLBs: a [`Host`](slat_mmu::Host) | write it |
//! | `vcpu` | the loop around "enter the guest" | write it |
//! | `story` | slots, faults, a dump, dirty logging, ageing, taking memory back | copy from it |
//! | `heap`, `lock`, `bytes` | what `alloc` and the compiler need | you have them |
//! | `start`, `platform`, `console` | entry, panic, two functions to the outside | you have them |
//! | `hardware`, `tlb`, `ram` | stand-ins for the processor and its memory | the machine has them |
//!
//! The guest does not run code: it *touches* frames, and each touch goes through a TLB, a walker
//! written from the manuals, and the MMU, as a processor's would. The same story is told for five
//! formats; it ends the program with 1 at the first line where the processor sees something else
//! than the MMU promised.

#![no_std]
#![no_main]

extern crate alloc;

#[cfg(not(target_os = "none"))]
mod bytes;
mod console;
mod frames;
mod hardware;
mod heap;
mod host;
mod lock;
mod platform;
mod ram;
mod start;
mod story;
mod tlb;
mod vcpu;

use slat_arch::{Arm64Ipa48, Ept4, Npt4, Sv39x4, Sv48x4};

use crate::{
    console::say,
    frames::Frames,
    story::{Failed, tell},
};

extern "C" fn main() -> ! {
    let frames = Frames::take();
    let stories = [
        tell::<Ept4>,
        tell::<Npt4>,
        tell::<Sv39x4>,
        tell::<Sv48x4>,
        tell::<Arm64Ipa48>,
    ];
    for story in stories {
        if let Err(Failed { file, line, what }) = story(&frames) {
            say!("FAILED at {file}:{line}: {what}");
            platform::exit(1);
        }
    }
    say!(
        "all {} formats: the processor saw what the MMU promised",
        stories.len()
    );
    platform::exit(0)
}
