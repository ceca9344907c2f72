//! Checksums, which know what they are of and where that belongs.
//!
//! The seed is xxh3-64 of 32 bytes: the image's id (16); the part as below (u8); the codec (u8);
//! the pages of the group (u16); the memory's number (u32); the place (u64).
//!
//! | part | 1 header | 2 footer | 3 table | 4 index block | 5 section | 6 cluster |
//! |---|---|---|---|---|---|---|
//! | place | 0 | 0 | 0 | its number in the memory | its number | the group's first page |
//!
//! The header's has an id of zeroes, since the header is what says the id.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::names::ImageId;

/// What is summed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Header,
    Footer,
    Table,
    Block {
        memory: u32,
        block: u64,
    },
    Section {
        index: usize,
    },
    Cluster {
        memory: u32,
        first: u64,
        mask: u16,
        codec: u8,
    },
}

/// The checksum of `bytes`, which are that part of the image `id`.
pub(crate) fn sum(id: ImageId, part: Part, bytes: &[u8]) -> u64 {
    let (number, codec, mask, memory, place) = match part {
        Part::Header => (1, 0, 0, 0, 0),
        Part::Footer => (2, 0, 0, 0, 0),
        Part::Table => (3, 0, 0, 0, 0),
        Part::Block { memory, block } => (4, 0, 0, memory, block),
        Part::Section { index } => (5, 0, 0, 0, index as u64),
        Part::Cluster {
            memory,
            first,
            mask,
            codec,
        } => (6, codec, mask, memory, first),
    };
    let mut seed = [0; 32];
    seed[..16].copy_from_slice(&id.0);
    seed[16] = number;
    seed[17] = codec;
    seed[18..20].copy_from_slice(&u16::to_le_bytes(mask));
    seed[20..24].copy_from_slice(&u32::to_le_bytes(memory));
    seed[24..].copy_from_slice(&u64::to_le_bytes(place));
    xxh3_64_with_seed(bytes, xxh3_64(&seed))
}

/// Of the header, which says the id.
pub(crate) fn of_header(bytes: &[u8]) -> u64 {
    sum(ImageId([0; 16]), Part::Header, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_have_another_sum_in_each_place() {
        let cluster = |memory, first, mask, codec| Part::Cluster {
            memory,
            first,
            mask,
            codec,
        };
        let parts = [
            Part::Header,
            Part::Footer,
            Part::Table,
            Part::Block {
                memory: 0,
                block: 0,
            },
            Part::Block {
                memory: 1,
                block: 0,
            },
            Part::Block {
                memory: 0,
                block: 1,
            },
            Part::Section { index: 0 },
            Part::Section { index: 1 },
            cluster(0, 0, 1, 0),
            cluster(1, 0, 1, 0),
            cluster(0, 16, 1, 0),
            cluster(0, 0, 2, 0),
            cluster(0, 0, 1, 1),
        ];
        let ids = [ImageId([0; 16]), ImageId([1; 16])];
        let sums = ids.map(|id| parts.map(|part| sum(id, part, b"the same")));
        let mut sums = sums.concat();
        sums.sort_unstable();
        sums.dedup();
        assert_eq!(sums.len(), ids.len() * parts.len());
    }
}
