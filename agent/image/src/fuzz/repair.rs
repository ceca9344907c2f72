//! Sets the checksums of a damaged image right, from the inside outwards, and with them what would
//! be refused at once: the footer's magic, id and length. What cannot be found is left as it is.

use crate::{
    format::{
        BLOCK_PAGES,
        block::KINDS,
        blocks_of,
        footer::FOOTER,
        header::HEADER,
        sum::{Part, of_header, sum},
    },
    names::ImageId,
};

fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let mut number = [0; 8];
    number[..width].copy_from_slice(bytes.get(at..at.checked_add(width)?)?);
    Some(u64::from_le_bytes(number))
}

fn put(bytes: &mut [u8], at: usize, number: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

/// Of bytes that are there, the checksum.
fn sum_of(bytes: &[u8], id: ImageId, part: Part, from: u64, length: u64) -> Option<u64> {
    let from = usize::try_from(from).ok()?;
    let end = from.checked_add(usize::try_from(length).ok()?)?;
    Some(sum(id, part, bytes.get(from..end)?))
}

/// See the module.
pub(super) fn repair(bytes: &mut [u8]) {
    let Some(end) = bytes.len().checked_sub(FOOTER).filter(|end| *end >= HEADER) else {
        return;
    };
    let header_sum = of_header(&bytes[..HEADER - 8]);
    put(bytes, HEADER - 8, header_sum);
    let id = ImageId(std::array::from_fn(|at| bytes[24 + at]));
    bytes[end..end + 8].copy_from_slice(b"SLATEND\n");
    bytes[end + 8..end + 24].copy_from_slice(&id.0);
    let length = bytes.len() as u64;
    put(bytes, end + 24, length);
    put(bytes, end + 56, header_sum);
    let table = number(bytes, end + 40, 8).unwrap_or(0);
    if let Ok(at) = usize::try_from(table)
        && at <= end
    {
        let data_end = number(bytes, end + 32, 8).unwrap_or(0);
        // Its end is only that the table ends.
        let _ = repair_table(bytes, id, at, data_end);
        let table_sum = sum(id, Part::Table, &bytes[at..end]);
        put(bytes, end + 48, table_sum);
    }
    let footer_sum = sum(id, Part::Footer, &bytes[end..end + FOOTER - 8]);
    put(bytes, end + 80, footer_sum);
}

fn repair_table(bytes: &mut [u8], id: ImageId, table: usize, mut place: u64) -> Option<()> {
    let memories = number(bytes, table, 4)? as usize;
    let sections = number(bytes, table + 4, 4)? as usize;
    let first_section = table + 8 + memories.checked_mul(16)?;
    let mut at = first_section;
    for index in 0..sections {
        let length = number(bytes, at.checked_add(40)?, 8)?;
        if let Some(sum) = sum_of(bytes, id, Part::Section { index }, place, length) {
            put(bytes, at + 48, sum);
        }
        place = place.checked_add(length)?;
        at += 64;
    }
    for entry in 0..memories {
        let memory = number(bytes, table + 8 + entry * 16, 4)? as u32;
        let pages = number(bytes, table + 16 + entry * 16, 8)?;
        for block in 0..blocks_of(pages) {
            let length = number(bytes, at, 4)?;
            if length > 0 {
                repair_rows(bytes, id, (memory, block), place, length);
                let part = Part::Block { memory, block };
                if let Some(sum) = sum_of(bytes, id, part, place, length) {
                    put(bytes, at + 8, sum);
                }
            }
            place = place.checked_add(length)?;
            at += 16;
        }
    }
    Some(())
}

fn repair_rows(
    bytes: &mut [u8],
    id: ImageId,
    (memory, block): (u32, u64),
    place: u64,
    length: u64,
) -> Option<()> {
    let mut at = usize::try_from(place).ok()?.checked_add(KINDS)?;
    let end = usize::try_from(place.checked_add(length)?).ok()?;
    while at.checked_add(24)? <= end {
        let group = number(bytes, at + 22, 1)?;
        let part = Part::Cluster {
            memory,
            first: block.wrapping_mul(BLOCK_PAGES).wrapping_add(group * 16),
            mask: number(bytes, at + 20, 2)? as u16,
            codec: number(bytes, at + 23, 1)? as u8,
        };
        let from = number(bytes, at, 8)?;
        let stored = number(bytes, at + 16, 4)?;
        if let Some(sum) = sum_of(bytes, id, part, from, stored) {
            put(bytes, at + 8, sum);
        }
        at += 24;
    }
    Some(())
}
