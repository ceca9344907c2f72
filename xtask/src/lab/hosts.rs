//! All hosts of a lab, numbered from 1.
//!
//! They boot at the same time. Host 1 has the network's hub, so it is never switched off while a
//! test runs.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, ensure};

#[cfg(doc)]
use super::machine::Machine;
use super::{
    console::Said,
    host::{Host, Plan},
};

/// Files whose ends are brought back, by what they are on a host.
const LOGS: &str = "*.log agent/vms/*/log";
/// How much of each.
const LOG_TAIL: usize = 256 << 10;

/// The hosts.
#[derive(Debug)]
pub(crate) struct Hosts {
    plan: Plan,
    all: Vec<Host>,
}

impl Hosts {
    /// Boots them.
    ///
    /// # Errors
    /// When one does not come up.
    pub(crate) fn boot(plan: Plan) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for number in 1..=plan.hosts {
            all.push(Host::power_on(&plan, number, "")?);
            if number == 1 {
                all[0].takes_connections(&plan)?;
            }
        }
        for host in &mut all {
            host.booted(&plan)?;
        }
        Ok(Self { plan, all })
    }

    /// What they were made from.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Their numbers.
    pub(crate) fn numbers(&self) -> std::ops::RangeInclusive<u8> {
        1..=self.plan.hosts
    }

    /// One of them.
    pub(crate) fn get(&mut self, number: u8) -> &mut Host {
        &mut self.all[usize::from(number) - 1]
    }

    /// Cuts the power of one.
    pub(crate) fn power_off(&mut self, number: u8) {
        self.get(number).power_off();
    }

    /// Boots one again that was switched off. Nothing of what it had is there.
    ///
    /// # Errors
    /// When it does not come up.
    pub(crate) fn power_on(&mut self, number: u8) -> anyhow::Result<()> {
        self.power_on_with(number, "")
    }

    /// The same, with a processor that has or lacks these `features`; see [`Machine::emulator`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn power_on_with(&mut self, number: u8, features: &str) -> anyhow::Result<()> {
        ensure!(number != 1, "host 1 has the network's hub");
        // The console that it had is worth keeping beside the new one.
        let old = self.plan.folder.join(format!("host-{number}.console"));
        fs::rename(&old, old.with_extension("console.before")).context("keeping its console")?;
        *self.get(number) = Host::power_on(&self.plan, number, features)?;
        let plan = self.plan.clone();
        self.get(number).booted(&plan)
    }

    /// [`Host::run`] on one of them.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn run(&mut self, number: u8, command: &str) -> anyhow::Result<String> {
        self.get(number).run(command)
    }

    /// [`Host::try_run`] on one of them.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn try_run(
        &mut self,
        number: u8,
        command: &str,
        bound: Duration,
    ) -> anyhow::Result<Said> {
        self.get(number).try_run(command, bound)
    }

    /// Writes what daemons and VMs logged on each host to a file of `folder` for each.
    ///
    /// # Errors
    /// When a host does not answer, or a file cannot be written.
    pub(crate) fn bring_logs(&mut self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let command = format!(
            "cd /srv; for log in {LOGS}; do [ -s $log ] && echo \"==> $log\" && tail -c {LOG_TAIL} $log; done; true"
        );
        for host in &mut self.all {
            let text = host.run(&command)?;
            fs::write(folder.join(format!("{}.log", host.name())), text)?;
        }
        Ok(())
    }
}
