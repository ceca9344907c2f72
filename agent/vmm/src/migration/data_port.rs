//! The port on which a destination takes pages.
//!
//! It comes from a range that the operator chose and can let through a firewall. The range belongs
//! to the whole host, and nobody hands its ports out: each VM's process tries them one by one, from
//! a place of its own on, and the kernel gives a port to one process only. A port that is taken, by
//! whomever, is passed over.

use std::{
    io,
    net::{IpAddr, TcpListener},
};

use slat_proto::{ApiError, Reason, model::PortRange};

/// How often the whole range is tried. Two processes that begin to listen on one port in the same
/// instant may both be refused, and the port is free again.
const ROUNDS: usize = 3;

/// Why there is no data port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    /// Every port of the range is in use.
    #[error("every data port of {ports} on {ip} is in use")]
    UsedUp { ip: IpAddr, ports: PortRange },
    /// The address cannot be listened on.
    #[error("cannot listen for pages on {ip}, ports {ports}: {source}")]
    Io {
        ip: IpAddr,
        ports: PortRange,
        #[source]
        source: io::Error,
    },
}

impl From<PortError> for ApiError {
    fn from(error: PortError) -> Self {
        let message = error.to_string();
        let (reason, ip, ports, advice) = match error {
            PortError::UsedUp { ip, ports } => (
                Reason::LimitReached,
                ip,
                ports,
                "wait until other migrations to this host have ended, or widen the agent's --data-ports",
            ),
            PortError::Io { ip, ports, .. } => (
                Reason::Internal,
                ip,
                ports,
                "give the agent an address of its host with --data-ip, and ports that it may listen on",
            ),
        };
        ApiError::new(reason, message)
            .with("data_ip", ip)
            .with("data_ports", ports)
            .with("vm_location", "SOURCE")
            .with("advice", advice)
    }
}

/// Listens on a free port of the range.
///
/// # Errors
/// See [`PortError`].
pub(crate) fn bind(ip: IpAddr, ports: PortRange) -> Result<TcpListener, PortError> {
    bind_from(ip, ports, std::process::id())
}

/// As [`bind`], beginning with the port at `place`, counted round the range.
fn bind_from(ip: IpAddr, ports: PortRange, place: u32) -> Result<TcpListener, PortError> {
    let failed = |source| PortError::Io { ip, ports, source };
    let Some(range) = ports.ports() else {
        return TcpListener::bind((ip, 0)).map_err(failed);
    };
    let turn = place as usize % range.len();
    for _ in 0..ROUNDS {
        for port in range.clone().skip(turn).chain(range.clone().take(turn)) {
            match TcpListener::bind((ip, port)) {
                Ok(socket) => return Ok(socket),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
    Err(PortError::UsedUp { ip, ports })
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::Barrier};

    use super::*;

    /// Loopback addresses that no other test listens on: each has all ports to itself.
    fn own_ip(last: u8) -> IpAddr {
        Ipv4Addr::new(127, 74, 10, last).into()
    }

    fn port(socket: &TcpListener) -> u16 {
        socket.local_addr().unwrap().port()
    }

    #[test]
    fn a_port_that_is_taken_is_passed_over_and_a_range_that_is_used_up_is_named() {
        let (ip, ports) = (own_ip(1), "7410-7412".parse().unwrap());
        let taken = TcpListener::bind((ip, 7411)).unwrap();
        let first = bind_from(ip, ports, 1).unwrap();
        assert_eq!(port(&first), 7412);
        let second = bind_from(ip, ports, 1).unwrap();
        assert_eq!(port(&second), 7410);
        let error = ApiError::from(bind_from(ip, ports, 5).unwrap_err());
        assert_eq!(error.reason, Reason::LimitReached);
        assert_eq!(error.metadata["data_ports"], "7410-7412");
        assert_eq!(error.metadata["data_ip"], ip.to_string());
        assert!(error.message.contains("7410-7412"), "{error}");
        drop(taken);
        assert_eq!(port(&bind_from(ip, ports, 0).unwrap()), 7411);
    }

    #[test]
    fn an_address_of_another_host_is_no_range_that_is_used_up() {
        let ip = Ipv4Addr::new(192, 0, 2, 1).into();
        for ports in ["7410-7412", "0"] {
            let error = bind(ip, ports.parse().unwrap()).unwrap_err();
            assert!(matches!(error, PortError::Io { .. }), "{error}");
        }
    }

    #[test]
    fn those_who_bind_at_the_same_moment_never_share_a_port() {
        let (ip, ports) = (own_ip(2), "7410-7417".parse().unwrap());
        let together = Barrier::new(16);
        let one = |_| {
            together.wait();
            bind_from(ip, ports, 3)
        };
        let sockets: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|n| scope.spawn(move || one(n))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let mut bound: Vec<u16> = sockets.iter().flatten().map(port).collect();
        bound.sort_unstable();
        assert_eq!(bound, (7410..=7417).collect::<Vec<u16>>());
        let used_up = |socket: &&Result<_, _>| matches!(socket, Err(PortError::UsedUp { .. }));
        assert_eq!(sockets.iter().filter(used_up).count(), 8);
    }
}
