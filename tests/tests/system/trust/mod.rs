//! Fleets that know their callers by certificates: who may do what, certificates that change while
//! everything goes on, and secrets that stay where they are.

mod caller;
mod own_user;
mod rig;
mod roles;
mod rotation;
mod scope;
mod secrets;
