//! Which pages go out: a port, so that a test can lose one and see that it is noticed.

use std::fmt;

/// Which pages of an iteration go out. Given from outside: whoever wants to see that a lost page is
/// found has one lost.
pub(crate) trait PageFilter: fmt::Debug + Send + Sync {
    /// Whether this page goes out in this iteration.
    fn sends(&self, slot: u32, page: u32, iteration: u32) -> bool;
}

/// Every page goes out.
#[derive(Debug)]
pub(crate) struct EveryPage;

impl PageFilter for EveryPage {
    fn sends(&self, _slot: u32, _page: u32, _iteration: u32) -> bool {
        true
    }
}
