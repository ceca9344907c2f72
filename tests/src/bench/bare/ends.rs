//! One connection's end: bytes in the clear, or records of TLS.
//!
//! By TLS the ends speak what page streams speak ([`slat_trust::channel`]), in records of 16 KiB
//! made of memory where it lies. Many records leave by one write, and many come by one read:
//! rustls's own stream reads 4 KiB at a time.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
};

use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection,
    pki_types::ServerName,
};

/// Bytes of one record.
const RECORD: usize = 16 << 10;
/// So many records leave by one write.
const BATCH: usize = 32;
/// What is read at once.
const PIECE: usize = 256 << 10;

/// Sends, or receives.
pub(super) enum End {
    Plain(TcpStream),
    Tls(Box<Tls>),
}

/// What TLS has besides the connection.
pub(super) struct Tls {
    socket: TcpStream,
    connection: Connection,
    wire: Vec<u8>,
    begin: usize,
    end: usize,
}

impl End {
    /// The end that connected, after its handshake.
    pub(super) fn client(
        socket: TcpStream,
        config: Option<&Arc<ClientConfig>>,
    ) -> io::Result<Self> {
        let Some(config) = config else {
            return Ok(Self::Plain(socket));
        };
        // Nobody looks at the name: the key says who it is.
        let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
        let connection =
            ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        Tls::establish(socket, connection.into())
    }

    /// The end that took the connection, after its handshake.
    pub(super) fn server(
        socket: TcpStream,
        config: Option<&Arc<ServerConfig>>,
    ) -> io::Result<Self> {
        let Some(config) = config else {
            return Ok(Self::Plain(socket));
        };
        let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        Tls::establish(socket, connection.into())
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.write_all(bytes),
            Self::Tls(tls) => tls.send(bytes),
        }
    }

    pub(super) fn receive(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.read_exact(bytes),
            Self::Tls(tls) => tls.receive(bytes),
        }
    }
}

impl Tls {
    fn establish(mut socket: TcpStream, mut connection: Connection) -> io::Result<End> {
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        connection.set_buffer_limit(None);
        Ok(End::Tls(Box::new(Self {
            socket,
            connection,
            wire: vec![0; PIECE],
            begin: 0,
            end: 0,
        })))
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        for batch in bytes.chunks(BATCH * RECORD) {
            self.connection.writer().write_all(batch)?;
            while self.connection.wants_write() {
                self.connection.write_tls(&mut self.socket)?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.connection.reader().read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(taken) => {
                    bytes = &mut bytes[taken..];
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.begin == self.end {
                (self.begin, self.end) = (0, self.socket.read(&mut self.wire)?);
                if self.end == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let mut rest = &self.wire[self.begin..self.end];
            self.connection.read_tls(&mut rest)?;
            self.begin = self.end - rest.len();
            self.connection
                .process_new_packets()
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}
