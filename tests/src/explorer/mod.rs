//! The handover, explored: both sides, the server, both hosts' disks and all that lies between
//! them.
//!
//! The machines that decide are the ones that run in production. `world` is the state, `source`,
//! `destination` and `server` are what drivers and agents do with the machines' actions, `step` is
//! what can happen next, `property` what must hold, `explore` the search, `scenario` what is
//! explored and `planted` the faults that it must find. `replay` explains journals of real runs by
//! the machines.

pub mod destination;
pub mod explore;
pub mod planted;
pub mod property;
pub mod replay;
pub mod scenario;
pub mod server;
pub mod source;
pub mod step;
pub mod world;
