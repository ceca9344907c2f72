//! The command line as a whole. Each command's own options stand in its own file.

use clap::{Parser, Subcommand, builder::styling};

use crate::{client::ClientArgs, command, demo, failure::EXIT_CODES};

const EXAMPLES: &str = "\
Examples:
  slat demo                                   watch a running VM move between two hosts
  slat up &                                   a server and this host, with certificates
  slat create vm web --memory 512MiB --dirty-rate 64MiB/s
  slat migrate web --to host-b                move it while it runs
  slat get vms --watch

";

const STYLES: styling::Styles = styling::Styles::styled()
    .header(styling::AnsiColor::Green.on_default().bold())
    .usage(styling::AnsiColor::Green.on_default().bold())
    .literal(styling::AnsiColor::Cyan.on_default());

/// Move running KVM virtual machines between hosts, and work with their memory while they run
#[derive(Debug, Parser)]
#[command(
    name = "slat",
    version,
    styles = STYLES,
    after_help = const_format(),
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

fn const_format() -> String {
    format!("{EXAMPLES}{EXIT_CODES}")
}

/// Every command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show a running VM move between two hosts, in a fleet made for this run
    Demo(demo::args::DemoArgs),
    /// Run a server, agents and certificates for one machine
    Up(command::up::UpArgs),
    /// Run the control plane
    Server(command::server::ServerArgs),
    /// Run the agent of this host
    Agent(command::agent::AgentArgs),
    /// Run one VM's process (agents start it)
    #[command(hide = true)]
    Vm(command::vm::VmArgs),
    /// Resolve the page faults of one VM's guest (agents start it)
    #[command(hide = true)]
    Pager(command::pager::PagerArgs),
    /// Write one save's file (agents start it)
    #[command(hide = true)]
    SaveWriter(command::save_writer::SaveWriterArgs),
    /// Show hosts, VMs, migrations, saves or leftovers
    Get(command::get::GetArgs),
    /// Create a VM
    Create(command::create::CreateArgs),
    /// Start a VM that was created
    Start(command::life::LifeArgs),
    /// Stop a VM's vCPUs; its memory stays
    Pause(command::life::LifeArgs),
    /// Resume a paused VM
    Resume(command::life::LifeArgs),
    /// Delete VMs and free their memory; remove saves; forget hosts; end leftovers
    Delete(command::delete::DeleteArgs),
    /// Move a running VM to another host
    Migrate(command::migrate::MigrateArgs),
    /// Cancel a migration; the VM stays where it is
    Cancel(command::cancel::CancelArgs),
    /// Save a VM to a file of its host, while it runs
    Save(command::save::SaveArgs),
    /// Make a VM of a save
    Restore(command::restore::RestoreArgs),
    /// Make copies of a VM on its host
    Fork(command::fork::ForkArgs),
    /// Try a VM's page source again that failed
    Retry(command::retry::RetryArgs),
    /// Compare a save with its checksums
    Verify(command::verify::VerifyArgs),
    /// Let no new VM and no migration go to a host
    Cordon(command::cordon::CordonArgs),
    /// Let VMs and migrations go to a host again
    Uncordon(command::cordon::CordonArgs),
    /// Make sure that nothing of a host runs any more
    Fence(command::fence::FenceArgs),
    /// Make a leftover of a migration a VM that can run again
    Adopt(command::leftover::AdoptArgs),
    /// Inspect and change a VM's memory: slots, dirty pages, mappings, digest
    Memory(command::memory::MemoryArgs),
    /// Make and renew the certificates that hosts, servers and users show each other
    Pki(command::pki::PkiArgs),
    /// Print the version
    Version(command::version::VersionArgs),
    /// Print the completion script of a shell
    Completion(command::completion::CompletionArgs),
    /// Write the manual pages
    Man(command::man::ManArgs),
}

