//! Who is inside the MMU: readers, faults, and the one who excludes them.
//!
//! | file | what |
//! |---|---|
//! | `cell` | one participant's mark, and its counters |
//! | `participants` | all participants; grace periods |
//! | `lock` | the MMU lock: shared by faults, exclusive for zaps |
//! | `buffer` | a value in two copies, changed while others read it |
//!
//! # Protocol
//!
//! A participant (a vCPU, or a thread that carries out an operation) owns a [`Cell`](cell::Cell) of
//! its own on cache lines of its own. It *announces* itself there: one store and one full barrier,
//! nothing that another participant writes. The mark says
//!
//! - *pinned*: looks at tables and slots (an RCU read section), or
//! - *shared*: the same, and holds the MMU lock shared.
//!
//! and carries the *era* in which it was made. Who waits looks at all cells:
//!
//! - the exclusive locker, until none is *shared*;
//! - a grace period, until none is of the era in which it began, or older. Then nobody sees what
//!   was unlinked before it began.
//!
//! # Why it is enough
//!
//! 1. *Dekker*: a participant announces, then (full barrier) looks at the lock, at tables, at the
//!    era. The waiter changes one of these, then (full barrier) looks at the cells. Either the
//!    waiter sees the mark or the participant the change.
//! 2. *Eras*: who unlinks a table moves the era on afterwards. A participant whose mark carries the
//!    new era read it, so it also sees the unlinking; one with an older era is waited for.
//!
//! # Nesting
//!
//! A participant goes inside once at a time: its mark is one, and the end of an inner section would
//! take back the outer one's. Debug builds assert it. Whoever waits for a grace period, or takes
//! the MMU lock exclusive, is not inside itself. The order of locks is in `locks`.

pub(crate) mod buffer;
pub(crate) mod cell;
pub(crate) mod lock;
pub(crate) mod participants;
