//! Every format with the machine that walks it, in order, and what became of it.
//!
//! A machine that cannot be had skips its formats, each with the reason; a machine that was had and
//! does not work fails them.

use std::path::Path;

use slat_packages::{Release, Root, Set, Store};

use super::{
    answer::Unsupported,
    cpu::{BOCHS_PHYSICAL_BITS, EmulatedCpu, RiscV},
    fetch,
    format::Ops,
    guest::Plan,
    run::{Report, Trial},
};

/// Questions for each format.
const QUERIES: usize = 12_288;

/// What became of a format.
#[derive(Debug)]
pub enum Outcome {
    /// It was asked.
    Asked(Report),
    /// There is no machine for it here.
    Skipped(String),
    /// The proof could not be carried out.
    Failed(String),
}

/// One format's outcome.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What became of it.
    pub outcome: Outcome,
}

/// How a machine is made.
type Make = fn(&Path, Root, &Path) -> anyhow::Result<EmulatedCpu>;

struct Format {
    name: &'static str,
    format: &'static str,
    set: Set,
    make: Make,
    gpa_bits: u32,
    own_guest: bool,
    below_root: bool,
    sets_ad: bool,
    memory_types: bool,
}

fn svade(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::riscv(
        root,
        folder,
        sources,
        RiscV {
            svadu: false,
            svpbmt: true,
        },
    )
}

fn svadu(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::riscv(
        root,
        folder,
        sources,
        RiscV {
            svadu: true,
            svpbmt: true,
        },
    )
}

fn without_svpbmt(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::riscv(
        root,
        folder,
        sources,
        RiscV {
            svadu: false,
            svpbmt: false,
        },
    )
}

const fn g_stage(name: &'static str, format: &'static str, sets_ad: bool) -> Format {
    Format {
        name,
        format,
        set: fetch::RISCV,
        make: if sets_ad { svadu } else { svade },
        gpa_bits: 63,
        own_guest: false,
        below_root: false,
        sets_ad,
        memory_types: true,
    }
}

/// On a hart without Svpbmt.
const fn g_stage_without_types(name: &'static str, format: &'static str) -> Format {
    Format {
        make: without_svpbmt,
        memory_types: false,
        ..g_stage(name, format, false)
    }
}

fn intel(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::bochs(root, folder, sources, "corei7_skylake_x", "vmx")
}

fn newer_intel(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::bochs(root, folder, sources, "arrow_lake", "vmx")
}

fn amd(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::bochs(root, folder, sources, "ryzen", "svm")
}

fn qemu_amd(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::svm(root, folder, sources, 4, NPT4_BITS)
}

fn qemu_amd5(folder: &Path, root: Root, sources: &Path) -> anyhow::Result<EmulatedCpu> {
    EmulatedCpu::svm(root, folder, sources, 5, NPT5_BITS)
}

/// As many as four levels translate. What a processor with more does above is not settled: the bits
/// may be ignored.
const NPT4_BITS: u32 = 48;
/// The most with which bit 51 of an entry is still reserved.
const NPT5_BITS: u32 = 51;

const fn x86(
    name: &'static str,
    format: &'static str,
    set: Set,
    make: Make,
    gpa_bits: u32,
) -> Format {
    Format {
        name,
        format,
        set,
        make,
        gpa_bits,
        own_guest: true,
        below_root: false,
        sets_ad: false,
        memory_types: true,
    }
}

const FORMATS: [Format; 16] = [
    g_stage("sv39x4", "sv39x4", false),
    g_stage("sv48x4", "sv48x4", false),
    g_stage("sv57x4", "sv57x4", false),
    g_stage("sv39x4+svadu", "sv39x4", true),
    g_stage("sv48x4+svadu", "sv48x4", true),
    g_stage("sv57x4+svadu", "sv57x4", true),
    g_stage_without_types("sv39x4-svpbmt", "sv39x4"),
    g_stage_without_types("sv48x4-svpbmt", "sv48x4"),
    g_stage_without_types("sv57x4-svpbmt", "sv57x4"),
    x86("npt4", "npt4", fetch::X86, qemu_amd, NPT4_BITS),
    x86("npt5", "npt5", fetch::X86, qemu_amd5, NPT5_BITS),
    x86("npt4+bochs", "npt4", fetch::BOCHS, amd, BOCHS_PHYSICAL_BITS),
    x86("ept4", "ept4", fetch::BOCHS, intel, BOCHS_PHYSICAL_BITS),
    x86(
        "ept4-noad",
        "ept4-noad",
        fetch::BOCHS,
        intel,
        BOCHS_PHYSICAL_BITS,
    ),
    x86(
        "ept5",
        "ept5",
        fetch::BOCHS,
        newer_intel,
        BOCHS_PHYSICAL_BITS,
    ),
    // Where no machine walks five levels, at least all but the root's entries are walked.
    Format {
        below_root: true,
        ..x86(
            "ept5-below",
            "ept5",
            fetch::BOCHS,
            intel,
            BOCHS_PHYSICAL_BITS,
        )
    },
];

fn one(format: &Format, store: &mut Store, work: &Path, sources: &Path, seed: u64) -> Outcome {
    let root = match store.get(format.set) {
        Ok(root) => root,
        Err(error) => return Outcome::Skipped(format!("{error:#}")),
    };
    let trial = || -> anyhow::Result<Report> {
        let folder = work.join(format.name);
        let machine = (format.make)(&folder, root, sources)?;
        let plan = Plan {
            ops: Ops::named(format.format)?,
            layout: machine.layout,
            gpa_bits: format.gpa_bits,
            own_guest: format.own_guest,
            below_root: format.below_root,
            memory_types: format.memory_types,
        };
        Trial {
            name: format.name,
            plan,
            machine: &machine,
            sets_ad: format.sets_ad,
            queries: QUERIES,
        }
        .run(seed)
    };
    match trial() {
        Ok(report) => Outcome::Asked(report),
        Err(error) => match error
            .chain()
            .find_map(|cause| cause.downcast_ref::<Unsupported>())
        {
            Some(lacks) => Outcome::Skipped(lacks.to_string()),
            None => Outcome::Failed(format!("{error:#}")),
        },
    }
}

/// Whether a machine of the list walks the format called `name`.
pub fn asks_about(name: &str) -> bool {
    FORMATS.iter().any(|format| format.format == name)
}

/// Runs the formats whose names contain `only`, all if it is empty, and says after each what became
/// of it. Packages and each format's files go below `cache`.
///
/// # Errors
/// When the store cannot be opened.
pub fn run(
    cache: &Path,
    sources: &Path,
    seed: u64,
    only: &str,
    mut done: impl FnMut(&Row),
) -> anyhow::Result<Vec<Row>> {
    let mut store = Store::open(cache, Release::Fixed)?;
    let mut rows = Vec::new();
    for format in FORMATS.iter().filter(|format| format.name.contains(only)) {
        let row = Row {
            name: format.name,
            outcome: one(format, &mut store, &cache.join("work"), sources, seed),
        };
        done(&row);
        rows.push(row);
    }
    Ok(rows)
}
