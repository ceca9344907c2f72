//! `slat create vm`.

use std::path::{Path, PathBuf};

use slat_proto::{
    json::to_json,
    model::{Format as TableFormat, HostName, Labels, MemoryBacking, VmName, VmSpec},
    v1,
};

use super::populated::started;
use crate::{
    client::{ClientArgs, Session},
    daemon::stop::Stop,
    failure::Failure,
    term::{
        out,
        units::{Rate, Size},
    },
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat create vm web                                      512 MiB, 1 vCPU, started
  slat create vm web --memory 2GiB --vcpus 2 --dirty-rate 64MiB/s
  slat create vm web --backend software --format sv48x4   RISC-V tables on any host
  slat create vm web --pattern hot-cold --fill random --host host-a
  slat create vm web --image guest.img --no-start
  slat create vm web --pattern random --write-percent 50 --seed 7
  slat create vm web --memory 4GiB --backing hugetlb-2m   2 MiB pages that the host set aside
  slat create vm web --memory 4GiB --prefault --numa-node 0
  slat create vm web --paging agent                       mappings can be listed, aged, protected
  slat create vm web --dry-run                            check everything, build nothing

The guest is memstress, which writes its memory, stamps every page and counts every stamp
that is not what it wrote; or, with --image, flat 64-bit code of your own.";

/// Options of `slat create`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CreateArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl CreateArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// A virtual machine
    #[command(after_help = EXAMPLES)]
    Vm(Box<VmOptions>),
}

/// How the second stage is walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BackendChoice {
    /// KVM where /dev/kvm can be opened, software elsewhere
    #[default]
    Auto,
    /// The kernel walks
    Kvm,
    /// The Common MMU is the page table
    Software,
}

impl BackendChoice {
    /// As a message.
    pub(crate) fn to_message(self) -> v1::Backend {
        match self {
            Self::Auto => v1::Backend::Unspecified,
            Self::Kvm => v1::Backend::Kvm,
            Self::Software => v1::Backend::Software,
        }
    }
}

/// How written pages are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DirtyEngineChoice {
    /// The host's choice, by what it has and by the VM's size
    #[default]
    Auto,
    /// One bit a page
    Bitmap,
    /// One ring of written pages a vCPU; KVM only
    Ring,
}

impl DirtyEngineChoice {
    /// As a message.
    pub(crate) fn to_message(self) -> v1::DirtyEngine {
        match self {
            Self::Auto => v1::DirtyEngine::Unspecified,
            Self::Bitmap => v1::DirtyEngine::Bitmap,
            Self::Ring => v1::DirtyEngine::Ring,
        }
    }
}

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BackingChoice {
    /// 2 MiB pages where they are cheap, made afterwards elsewhere; needs no setting of the host
    #[default]
    Auto,
    /// What transparent huge pages give at a touch; the host's shmem_enabled must allow it
    Thp,
    /// 2 MiB pages that the host set aside, all reserved when the VM is made
    #[value(name = "hugetlb-2m")]
    Hugetlb2M,
    /// 1 GiB pages that the host set aside; memory in steps of 1GiB
    #[value(name = "hugetlb-1g")]
    Hugetlb1G,
    /// 4 KiB pages alone
    Small,
}

impl BackingChoice {
    /// As a message.
    pub(crate) fn to_message(self) -> v1::MemoryBacking {
        match self {
            Self::Auto => MemoryBacking::Auto,
            Self::Thp => MemoryBacking::Thp,
            Self::Hugetlb2M => MemoryBacking::Hugetlb2M,
            Self::Hugetlb1G => MemoryBacking::Hugetlb1G,
            Self::Small => MemoryBacking::Small,
        }
        .to_message()
    }
}

/// Who decides which pages of a guest are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PagingChoice {
    /// The host's kernel, with huge pages
    Kernel,
    /// The Common MMU, in a process beside the VM's, by 4 KiB; KVM only
    Agent,
}

impl PagingChoice {
    /// As a message.
    pub(crate) fn to_message(self) -> v1::Paging {
        match self {
            Self::Kernel => v1::Paging::Kernel,
            Self::Agent => v1::Paging::Agent,
        }
    }
}

