//! Why an agent cannot start.

use std::{io, path::PathBuf};

use slat_proto::ApiError;

/// A failure of [`super::Agent::start`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The state directory cannot be used.
    #[error("state directory {path}: {source}")]
    StateDir {
        /// The directory or the file in it.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another agent holds the state directory.
    #[error(
        "another agent{} holds the state directory {path}",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
    )]
    StateDirInUse {
        /// The directory.
        path: PathBuf,
        /// Process id of the other agent, when it wrote one.
        pid: Option<u32>,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The configuration cannot work.
    #[error("{message}")]
    Config {
        /// What is wrong and what to do.
        message: String,
    },
    /// The server's address makes no channel.
    #[error("server address: {source}")]
    Server {
        /// Why.
        #[source]
        source: ApiError,
    },
}
