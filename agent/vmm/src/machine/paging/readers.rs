//! Named readers of the working set ([`Readers`] says what each is told).
//!
//! *Locking*: `readers` of the machine is a leaf, and never held while a pager is asked.

use std::sync::{MutexGuard, PoisonError};

use slat_proto::{ApiError, model::CursorName};

use super::super::Machine;
use crate::pager::Readers;

impl Machine {
    fn readers(&self) -> MutexGuard<'_, Readers> {
        // Each change leaves it whole.
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no VM any more, and nothing to be told of it.
    pub(in crate::machine) fn end_readers(&self) {
        *self.readers() = Readers::default();
    }

    /// Puts down for every reader what a harvest found.
    pub(super) fn tell_readers(&self, runs: &[(u64, u64)]) {
        self.readers().found(runs);
    }

    /// As [`Machine::harvest_working_set`], for a reader: all that any harvest found since its last
    /// look, and whether the reader was made by this call. `end`: it ends with the answer.
    ///
    /// # Errors
    /// As there; LIMIT_REACHED for a reader too many. What was found is still to be told then.
    pub(crate) fn harvest_for_reader(
        &self,
        reader: &CursorName,
        range: Option<(u64, u64)>,
        end: bool,
    ) -> Result<(Vec<(u64, u64)>, bool), ApiError> {
        self.check_paged_now()?;
        let ranges = self.pieces(range)?;
        let created = self.readers().begin(reader)?;
        if let Err(error) = self.harvest_working_set(range) {
            if created {
                // Nobody heard of it.
                self.readers().take(reader, &[], true);
            }
            return Err(error);
        }
        Ok((self.readers().take(reader, &ranges, end), created))
    }
}