/// Layout of second-stage entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FormatChoice {
    /// Intel EPT, 4 levels
    Ept4,
    /// RISC-V Sv39x4
    Sv39x4,
    /// RISC-V Sv48x4
    Sv48x4,
    /// RISC-V Sv57x4
    Sv57x4,
    /// Intel EPT, 5 levels
    Ept5,
    /// AMD NPT, 4 levels
    Npt4,
    /// AMD NPT, 5 levels
    Npt5,
    /// Intel EPT, 4 levels, Accessed and Dirty kept by faults
    #[value(name = "ept4-noad")]
    Ept4NoAd,
    /// Intel EPT, 5 levels, Accessed and Dirty kept by faults
    #[value(name = "ept5-noad")]
    Ept5NoAd,
    /// arm64 stage 2, 40-bit addresses
    #[value(name = "arm64-ipa40")]
    Arm64Ipa40,
    /// arm64 stage 2, 48-bit addresses
    #[value(name = "arm64-ipa48")]
    Arm64Ipa48,
}

impl FormatChoice {
    /// As a message.
    pub(crate) fn to_message(self) -> v1::Format {
        match self {
            Self::Ept4 => TableFormat::Ept4,
            Self::Sv39x4 => TableFormat::Sv39x4,
            Self::Sv48x4 => TableFormat::Sv48x4,
            Self::Sv57x4 => TableFormat::Sv57x4,
            Self::Ept5 => TableFormat::Ept5,
            Self::Npt4 => TableFormat::Npt4,
            Self::Npt5 => TableFormat::Npt5,
            Self::Ept4NoAd => TableFormat::Ept4NoAd,
            Self::Ept5NoAd => TableFormat::Ept5NoAd,
            Self::Arm64Ipa40 => TableFormat::Arm64Ipa40,
            Self::Arm64Ipa48 => TableFormat::Arm64Ipa48,
        }
        .to_message()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Pattern {
    /// One page after the other
    Sequential,
    /// Uniformly at random
    Random,
    /// A tenth of the pages gets nine tenths of the visits
    HotCold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Fill {
    /// Zero, unpopulated
    Zero,
    /// Random bytes in every page
    Random,
}

#[derive(Clone, Debug, clap::Args)]
struct VmOptions {
    /// Its name, as web-1: lower-case letters, digits and dashes, at most 63
    name: VmName,
    /// Guest memory with its unit, as 2GiB: at least 8MiB, in steps of 2MiB
    #[arg(long, default_value = "512MiB", value_name = "SIZE")]
    memory: Size,
    /// What guest memory is made of, as hugetlb-2m; a migration keeps it
    #[arg(long, value_enum, default_value_t, value_name = "BACKING")]
    backing: BackingChoice,
    /// Memory of this NUMA node of the host alone, as 0: 0 to 1023 [default: any]
    #[arg(long, value_name = "NODE", value_parser = clap::value_parser!(u32).range(0..=1023))]
    numa_node: Option<u32>,
    /// What it is called by, as team=web,tier=front; who may see and change it can be told by them
    #[arg(
        long = "label",
        value_name = "KEY=VALUE",
        default_value = "",
        hide_default_value = true
    )]
    labels: Labels,
    /// Populate all of its memory before it starts, and show how far that is; a VM that does not
    /// answer meanwhile is waited for 60 s
    #[arg(long)]
    prefault: bool,
    /// Virtual CPUs, as 2: 1 to 64
    #[arg(long, default_value_t = 1, value_name = "N")]
    vcpus: u32,
    /// What walks the second stage, as software
    #[arg(long, value_enum, default_value_t, value_name = "BACKEND")]
    backend: BackendChoice,
    /// Layout of page-table entries, as sv48x4; software backend only [default: ept4]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<FormatChoice>,
    /// How written pages are told, as ring
    #[arg(long, value_enum, default_value_t, value_name = "ENGINE")]
    dirty_engine: DirtyEngineChoice,
    /// Who decides which of its pages are mapped, as agent [default: kernel]
    #[arg(long, value_enum, value_name = "WHO")]
    paging: Option<PagingChoice>,
    /// Host to place it on, as host-a [default: the one with most free memory]
    #[arg(long, value_name = "HOST")]
    host: Option<HostName>,
    /// memstress: order in which it visits pages, as random [default: sequential]
    #[arg(long, value_enum, value_name = "PATTERN", conflicts_with = "image")]
    pattern: Option<Pattern>,
    /// memstress: share of visits that write, in percent, as 50: 0 to 100 [default: 100]
    #[arg(long, value_name = "PERCENT", conflicts_with = "image")]
    write_percent: Option<u32>,
    /// memstress: ceiling for memory dirtied a second, as 64MiB/s; 0 is idle [default: none]
    #[arg(long, value_name = "RATE", conflicts_with = "image")]
    dirty_rate: Option<Rate>,
    /// memstress: what memory holds before the first instruction, as random [default: zero]
    #[arg(long, value_enum, value_name = "FILL", conflicts_with = "image")]
    fill: Option<Fill>,
    /// memstress: seed of pattern and fill, as 7 [default: 1]
    #[arg(long, value_name = "NUMBER", conflicts_with = "image")]
    seed: Option<u64>,
    /// Flat 64-bit code to run in place of memstress, as guest.img; at most 1 MiB
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Start it at once (the default)
    #[arg(long, overrides_with = "no_start")]
    start: bool,
    /// Leave it CREATED
    #[arg(long, overrides_with = "start")]
    no_start: bool,
    /// Check everything, build nothing
    #[arg(long)]
    dry_run: bool,
}

impl VmOptions {
    fn guest(&self) -> Result<v1::vm_spec::Guest, Failure> {
        use v1::memstress;
        if let Some(path) = &self.image {
            let image = read_image(path)?;
            return Ok(v1::vm_spec::Guest::RawImage(v1::RawImage {
                image,
                size_bytes: 0,
            }));
        }
        let pattern = match self.pattern {
            None => memstress::Pattern::Unspecified,
            Some(Pattern::Sequential) => memstress::Pattern::Sequential,
            Some(Pattern::Random) => memstress::Pattern::Random,
            Some(Pattern::HotCold) => memstress::Pattern::HotCold,
        };
        let fill = match self.fill {
            None => memstress::Fill::Unspecified,
            Some(Fill::Zero) => memstress::Fill::Zero,
            Some(Fill::Random) => memstress::Fill::Random,
        };
        Ok(v1::vm_spec::Guest::Memstress(v1::Memstress {
            pattern: pattern.into(),
            write_percent: self.write_percent,
            dirty_rate_bytes_per_second: self.dirty_rate.map(|rate| rate.0),
            fill: fill.into(),
            seed: self.seed.unwrap_or(0),
            ..Default::default()
        }))
    }

