//! Grants that were used here, in `grants-used.json`, until they end: one that is shown again is
//! good for the side that it was used for, while nobody has released that.
//!
//! A side that was released is over: no grant that was signed before can begin it again, whether it
//! was used or not, and whether another one was. The last releases are remembered one by one. What
//! was signed before one that is forgotten is for a side of which nobody knows any more whether it
//! is over, and is refused: the server signs anew when it asks again.
//!
//! Decisions are about a side that has begun, and last minutes: they are taken whatever is kept.
//! Pure, but for the file's form.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use slat_trust::grant::{Grant, Purpose};

use super::file;
use crate::side::{Role, SideKey};

/// Grants that are kept at most, and releases.
pub(super) const MOST: usize = 10_000;
/// The longest life of a grant for a side: 30 days.
pub(super) const LONGEST_MS: u64 = 30 * 24 * 3600 * 1000;
/// A grant for a side lasts longer than this; a decision does not.
const DECISION_MS: u64 = 5 * 60 * 1000;

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
    /// The last release that is not remembered any more.
    forgotten_ms: u64,
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
        let over = self.over.get(&side);
        if over.is_some_and(|over| grant.issued_ms < over.at_ms) {
            return Err(Refused::Used);
        }
        match self.grants.get(&grant.id) {
            Some(used) if used.side == side => return Ok(false),
            Some(_) => return Err(Refused::Used),
            None => {}
        }
        let decides = matches!(grant.purpose, Purpose::Commit | Purpose::Abort);
        if !decides && grant.issued_ms < self.forgotten_ms {
            return Err(Refused::Used);
        }
        if self.grants.len() >= MOST {
            // A side that is in doubt must hear what was decided. It has its own journal, and the
            // grant is good for no other.
            return if decides {
                Ok(false)
            } else {
                Err(Refused::TooMany)
            };
        }
        let used = Use {
            side,
            issued_ms: grant.issued_ms,
            not_after_ms: grant.not_after_ms,
        };
        self.grants.insert(grant.id, used);
        Ok(true)
    }

    /// A side was released: to be kept.
    pub(super) fn release(&mut self, side: &SideKey, now_ms: u64) {
        self.prune(now_ms);
        let side = of(side);
        let own = self.grants.values().filter(|used| used.side == side);
        // Others for it may be about that were never used: signed before now, for as long. Where
        // none was used, or none is known any more, for as long as any; where it was released
        // before, as then.
        let lasts = own.map(|used| used.not_after_ms.saturating_sub(used.issued_ms));
        let lasts = lasts.filter(|lasts| *lasts > DECISION_MS).max();
        let before = self.over.get(&side);
        let before = before.map(|over| over.until_ms.saturating_sub(over.at_ms));
        let lasts = lasts.max(before).unwrap_or(LONGEST_MS);
        self.grants.retain(|_, used| used.side != side);
        let over = Over {
            at_ms: now_ms,
            until_ms: now_ms.saturating_add(lasts),
        };
        self.over.insert(side, over);
        while self.over.len() > MOST {
            let oldest = self.over.iter().min_by_key(|(_, over)| over.at_ms);
            let Some((side, over)) = oldest.map(|(side, over)| (side.clone(), *over)) else {
                return;
            };
            self.over.remove(&side);
            self.forgotten_ms = self.forgotten_ms.max(over.at_ms);
        }
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
        json!({ "grants": grants, "released": over, "forgotten_ms": self.forgotten_ms })
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
        // An older version forgot none.
        used.forgotten_ms = number(value, "forgotten_ms").unwrap_or_default();
        Some(used)
    }
}
