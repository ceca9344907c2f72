//! Where a role may listen. There is no TLS and no authentication yet: whoever reaches an endpoint
//! may pause, move and delete VMs. So anything but loopback must be asked for by name.

use std::net::{IpAddr, SocketAddr};

use crate::failure::Failure;

/// The way past [`check`].
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct InsecureArgs {
    /// Listen beyond loopback, without TLS and authentication: anyone who reaches it is in control
    #[arg(long, env = "SLAT_INSECURE_LISTEN")]
    pub(crate) insecure_listen: bool,
}

/// Refuses `address` beyond loopback unless the operator asked for it.
pub(crate) fn check(option: &str, address: IpAddr, insecure: InsecureArgs) -> Result<(), Failure> {
    if address.is_loopback() || insecure.insecure_listen {
        return Ok(());
    }
    Err(Failure::value(
        format!(
            "{option} {address} is not loopback, and there is no TLS and no authentication yet: \
             anyone who reaches it could pause, move and delete VMs"
        ),
        "take 127.0.0.1 or [::1], or, on a network you trust, add --insecure-listen",
    ))
}

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

    fn checked(address: &str, insecure_listen: bool) -> Result<(), Failure> {
        check(
            "--listen",
            address.parse().unwrap(),
            InsecureArgs { insecure_listen },
        )
    }

    #[test]
    fn only_loopback_is_free() {
        for address in ["127.0.0.1", "127.9.9.9", "::1"] {
            assert!(checked(address, false).is_ok(), "{address}");
        }
        for address in ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"] {
            let text = checked(address, false).unwrap_err().render();
            assert!(text.contains("--insecure-listen"), "{text}");
            assert!(checked(address, true).is_ok(), "{address}");
        }
    }

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
