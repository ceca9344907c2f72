//! A filter that loses a page, to show that it is noticed.

use super::sender::{EveryPage, PageFilter};

/// Leaves a page out: (slot, page, from iteration).
pub(super) fn page(omit: Option<(u32, u32, u32)>) -> Box<dyn PageFilter> {
    match omit {
        Some(omit) => Box::new(Omit(omit)),
        None => Box::new(EveryPage),
    }
}

#[derive(Debug)]
struct Omit((u32, u32, u32));

impl PageFilter for Omit {
    fn sends(&self, slot: u32, page: u32, iteration: u32) -> bool {
        let Self((of, which, from)) = *self;
        (slot, page) != (of, which) || iteration < from
    }
}
