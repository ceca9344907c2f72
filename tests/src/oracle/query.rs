//! A question to hardware and what it should answer.
//!
//! # The block of queries
//! Little-endian words at the layout's address for queries, read by the bare-metal programs:
//!
//! | offset | what |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 8 | number of queries |
//! | 16 | the root's register |
//! | 24 | flags of the machine: on RISC-V, bits to set in `menvcfg`; on x86, 1 for five levels |
//! | 32 | two windows to fill: start, end each |
//! | 128 | the queries, 16 bytes each: guest physical address; 0 read, 1 write, 2 fetch |

use std::fmt;

use slat_mmu::{Access, Gfn};

use super::layout::Layout;

/// First word of a block of queries.
pub const MAGIC: u64 = u64::from_le_bytes(*b"slatqry1");
const HEADER: usize = 128;
/// The most queries that fit between queries and results in the layout.
pub const MAX_QUERIES: usize = 16384;

/// What software says of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It reaches this host physical address.
    Leads(u64),
    /// Nothing is mapped.
    NotPresent,
    /// The mapping does not allow it.
    Permission,
    /// The mapping allows it, but A or D is clear and hardware that does not set them faults.
    AccessedDirty,
    /// An entry that hardware does not accept.
    Malformed,
    /// An entry that is made so that hardware reports an access to a device.
    Mmio,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leads(hpa) => write!(f, "leads to {hpa:#x}"),
            Self::NotPresent => f.write_str("faults: not present"),
            Self::Permission => f.write_str("faults: not allowed"),
            Self::AccessedDirty => f.write_str("faults: A or D is clear"),
            Self::Malformed => f.write_str("faults: malformed"),
            Self::Mmio => f.write_str("faults: MMIO"),
        }
    }
}

/// One question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Guest physical address, a multiple of 8.
    pub gpa: u64,
    /// What is tried.
    pub access: Access,
    /// Why it is asked, for the counts.
    pub kind: &'static str,
    /// What the answer should be; the address is that of the byte asked about.
    pub expected: Expected,
}

impl Query {
    /// The frame asked about.
    pub fn gfn(&self) -> Gfn {
        Gfn::from_gpa(self.gpa)
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} at gpa {:#x} ({})",
            self.access, self.gpa, self.kind
        )
    }
}

/// The block of queries as the program reads it.
pub fn encode(layout: Layout, root: u64, flags: u64, queries: &[Query]) -> Vec<u8> {
    let mut words = vec![MAGIC, queries.len() as u64, root, flags];
    words.extend(
        layout
            .windows()
            .iter()
            .flat_map(|(start, end)| [*start, *end]),
    );
    words.resize(HEADER / 8, 0);
    for query in queries {
        let access = match query.access {
            Access::Read => 0,
            Access::Write => 1,
            Access::Execute => 2,
        };
        words.extend([query.gpa, access]);
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_as_the_programs_read_it() {
        let layout = Layout { base: 0x8000_0000 };
        let query = |gpa, access| Query {
            gpa,
            access,
            kind: "test",
            expected: Expected::NotPresent,
        };
        let queries = [
            query(0x1008, Access::Write),
            query(1 << 58, Access::Execute),
        ];
        let bytes = encode(layout, 0xa000_0000_0008_1000, 1 << 61, &queries);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(&bytes[..8], b"slatqry1");
        assert_eq!(
            (word(8), word(16), word(24)),
            (2, 0xa000_0000_0008_1000, 1 << 61)
        );
        assert_eq!((word(32), word(40)), layout.windows()[0]);
        assert_eq!((word(48), word(56)), layout.windows()[1]);
        assert_eq!((word(128), word(136)), (0x1008, 1));
        assert_eq!((word(144), word(152)), (1 << 58, 2));
        assert_eq!(bytes.len(), 160);
    }

    #[test]
    fn the_most_queries_end_before_the_results_begin() {
        let layout = Layout { base: 0 };
        assert!(layout.queries() + (HEADER + MAX_QUERIES * 16) as u64 <= layout.results());
    }
}
