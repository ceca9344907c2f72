//! A register of `KVM_GET_ONE_REG` on RISC-V: what its number says, its name, and when it is
//! loaded.
//!
//! A number has the architecture in its top byte, then the size (as a power of two of bytes), a
//! kind, a subtype, and the register's place among its like.
//!
//! # Order
//! Registers are ordered by phase, and within a phase by number:
//!
//! 1. what the vCPU is: configuration, extensions of ISA and SBI. They decide which other registers
//!    there are, and cannot be changed once the vCPU has run.
//! 2. what it holds. FP_F comes before FP_D, which is the same registers in full.
//! 3. its timer: frequency, time, compare, state. Setting the state arms it, by the rest.

use std::{borrow::Cow, cmp::Ordering, fmt};

use super::names;

const ARCHITECTURE: u64 = 0x80;
const ARCHITECTURE_SHIFT: u32 = 56;
const SIZE_SHIFT: u32 = 52;
const KIND_SHIFT: u32 = 24;
const SUBTYPE_SHIFT: u32 = 16;
/// No register has fewer than 4 bytes; a vector register of 2,048 bits has 256.
const SIZES: std::ops::RangeInclusive<u64> = 2..=8;
const SIZE_WORD: u64 = 3;
/// Of [`Kind::Config`].
const ZICBOM_BYTES: u16 = 1;
const ZICBOZ_BYTES: u16 = 5;
const ZICBOP_BYTES: u16 = 7;
/// Of [`Kind::Csr`].
const SUBTYPE_AIA: u8 = 1;
const SUBTYPE_SMSTATEEN: u8 = 2;

/// What a register belongs to, as the kernel numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Config = 1,
    Core = 2,
    Csr = 3,
    Timer = 4,
    FpF = 5,
    FpD = 6,
    Isa = 7,
    Sbi = 8,
    Vector = 9,
    SbiState = 10,
}

impl Kind {
    const ALL: [Self; 10] = [
        Self::Config,
        Self::Core,
        Self::Csr,
        Self::Timer,
        Self::FpF,
        Self::FpD,
        Self::Isa,
        Self::Sbi,
        Self::Vector,
        Self::SbiState,
    ];
}

/// When a register is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Being,
    Contents,
    Timer,
}

/// A register's number, of which every part is known here.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Register(u64);

/// Those that are asked for by name.
#[cfg_attr(
    not(target_arch = "riscv64"),
    allow(dead_code, reason = "whoever has the kernel asks for them")
)]
impl Register {
    pub(super) const ZICBOM_BYTES: Self = Self::word(Kind::Config, ZICBOM_BYTES);
    pub(super) const ZICBOZ_BYTES: Self = Self::word(Kind::Config, ZICBOZ_BYTES);
    pub(super) const ZICBOP_BYTES: Self = Self::word(Kind::Config, ZICBOP_BYTES);
    pub(super) const SATP_MODE: Self = Self::word(Kind::Config, 6);
    pub(super) const PC: Self = Self::word(Kind::Core, 0);
    pub(super) const SP: Self = Self::word(Kind::Core, 2);
    pub(super) const A0: Self = Self::word(Kind::Core, 10);
    pub(super) const STVEC: Self = Self::word(Kind::Csr, 2);
    pub(super) const SATP: Self = Self::word(Kind::Csr, 8);
    pub(super) const SENVCFG: Self = Self::word(Kind::Csr, 10);
    pub(super) const TIMER_FREQUENCY: Self = Self::word(Kind::Timer, 0);
    pub(super) const SBI_DBCN: Self = Self::word(Kind::Sbi, 9);
    pub(super) const VLENB: Self = Self::word(Kind::Vector, 4);
}

impl Register {
    /// A register of 64 bits and the first subtype.
    pub(super) const fn word(kind: Kind, place: u16) -> Self {
        Self(
            ARCHITECTURE << ARCHITECTURE_SHIFT
                | SIZE_WORD << SIZE_SHIFT
                | (kind as u64) << KIND_SHIFT
                | place as u64,
        )
    }

