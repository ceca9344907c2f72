//! How the connections of one side are opened: in the clear or by TLS, and what each shows.
//!
//! In the clear a connection shows the ticket. By TLS both ends pin the key that the other made for
//! this migration ([`slat_trust::channel`]); what a connection shows is then a token, made from the
//! ticket, from secrets of this one handshake, from what both ends' grants say (`binding`) and from
//! the number of the stream. The ticket itself does not travel.

use std::{fmt, net::TcpStream, sync::Arc, time::Instant};

use rustls::{
    ClientConfig, ClientConnection, ServerConfig, ServerConnection, pki_types::ServerName,
};
use slat_proto::{ApiError, Reason, v1};
use slat_trust::channel::{ChannelError, ChannelKey, EXPORTER, Extraction, same, token};

use super::{
    kernel,
    stream::{self, Inlet, Outlet},
    tls::Session,
    wire::{StreamRole, TICKET, WireError},
};

/// See the module.
pub(crate) struct Channel {
    ticket: [u8; TICKET],
    protection: Option<Protection>,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("tls", &self.protection.is_some())
            .finish_non_exhaustive()
    }
}

struct Protection {
    end: End,
    binding: [u8; 32],
}

enum End {
    Source {
        config: Arc<ClientConfig>,
        /// Where the kernel is to encrypt.
        kernel: Arc<ClientConfig>,
    },
    Destination(Arc<ServerConfig>),
}

/// Whether the kernel is asked to encrypt a data stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    Ask,
    /// Why not.
    Not(String),
}

/// A connection of the source's, open.
pub(crate) struct Opened {
    pub(crate) inlet: Inlet,
    pub(crate) outlet: Outlet,
    /// What its Hello shows.
    pub(crate) shows: [u8; TICKET],
}

impl From<ChannelError> for WireError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Tls(error) => error.into(),
            other => Self::Io(std::io::Error::other(other)),
        }
    }
}

impl Channel {
    /// Connections in the clear.
    pub(crate) fn plain(ticket: [u8; TICKET]) -> Self {
        Self {
            ticket,
            protection: None,
        }
    }

    /// The source's end by TLS, to who has the key `peer`.
    ///
    /// # Errors
    /// INTERNAL when TLS cannot be set up.
    pub(crate) fn source(
        ticket: [u8; TICKET],
        key: &ChannelKey,
        peer: [u8; 32],
        binding: [u8; 32],
    ) -> Result<Self, ApiError> {
        let end = End::Source {
            config: key.client(peer, Extraction::Never).map_err(no_tls)?,
            kernel: key.client(peer, Extraction::ToKernel).map_err(no_tls)?,
        };
        Ok(Self::protected(ticket, end, binding))
    }

    /// The destination's end by TLS, for who has the key `peer`.
    ///
    /// # Errors
    /// INTERNAL when TLS cannot be set up.
    pub(crate) fn destination(
        ticket: [u8; TICKET],
        key: &ChannelKey,
        peer: [u8; 32],
        binding: [u8; 32],
    ) -> Result<Self, ApiError> {
        let config = key.server(peer, Extraction::Never).map_err(no_tls)?;
        Ok(Self::protected(ticket, End::Destination(config), binding))
    }

    fn protected(ticket: [u8; TICKET], end: End, binding: [u8; 32]) -> Self {
        Self {
            ticket,
            protection: Some(Protection { end, binding }),
        }
    }

    /// Opens a connection of the source's. When the kernel is asked and has no TLS, `kernel` says
    /// why afterwards, and this process encrypts.
    ///
    /// # Errors
    /// `Tls` when one end refuses the other; `Io`. When the kernel began and did not go on,
    /// `kernel` says so and the connection is to be made again.
    pub(crate) fn open(
        &self,
        socket: TcpStream,
        role: StreamRole,
        kernel: &mut Kernel,
        until: Instant,
    ) -> Result<Opened, WireError> {
        let data = matches!(role, StreamRole::Data(_));
        let Some(Protection { end, binding }) = &self.protection else {
            let (inlet, outlet) = stream::plain(socket);
            return Ok(Opened {
                inlet,
                outlet,
                shows: self.ticket,
            });
        };
        let End::Source {
            config,
            kernel: given,
        } = end
        else {
            return Err(WireError::Io(std::io::ErrorKind::Unsupported.into()));
        };
        let asks = data && *kernel == Kernel::Ask;
        if asks && let Err(error) = kernel::attach(&socket) {
            *kernel = Kernel::Not(format!("the kernel has no TLS for sockets: {error}"));
        }
        let by_kernel = asks && *kernel == Kernel::Ask;
        let config = if by_kernel { given } else { config };
        // Nobody looks at the name: the key says who it is.
        let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
        let connection = ClientConnection::new(Arc::clone(config), name)?;
        let session = Session::establish(connection.into(), &socket, until)?;
        let shows = self.token(&session.export(EXPORTER, binding)?, role);
        let (inlet, outlet) = if by_kernel {
            let suite = session.suite();
            let secrets = session.into_inner().dangerous_extract_secrets()?;
            if let Err(error) = kernel::give(&socket, &secrets) {
                let words = format!("the kernel did not take the keys: {error}");
                *kernel = Kernel::Not(words);
                return Err(WireError::Io(error));
            }
            stream::by_kernel(socket, suite)
        } else {
            stream::protected(socket, session, data)
        };
        Ok(Opened {
            inlet,
            outlet,
            shows,
        })
    }

    /// Takes a connection at the destination. Which it is, its Hello says.
    ///
    /// # Errors
    /// `Tls` when one end refuses the other; `Io`.
    pub(crate) fn accept(
        &self,
        socket: TcpStream,
        until: Instant,
    ) -> Result<(Inlet, Outlet), WireError> {
        let Some(Protection { end, .. }) = &self.protection else {
            return Ok(stream::plain(socket));
        };
        let End::Destination(config) = end else {
            return Err(WireError::Io(std::io::ErrorKind::Unsupported.into()));
        };
        let connection = ServerConnection::new(Arc::clone(config))?;
        let session = Session::establish(connection.into(), &socket, until)?;
        Ok(stream::protected(socket, session, true))
    }

    /// Whether `shown` is what the connection has to show as `role`.
    pub(crate) fn admits(
        &self,
        inlet: &Inlet,
        role: StreamRole,
        shown: &[u8; TICKET],
    ) -> Result<bool, WireError> {
        let wanted = match &self.protection {
            None => self.ticket,
            Some(Protection { binding, .. }) => {
                let exported = inlet
                    .export(EXPORTER, binding)
                    .ok_or_else(|| WireError::corrupt("tls", "in the clear"))??;
                self.token(&exported, role)
            }
        };
        Ok(same(&wanted, shown))
    }

    fn token(&self, exported: &[u8; 32], role: StreamRole) -> [u8; TICKET] {
        token(&self.ticket, exported, role.number())
    }
}

fn no_tls(error: ChannelError) -> ApiError {
    ApiError::new(Reason::Internal, format!("page streams: {error}"))
}

/// How the page streams of a side are protected: the least of what its connections say.
pub(super) fn least(paths: &[v1::PagePath], why_not_kernel: &str) -> Option<v1::PagePath> {
    let mut path = paths.iter().min_by_key(|path| path.protection)?.clone();
    let words = match path.protection() {
        v1::page_path::Protection::KernelTls => "",
        v1::page_path::Protection::Tls => why_not_kernel,
        _ => "both agents were started with --insecure-pages",
    };
    path.message = words.to_owned();
    Some(path)
}
