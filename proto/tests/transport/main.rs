//! Endpoints and channels over real sockets: what a peer hears when something is not as it should
//! be.

mod connections;
mod lasting;
mod messages;
mod peers;
mod rig;
mod secure;
mod tls;
mod unknown;
