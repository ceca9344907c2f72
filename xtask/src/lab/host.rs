//! One emulated host, as a process of its emulator.
//!
//! Its kernel's console is a file, `host-N.console`; what its emulator says, `host-N.emulator`.
//!
//! *Its end*: dropping a [`Host`] kills the emulator. When this tool dies, by Ctrl-C or otherwise,
//! the kernel kills the emulator (`setpriv --pdeathsig`), so none stays in any case.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use slat_packages::Root;

use super::{
    console::{Console, Said},
    image::Image,
    kind::Kind,
    machine::Machine,
    network,
};

/// From power to the first program. A busy machine takes a fifth of it.
const BOOT: Duration = Duration::from_secs(180);
/// For a command that does what takes no time.
pub(crate) const SHORT: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What all hosts of one kind have.
#[derive(Clone, Debug)]
pub(crate) struct Kit {
    pub(crate) machine: Machine,
    pub(crate) root: Root,
    pub(crate) image: Image,
}

/// What the hosts of a lab are.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    /// One for each kind of host.
    pub(crate) kits: Vec<Kit>,
    /// Sockets and consoles.
    pub(crate) folder: PathBuf,
    pub(crate) hosts: u8,
    /// See [`Machine::emulator`].
    pub(crate) steady: bool,
}

impl Plan {
    /// What a host is.
    pub(crate) fn machine(&self, host: u8) -> Machine {
        self.kind.machine(host)
    }

    fn kit(&self, host: u8) -> anyhow::Result<&Kit> {
        let machine = self.machine(host);
        let kit = self.kits.iter().find(|kit| kit.machine == machine);
        kit.with_context(|| format!("nothing to boot host-{host} from"))
    }
}

/// A host that is switched on.
#[derive(Debug)]
pub(crate) struct Host {
    number: u8,
    child: Child,
    console: Console,
}

impl Host {
    /// Switches one on; it boots meanwhile. See [`Machine::emulator`] for its `features`.
    ///
    /// # Errors
    /// When its emulator cannot be started.
    pub(crate) fn power_on(plan: &Plan, number: u8, features: &str) -> anyhow::Result<Self> {
        let Kit {
            machine,
            root,
            image,
        } = plan.kit(number)?;
        let mut emulator = machine.emulator(root, features, plan.steady);
        emulator.args(["-nodefaults", "-display", "none", "-monitor", "none"]);
        emulator.arg("-no-reboot");
        emulator.arg("-kernel").arg(&image.kernel);
        emulator.arg("-initrd").arg(&image.files);
        let arguments = machine.kernel_arguments();
        emulator.args(["-append", &format!("{arguments} lab_host={number}")]);
        emulator.args(["-serial", &format!("file:host-{number}.console")]);
        emulator.args(["-device", "virtio-serial-pci", "-device"]);
        emulator.arg("virtserialport,chardev=lab,name=lab");
        emulator.args(["-chardev", "stdio,id=lab,signal=off"]);
        emulator.args(["-device", "virtio-rng-pci"]);
        network::connect(&mut emulator, number, plan.hosts);
        let log = plan.folder.join(format!("host-{number}.emulator"));
        let log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let mut child = bound_to_us(&emulator)
            .current_dir(&plan.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("starting setpriv (package util-linux)")?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the emulator has no pipes");
        };
        Ok(Self {
            number,
            child,
            console: Console::new(to, from),
        })
    }

    /// Waits until the first host's emulator has a socket for each other host's.
    ///
    /// # Errors
    /// When it does not by then.
    pub(crate) fn takes_connections(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT;
        for other in 2..=plan.hosts {
            let socket = plan.folder.join(network::socket(other));
            while !socket.exists() {
                // What it said is told by whoever waits for it to boot.
                if self.child.try_wait()?.is_some() {
                    return Ok(());
                }
                if Instant::now() > deadline {
                    bail!("{} opens no socket for host-{other}", self.name());
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }

    /// Waits until it serves commands.
    ///
    /// # Errors
    /// When it does not come up, with what it and its emulator said last.
    pub(crate) fn booted(&mut self, plan: &Plan) -> anyhow::Result<()> {
        self.console.ready(Instant::now() + BOOT).map_err(|error| {
            let last = |ending| {
                let name = format!("host-{}.{ending}", self.number);
                let text = std::fs::read(plan.folder.join(name)).unwrap_or_default();
                slat_packages::program::tail(&String::from_utf8_lossy(&text))
            };
            let name = self.name();
            error.context(format!(
                "booting {name}: its console ends with\n{}\nand its emulator with\n{}",
                last("console"),
                last("emulator"),
            ))
        })
    }

    /// `host-1`, and so on.
    pub(crate) fn name(&self) -> String {
        format!("host-{}", self.number)
    }

    /// Runs a command of its shell, whatever its exit code.
    ///
    /// # Errors
    /// When the host does not answer in time.
    pub(crate) fn try_run(&mut self, command: &str, bound: Duration) -> anyhow::Result<Said> {
        let name = self.name();
        self.console.run(command, bound).context(name)
    }

    /// Runs a command that must end with 0 and takes no time, and gives back what it printed.
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn run(&mut self, command: &str) -> anyhow::Result<String> {
        let name = self.name();
        let said = self.try_run(command, SHORT)?;
        said.good(command).context(name)
    }

    /// Cuts its power: nothing in it ends in order.
    pub(crate) fn power_off(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.power_off();
    }
}

/// Makes the emulator die with this thread, which is the tool's first.
fn bound_to_us(emulator: &Command) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    command
        .arg(emulator.get_program())
        .args(emulator.get_args());
    for (key, value) in emulator.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    command
}
