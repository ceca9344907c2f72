//! Where things lie in an emulated machine's physical memory.
//!
//! All offsets are from the start of RAM, so that one table serves machines whose RAM begins at 0
//! (x86) and elsewhere (RISC-V's `virt` machine). The bare-metal programs get these addresses from
//! here when they are built.
//!
//! | offset | what |
//! |---|---|
//! | 0 | the program |
//! | 2 MiB | the program's own guest, on x86: code, page tables, queries, results |
//! | 4 MiB | queries |
//! | 5 MiB | results |
//! | 16 MiB | the tables under test |
//! | 64 MiB, 1088 MiB | windows of data |
//!
//! A window's words name their own address ([`pattern`]), so what is read through a translation
//! says where it led. The same bytes are x86 code that loads the address into a register and
//! returns, so that fetching says it too.

use slat_mmu::Pfn;

const MIB: u64 = 1 << 20;

/// RAM of every machine, in bytes.
pub const RAM: u64 = 1280 * MIB;
/// Memory of the program's own guest, in bytes.
pub const GUEST_SIZE: u64 = 4 * MIB;
/// Frames for tables.
pub const TABLE_FRAMES: usize = 2048;

/// An address map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First address of RAM.
    pub base: u64,
}

impl Layout {
    /// The memory that the program maps for its own guest.
    pub const fn guest(self) -> u64 {
        self.base + 2 * MIB
    }

    /// The block of queries.
    pub const fn queries(self) -> u64 {
        self.base + 4 * MIB
    }

    /// The block of results.
    pub const fn results(self) -> u64 {
        self.base + 5 * MIB
    }

    /// The tables under test.
    pub const fn tables(self) -> u64 {
        self.base + 16 * MIB
    }

    /// Host physical ranges `[start, end)` that are filled with [`pattern`].
    pub const fn windows(self) -> [(u64, u64); 2] {
        let first = self.base + 64 * MIB;
        let second = self.base + 1088 * MIB;
        [(first, first + 64 * MIB), (second, second + 4 * MIB)]
    }

    /// Whether the page at `hpa` lies in a window.
    pub fn in_window(self, hpa: u64) -> bool {
        self.windows()
            .iter()
            .any(|(start, end)| *start <= hpa && hpa < *end)
    }

    /// First frame of a window.
    pub const fn window_pfn(self, window: usize) -> Pfn {
        Pfn(self.windows()[window].0 >> slat_mmu::PAGE_SHIFT)
    }
}

/// What the word at `hpa` (a multiple of 8 below 32 GiB) of a window holds:
/// `mov eax, hpa / 8; ret; nop; nop`.
pub const fn pattern(hpa: u64) -> u64 {
    0x9090_c300_0000_00b8 | ((hpa >> 3) & 0xffff_ffff) << 8
}

/// The address that a word of a window names, or `None` if no window holds this word.
pub const fn named_by(word: u64) -> Option<u64> {
    let hpa = ((word >> 8) & 0xffff_ffff) << 3;
    if pattern(hpa) == word {
        Some(hpa)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_names_its_address() {
        for hpa in [0, 8, 0x8400_0000, 0x7_ffff_fff8] {
            assert_eq!(named_by(pattern(hpa)), Some(hpa));
        }
        assert_eq!(named_by(0), None);
        assert_eq!(
            pattern(0x8400_0ff8).to_le_bytes()[..6],
            [0xb8, 0xff, 0x01, 0x80, 0x10, 0xc3]
        );
    }

    #[test]
    fn nothing_overlaps() {
        let layout = Layout { base: 0x8000_0000 };
        assert_eq!(layout.guest() + GUEST_SIZE, layout.base + 6 * MIB);
        assert!(layout.tables() + TABLE_FRAMES as u64 * 4096 <= layout.windows()[0].0);
        assert!(layout.windows()[1].1 <= layout.base + RAM);
        assert!(layout.in_window(layout.windows()[1].0));
        assert!(!layout.in_window(layout.windows()[1].1));
    }
}
