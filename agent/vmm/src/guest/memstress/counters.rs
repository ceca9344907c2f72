//! Sums up the control pages.

use slat_proto::v1;

use super::control::{MAGIC, NONE, VERSION, control_page, offset};
use crate::memory::SlotTable;

/// What memstress counted, summed over `vcpus`; `None` when a control page is missing or not
/// memstress'. May be called while vCPUs run: counters are then those of a moment within the last
/// batch of each.
#[must_use]
pub(crate) fn counters(memory: &SlotTable, vcpus: u32) -> Option<v1::GuestCounters> {
    let mut sum = v1::GuestCounters::default();
    let mut visits = 0u64;
    let mut first_error = NONE;
    for vcpu in 0..vcpus {
        let word = |at: u64| memory.load(control_page(vcpu) + at);
        if word(offset::MAGIC)? != MAGIC || word(offset::VERSION)? != VERSION {
            return None;
        }
        visits = visits.wrapping_add(word(offset::VISITS)?);
        sum.pages_written = sum.pages_written.wrapping_add(word(offset::PAGES_WRITTEN)?);
        sum.errors = sum.errors.saturating_add(word(offset::ERRORS)?);
        sum.pages = word(offset::WORKING_PAGES)?;
        first_error = first_error.min(word(offset::FIRST_ERROR_PAGE)?);
    }
    if first_error != NONE {
        sum.first_error_page = first_error;
    }
    sum.passes = visits.checked_div(sum.pages)?;
    Some(sum)
}