    fn spec(&self) -> Result<v1::VmSpec, Failure> {
        let spec = v1::VmSpec {
            memory_bytes: self.memory.0,
            vcpus: self.vcpus,
            backend: self.backend.to_message().into(),
            format: self.format.map_or(0, |format| format.to_message().into()),
            dirty_engine: self.dirty_engine.to_message().into(),
            backing: self.backing.to_message().into(),
            numa_node: self.numa_node,
            prefault: self.prefault,
            paging: self.paging.map_or(0, |paging| paging.to_message().into()),
            guest: Some(self.guest()?),
            labels: self.labels.to_field(),
        };
        // The server checks again. Here a mistake costs no round trip and has exit code 2.
        VmSpec::from_message(&spec)?;
        Ok(spec)
    }
}

/// At most a little more than the API takes is read, so that a wrong file is not loaded whole to be
/// refused.
fn read_image(path: &Path) -> Result<Vec<u8>, Failure> {
    use std::io::Read as _;
    let mut image = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take((1 << 20) + 1).read_to_end(&mut image))
        .map_err(|error| Failure::local(format!("cannot read {}: {error}", path.display())))?;
    if image.len() > 1 << 20 {
        return Err(Failure::Usage(format!(
            "{} is larger than 1 MiB, the most an image can be over the API",
            path.display()
        )));
    }
    Ok(image)
}

