//! A fleet on the hosts of a lab: the server on host 1, an agent on each, all by their addresses in
//! the lab's network. It is driven as an operator does, by `slat` on host 1 with its answers as
//! JSON.
//!
//! Everything that it writes is below `/srv` on its host. A fleet that is dropped has killed every
//! `slat` there; one that is [finished](Fleet::finish) has also proved that nothing was left.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::{
    answer::{ended, is, number},
    console::Said,
    host::SHORT,
    hosts::Hosts,
    network::address,
};

/// How long anything may take that is bound to happen. An emulated host on a busy machine is slow;
/// a test that passes does not wait.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const SERVER_PORT: u16 = 7400;
const AGENT_PORT: u16 = 7401;
const MIB: u64 = 1 << 20;
/// The VM that a fleet has unless a test makes others.
pub(crate) const VM: &str = "web";

/// What runs the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Kvm,
    /// The Common MMU, with the format of this name.
    Software(&'static str),
}

impl Backend {
    /// In names of tests.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Software(_) => "software",
        }
    }

    pub(crate) fn options(self) -> String {
        match self {
            Self::Kvm => "--backend kvm".to_owned(),
            Self::Software(format) => format!("--backend software --format {format}"),
        }
    }
}

/// A running fleet.
#[derive(Debug)]
pub(crate) struct Fleet<'a> {
    hosts: &'a mut Hosts,
    migrations: u32,
}

impl<'a> Fleet<'a> {
    /// Starts the server and the agents, and waits until every host is READY.
    ///
    /// # Errors
    /// When a daemon does not start or a host does not show up.
    pub(crate) fn start(hosts: &'a mut Hosts) -> anyhow::Result<Self> {
        for number in hosts.numbers() {
            hosts.run(number, "rm -rf /srv/*")?;
        }
        // A fleet from here on: what was started is ended.
        let mut fleet = Self {
            hosts,
            migrations: 0,
        };
        fleet.start_server()?;
        for number in fleet.hosts.numbers() {
            fleet.start_agent(number)?;
        }
        fleet.hosts_ready()?;
        Ok(fleet)
    }

    /// The hosts below it.
    pub(crate) fn hosts(&mut self) -> &mut Hosts {
        self.hosts
    }

    // Daemons.

    fn start_daemon(&mut self, host: u8, name: &str, options: &str) -> anyhow::Result<()> {
        let listens = format!("grep -q '^listening on' /srv/{name}.out");
        let tries = PATIENCE.as_secs() * 10;
        let command = format!(
            "ulimit -c 0; setsid slat {name} {options} --insecure-plaintext --state-dir /srv/{name} \
             >/srv/{name}.out 2>>/srv/{name}.log & echo $! >/srv/{name}.pid; \
             for try in $(seq {tries}); do {listens} && exit 0; sleep 0.1; done; \
             tail -5 /srv/{name}.log; exit 1"
        );
        let said = self.hosts.try_run(host, &command, PATIENCE + SHORT)?;
        said.good(&format!("slat {name}"))
            .with_context(|| format!("starting it on host-{host}"))?;
        Ok(())
    }

    /// Starts the server, on its state if it has some.
    ///
    /// # Errors
    /// When it does not listen.
    pub(crate) fn start_server(&mut self) -> anyhow::Result<()> {
        let at = address(1);
        let options = format!("--listen {at}:{SERVER_PORT} --report-interval 500ms");
        self.start_daemon(1, "server", &options)
    }

    /// Starts a host's agent, on its state if it has some.
    ///
    /// # Errors
    /// When it does not listen.
    pub(crate) fn start_agent(&mut self, host: u8) -> anyhow::Result<()> {
        let (own, server) = (address(host), address(1));
        let options = format!(
            "--name host-{host} --listen {own}:{AGENT_PORT} --server {server}:{SERVER_PORT} \
             --memory 768MiB"
        );
        self.start_daemon(host, "agent", &options)
    }

    /// kill -9 of a daemon.
    ///
    /// # Errors
    /// When it does not run.
    pub(crate) fn kill(&mut self, host: u8, daemon: &str) -> anyhow::Result<()> {
        let command = format!("kill -9 $(cat /srv/{daemon}.pid)");
        self.hosts.run(host, &command).map(drop)
    }

