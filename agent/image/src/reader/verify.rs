//! Reads everything in a chain and says what is wrong with it.

use std::ops::Range;

use super::{
    chain::{Chain, Found as Page},
    layer::Layer,
    order::Listed,
};
use crate::{
    codec::ClusterBuffer,
    error::ImageError,
    format::{
        BLOCK_PAGES,
        block::{Kind, mask_of},
        header::HEADER,
    },
    names::{CLUSTER_PAGES, ImageName, PageKind},
    storage::Storage,
};

/// What [`crate::Reader::verify`] read and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Clusters that are right, those of all bases counted.
    pub clusters: u64,
    /// Pages in them, likewise.
    pub data_pages: u64,
    /// Bytes of them as they are stored, likewise.
    pub stored_bytes: u64,
    /// Sections that are right, likewise.
    pub sections: u64,
    /// Pages of the image that have contents.
    pub data: u64,
    /// Pages of the image that are zeroes.
    pub zero: u64,
    /// Pages of the image that were never touched.
    pub hole: u64,
    /// What is wrong, as far as was asked for.
    pub faults: Vec<Fault>,
    /// How much more is wrong.
    pub more_faults: u64,
}

/// Something wrong in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// In this image: the opened one, or a base of it.
    pub image: ImageName,
    /// What is wrong.
    pub what: &'static str,
    /// Where in its file, in bytes.
    pub offset: u64,
    /// Pages that it concerns: memory, first page, how many; `None` for what is no page.
    pub pages: Option<(u32, u64, u64)>,
}

/// Keeps what was found.
struct Found {
    most: usize,
    verified: Verified,
}

impl Found {
    /// What an error says; that of the host is passed on.
    fn error(
        &mut self,
        image: ImageName,
        error: ImageError,
        pages: Option<(u32, u64, u64)>,
    ) -> Result<(), ImageError> {
        let (what, offset) = match error {
            ImageError::Corrupt { what, offset } => (what, offset),
            ImageError::Truncated { found, .. } => ("it became shorter", found),
            error => return Err(error),
        };
        self.add(Fault {
            image,
            what,
            offset,
            pages,
        });
        Ok(())
    }

    fn add(&mut self, fault: Fault) {
        if self.verified.faults.len() < self.most {
            self.verified.faults.push(fault);
        } else {
            self.verified.more_faults += 1;
        }
    }
}

/// See [`crate::Reader::verify`].
pub(super) fn verify<S: Storage>(chain: &Chain<S>, most: usize) -> Result<Verified, ImageError> {
    let mut found = Found {
        most,
        verified: Verified::default(),
    };
    for depth in 0..=chain.depth {
        file(chain.layer(depth), &mut found)?;
    }
    // A block that is wrong would be found again by each of its pages.
    let whole = found.verified.faults.is_empty() && found.verified.more_faults == 0;
    let table = &chain.youngest.table;
    for memory in &table.memories {
        let mut page = 0;
        while page < memory.spec.pages {
            let number = memory.first_block + (page / BLOCK_PAGES) as usize;
            let end = memory.spec.pages.min(page + BLOCK_PAGES);
            // Without bytes, and of the kind that the base does not decide, none is looked at.
            let alike = table.blocks.get(number).filter(|entry| entry.length == 0);
            match alike.map(|entry| entry.kind) {
                Some(Kind::Hole) => found.verified.hole += end - page,
                Some(Kind::Zero) => found.verified.zero += end - page,
                _ => pages(chain, memory.spec.number, page..end, whole, &mut found)?,
            }
            page = end;
        }
    }
    Ok(found.verified)
}

/// One file: sections, index blocks, clusters, and whether they are as many as it says.
fn file<S: Storage>(layer: &Layer<S>, found: &mut Found) -> Result<(), ImageError> {
    let image = layer.name();
    for index in 0..layer.table.sections.len() {
        match layer.section(index) {
            Ok(_) => found.verified.sections += 1,
            Err(error) => found.error(image, error, None)?,
        }
    }
    let (mut list, mut pages, mut whole) = (Vec::new(), 0, true);
    for number in 0..layer.table.blocks.len() {
        match layer.block(number) {
            Ok(None) => {}
            Ok(Some(block)) => {
                let kinds = block.kinds.iter();
                let data = kinds.map(|kinds| u64::from(mask_of(*kinds, Kind::Data).count_ones()));
                pages += data.sum::<u64>();
                Listed::list(number, &block.rows, &mut list);
            }
            Err(error) => {
                let place = layer.place_of(number).map(|(memory, first)| {
                    let count = (memory.spec.pages - first).min(BLOCK_PAGES);
                    (memory.spec.number, first, count)
                });
                found.error(image, error, place)?;
                whole = false;
            }
        }
    }
    let clusters = list.len() as u64;
    let said = (layer.footer.clusters, layer.footer.data_pages);
    if whole && said != (clusters, pages) {
        found.add(Fault {
            image,
            what: "the footer's counts",
            offset: layer.footer.table,
            pages: None,
        });
    }
    Listed::sort(&mut list);
    let mut buffer = ClusterBuffer::default();
    let mut end = HEADER as u64;
    for listed in list {
        let (memory, first, row) = match listed.find(layer) {
            Ok(Some(cluster)) => cluster,
            Ok(None) => continue,
            Err(error) => {
                found.error(image, error, None)?;
                continue;
            }
        };
        let pages = Some((memory, first, CLUSTER_PAGES as u64));
        if row.offset < end {
            found.add(Fault {
                image,
                what: "clusters overlap",
                offset: row.offset,
                pages,
            });
        }
        end = row.offset + u64::from(row.length);
        match layer.read_row(memory, first, &row, &mut buffer) {
            Ok(()) => {
                found.verified.clusters += 1;
                found.verified.data_pages += u64::from(row.mask.count_ones());
                found.verified.stored_bytes += u64::from(row.length);
            }
            Err(error) => found.error(image, error, pages)?,
        }
    }
    Ok(())
}

/// What pages are, all bases considered.
fn pages<S: Storage>(
    chain: &Chain<S>,
    memory: u32,
    pages: Range<u64>,
    whole: bool,
    found: &mut Found,
) -> Result<(), ImageError> {
    for page in pages {
        match chain.find(memory, page) {
            Ok(Page::In(_)) => found.verified.data += 1,
            Ok(Page::Without(PageKind::Zero)) => found.verified.zero += 1,
            Ok(Page::Without(_)) => found.verified.hole += 1,
            Err(error) if whole => {
                found.error(chain.youngest.name(), error, Some((memory, page, 1)))?
            }
            Err(error) if error.is_of_the_file() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
