//! The emulated machines: how each is started with an image and a block of queries, and what it
//! prints.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use slat_packages::{
    Root,
    program::{bounded, succeeds, tail},
};

use super::{
    answer::{self, Answer, Unsupported},
    layout::{Layout, RAM, TABLE_FRAMES},
    query::{self, Query},
};

/// No run takes a tenth of this on an idle machine.
const BOUND: Duration = Duration::from_secs(60);
const BUILD_BOUND: Duration = Duration::from_secs(30);

/// What a machine is given.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The tables.
    pub image: &'a [u8],
    /// The register of the root.
    pub root: u64,
    /// The questions.
    pub queries: &'a [Query],
}

/// A machine.
#[derive(Clone, Debug)]
pub struct EmulatedCpu {
    /// Name and version of the emulator.
    pub name: String,
    /// Its memory.
    pub layout: Layout,
    root: Root,
    folder: PathBuf,
    sources: PathBuf,
    flags: u64,
    kind: Kind,
}

/// Extensions of a RISC-V hart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiscV {
    /// The hart sets Accessed and Dirty (Svadu) instead of faulting (Svade).
    pub svadu: bool,
    /// Entries have memory types, and `menvcfg` enables them.
    pub svpbmt: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    RiscV { cpu: String },
    QemuX86 { physical_bits: u32 },
    Bochs { model: &'static str },
}

/// Bochs allots its memory in blocks as they are first touched, and reads a file into it as if they
/// followed each other: a file must lie within one block. This is the largest there is.
const BOCHS_BLOCK_KIB: u64 = 8192;
const _: () = assert!(TABLE_FRAMES as u64 * 4 <= BOCHS_BLOCK_KIB);

/// Physical address bits of Bochs, whatever the processor: a choice of its build.
pub const BOCHS_PHYSICAL_BITS: u32 = 40;

/// `menvcfg` of RISC-V.
const PBMTE: u64 = 1 << 62;
const ADUE: u64 = 1 << 61;

