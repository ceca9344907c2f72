//! The commands, one file each. What several of them share is in [`follow`].

pub(crate) mod agent;
pub(crate) mod cancel;
pub(crate) mod completion;
pub(crate) mod create;
pub(crate) mod follow;
pub(crate) mod get;
pub(crate) mod life;
pub(crate) mod memory;
pub(crate) mod migrate;
pub(crate) mod server;
pub(crate) mod version;
pub(crate) mod vm;
