//! Deaths and returns: which process is whose, killing it, and starting it again.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use slat_record::{dir::VmDir, journal::Journal};

use super::{FENCE_HOOK, Fleet, list};
use crate::process::VmProcess;

impl Fleet {
    /// kill -9 of the server.
    pub fn kill_server(&mut self) {
        self.server.kill();
    }

    /// The server again, on its state and port.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_server(&mut self) -> anyhow::Result<()> {
        self.server.start().map(drop)
    }

    /// kill -9 of an agent. Its VMs' processes live on.
    pub fn kill_agent(&mut self, host: &str) {
        self.host_mut(host).daemon.kill();
    }

    /// The process of an agent that runs.
    ///
    /// # Errors
    /// When it does not run.
    pub fn agent_pid(&mut self, host: &str) -> anyhow::Result<u32> {
        let daemon = &self.host_mut(host).daemon;
        daemon.pid().context("the agent does not run")
    }

    /// A fence may decide for this VM's destination although no journal gave the VM away.
    pub fn may_be_fenced(&mut self, uid: &str) {
        self.journals.may_be_fenced(uid);
    }

    /// Puts the server's hook there: a shell script with these lines.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_fence_hook(&self, lines: &str) -> anyhow::Result<()> {
        let path = self.root().join(FENCE_HOOK);
        // Written by another process and put in its place whole: what this process has open for
        // writing its children have too, and nobody can run it meanwhile; nor can what runs be
        // written.
        let aside = path.with_extension("new");
        let mut shell = Command::new("sh");
        let script = "cat > \"$0\" && chmod 755 \"$0\" && mv \"$0\" \"$1\"";
        shell.args(["-c", script]).args([&aside, &path]);
        let mut shell = shell.stdin(Stdio::piped()).spawn()?;
        let mut input = shell.stdin.take().context("no standard input")?;
        write!(input, "#!/bin/sh\n{lines}\n")?;
        drop(input);
        let status = shell.wait()?;
        ensure!(status.success(), "the hook is not written: {status}");
        Ok(())
    }

    /// The agent again, on its state and port.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&mut self, host: &str) -> anyhow::Result<()> {
        self.host_mut(host).daemon.start().map(drop)
    }

    /// Names of all hosts, and whether their agents run.
    pub fn host_names(&self) -> impl Iterator<Item = (&'static str, bool)> {
        self.hosts
            .iter()
            .map(|host| (host.name, host.daemon.is_running()))
    }

    /// The folder of a host's VM directories, each called by its VM's uid.
    #[must_use]
    pub fn host_vms(&self, host: &str) -> PathBuf {
        self.host(host).state.join("vms")
    }

    /// The directory of a VM on a host, by the name in its journal; one that is not there when none
    /// has it.
    #[must_use]
    pub fn vm_dir(&self, host: &str, vm: &str) -> PathBuf {
        let id = vm.strip_prefix("vms/").unwrap_or(vm);
        let vms = self.host_vms(host);
        let is_its = |dir: &PathBuf| {
            let journal = VmDir::new(dir).journal();
            Journal::read(&journal).is_ok_and(|state| state.is_some_and(|state| state.vm == id))
        };
        list(&vms)
            .into_iter()
            .find(is_its)
            .unwrap_or_else(|| vms.join(id))
    }

    /// The living process of a VM on a host.
    ///
    /// # Errors
    /// When there is none.
    pub fn vm_process(&self, host: &str, vm: &str) -> anyhow::Result<VmProcess> {
        VmProcess::behind(&self.vm_dir(host, vm))?
            .with_context(|| format!("{vm} has no process on {host}"))
    }
}