    /// kill -9 of the process that a host has of the VM.
    ///
    /// # Errors
    /// When it has none.
    pub(crate) fn kill_vm(&mut self, host: u8) -> anyhow::Result<()> {
        self.hosts
            .run(host, "kill -9 $(cat /srv/agent/vms/*/lock)")
            .map(drop)
    }

    // What an operator says.

    /// Runs `slat` on host 1.
    ///
    /// # Errors
    /// When the host does not answer in time.
    pub(crate) fn slat(&mut self, arguments: &str) -> anyhow::Result<Said> {
        let server = address(1);
        let command = format!(
            "slat {arguments} --server {server}:{SERVER_PORT} --insecure-plaintext -o json"
        );
        self.hosts.try_run(1, &command, PATIENCE)
    }

    /// The same, and its answer; it must end with 0.
    ///
    /// # Errors
    /// When it does not, or says no JSON.
    pub(crate) fn ask(&mut self, arguments: &str) -> anyhow::Result<Value> {
        let said = self.slat(arguments)?.good(&format!("slat {arguments}"))?;
        serde_json::from_str(&said).with_context(|| format!("slat {arguments} said {said}"))
    }

    /// Asks until `found` likes the answer. A call that fails is made again.
    ///
    /// # Errors
    /// When it never does, with the last answer.
    pub(crate) fn until(
        &mut self,
        arguments: &str,
        what: &str,
        mut found: impl FnMut(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let last = match self.ask(arguments) {
                Ok(value) if found(&value) => return Ok(value),
                Ok(value) => format!("{value:#}"),
                Err(error) => format!("{error:#}"),
            };
            if Instant::now() > deadline {
                let limit = PATIENCE.as_secs();
                bail!("after {limit} s still not: {what}; slat {arguments} says {last}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until every host is READY.
    ///
    /// # Errors
    /// When one is not in time.
    pub(crate) fn hosts_ready(&mut self) -> anyhow::Result<()> {
        let count = self.hosts.numbers().count();
        self.until("get hosts", "every host is READY", |answer| {
            let hosts = answer["hosts"].as_array().map_or(&[][..], Vec::as_slice);
            let ready = hosts.iter().filter(|host| is(&host["state"], "READY"));
            ready.count() == count
        })
        .map(drop)
    }

    /// Makes the VM on host 1: `memory` MiB of random bytes, of which it writes `rate` a second.
    ///
    /// # Errors
    /// When it is refused or does not run.
    pub(crate) fn run_vm(
        &mut self,
        backend: Backend,
        memory: u32,
        rate: u32,
    ) -> anyhow::Result<()> {
        self.create(VM, 1, backend, [memory, rate])?;
        self.sound_on(1)
    }

    /// Makes a VM of that name on that host: MiB of random bytes, of which it writes MiB a second.
    ///
    /// # Errors
    /// When it is refused.
    pub(crate) fn create(
        &mut self,
        vm: &str,
        host: u8,
        backend: Backend,
        [memory, rate]: [u32; 2],
    ) -> anyhow::Result<()> {
        let options = backend.options();
        self.ask(&format!(
            "create vm {vm} --host host-{host} --memory {memory}MiB --fill random --pattern random \
             --dirty-rate {rate}MiB/s {options}"
        ))
        .map(drop)
    }

    /// Deletes a VM.
    ///
    /// # Errors
    /// When it cannot be.
    pub(crate) fn delete(&mut self, vm: &str) -> anyhow::Result<()> {
        self.ask(&format!("delete vm {vm}")).map(drop)
    }

    /// Proves that the VM runs on that host, in no migration, and that its guest writes on and has
    /// found no error in its memory.
    ///
    /// # Errors
    /// When one of these is not so.
    pub(crate) fn sound_on(&mut self, host: u8) -> anyhow::Result<()> {
        self.sound(VM, host).map(drop)
    }

    /// The same of a VM of that name; gives what is said of it.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn sound(&mut self, vm: &str, host: u8) -> anyhow::Result<Value> {
        let home = format!("hosts/host-{host}");
        let get = format!("get vm {vm}");
        let quiet = format!("RUNNING on host-{host}, in no migration");
        let written = |vm: &Value| number(&vm["guestCounters"]["pagesWritten"]).unwrap_or(0);
        let before = self.until(&get, &quiet, |vm| {
            is(&vm["state"], "RUNNING")
                && vm["host"] == home
                && vm["migration"] == ""
                && vm["dirtyLogging"] == false
        })?;
        let after = self.until(&get, "the guest writes on", |vm| {
            written(vm) > written(&before) + 100
        })?;
        let errors = number(&after["guestCounters"]["errors"]);
        ensure!(errors == Some(0), "the guest found errors: {after:#}");
        ensure!(after["host"] == home, "it is not on host-{host}: {after:#}");
        Ok(after)
    }

    /// Asks for a migration to that host, and gives its name.
    ///
    /// # Errors
    /// When it is refused.
    pub(crate) fn migrate(&mut self, to: u8, options: &str) -> anyhow::Result<String> {
        self.migrations += 1;
        let name = format!("m{}", self.migrations);
        self.ask(&format!(
            "migrate {VM} --to host-{to} --id {name} --no-wait {options}"
        ))?;
        Ok(name)
    }

    /// The same, and waits until some pages have been sent.
    ///
    /// # Errors
    /// When it ends before.
    pub(crate) fn migrate_until_pages_flow(
        &mut self,
        to: u8,
        options: &str,
    ) -> anyhow::Result<String> {
        self.migrate_until_sent(to, options, 1)
    }

    /// The same, and waits until so many MiB have been sent.
    ///
    /// # Errors
    /// When it ends before.
    pub(crate) fn migrate_until_sent(
        &mut self,
        to: u8,
        options: &str,
        mib: u64,
    ) -> anyhow::Result<String> {
        let name = self.migrate(to, options)?;
        let found = self.until(
            &format!("get migration {name}"),
            "pages flow",
            |migration| {
                let sent = number(&migration["progress"]["bytesTransferred"]);
                let flows = is(&migration["phase"], "PRECOPY_ACTIVE") && sent > Some(mib * MIB);
                ended(migration) || flows
            },
        )?;
        ensure!(!ended(&found), "it ended before: {found:#}");
        Ok(name)
    }

    /// Waits for a migration's end, which must be this one.
    ///
    /// # Errors
    /// When it ends otherwise, or not in time.
    pub(crate) fn ends(&mut self, name: &str, phase: &str) -> anyhow::Result<Value> {
        let last = self.end_of(name)?;
        ensure!(is(&last["phase"], phase), "not {phase}: {last:#}");
        Ok(last)
    }

    /// Waits for a migration's end, whatever it is.
    ///
    /// # Errors
    /// When it does not end in time.
    pub(crate) fn end_of(&mut self, name: &str) -> anyhow::Result<Value> {
        self.until(&format!("get migration {name}"), "it ended", ended)
    }

    // The end.

    /// Deletes the VM, stops everything in order and proves that nothing is left on any host.
    ///
    /// # Errors
    /// When something is.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.delete(VM)?;
        self.until("get leftovers", "nothing is left over", |answer| {
            answer["leftovers"].as_array().is_some_and(Vec::is_empty)
        })?;
        let numbers = self.hosts.numbers();
        for host in numbers.clone() {
            self.gone(host, "ls -A /srv/agent/vms", "VM directories")?;
            self.hosts.run(host, "kill $(cat /srv/agent.pid)")?;
        }
        self.hosts.run(1, "kill $(cat /srv/server.pid)")?;
        for host in numbers {
            self.gone(host, "pidof slat", "processes")?;
        }
        Ok(())
    }

    /// Waits until a command says nothing.
    fn gone(&mut self, host: u8, command: &str, what: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.hosts.try_run(host, command, SHORT)?;
            if said.out.trim().is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "host-{host} still has {what}: {}",
                said.out.trim()
            );
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Fleet<'_> {
    fn drop(&mut self) {
        for host in self.hosts.numbers() {
            // One that is switched off has nothing to end.
            drop(self.hosts.try_run(host, "killall -9 slat", SHORT));
        }
    }
}
