//! Grants that were used here, in `grants-used.json`, until they end: one that is shown again is
//! good for the side that it was used for, while nobody has released that.
//!
//! A side that was released is over: no grant that was signed before can begin it again, whether it
//! was used or not. Pure, but for the file's form.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use slat_trust::grant::Grant;

use super::file;
use crate::side::{Role, SideKey};

/// Grants and sides that are kept at most.
pub(super) const MOST: usize = 10_000;

/// Why a grant cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// For another side, or for one that was released.
    Used,
    /// Too many are kept.
    TooMany,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Use {
    side: (String, bool),
    issued_ms: u64,
    not_after_ms: u64,
}

/// A side that was released, at that time, and until when a grant for it may be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Over {
    at_ms: u64,
    until_ms: u64,
}

/// See the module. A side is a migration's id and whether it is its source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    grants: BTreeMap<[u8; 16], Use>,
    over: BTreeMap<(String, bool), Over>,
}

fn of(side: &SideKey) -> (String, bool) {
    (side.migration.id().to_owned(), side.role == Role::Source)
}

impl Used {
    fn prune(&mut self, now_ms: u64) {
        self.grants.retain(|_, used| used.not_after_ms > now_ms);
        self.over.retain(|_, over| over.until_ms > now_ms);
    }

    /// Takes a grant for a side. True when that is new.
    ///
    /// # Errors
    /// See [`Refused`].
    pub(super) fn take(
        &mut self,
        grant: &Grant,
        side: &SideKey,
        now_ms: u64,
    ) -> Result<bool, Refused> {
        self.prune(now_ms);
        let side = of(side);
        if self
            .over
            .get(&side)
            .is_some_and(|over| grant.issued_ms < over.at_ms)
        {
            return Err(Refused::Used);
        }
        match self.grants.get(&grant.id) {
            Some(used) if used.side == side => return Ok(false),
            Some(_) => return Err(Refused::Used),
            None => {}
        }
        if self.grants.len() + self.over.len() >= MOST {
            return Err(Refused::TooMany);
        }
        let used = Use {
            side,
            issued_ms: grant.issued_ms,
            not_after_ms: grant.not_after_ms,
        };
        self.grants.insert(grant.id, used);
        Ok(true)
    }

    /// A side was released. True when a grant for it was used, so that this is to be kept.
    pub(super) fn release(&mut self, side: &SideKey, now_ms: u64) -> bool {
        self.prune(now_ms);
        let side = of(side);
        let own = self.grants.values().filter(|used| used.side == side);
        // Others for it may be about that were never used: signed before now, for as long.
        let lasts = own.map(|used| used.not_after_ms.saturating_sub(used.issued_ms));
        let Some(lasts) = lasts.max() else {
            return false;
        };
        self.grants.retain(|_, used| used.side != side);
        let over = Over {
            at_ms: now_ms,
            until_ms: now_ms.saturating_add(lasts),
        };
        self.over.insert(side, over);
        true
    }

    pub(super) fn to_json(&self) -> Value {
        let grants: Vec<Value> = self
            .grants
            .iter()
            .map(|(id, used)| {
                json!({
                    "id": file::hex(id),
                    "migration": used.side.0,
                    "source": used.side.1,
                    "issued_ms": used.issued_ms,
                    "not_after_ms": used.not_after_ms,
                })
            })
            .collect();
        let over: Vec<Value> = self
            .over
            .iter()
            .map(|((migration, source), over)| {
                json!({
                    "migration": migration,
                    "source": source,
                    "at_ms": over.at_ms,
                    "until_ms": over.until_ms,
                })
            })
            .collect();
        json!({ "grants": grants, "released": over })
    }

    /// `None` when it is not what [`Used::to_json`] gives.
    pub(super) fn from_json(value: &Value) -> Option<Self> {
        let mut used = Self::default();
        let side = |entry: &Value| {
            let migration = entry.get("migration")?.as_str()?.to_owned();
            Some((migration, entry.get("source")?.as_bool()?))
        };
        let number = |entry: &Value, field| entry.get(field)?.as_u64();
        for entry in value.get("grants")?.as_array()? {
            let one = Use {
                side: side(entry)?,
                issued_ms: number(entry, "issued_ms")?,
                not_after_ms: number(entry, "not_after_ms")?,
            };
            let id = file::unhex(entry.get("id")?.as_str()?)?;
            used.grants.insert(id, one);
        }
        for entry in value.get("released")?.as_array()? {
            let over = Over {
                at_ms: number(entry, "at_ms")?,
                until_ms: number(entry, "until_ms")?,
            };
            used.over.insert(side(entry)?, over);
        }
        Some(used)
    }
}
