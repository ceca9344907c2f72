//! A network namespace for each host, joined by a bridge on this machine: hosts have addresses of
//! their own and reach each other and the server as on a network.
//!
//! ```text
//! this machine:  198.18.N.1 on the bridge     the server, the test
//! namespace:     198.18.N.2, .3, ...          one agent and its VMs' processes each
//! ```
//! Addresses are of the block for tests of network devices (RFC 2544): 198.18.N, or 198.19.N. N is
//! one that nothing here has, be it another process's or what a killed run left. The bridge is
//! called by it, and the kernel takes each name once: of two that choose at once one chooses again.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, bail, ensure};

/// Networks made by this process, each with a number of its own.
static MADE: AtomicU32 = AtomicU32::new(0);
/// Of 198.18.0.0/15.
const NETWORKS: u32 = 512;

/// The bridge and the namespaces. Gone when it is dropped.
#[derive(Debug)]
pub(super) struct Networks {
    label: String,
    /// The first three bytes of its addresses.
    prefix: [u8; 3],
    hosts: Vec<String>,
}

fn ip(arguments: &str) -> anyhow::Result<String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.with_context(|| format!("ip {arguments}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether there is a namespace of that network: its bridge was ended without it.
fn left_behind(label: &str) -> bool {
    let of = format!("{label}h");
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    names
        .map(|name| name.file_name())
        .any(|name| name.to_string_lossy().starts_with(&of))
}

impl Networks {
    /// Makes the bridge.
    ///
    /// # Errors
    /// When this machine does not let one be made.
    pub(super) fn make() -> anyhow::Result<Self> {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        // Where this works, what follows does.
        let probe = format!("sl{pid}x{number}");
        ip(&format!("netns add {probe}"))?;
        ip(&format!("netns del {probe}"))?;
        Self::make_from(pid.wrapping_add(number))
    }

    /// The first that is free from there.
    fn make_from(begin: u32) -> anyhow::Result<Self> {
        let taken = ip("-4 -o addr show")?;
        for number in 0..NETWORKS {
            let at = (begin % NETWORKS + number) % NETWORKS;
            let [.., block, third] = at.to_be_bytes();
            let prefix = [198, 18 + block, third];
            let label = format!("sl{}n{third}", prefix[1]);
            let addresses = format!(" 198.{}.{third}.", prefix[1]);
            if taken.contains(&addresses) || left_behind(&label) {
                continue;
            }
            if let Err(error) = ip(&format!("link add {label} type bridge")) {
                if Path::new("/sys/class/net").join(&label).exists() {
                    continue;
                }
                return Err(error);
            }
            let networks = Self {
                label,
                prefix,
                hosts: Vec::new(),
            };
            let (bridge, outside) = (&networks.label, networks.outside());
            ip(&format!("addr add {outside}/24 dev {bridge}"))?;
            ip(&format!("link set {bridge} up"))?;
            return Ok(networks);
        }
        bail!("every network of 198.18.0.0/15 is taken: see ip addr")
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        let [first, second, third] = self.prefix;
        Ipv4Addr::new(first, second, third, last)
    }

    /// This machine's address on it.
    #[must_use]
    pub(super) fn outside(&self) -> Ipv4Addr {
        self.address(1)
    }

    fn namespace(&self, number: usize) -> String {
        format!("{}h{number}", self.label)
    }

    /// Makes a host's namespace. Returns its address, and what is put before a command that is to
    /// run there.
    ///
    /// # Errors
    /// When this machine does not let one be made.
    pub(super) fn add(&mut self, host: &str) -> anyhow::Result<(Ipv4Addr, [String; 2])> {
        let number = self.hosts.len();
        let address = self.address(u8::try_from(number)? + 2);
        let (bridge, name) = (&self.label, self.namespace(number));
        ip(&format!("netns add {name}"))?;
        self.hosts.push(host.to_owned());
        for line in [
            format!("link add {name} type veth peer name eth0 netns {name}"),
            format!("link set {name} master {bridge} up"),
            format!("-n {name} addr add {address}/24 dev eth0"),
            format!("-n {name} link set eth0 up"),
            format!("-n {name} link set lo up"),
        ] {
            ip(&line)?;
        }
        let inside = format!("--net=/run/netns/{name}");
        Ok((address, ["nsenter".to_owned(), inside]))
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        let namespaces =
            (0..self.hosts.len()).map(|it| format!("netns del {}", self.namespace(it)));
        let bridge = format!("link del {}", self.label);
        for line in namespaces.chain([bridge]) {
            if let Err(error) = ip(&line) {
                eprintln!("left behind: {error:#}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_somebody_has_is_not_made_again() {
        // Somebody else who begins to look at the same place.
        let first = match Networks::make_from(511) {
            Ok(first) => first,
            Err(error) => {
                println!("SKIPPED: no network can be made: {error:#}");
                return;
            }
        };
        let mut second = Networks::make_from(511).unwrap();
        assert_ne!(first.outside(), second.outside());
        assert_ne!(first.label, second.label);
        let (address, _) = second.add("a").unwrap();
        assert_eq!(address, second.address(2));
        // An address that is there under another name.
        let left = Networks::make_from(300).unwrap();
        let [_, block, third] = left.prefix;
        ip(&format!("link set {} down", left.label)).unwrap();
        ip(&format!("link set {} name slatleft", left.label)).unwrap();
        let next = Networks::make_from((u32::from(block) - 18) * 256 + u32::from(third)).unwrap();
        assert_ne!(next.prefix, left.prefix);
        drop(next);
        // A namespace that was left without its bridge.
        let of = format!("{}h0", left.label);
        assert!(!left_behind(&left.label));
        ip(&format!("netns add {of}")).unwrap();
        assert!(left_behind(&left.label));
        ip(&format!("netns del {of}")).unwrap();
        ip(&format!("link set slatleft name {}", left.label)).unwrap();
    }
}