impl Command {
    /// Options of a command that asks an endpoint.
    pub(crate) fn client(&self) -> Option<&ClientArgs> {
        match self {
            Self::Get(args) => Some(args.client()),
            Self::Create(args) => Some(args.client()),
            Self::Start(args) | Self::Pause(args) | Self::Resume(args) => Some(args.client()),
            Self::Delete(args) => Some(args.client()),
            Self::Migrate(args) => Some(args.client()),
            Self::Cancel(args) => Some(args.client()),
            Self::Cordon(args) | Self::Uncordon(args) => Some(args.client()),
            Self::Fence(args) => Some(args.client()),
            Self::Adopt(args) => Some(args.client()),
            Self::Save(args) => Some(args.client()),
            Self::Restore(args) => Some(args.client()),
            Self::Fork(args) => Some(args.client()),
            Self::Retry(args) => Some(args.client()),
            Self::Verify(args) => Some(args.client()),
            Self::Memory(args) => Some(args.client()),
            Self::Demo(_)
            | Self::Up(_)
            | Self::Server(_)
            | Self::Agent(_)
            | Self::Vm(_)
            | Self::Pager(_)
            | Self::SaveWriter(_)
            | Self::Pki(_)
            | Self::Version(_)
            | Self::Completion(_)
            | Self::Man(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("slat").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_with_examples() {
        fn check(command: &clap::Command, path: &str) {
            if command.is_hide_set() || command.get_name() == "help" {
                return;
            }
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Examples:"), "{path} has no examples");
            assert!(
                command.get_about().is_some(),
                "{path} says not what it does"
            );
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some() || argument.is_hide_set(),
                    "{path} --{} has no help",
                    argument.get_id()
                );
            }
            for sub in command.get_subcommands() {
                check(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        let mut command = Cli::command();
        command.build();
        check(&command, "slat");
    }

    /// An option with a value says how the value looks: `as 50ms`, a default, or the values there
    /// are.
    #[test]
    fn every_value_has_an_example() {
        fn check(command: &clap::Command, path: &str, found: &mut Vec<String>) {
            if command.is_hide_set() || command.get_name() == "help" {
                return;
            }
            for argument in command.get_arguments() {
                let takes = argument.get_action().takes_values() && !argument.is_hide_set();
                let listed = !argument.get_possible_values().is_empty();
                let defaults = !argument.get_default_values().is_empty();
                let help = argument.get_long_help().or(argument.get_help());
                let help = help.map(ToString::to_string).unwrap_or_default();
                let taught = help.contains(" as ")
                    || help.contains("(as ")
                    || listed
                    || defaults
                    || help.contains("shows it");
                if takes && !taught {
                    found.push(format!("{path} {}: {help}", argument.get_id()));
                }
            }
            for sub in command.get_subcommands() {
                check(sub, &format!("{path} {}", sub.get_name()), found);
            }
        }
        let mut command = Cli::command();
        command.build();
        let mut found = Vec::new();
        check(&command, "slat", &mut found);
        assert_eq!(found, [""; 0], "without an example");
    }

    #[test]
    fn the_top_help_stays_small() {
        let help = Cli::command().term_width(100).render_help().to_string();
        let golden = include_str!("../tests/golden/help.txt");
        assert_eq!(help, golden, "now:\n{help}");
    }

    #[test]
    fn what_the_pages_promise_parses() {
        for line in [
            "demo",
            "demo --backend software --format sv48x4 --memory 64MiB --migrations 3 --output json",
            "demo --vcpus 2 --dirty-rate 128MiB/s --streams 4 --max-downtime 50ms --keep",
            "server --listen 127.0.0.1:0 --state-dir /tmp/s --log-format json --log-filter debug",
            "agent --name host-a --server 127.0.0.1:7400 --memory 4GiB --data-ip 127.0.0.1",
            "agent --data-ports 49152-49215 --vm-log-size 1MiB",
            "agent --data-ports 0",
            "agent --vm-seccomp kill --vm-core-dumps --vm-cgroup /sys/fs/cgroup/slat",
            "agent --vm-seccomp off --vm-cgroup none",
            "agent --listen 0.0.0.0:7401 --tls-dir /etc/slat/tls --advertise a.example:7401 --data-ip 192.0.2.1",
            "up",
            "up --agent host-a --agent host-b --memory 2GiB --listen 127.0.0.1:0 --state-dir /tmp/s",
            "server --tls-dir /etc/slat/tls --access /etc/slat/access.yaml",
            "agent --label rack=r1,disk=nvme --insecure-plaintext",
            "get hosts --tls-dir /tmp/admin",
            "get hosts",
            "get host host-a -o json",
            "get vms --watch",
            "get vm web --server unix:/run/vm.sock",
            "get vms --server 192.0.2.1:7401 --agent host-a",
            "pause vm web --agent host-a --server 192.0.2.1:7401",
            "get migrations --vm web",
            "get migration m1 --watch",
            "create vm web --memory 1GiB --vcpus 2 --backend software --format ept4 --host host-a",
            "create vm web --pattern hot-cold --write-percent 50 --dirty-rate 64MiB/s --fill random --seed 7",
            "create vm web --no-start --dry-run -o json",
            "start vm web",
            "pause vm web",
            "resume vms web db",
            "delete vm web",
            "delete vm web db cache",
            "delete vm web --host host-a",
            "delete vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --force",
            "delete host host-a --give-up-vms",
            "delete leftover --uid u --host host-a --give-up",
            "get leftovers --host host-a",
            "get vms -o wide --sort-by -memory --no-headers",
            "get vms --watch --reconnect-timeout 5m",
            "get vms --host host-a -o yaml",
            "get vm --uid u",
            "get migrations --limit 20 -o name",
            "adopt vm --uid u --host host-a --give-up",
            "cordon host host-a",
            "uncordon host host-a host-b",
            "fence host host-a",
            "fence hosts host-a host-b --force",
            "pause vm web --host host-a",
            "migrate web --host host-a --to host-b",
            "migrate --uid u --to host-b",
            "memory slots --uid u",
            "memory dirty web --host host-a",
            "cancel m1 m2",
            "man --dir /tmp/man",
            "migrate web --to host-b --max-downtime 300ms --max-total-time 10m --streams 4",
            "migrate vms/web --to hosts/b --max-bandwidth 1GiB/s --max-iterations 5 --verify after-commit",
            "migrate web --to b --on-timeout force-switchover --id m1 --dry-run",
            "migrate web --to b --no-wait",
            "cancel m1",
            "memory slots web",
            "memory dirty web --cursor backup --watch",
            "memory dirty web --stop",
            "memory invalidate web --base 0x200000 --size 2MiB",
            "memory digest web",
            "memory add-slot web --slot 3 --base 4GiB --size 64MiB --read-only",
            "memory delete-slot web --slot 3",
            "memory move-slot web --slot 3 --base 8GiB",
            "memory set-slot web --slot 3 --access read-only",
            "memory set-slot web --slot 3 --access read-write --generation 7",
            "memory discard web --base 0x200000 --size 2MiB",
            "memory working-set web",
            "memory working-set web --cursor backup --end",
            "memory prefault web",
            "memory prefault web --host host-a --base 0x200000 --size 64MiB",
            "memory mappings web --host host-a",
            "save vm web",
            "save vm web --as web-2 --base web-1 --compress 3 --no-wait",
            "save vm --uid u --as web-2 --base hosts/a/saves/web-1 --reconnect-timeout 5m",
            "restore vm web-1",
            "restore vm hosts/a/saves/web-1 --as copy --lazy --start --paging agent",
            "restore vm web-1 --host a --dry-run -o json",
            "fork vm web --as a,b,c --paused",
            "retry vm web db",
            "verify save web-1 --host a",
            "get saves -o wide --host a",
            "get save web-1 --watch",
            "delete save web-1 hosts/a/saves/web-2",
            "create vm web --paging agent",
            "agent --save-dir /srv/saves",
            "pki init --domain example.org",
            "pki init --dir /srv/pki --domain example.org -o json",
            "pki issue agent host-a --dir pki --out tls --lifetime 90d",
            "pki issue user ann --out tls",
            "pki renew --out a --out b --within 30d",
            "pki list --all -o wide",
            "pki revoke agent/host-a",
            "pki publish --out a --out b",
            "pki publish --out a --force",
            "pki rotate",
            "pki retire --force",
            "version -o json",
            "completion bash",
        ] {
            if let Err(error) = parse(line) {
                panic!("slat {line}: {error}");
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "",
            "get",
            "get everything",
            "migrate web",
            "migrate --to b",
            "migrate web --to b --max-downtime 300",
            "migrate web --to Host_B",
            "create vm UPPER",
            "create vm web --memory lots",
            "create vm web --image x --pattern random",
            "cancel",
            "delete vm",
            "memory add-slot web --slot 3",
            "memory dirty web --stop --watch",
            "completion tcsh",
            "server --listen localhost",
            "get vms -o xml",
            "get vms --agent Host_A",
            "get migration m1 --limit 3",
            "delete vm web --force",
            "delete vm --host host-a",
            "delete vm web --uid u --host host-a",
            "delete host",
            "adopt vm --uid u",
            "create vm web --memory 512",
            "create vm web --dirty-rate 64",
            "migrate web --to b --max-bandwidth 100",
            "memory invalidate web --base 0x200000 --size 4096",
            "memory add-slot web --slot 3 --base 4096 --size 2MiB",
            "memory set-slot web --slot 3",
            "memory set-slot web --slot 3 --access write-only",
            "save vm",
            "save vm web --compress 20",
            "restore vm",
            "fork vm web",
            "fork vm web --as Upper",
            "get save Web_1",
            "delete save",
            "create vm web --paging nobody",
            "memory discard web",
            "memory discard web --base 0x200000",
            "agent --memory 1073741824",
            "agent --vm-seccomp maybe",
            "agent --vm-cgroup slat",
            "demo --memory 512",
            "man",
            "pki",
            "pki init",
            "pki issue pager x --out y",
            "pki issue agent x",
            "pki renew",
            "pki revoke",
        ] {
            assert!(parse(line).is_err(), "slat {line}");
        }
    }
}
