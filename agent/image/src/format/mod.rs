//! The bytes of an image. This is the reference; all numbers are little-endian.
//!
//! ```text
//! header | clusters | sections' contents | index blocks | table | footer
//! ```
//!
//! Each part begins where the one before ends. Clusters stand in the order in which they were
//! written; all after them is written last, when everything is known. A file without a right footer
//! is not whole, whatever else is in it.
//!
//! # Header, 4096 bytes
//! Of this length so that clusters which are not compressed are aligned to pages.
//!
//! | at | what |
//! |---|---|
//! | 0 | magic: `SLATVM\r\n` |
//! | 8 | u32: version of the format, 1. Magic and version stay where they are in all versions |
//! | 12 | u32: bytes of a page, 4096 |
//! | 16 | u32: pages of a group, 16 |
//! | 20 | u32: 1 when there is a base |
//! | 24 | the image's id, 16 bytes |
//! | 40 | the base's id, 16 bytes; zeroes without |
//! | 56 | u64: checksum of the base's table; 0 without |
//! | 64 | u32: how many features the reader must have, at most 16 |
//! | 68 | zeroes |
//! | 128 | their names, 32 bytes each, filled up with zeroes |
//! | 640 | zeroes |
//! | 4088 | u64: checksum of all before it |
//!
//! A program reads the newest version that it knows and the one before it ([`KNOWN`]), and writes
//! the newest. What a reader may not pass over without a new version is a *feature*: `base` (pages
//! of the kind 3), `zstd` (clusters of the codec 1).
//!
//! # Clusters
//! A *group* is 16 pages of a memory, the first of which has a number that 16 divides. A cluster
//! has the contents of pages of one group, in order, without gaps, as codec 0 says; codec 1 is one
//! zstd frame of that, which is shorter. Pages that were written at once are in one cluster, so a
//! group has one most of the time, and at most 16.
//!
//! Sixteen pages, 64 KiB, because of who restores a VM that runs: one page at random costs reading
//! and decompressing 64 KiB at most, and brings its neighbours, which need no fault of their own
//! then. Of 19.1 MB of programs and text zstd at level 1 made 8.3 MB by 4 KiB, 7.6 by 16, 7.5 by
//! 64, 7.2 by 256, and it decompressed 64 KiB at once twice as fast as 4. Sixteen pages fit a mask
//! of two bytes, and a whole cluster's row is 0.04 % of it.
//!
//! # Index blocks
//! One for each 64 groups (1024 pages, 4 MiB) of a memory, the last for less, by memory in the
//! table's order. A block whose pages are all of one kind but 2 has no bytes.
//!
//! | at | what |
//! |---|---|
//! | 0 | 256 bytes: two bits a page, the first page in the lowest bits of the first byte |
//! | 256 | a row of 24 bytes for each cluster, by group, then by the first page |
//!
//! The kinds: 0 never touched, 1 zeroes, 2 in a cluster here, 3 as in the base. Pages beyond the
//! memory's end have 0. A row:
//!
//! | at | what |
//! |---|---|
//! | 0 | u64: where the cluster is in the file |
//! | 8 | u64: its checksum |
//! | 16 | u32: its length in bytes, 1 to 65536 |
//! | 20 | u16: which pages of the group it has, the first in the lowest bit |
//! | 22 | u8: the group's number within the block, 0 to 63 |
//! | 23 | u8: codec: 0 none, 1 zstd |
//!
//! Each page of kind 2 is in exactly one row, and no other page is in any.
//!
//! # Table
//! u32: how many memories, at most 32,768. u32: how many sections, at most 64. Then for each
//! memory, by ascending number: u32 its number, u32 zero, u64 its pages. All memories together have
//! at most 2^32 pages. For each section, 64 bytes: its name, 32 bytes filled up with zeroes; u32
//! version; u32 flags (1: optional); u64 length in bytes; u64 checksum; u64 zero. For each index
//! block, 16 bytes: u32 length in bytes; u32 the kind of all its pages when that is 0; u64
//! checksum, 0 without bytes.
//!
//! What is in a section is its writer's and its reader's; that of the name `working-set` is read
//! here, too, and means what `working_set` says.
//!
//! # Footer, 88 bytes
//!
//! | at | what |
//! |---|---|
//! | 0 | magic: `SLATEND\n` |
//! | 8 | the image's id |
//! | 24 | u64: length of the file in bytes, the footer included |
//! | 32 | u64: where the clusters end |
//! | 40 | u64: where the table begins |
//! | 48 | u64: checksum of the table |
//! | 56 | u64: the header's checksum |
//! | 64 | u64: pages of kind 2 |
//! | 72 | u64: clusters |
//! | 80 | u64: checksum of all before it |
//!
//! # Checksums
//! xxh3-64, with a seed that is xxh3-64 of what is summed and where it belongs ([`sum`]). So a
//! cluster or a block of another place, or of another image, is not taken for the right one. The
//! table has the checksums of blocks and sections, and blocks those of clusters: the table's is the
//! checksum of the whole index, and of all contents through it. Opening a file reads header, table
//! and footer; a block is checked when it is read. The sums find damage and mistakes. They are no
//! signature: a file of an enemy can have right ones, and everything is bounded all the same.

use crate::names::{CLUSTER_PAGES, PAGE_SIZE};

pub(crate) mod block;
pub(crate) mod bytes;
pub(crate) mod footer;
pub(crate) mod header;
pub(crate) mod sum;
pub(crate) mod table;

/// Versions of the format that are read here: the newest and, once there is one, the one before.
pub(crate) const KNOWN: (u32, u32) = (1, 1);
/// Bytes of a cluster at most, and of all of a group's pages.
pub(crate) const GROUP_BYTES: usize = CLUSTER_PAGES * PAGE_SIZE;
/// Groups of an index block.
pub(crate) const BLOCK_GROUPS: u64 = 64;
/// Pages of an index block.
pub(crate) const BLOCK_PAGES: u64 = BLOCK_GROUPS * CLUSTER_PAGES as u64;
/// Pages of all memories.
pub(crate) const MAX_PAGES: u64 = 1 << 32;
/// Memories.
pub(crate) const MAX_MEMORIES: u64 = 32768;
/// Sections.
pub(crate) const MAX_SECTIONS: u64 = 64;
/// Bytes of a section.
pub(crate) const MAX_SECTION: u64 = 16 << 20;
/// Bytes of all sections.
pub(crate) const MAX_SECTIONS_BYTES: u64 = 64 << 20;
/// Bytes of a name, of a feature or a section.
pub(crate) const NAME: usize = 32;

/// How many index blocks a memory has.
pub(crate) fn blocks_of(pages: u64) -> u64 {
    pages.div_ceil(BLOCK_PAGES)
}
