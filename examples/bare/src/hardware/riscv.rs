//! RISC-V privileged architecture, "Two-Stage Address Translation" and "Virtual Address Translation
//! Process", for a hart with Svade: it faults where A, or D on a store, is clear; and without
//! Svvptc: it may remember that an entry was not valid.
//!
//! Bits 0 to 7 are V, R, W, X, U, G, A and D; 53:10 are the PPN; 60:54 are reserved and, without
//! Svnapot and Svpbmt, so are 63:61. R, W and X clear is a pointer, in which D, A and U are
//! reserved. W without R is reserved. A leaf must have U, because G-stage accesses are made as if
//! from U-mode. The root has 11 index bits and 16 KiB.

use slat_arch::{Sv39x4, Sv48x4};
use slat_mmu::Pfn;

use super::{Manual, Present, Seen};

const ROOT_BITS: u32 = 11;
const VMID: u16 = 7;

/// `hgatp`: MODE in 63:60, zero in 59:58, VMID in 57:44, PPN in 43:0, of which a 16 KiB root leaves
/// 1:0 clear.
fn root(register: u64, mode: u64) -> Option<u64> {
    let ppn = register & ((1 << 44) - 1);
    (register >> 60 == mode && register >> 58 & 3 == 0 && ppn & 3 == 0).then_some(ppn << 12)
}

fn read(raw: u64, level: u32) -> Seen {
    let bit = |at: u32| raw >> at & 1 != 0;
    let (valid, read, write, execute) = (bit(0), bit(1), bit(2), bit(3));
    let (user, accessed, dirty) = (bit(4), bit(6), bit(7));
    if !valid {
        return Seen::Absent;
    }
    if write && !read || raw >> 54 != 0 {
        return Seen::Reserved;
    }
    let leaf = read || execute;
    if !leaf && (level == 0 || user || accessed || dirty) {
        return Seen::Reserved;
    }
    Seen::Present(Present {
        address: (raw >> 10 & ((1 << 44) - 1)) << 12,
        leaf,
        read: !leaf || user && read,
        write: !leaf || user && write,
        execute: !leaf || user && execute,
        accessed: if leaf { 1 << 6 } else { 0 },
        dirty: if leaf { 1 << 7 } else { 0 },
    })
}

impl Manual for Sv39x4 {
    const LEVELS: u32 = 3;
    const ROOT_BITS: u32 = ROOT_BITS;
    const SETS_BITS: bool = false;
    const REMEMBERS_ABSENCE: bool = true;

    fn register(root: Pfn) -> u64 {
        Self::hgatp(root, VMID)
    }

    fn root(register: u64) -> Option<u64> {
        root(register, 8)
    }

    fn read(raw: u64, level: u32) -> Seen {
        read(raw, level)
    }
}

impl Manual for Sv48x4 {
    const LEVELS: u32 = 4;
    const ROOT_BITS: u32 = ROOT_BITS;
    const SETS_BITS: bool = false;
    const REMEMBERS_ABSENCE: bool = true;

    fn register(root: Pfn) -> u64 {
        Self::hgatp(root, VMID)
    }

    fn root(register: u64) -> Option<u64> {
        root(register, 9)
    }

    fn read(raw: u64, level: u32) -> Seen {
        read(raw, level)
    }
}
