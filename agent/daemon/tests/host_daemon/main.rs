//! The host agent against VM processes without VMs ([`fake`]): real processes, sockets, locks and
//! journals.

mod backends;
mod beside;
mod copies;
mod disk;
mod fake;
mod grants;
mod identity;
mod leftovers;
mod life;
mod reports;
mod rig;
mod sides;
mod silent;
