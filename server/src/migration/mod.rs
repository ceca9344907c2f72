//! Migrations: who may be moved, and the moving.
//!
//! * [`machine`] decides, without I/O. Its documentation has the rules.
//! * [`record`] is what is stored and shown of one migration.
//! * [`reconciler`] carries one migration out: one task each, repaired by running again.
//! * [`follower`] asks one half how it is, again and again.
//! * [`registry`] accepts, finds, cancels and watches migrations, and owns the tasks.

mod follower;
mod machine;
pub mod protocol;
mod reconciler;
mod record;
mod registry;

pub(crate) use self::{
    machine::is_terminal,
    registry::{Migrations, NewMigration},
};
