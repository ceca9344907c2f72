//! A worker: reads a run of pages, and writes those that have to be in the file.
//!
//! A page that is as in the base is not written, and neither is one of zeroes. What was read is
//! said to be taken before it is compressed and written: if the file fails nobody needs it, and the
//! sooner it is said the less the VM's pager has to keep.

use std::{ops::Range, sync::atomic::Ordering::Relaxed};

use slat_image::{Mark, Page};

use super::{job::failed, work::Work};
use crate::{
    error::Trouble,
    page_file::is_zero,
    source::{Contents, FileLayer, Source as _},
};

/// A worker's thread.
pub(super) fn write(work: &Work) {
    let mut buffers = Buffers::default();
    let base = work
        .base
        .as_ref()
        .map(|base| FileLayer::of("the base".to_owned(), base));
    if work.is_empty() {
        return work.finish();
    }
    while let Some((memory, pages)) = work.take() {
        let count = pages.end - pages.start;
        let result = write_run(work, base.as_ref(), memory, pages, &mut buffers);
        if work.over(count, result) {
            work.finish();
        }
    }
}

#[derive(Default)]
struct Buffers {
    new: Contents,
    old: Contents,
}

fn write_run(
    work: &Work,
    base: Option<&FileLayer>,
    memory: u32,
    pages: Range<u64>,
    buffers: &mut Buffers,
) -> Result<(), Trouble> {
    let writer = work.writer()?;
    let Buffers { new, old } = buffers;
    new.clear();
    work.chain.read(memory, pages.clone(), new)?;
    work.chain.taken(memory, pages.clone());
    let mut now = table(new, &pages);
    let empty = now.iter().filter(|page| page.is_none()).count() as u64;
    work.empty.fetch_add(empty, Relaxed);
    let marked = |page: u64, count, mark| {
        let result = writer.mark(memory, page, count, mark);
        result.map_err(|error| failed(&work.name, &error))
    };
    match base.filter(|base| base.pages(memory) > 0) {
        None => {
            // In a file that stands alone, or a memory that the base lacks.
            for (page, at) in pages.clone().zip(&now) {
                if at.is_none() {
                    marked(page, 1, Mark::Hole)?;
                }
            }
        }
        Some(base) => {
            old.clear();
            let known = pages.start..pages.end.min(base.pages(memory)).max(pages.start);
            base.read(memory, known.clone(), old)?;
            let before = table(old, &known);
            for (at, page) in (0..).zip(pages.clone()) {
                let mark = match (now[at], before.get(at)) {
                    (None, None) => Mark::Hole,
                    (Some(_), None) => continue,
                    (None, Some(Some(_))) => Mark::Zero,
                    (None, Some(None)) => Mark::Base,
                    (Some(new), Some(old)) if Some(new) == *old => Mark::Base,
                    (Some(_), Some(_)) => continue,
                };
                now[at] = None;
                marked(page, 1, mark)?;
            }
        }
    }
    let written = writer.write_some(memory, pages.start, &now);
    written.map_err(|error| failed(&work.name, &error))
}

/// By page, its contents; `None`: zeroes.
fn table<'a>(contents: &'a Contents, pages: &Range<u64>) -> Vec<Option<&'a Page>> {
    let mut table = vec![None; (pages.end - pages.start) as usize];
    for (first, _, bytes) in contents.runs() {
        let (found, _) = bytes.unwrap_or_default().as_chunks();
        for (page, at) in found.iter().zip((first - pages.start) as usize..) {
            if let Some(slot) = table.get_mut(at) {
                *slot = (!is_zero(page)).then_some(page);
            }
        }
    }
    table
}
