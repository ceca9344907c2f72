//! Migrations: who may be moved, and the moving.
//!
//! From the bottom:
//! * [`protocol`] decides, without I/O. Its documentation has the rules.
//! * `record` is what is stored and shown of one migration, `errors` what a user reads, `subject`
//!   what does not change.
//! * `calls` and `follower` carry actions out, `tasks` owns what is under way, `waiting` waits for
//!   earlier migrations, `waits` says what is waited for.
//! * `key` says which VM a migration is of: by uid, where one is known.
//! * `replies` holds answers that users wait for.
//! * `reconciler` drives one migration: one task each, repaired by running again.
//! * `orphans` ends sides that were made too late.
//! * `retention` forgets those that ended long ago.
//! * `admission` says whether a migration may begin, `updates` is a watch.
//! * `migrations` accepts, finds, cancels and watches them, and owns the reconcilers; `active` is
//!   what it knows of one with work left.
//! * `copies` knows the frozen copies that ended ones keep.

mod active;
mod admission;
mod calls;
mod copies;
mod errors;
mod follower;
mod key;
mod leave;
mod migrations;
mod orphans;
mod pairs;
pub mod protocol;
mod reconciler;
mod record;
mod replies;
mod retention;
mod subject;
mod tasks;
mod updates;
mod waiting;
mod waits;

pub use self::retention::Retention;
pub(crate) use self::{admission::NewMigration, errors::no_such_migration, migrations::Migrations};