    /// From its number. `None` when a part of it means nothing here.
    pub(super) fn parse(id: u64) -> Option<Self> {
        let this = Self(id);
        let kind = this.find_kind()?;
        let whole = id >> ARCHITECTURE_SHIFT == ARCHITECTURE
            && SIZES.contains(&(id >> SIZE_SHIFT & 0xf))
            && id >> 32 & 0xf_ffff == 0;
        // Extensions also have registers of 64 flags each, which no list of registers has.
        let single = !matches!(kind, Kind::Isa | Kind::Sbi) || id == Self::word(kind, id as u16).0;
        (whole && single).then_some(this)
    }

    /// Its number.
    pub(super) const fn id(self) -> u64 {
        self.0
    }

    /// Bytes of its value.
    pub(super) fn bytes(self) -> usize {
        1 << (self.0 >> SIZE_SHIFT & 0xf)
    }

    fn find_kind(self) -> Option<Kind> {
        let kind = self.0 >> KIND_SHIFT & 0xff;
        Kind::ALL.into_iter().find(|one| *one as u64 == kind)
    }

    pub(super) fn kind(self) -> Kind {
        // There is no other way to make one than by a kind.
        self.find_kind().unwrap_or(Kind::Config)
    }

    fn subtype(self) -> u8 {
        (self.0 >> SUBTYPE_SHIFT) as u8
    }

    fn place(self) -> u16 {
        self.0 as u16
    }

    /// Whether it says that the vCPU has an extension, of the ISA or the SBI: 0 or 1.
    pub(super) fn is_extension(self) -> bool {
        matches!(self.kind(), Kind::Isa | Kind::Sbi)
    }

    /// The extension that it speaks of, when it does.
    pub(super) fn extension(self) -> Option<Cow<'static, str>> {
        match self.kind() {
            Kind::Isa => Some(names::of(&names::ISA, self.place())),
            Kind::Sbi => Some(names::of(&names::SBI, self.place())),
            _ => None,
        }
    }

    /// The extension of the ISA without which it means nothing to a guest.
    pub(super) fn needs(self) -> Option<&'static str> {
        match (self.kind(), self.subtype(), self.place()) {
            (Kind::Config, 0, ZICBOM_BYTES) => Some("zicbom"),
            (Kind::Config, 0, ZICBOZ_BYTES) => Some("zicboz"),
            (Kind::Config, 0, ZICBOP_BYTES) => Some("zicbop"),
            (Kind::FpF, ..) => Some("f"),
            (Kind::FpD, ..) => Some("d"),
            (Kind::Vector, ..) => Some("v"),
            (Kind::Csr, SUBTYPE_AIA, _) => Some("ssaia"),
            (Kind::Csr, SUBTYPE_SMSTATEEN, _) => Some("smstateen"),
            _ => None,
        }
    }

    fn phase(self) -> Phase {
        match self.kind() {
            Kind::Config | Kind::Isa | Kind::Sbi => Phase::Being,
            Kind::Timer => Phase::Timer,
            _ => Phase::Contents,
        }
    }
}