/// Creates it and starts it.
pub(crate) async fn run(args: CreateArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(options) = args.kind;
    let name = options.name.clone();
    let request = v1::CreateVmRequest {
        vm_id: name.id().to_owned(),
        spec: Some(options.spec()?),
        host: options
            .host
            .as_ref()
            .map(HostName::to_string)
            .unwrap_or_default(),
        validate_only: options.dry_run,
    };
    let mut stop = Stop::listen()?;
    let mut vms = session.client.vms();
    let answer = tokio::select! {
        answer = vms.create_vm(request) => answer,
        cause = stop.wait() => {
            if !options.dry_run {
                let id = name.id();
                out::say(format!(
                    "interrupted before there was an answer; {name} may have been created: slat get vm {id}"
                ));
            }
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    let mut vm = answer
        .map_err(|status| Failure::call(format!("create {name}"), status))?
        .into_inner();
    if !options.no_start && !options.dry_run {
        vm = started(&session, &vm, &mut stop).await?;
    }
    session.answer(
        || to_json(&vm),
        &vm.name,
        || {
            if options.dry_run {
                could_be(&name, &vm)
            } else {
                created(&vm)
            }
        },
    )
}

fn could_be(name: &VmName, vm: &v1::Vm) -> String {
    let place = match vm.host.as_str() {
        "" => String::new(),
        host => format!(" on {}", view::id(host)),
    };
    format!("{name} could be created{place}; nothing was built")
}

fn created(vm: &v1::Vm) -> String {
    let spec = vm.spec.clone().unwrap_or_default();
    format!(
        "{} ({}) {} on {}: {}, {} vCPU, {}",
        vm.name,
        vm.uid,
        view::vm_state(vm.state()),
        view::id(&vm.host),
        Size(spec.memory_bytes),
        spec.vcpus,
        view::backend(&spec),
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn options(line: &str) -> VmOptions {
        let words = ["slat", "create", "vm"];
        let cli = Cli::try_parse_from(words.into_iter().chain(line.split_whitespace())).unwrap();
        let Command::Create(args) = cli.command else {
            panic!("another command");
        };
        let Kind::Vm(options) = args.kind;
        *options
    }

    #[test]
    fn every_format_of_the_api_can_be_named() {
        for format in TableFormat::ALL {
            let options = options(&format!("web --backend software --format {format}"));
            assert_eq!(options.format.unwrap().to_message(), format.to_message());
        }
    }

    #[test]
    fn every_backing_of_the_api_can_be_named() {
        for backing in MemoryBacking::ALL {
            let options = options(&format!("web --memory 1GiB --backing {backing}"));
            let spec = options.spec().unwrap();
            assert_eq!(spec.backing(), backing.to_message());
        }
    }

    #[test]
    fn options_reach_the_message() {
        let spec = options(
            "web --memory 1GiB --vcpus 2 --backend software --format sv48x4 --pattern hot-cold \
             --write-percent 50 --dirty-rate 64MiB/s --fill random --seed 7 --dirty-engine ring \
             --numa-node 1 --prefault",
        )
        .spec()
        .unwrap();
        assert_eq!(spec.memory_bytes, 1 << 30);
        assert_eq!(spec.vcpus, 2);
        assert_eq!(spec.backend(), v1::Backend::Software);
        assert_eq!(spec.format(), v1::Format::Sv48x4);
        assert_eq!(spec.dirty_engine(), v1::DirtyEngine::Ring);
        assert_eq!((spec.numa_node, spec.prefault), (Some(1), true));
        let Some(v1::vm_spec::Guest::Memstress(guest)) = spec.guest else {
            panic!("no memstress");
        };
        assert_eq!(guest.pattern(), v1::memstress::Pattern::HotCold);
        assert_eq!(guest.write_percent, Some(50));
        assert_eq!(guest.dirty_rate_bytes_per_second, Some(64 << 20));
        assert_eq!(guest.fill(), v1::memstress::Fill::Random);
        assert_eq!(guest.seed, 7);
    }

    #[test]
    fn what_the_server_would_refuse_is_a_usage_error() {
        for line in [
            "web --memory 3MiB",
            "web --vcpus 0",
            "web --memory 512MiB --backing hugetlb-1g",
            "web --write-percent 101",
            "web --backend kvm --format ept4",
        ] {
            let failure = options(line).spec().unwrap_err();
            assert_eq!(failure.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn a_numa_node_that_no_host_has_is_refused_by_its_option() {
        assert_eq!(options("web --numa-node 1023").numa_node, Some(1023));
        for node in ["1024", "4294967295"] {
            let words = ["slat", "create", "vm", "web", "--numa-node", node];
            let error = Cli::try_parse_from(words).unwrap_err().to_string();
            assert!(error.contains("--numa-node"), "{error}");
        }
    }

    #[test]
    fn the_last_of_start_and_no_start_counts() {
        assert!(!options("web").no_start);
        assert!(options("web --start --no-start").no_start);
        assert!(!options("web --no-start --start").no_start);
    }

    #[test]
    fn an_image_too_large_is_not_sent() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![0; (1 << 20) + 1]).unwrap();
        assert_eq!(read_image(&path).unwrap_err().exit_code(), 2);
        std::fs::write(&path, [0xf4]).unwrap();
        assert_eq!(read_image(&path).unwrap(), [0xf4]);
        assert!(read_image(&dir.path().join("none")).is_err());
    }
}
