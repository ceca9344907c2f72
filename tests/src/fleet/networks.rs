//! A network namespace for each host, joined by a bridge on this machine: hosts have addresses of
//! their own and reach each other and the server as on a network.
//!
//! ```text
//! this machine:  198.18.N.1 on the bridge     the server, the test
//! namespace:     198.18.N.2, .3, ...          one agent and its VMs' processes each
//! ```
//! Addresses are of the block for tests of network devices (RFC 2544). Names and N have the id of
//! this process, so that tests in other processes are not met.

use std::{
    net::Ipv4Addr,
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
};

use anyhow::{Context as _, ensure};

/// Networks made by this process, each with a number of its own.
static MADE: AtomicU8 = AtomicU8::new(0);

/// The bridge and the namespaces. Gone when it is dropped.
#[derive(Debug)]
pub(super) struct Networks {
    label: String,
    third: u8,
    hosts: Vec<String>,
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.with_context(|| format!("ip {arguments}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {}", said.trim());
    Ok(())
}

impl Networks {
    /// Makes the bridge.
    ///
    /// # Errors
    /// When this machine does not let one be made.
    pub(super) fn make() -> anyhow::Result<Self> {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let [.., third] = pid.wrapping_add(u32::from(number)).to_be_bytes();
        let label = format!("sl{pid}x{number}");
        // Where this works, what follows does.
        ip(&format!("netns add {label}"))?;
        ip(&format!("netns del {label}"))?;
        ip(&format!("link add {label} type bridge"))?;
        let networks = Self {
            label,
            third,
            hosts: Vec::new(),
        };
        let (bridge, outside) = (&networks.label, networks.outside());
        ip(&format!("addr add {outside}/24 dev {bridge}"))?;
        ip(&format!("link set {bridge} up"))?;
        Ok(networks)
    }

    /// This machine's address on it.
    #[must_use]
    pub(super) fn outside(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.third, 1)
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
        let address = Ipv4Addr::new(198, 18, self.third, u8::try_from(number)? + 2);
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
