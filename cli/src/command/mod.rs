//! The commands, one file each. What several of them share is in [`target`] (which VM), [`several`]
//! (one thing after the other), [`patience`] (with a silent server) [`follow`] (a
//! migration) and [`saves`] (which save, and one followed).

pub(crate) mod agent;
pub(crate) mod cancel;
pub(crate) mod completion;
pub(crate) mod cordon;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod fence;
pub(crate) mod follow;
pub(crate) mod fork;
pub(crate) mod get;
pub(crate) mod leftover;
pub(crate) mod life;
pub(crate) mod man;
pub(crate) mod memory;
pub(crate) mod migrate;
pub(crate) mod pager;
pub(crate) mod patience;
pub(crate) mod pki;
mod populated;
pub(crate) mod restore;
pub(crate) mod retry;
pub(crate) mod save;
pub(crate) mod save_writer;
mod saves;
pub(crate) mod server;
pub(crate) mod several;
pub(crate) mod target;
pub(crate) mod up;
pub(crate) mod verify;
pub(crate) mod version;
pub(crate) mod vm;
