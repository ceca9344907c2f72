//! The network between hosts: one Ethernet, without privileges and without a device of this
//! machine.
//!
//! The first host's emulator has a hub. Each other host is a stream over a Unix socket to a port of
//! it; the sockets lie in the lab's run folder, and go by relative names, because the path of one
//! has at most 107 bytes. A host that comes back connects again by itself.

use std::{net::Ipv4Addr, path::PathBuf, process::Command};

/// The socket of a host's stream, below the run folder.
pub(crate) fn socket(host: u8) -> PathBuf {
    format!("link-{host}").into()
}

/// A host's address.
pub(crate) fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, host)
}

/// Gives host number `host` of `hosts` its network card. The first is number 1, and starts first.
pub(crate) fn connect(command: &mut Command, host: u8, hosts: u8) {
    if host == 1 {
        command.args(["-netdev", "hubport,id=card,hubid=0"]);
        for other in 2..=hosts {
            let path = socket(other).display().to_string();
            let stream = format!("stream,id=link{other},server=on,addr.type=unix,addr.path={path}");
            let port = format!("hubport,id=port{other},hubid=0,netdev=link{other}");
            command.args(["-netdev", &stream, "-netdev", &port]);
        }
    } else {
        let path = socket(host).display().to_string();
        let stream =
            format!("stream,id=card,server=off,addr.type=unix,addr.path={path},reconnect-ms=200");
        command.args(["-netdev", &stream]);
    }
    // No boot program for the card: nothing boots from the network.
    let card = format!("virtio-net-pci,netdev=card,romfile=,mac=52:54:00:77:00:{host:02x}");
    command.args(["-device", &card]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_has_a_port_for_each_other() {
        let line = |host| {
            let mut command = Command::new("qemu");
            connect(&mut command, host, 3);
            let words: Vec<_> = command
                .get_args()
                .map(|word| word.display().to_string())
                .collect();
            words.join(" ")
        };
        let first = line(1);
        assert_eq!(first.matches("server=on").count(), 2);
        assert_eq!(first.matches("hubport").count(), 3);
        assert!(first.contains("link-3") && first.contains("00:01"));
        let third = line(3);
        assert!(third.contains("addr.path=link-3,") && !third.contains("hubport"));
        assert_eq!(address(3).to_string(), "10.77.0.3");
    }
}
