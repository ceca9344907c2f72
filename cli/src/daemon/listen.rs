//! Where a role may be reached.

use std::net::{IpAddr, SocketAddr};

use crate::failure::Failure;

/// The address pages are received at: the one given, or the one it listens on.
pub(crate) fn data_ip(listen: SocketAddr, given: Option<IpAddr>) -> Result<IpAddr, Failure> {
    match given {
        Some(ip) if ip.is_unspecified() => Err(Failure::value(
            format!("--data-ip {ip} is no address other hosts can send pages to"),
            "give one address of this host",
        )),
        Some(ip) => Ok(ip),
        None if listen.ip().is_unspecified() => Err(Failure::value(
            format!("--listen {listen} does not say at which address other hosts reach this one"),
            "add --data-ip ADDRESS (for pages) and --advertise ADDRESS:PORT (for calls)",
        )),
        None => Ok(listen.ip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_address_follows_the_listening_one() {
        let listen = "127.0.0.1:0".parse().unwrap();
        assert_eq!(data_ip(listen, None).unwrap().to_string(), "127.0.0.1");
        let any = "0.0.0.0:7401".parse().unwrap();
        assert!(data_ip(any, None).is_err());
        let given = "192.0.2.7".parse().unwrap();
        assert_eq!(data_ip(any, Some(given)).unwrap(), given);
        assert!(data_ip(listen, Some("0.0.0.0".parse().unwrap())).is_err());
    }
}