impl Ord for Register {
    fn cmp(&self, other: &Self) -> Ordering {
        // The size says nothing about the order: FP_F is narrower than FP_D, fcsr than both.
        let key = |one: &Self| (one.phase(), one.0 as u32, one.0);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Register {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Names of the first registers of a kind.
fn named(kind: Kind, subtype: u8) -> &'static [&'static str] {
    match (kind, subtype) {
        (Kind::Config, 0) => &[
            "isa",
            "zicbom_block_size",
            "mvendorid",
            "marchid",
            "mimpid",
            "zicboz_block_size",
            "satp_mode",
            "zicbop_block_size",
        ],
        (Kind::Core, 0) => &[
            "pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3",
            "a4", "a5", "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11",
            "t3", "t4", "t5", "t6", "mode",
        ],
        (Kind::Csr, 0) => &[
            "sstatus",
            "sie",
            "stvec",
            "sscratch",
            "sepc",
            "scause",
            "stval",
            "sip",
            "satp",
            "scounteren",
            "senvcfg",
        ],
        (Kind::Csr, SUBTYPE_AIA) => &[
            "siselect", "iprio1", "iprio2", "sieh", "siph", "iprio1h", "iprio2h",
        ],
        (Kind::Csr, SUBTYPE_SMSTATEEN) => &["sstateen0"],
        (Kind::Timer, 0) => &["frequency", "time", "compare", "state"],
        (Kind::Vector, 0) => &["vstart", "vl", "vtype", "vcsr", "vlenb"],
        _ => &[],
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind() {
            Kind::Config => "configuration",
            Kind::Core => "core",
            Kind::Csr => "CSR",
            Kind::Timer => "timer",
            Kind::FpF => "FP_F",
            Kind::FpD => "FP_D",
            Kind::Isa => "ISA extension",
            Kind::Sbi => "SBI extension",
            Kind::Vector => "vector",
            Kind::SbiState => "SBI state",
        };
        let (subtype, place) = (self.subtype(), self.place());
        if let Some(extension) = self.extension() {
            return write!(f, "{kind} {extension}");
        }
        match named(self.kind(), subtype).get(usize::from(place)) {
            Some(name) => write!(f, "{kind} {name}"),
            None if subtype == 0 => write!(f, "{kind} {place}"),
            None => write!(f, "{kind} {subtype}.{place}"),
        }
    }
}

impl fmt::Debug for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} ({:#x})", self.0)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A register of any size and subtype.
    pub(in super::super) fn register(kind: Kind, subtype: u8, place: u16, bytes: u64) -> Register {
        let id = Register::word(kind, place).id() & !(0xf << SIZE_SHIFT)
            | u64::from(bytes.trailing_zeros()) << SIZE_SHIFT
            | u64::from(subtype) << SUBTYPE_SHIFT;
        Register::parse(id).unwrap()
    }

    #[test]
    fn numbers_are_the_kernels() {
        // As a kernel lists them.
        for (id, name, bytes) in [
            (0x8030_0000_0100_0006, "configuration satp_mode", 8),
            (0x8030_0000_0200_0000, "core pc", 8),
            (0x8030_0000_0300_0002, "CSR stvec", 8),
            (0x8030_0000_0301_0000, "CSR siselect", 8),
            (0x8030_0000_0302_0000, "CSR sstateen0", 8),
            (0x8030_0000_0400_0001, "timer time", 8),
            (0x8020_0000_0500_0020, "FP_F 32", 4),
            (0x8030_0000_0600_001f, "FP_D 31", 8),
            (0x8030_0000_0700_000f, "ISA extension v", 8),
            (0x8030_0000_0800_0009, "SBI extension dbcn", 8),
            (0x8030_0000_0900_0004, "vector vlenb", 8),
            (0x8040_0000_0900_0006, "vector 6", 16),
            (0x8030_0000_0a00_0000, "SBI state 0", 8),
        ] {
            let register = Register::parse(id).unwrap();
            assert_eq!(register.to_string(), name);
            assert_eq!((register.bytes(), register.id()), (bytes, id));
        }
        assert_eq!(Register::SATP_MODE.id(), 0x8030_0000_0100_0006);
    }

    #[test]
    fn a_number_with_an_unknown_part_is_none() {
        for id in [
            0,
            0x2030_0000_0100_0000, // x86
            0x8000_0000_0100_0000, // 1 byte
            0x8090_0000_0100_0000, // 512 bytes
            0x8030_0000_0b00_0000, // a kind to come
            0x8030_0001_0100_0000, // a bit between
            0x8030_0000_0701_0000, // 64 extensions in one
            0x8040_0000_0800_0000, // an extension of 16 bytes
        ] {
            assert_eq!(Register::parse(id), None, "{id:#x}");
        }
    }

    #[test]
    fn what_a_vcpu_is_comes_first_and_its_timer_last() {
        let ordered = [
            Register::word(Kind::Config, 0),
            Register::SATP_MODE,
            Register::word(Kind::Isa, 15),
            Register::SBI_DBCN,
            Register::PC,
            Register::STVEC,
            register(Kind::Csr, SUBTYPE_AIA, 0, 8),
            register(Kind::FpF, 0, 0, 4),
            register(Kind::FpF, 0, 32, 4),
            register(Kind::FpD, 0, 0, 8),
            register(Kind::FpD, 0, 32, 4),
            Register::VLENB,
            register(Kind::Vector, 0, 6, 32),
            register(Kind::SbiState, 0, 0, 8),
            Register::TIMER_FREQUENCY,
            Register::word(Kind::Timer, 1),
            Register::word(Kind::Timer, 3),
        ];
        let mut sorted = ordered;
        sorted.reverse();
        sorted.sort_unstable();
        assert_eq!(sorted, ordered);
    }
}