impl EmulatedCpu {
    /// QEMU's RISC-V hart with the H extension and no Svnapot. `folder` is where it works,
    /// `sources` where the programs' sources are.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn riscv(root: Root, folder: &Path, sources: &Path, hart: RiscV) -> anyhow::Result<Self> {
        let RiscV { svadu, svpbmt } = hart;
        let cpu = format!(
            "rv64,h=true,svnapot=false,svpbmt={svpbmt},svadu={svadu},svade={}",
            !svadu
        );
        let mut machine = Self {
            name: String::new(),
            layout: Layout { base: 0x8000_0000 },
            root,
            folder: folder.to_owned(),
            sources: sources.to_owned(),
            flags: if svpbmt { PBMTE } else { 0 } | if svadu { ADUE } else { 0 },
            kind: Kind::RiscV { cpu },
        };
        fs::create_dir_all(folder)?;
        machine.name = machine.version("usr/bin/qemu-system-riscv64", "--version", "QEMU ")?;
        machine.build_riscv()?;
        Ok(machine)
    }

    /// QEMU's x86 processor with SVM and nested paging, in `levels` levels (nested paging has as
    /// many as the host's own) and with `physical_bits` of physical address.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn svm(
        root: Root,
        folder: &Path,
        sources: &Path,
        levels: u32,
        physical_bits: u32,
    ) -> anyhow::Result<Self> {
        let mut machine = Self {
            name: String::new(),
            layout: Layout { base: 0 },
            root,
            folder: folder.to_owned(),
            sources: sources.to_owned(),
            flags: u64::from(levels == 5),
            kind: Kind::QemuX86 { physical_bits },
        };
        fs::create_dir_all(folder)?;
        machine.name = machine.version("usr/bin/qemu-system-x86_64", "--version", "QEMU ")?;
        machine.build_x86("svm")?;
        Ok(machine)
    }

    /// Bochs' x86 processor `model` with `extension`: `vmx` and extended page tables, or `svm` and
    /// nested paging. It has [`BOCHS_PHYSICAL_BITS`] of physical address and pages itself in four
    /// levels.
    ///
    /// # Errors
    /// When the program cannot be built.
    pub fn bochs(
        root: Root,
        folder: &Path,
        sources: &Path,
        model: &'static str,
        extension: &str,
    ) -> anyhow::Result<Self> {
        let mut machine = Self {
            name: String::new(),
            layout: Layout { base: 0 },
            root,
            folder: folder.to_owned(),
            sources: sources.to_owned(),
            flags: 0,
            kind: Kind::Bochs { model },
        };
        fs::create_dir_all(folder)?;
        machine.name = machine.version("usr/bin/bochs-bin", "--help", "Bochs ")?;
        machine.build_x86(extension)?;
        Ok(machine)
    }

    /// `word` and the version that follows it in what the program says.
    fn version(&self, program: &str, argument: &str, word: &str) -> anyhow::Result<String> {
        let mut command = self.root.command(program);
        command.arg(argument);
        let (_, said) = bounded(&command, &self.folder, "version", BUILD_BOUND)?;
        let version = said
            .split_whitespace()
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
            .with_context(|| format!("{program} says no version: {}", tail(&said)))?;
        Ok(format!("{word}{version}"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn build_riscv(&self) -> anyhow::Result<()> {
        let tool = |name: &str| {
            self.root
                .command(&format!("usr/bin/riscv64-linux-gnu-{name}"))
        };
        let mut assemble = tool("as");
        assemble
            .arg("-march=rv64ima_zicsr")
            .args(["--defsym", &format!("QUERIES={:#x}", self.layout.queries())])
            .args(["--defsym", &format!("RESULTS={:#x}", self.layout.results())])
            .args(["-o", "walker.o"])
            .arg(self.sources.join("riscv/walker.S"));
        succeeds(&assemble, &self.folder, "as", BUILD_BOUND)?;
        let mut link = tool("ld");
        link.args([
            "--build-id=none",
            "--defsym",
            &format!("BASE={:#x}", self.layout.base),
        ])
        .arg("-T")
        .arg(self.sources.join("riscv/walker.ld"))
        .args(["-o", "walker.elf", "walker.o"]);
        succeeds(&link, &self.folder, "ld", BUILD_BOUND)?;
        let mut copy = tool("objcopy");
        copy.args(["-O", "binary", "walker.elf", "walker.raw"]);
        succeeds(&copy, &self.folder, "objcopy", BUILD_BOUND)?;
        Ok(())
    }

    /// Builds the ROM with the machine's own compiler and binutils.
    fn build_x86(&self, extension: &str) -> anyhow::Result<()> {
        let source = |name: &str| self.sources.join("x86").join(name);
        let address = |name: &str, address: u64| format!("-D{name}={address:#x}ull");
        let mut compile = Command::new("gcc");
        compile.args([
            "-m64",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-ffreestanding",
            "-fno-pic",
        ]);
        compile.args([
            "-fno-stack-protector",
            "-fcf-protection=none",
            "-fno-asynchronous-unwind-tables",
        ]);
        compile.args([
            "-mno-red-zone",
            "-mgeneral-regs-only",
            "-nostdlib",
            "-static",
            "-no-pie",
        ]);
        compile.arg(address("QUERIES", self.layout.queries()));
        compile.arg(address("RESULTS", self.layout.results()));
        compile.arg(address("GUEST", self.layout.guest()));
        compile.arg(format!("-Wa,--defsym,QUERIES={:#x}", self.layout.queries()));
        compile.arg(format!("-Wa,-I,{}", source("").display()));
        compile.arg(format!(
            "-Wl,--build-id=none,-T,{}",
            source("walker.ld").display()
        ));
        compile.args(["-o", "walker.elf"]);
        compile.args(["start.S", "guest.S", "main.c"].map(source));
        compile.arg(source(&format!("{extension}.c")));
        compile.arg(source(&format!("{extension}_enter.S")));
        succeeds(&compile, &self.folder, "gcc", BUILD_BOUND)?;
        let mut copy = Command::new("objcopy");
        copy.args(["-O", "binary", "walker.elf", "walker.rom"]);
        succeeds(&copy, &self.folder, "objcopy", BUILD_BOUND)?;
        Ok(())
    }

    /// Starts the machine, waits until it ends, and reads its answers.
    ///
    /// # Errors
    /// When it does not end in time, or its output is not whole.
    pub fn run(&self, job: Job<'_>) -> anyhow::Result<Vec<Answer>> {
        ensure!(
            job.queries.len() <= query::MAX_QUERIES,
            "too many queries for the layout"
        );
        let block = query::encode(self.layout, job.root, self.flags, job.queries);
        fs::write(self.file("queries.raw"), block)?;
        fs::write(self.file("tables.raw"), job.image)?;
        let output = self.file("output.txt");
        fs::write(&output, "")?;
        let (command, name) = match &self.kind {
            Kind::RiscV { cpu } => (self.qemu_riscv(cpu), "qemu"),
            Kind::QemuX86 { physical_bits } => (self.qemu_x86(*physical_bits), "qemu"),
            Kind::Bochs { model } => (self.bochs_of(model)?, "bochs"),
        };
        let (_, said) = bounded(&command, &self.folder, name, BOUND)?;
        let printed = match self.kind {
            // Port 0xe9 is Bochs' standard output, between what it says itself.
            Kind::Bochs { .. } => between(&said).to_owned(),
            _ => fs::read_to_string(&output)?,
        };
        answer::parse(&printed, job.queries.len()).map_err(|error| match error.downcast() {
            Ok(Unsupported(what)) => Unsupported(format!("{}: {what}", self.name)).into(),
            Err(error) => error.context(format!("{}: {}", self.name, tail(&said))),
        })
    }

    fn loader(&self, file: &str, address: u64) -> [String; 2] {
        let path = self.file(file);
        [
            "-device".to_owned(),
            format!(
                "loader,file={},addr={address:#x},force-raw=on",
                path.display()
            ),
        ]
    }

    fn qemu_riscv(&self, cpu: &str) -> Command {
        let mut command = self.root.command("usr/bin/qemu-system-riscv64");
        command.arg("-L").arg(self.root.path("usr/share/qemu"));
        command.args(["-M", "virt", "-accel", "tcg", "-cpu", cpu, "-smp", "1"]);
        command.args(["-m", &format!("{}M", RAM >> 20)]);
        command.args([
            "-bios",
            "none",
            "-display",
            "none",
            "-monitor",
            "none",
            "-nodefaults",
        ]);
        command.args(["-serial", "file:output.txt"]);
        command.args(self.loader("walker.raw", self.layout.base));
        command.args(self.loader("queries.raw", self.layout.queries()));
        command.args(self.loader("tables.raw", self.layout.tables()));
        command
    }

    fn qemu_x86(&self, physical_bits: u32) -> Command {
        let mut command = self.root.command("usr/bin/qemu-system-x86_64");
        command.arg("-L").arg(self.root.path("usr/share/qemu"));
        command.arg("-L").arg(self.root.path("usr/share/seabios"));
        let la57 = if self.flags & 1 == 1 { ",+la57" } else { "" };
        let cpu = format!("EPYC,+svm,+npt,phys-bits={physical_bits}{la57}");
        command.args(["-M", "pc", "-accel", "tcg", "-cpu", &cpu, "-smp", "1"]);
        command.args(["-m", &format!("{}M", RAM >> 20)]);
        command.args(["-display", "none", "-monitor", "none", "-nodefaults"]);
        command.args(["-debugcon", "file:output.txt"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
        command.args(["-bios", "walker.rom"]);
        command.args(self.loader("queries.raw", self.layout.queries()));
        command.args(self.loader("tables.raw", self.layout.tables()));
        command
    }

    fn bochs_of(&self, model: &str) -> anyhow::Result<Command> {
        let configuration = format!(
            "config_interface: textconfig\n\
             display_library: rfb, options=\"timeout=0\"\n\
             cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0\n\
             memory: guest={memory}, host={memory}, block_size={BOCHS_BLOCK_KIB}\n\
             romimage: file=walker.rom, address=0xffff0000, options=none\n\
             vgaromimage: file={vga}\n\
             speaker: enabled=0\n\
             optramimage1: file=queries.raw, address={queries:#x}\n\
             optramimage2: file=tables.raw, address={tables:#x}\n\
             port_e9_hack: enabled=1\n\
             log: messages.txt\npanic: action=fatal\nerror: action=ignore\ninfo: action=ignore\n",
            memory = RAM >> 20,
            vga = self
                .root
                .path("usr/share/bochs/VGABIOS-lgpl-latest")
                .display(),
            queries = self.layout.queries(),
            tables = self.layout.tables(),
        );
        fs::write(self.file("bochsrc"), configuration)?;
        let mut command = self.root.command("usr/bin/bochs-bin");
        command.args(["-q", "-f", "bochsrc"]);
        command.env("BXSHARE", self.root.path("usr/share/bochs"));
        // Its only display without a screen listens for viewers.
        Ok(without_network(command))
    }
}

/// `command` in a network of its own, where the machine lets one be made: for a program that opens
/// a port unasked.
fn without_network(command: Command) -> Command {
    let mut alone = Command::new("unshare");
    alone.args(["--map-root-user", "--net"]);
    let possible = Command::new("unshare")
        .args(["--map-root-user", "--net", "true"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !possible.is_ok_and(|status| status.success()) {
        return command;
    }
    alone.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            alone.env(key, value);
        }
    }
    alone
}

/// What a program printed, without what its emulator said before and after.
fn between(said: &str) -> &str {
    let begin = ["slat-oracle 1 ", "stop: "]
        .iter()
        .filter_map(|word| said.find(word))
        .min();
    let Some(begin) = begin else {
        return "";
    };
    let rest = &said[begin..];
    rest.find("\nend\n").map_or(rest, |end| &rest[..end + 5])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_told_from_its_emulator() {
        assert_eq!(
            between("Bochs\nslat-oracle 1 1\n0 0 0\nend\nBochs is exiting\n"),
            "slat-oracle 1 1\n0 0 0\nend\n"
        );
        assert_eq!(
            between("Bochs\nslat-oracle 1 2\n0 0"),
            "slat-oracle 1 2\n0 0"
        );
        assert_eq!(between("Bochs\nstop: why\n"), "stop: why\n");
        assert_eq!(between("Bochs\n"), "");
    }
}
