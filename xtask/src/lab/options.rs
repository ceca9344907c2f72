//! What `cargo xtask lab` is asked for.

use clap::Args;

use super::kind::Kind;

/// Of a run that names none.
const SEED: u64 = 1;

const AFTER_HELP: &str = "\
Examples:
  cargo xtask lab x86_64                          two hosts with kvm-amd, everything
  cargo xtask lab riscv64 --brief                 what CI does, on two RISC-V hosts
  cargo xtask lab x86_64 -- migrate::             the tests whose names contain `migrate::`
  cargo xtask lab x86_64 --list                   their names
  cargo xtask lab x86_64 --hosts 3 -- kill:: downtime::
  cargo xtask lab x86_64 -- system::crash::kvm    some of the whole-system tests, in one host
  cargo xtask lab riscv64 --seed 7 -- storm       twenty migrations, with deaths by that seed
  cargo xtask lab x86_64 --times 10 -- vmm::service::tests_dirty_log
  cargo xtask lab x86_64 --steady -- system::     in hosts whose processors take turns
  cargo xtask lab mixed                           hosts of both kinds in one fleet

The first run fetches QEMU, a kernel and a shell as Debian packages (about 200 MB; for riscv64 also
a compiler and a linker where the machine has none) and unpacks them below target/lab; nothing is
installed, and later runs need no network. It needs apt, dpkg and setpriv.

QEMU runs each of a host's processors on a thread of its own. A guest of four vCPUs on kvm-amd then
now and then takes a page fault where its own code is, and ends with a triple fault: in two runs of
six of dirty_log_perf_test, in none of twelve with --steady, which CI takes for these hosts.

Each test says one line with its figures. What hosts' consoles, the server, the agents and the VMs
wrote is below target/lab/MACHINE/logs afterwards. Ctrl-C ends every host at once.";

/// What to run.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    /// What the hosts are
    #[arg(value_enum)]
    pub(crate) kind: Kind,
    /// How many, 2 to 9; each has two processors and up to 2 GiB
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=9))]
    pub(crate) hosts: u8,
    /// The part that CI runs: what concerns several hosts, in a few minutes
    #[arg(long)]
    pub(crate) brief: bool,
    /// Build the programs with this profile of cargo's and not with the usual ones
    #[arg(long)]
    pub(crate) profile: Option<String>,
    /// What becomes of the migrations of `storm`, and when
    #[arg(long, default_value_t = SEED)]
    pub(crate) seed: u64,
    /// Make each test that many times: for one that fails now and then
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) times: u32,
    /// Let the processors of a host take turns on one of QEMU's threads: slower
    #[arg(long)]
    pub(crate) steady: bool,
    /// Say the names of the tests, run none
    #[arg(long)]
    pub(crate) list: bool,
    /// Fetch the packages and build the programs, and boot nothing
    #[arg(long, conflicts_with = "list")]
    pub(crate) build: bool,
    /// Only tests whose names contain one of these
    #[arg(last = true, value_name = "FILTER")]
    pub(crate) filter: Vec<String>,
}

impl Options {
    /// The brief form on two hosts.
    pub(crate) fn brief(kind: Kind) -> Self {
        Self {
            kind,
            hosts: 2,
            brief: true,
            list: false,
            build: false,
            profile: None,
            seed: SEED,
            times: 1,
            steady: false,
            filter: Vec::new(),
        }
    }

    /// Whether a test of that name is asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        let mut words = self.filter.iter();
        self.filter.is_empty() || words.any(|word| name.contains(word.as_str()))
    }
}
