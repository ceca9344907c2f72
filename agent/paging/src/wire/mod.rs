//! Messages between a VM's process, its pager and its host's agent.
//!
//! One message is one packet of a Unix socket (`SOCK_SEQPACKET`): JSON of at most [`MOST_BYTES`],
//! and at most [`MOST_FDS`] descriptors, which the message says the meaning of. Nothing here is on
//! the path of a fault.

mod layer;
mod message;
mod problem;
mod socket;
mod state;
mod writer;

pub use self::{
    layer::{Layer, LayerMemory},
    message::{
        Answer, Ask, FromAgent, FromPager, Greeting, Mapped, Memory, Role, Setup, ToAgent, ToPager,
        VERSION,
    },
    problem::{Problem, ProblemKind},
    socket::{Listener, MOST_BYTES, MOST_FDS, Packet, Socket, WireError},
    state::{Faults, Histogram, Load, PagerState},
    writer::{FromWriter, ToWriter, WRITER_FD, Written},
};
