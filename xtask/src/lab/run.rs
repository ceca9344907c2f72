//! A run of the lab, from packages to a tally.
//!
//! What cannot be had here (packages, a compiler, an emulator of this machine) skips the lab, with
//! the reason. What was had and does not work fails it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_packages::{Release, Root, Store};

use super::{
    fleet::{Backend, Fleet},
    host::{Kit, Plan, SHORT},
    hosts::Hosts,
    image::Image,
    kind::Kind,
    machine::Machine,
    options::Options,
    programs::{Builder, Programs},
    suite,
    tests::{HARDWARE, KERNELS, MIXED, Outcome, Scene, Test, WITH_A_VM},
};
use crate::{budget::Budget, shell, tally::Tally, workspace::Workspace};

/// Seconds for each kind: what the three took in one run (194, 169 and 19) and half as much again.
const ON_A_SLOW_MACHINE: [(Kind, u64); 3] =
    [(Kind::X86_64, 300), (Kind::Riscv64, 270), (Kind::Mixed, 40)];

/// From where CI builds ahead for RISC-V to where it boots that: the demo, the soak and the lab of
/// x86-64 at the least.
const BETWEEN: Duration = Duration::from_secs(480);

/// What CI does on RISC-V: what differs there, without test programs, whose build for it takes
/// longer than they do.
const RISCV64: [&str; 6] = [
    "hardware::",
    "kvm::counters::",
    "kvm::demo",
    "kvm::migrate::there_and_back",
    "kvm::migrate::storm",
    "kvm::unlike::",
];

/// What CI does, as long as there is time: the brief form on two hosts of each kind, and on one of
/// each; on RISC-V a part.
///
/// # Errors
/// When a lab cannot be built or booted.
pub(crate) fn bounded(workspace: &Workspace, budget: &Budget) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let how = "takes too long here: cargo xtask lab riscv64 --brief";
    tally.add(Tally::skipped(
        "lab riscv64, the rest of its brief form",
        how,
    ));
    for (kind, secs) in ON_A_SLOW_MACHINE {
        let (name, needs) = (format!("lab {}", kind.name()), Duration::from_secs(secs));
        let instead = format!("cargo xtask {name} --brief");
        if let Some(skipped) = budget.refuses(&name, needs, &instead) {
            tally.add(skipped);
            continue;
        }
        let begin = Instant::now();
        println!("lab {}", kind.name());
        let mut options = Options::brief(kind);
        // The triple faults that `steady` is there for come about with x86-64 alone, and would fail
        // one run in some.
        options.steady = kind != Kind::Riscv64;
        if kind == Kind::Riscv64 {
            options.filter = RISCV64.map(str::to_owned).to_vec();
        }
        let made = run(workspace, &options);
        tally.add(made.unwrap_or_else(|error| Tally::of_faults(&[format!("{error:#}")])));
        let took = begin.elapsed().as_secs_f64();
        println!("lab {} took {took:.0} s", kind.name());
    }
    Ok(tally)
}

/// Whether there may be time for RISC-V in [`bounded`], for all that is known before.
pub(crate) fn will_fit(budget: &Budget) -> bool {
    let secs = ON_A_SLOW_MACHINE
        .iter()
        .find(|(kind, _)| *kind == Kind::Riscv64)
        .map_or(0, |(_, secs)| *secs);
    let needs = BETWEEN + Duration::from_secs(secs);
    budget.refuses("lab", needs, "").is_none()
}

/// Builds what [`bounded`] needs on RISC-V, which is most of its time.
///
/// # Errors
/// When this program's own file is not known.
pub(crate) fn build_ahead() -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["lab", Kind::Riscv64.name(), "--brief", "--build", "--"]);
    command.args(RISCV64);
    Ok(command)
}

/// Does what was asked for.
///
/// # Errors
/// When the lab cannot be built or booted.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    if options.list {
        list(options);
        return Ok(Tally::passed());
    }
    let kind = options.kind;
    let labs = workspace.target_dir()?.join("lab");
    let mut locks = vec![locked(&labs.join(kind.name()))?];
    let mut kits = Vec::new();
    let suites = suite::programs(options);
    for machine in kind.machines() {
        let folder = labs.join(machine.name());
        if kind == Kind::Mixed {
            locks.push(locked(&folder)?);
        }
        let (root, builder) =
            match supplies(workspace, *machine, options.profile.as_deref(), &folder) {
                Ok(supplies) => supplies,
                Err(error) => {
                    let why = format!("{error:#}").replace('\n', "; ");
                    return Ok(Tally::skipped(format!("lab {}", kind.name()), why));
                }
            };
        let begin = Instant::now();
        let programs = Programs::build(&builder, &suites)?;
        let image = Image::build(*machine, &root, &programs, &folder)?;
        let took = begin.elapsed().as_secs_f64();
        println!("programs of {} built in {took:.1} s", machine.name());
        kits.push(Kit {
            machine: *machine,
            root,
            image,
        });
    }
    if options.build {
        return Ok(Tally::passed());
    }
    let plan = Plan {
        kind,
        kits,
        folder: emptied(&labs.join(kind.name()).join("logs"))?,
        hosts: options.hosts,
        steady: options.steady,
    };
    let begin = Instant::now();
    let mut hosts = Hosts::boot(plan)?;
    let (count, took) = (options.hosts, begin.elapsed().as_secs_f64());
    println!("{count} hosts of {} booted in {took:.1} s", kind.name());
    let items = items(&mut hosts, options, &suites)?;
    let tally = make_all(&mut hosts, options, items);
    println!("logs are in {}", hosts.plan().folder.display());
    Ok(tally)
}

/// Keeps a folder to this run, as long as the file lives.
fn locked(folder: &Path) -> anyhow::Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let lock = File::create(folder.join("lock"))?;
    lock.try_lock()
        .with_context(|| format!("another lab runs in {}", folder.display()))?;
    Ok(lock)
}

/// What has to come from elsewhere.
fn supplies<'a>(
    workspace: &'a Workspace,
    machine: Machine,
    profile: Option<&'a str>,
    folder: &Path,
) -> anyhow::Result<(Root, Builder<'a>)> {
    shell::output(Command::new("setpriv").arg("--version"))
        .context("no setpriv (package util-linux), which ends emulators with this tool")?;
    let packages = folder.join("packages");
    let root = Store::open(&packages, Release::Fixed)?
        .get(machine.packages())
        .context("fetching the emulator and the kernel")?;
    let builder = Builder::new(workspace, machine, profile, folder)
        .context("fetching a compiler and a linker")?;
    Ok((root, builder))
}

/// A folder without what an earlier run left there.
fn emptied(folder: &Path) -> anyhow::Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("emptying {}", folder.display()))?;
    }
    fs::create_dir_all(folder)?;
    Ok(folder.to_owned())
}

fn list(options: &Options) {
    println!("{}", HARDWARE.name);
    for test in between(options) {
        for backend in test.backends(options.kind.machine(1)) {
            println!("{}::{}", backend.name(), test.name);
        }
    }
    match suite::programs(options).as_slice() {
        [] => {}
        programs if options.brief => {
            for one in suite::brief().filter(|one| programs.contains(&one.program())) {
                println!("{}", one.name());
            }
        }
        _ => println!("vmm::* and system::*, as the programs on a host list them"),
    }
    println!("{}", KERNELS.name);
}

/// Tests between hosts of the form that was asked for.
fn between(options: &Options) -> impl Iterator<Item = &'static Test> {
    let tests: &[Test] = match options.kind {
        Kind::Mixed => &MIXED,
        Kind::X86_64 | Kind::Riscv64 => &WITH_A_VM,
    };
    tests.iter().filter(|test| test.brief || !options.brief)
}

/// What is to be done under one name.
#[derive(Clone, Debug)]
enum Item {
    Between(Test, Backend),
    Inside(suite::One),
    Skip(String),
}

/// Everything that was asked for, in order, as often as it was.
fn items(
    hosts: &mut Hosts,
    options: &Options,
    suites: &[&str],
) -> anyhow::Result<Vec<(String, Item)>> {
    let machine = options.kind.machine(1);
    let native = Backend::Software(machine.format());
    let no_kvm = without_kvm(hosts, machine)?;
    let mut all = vec![(HARDWARE.name.to_owned(), Item::Between(HARDWARE, native))];
    if options.brief {
        let tests = suite::brief().filter(|one| suites.contains(&one.program()));
        all.extend(tests.map(|one| (one.name(), Item::Inside(one))));
    }
    for test in between(options) {
        for backend in test.backends(machine) {
            let name = format!("{}::{}", backend.name(), test.name);
            match &no_kvm {
                Some(why) if backend == Backend::Kvm => all.push((name, Item::Skip(why.clone()))),
                None if options.brief && backend != Backend::Kvm => {}
                _ => all.push((name, Item::Between(*test, backend))),
            }
        }
    }
    all.retain(|(name, _)| options.wants(name));
    if !suites.is_empty() && !options.brief {
        let tests = suite::list(hosts, &options.filter)?;
        all.extend(tests.into_iter().map(|one| (one.name(), Item::Inside(one))));
    }
    ensure!(
        !all.is_empty(),
        "no test has such a name: --list says which there are"
    );
    let again = |turn: u32, name: &str| match turn {
        1 => name.to_owned(),
        _ => format!("{name} #{turn}"),
    };
    let mut all: Vec<_> = all
        .iter()
        .flat_map(|(name, item)| {
            (1..=options.times).map(move |turn| (again(turn, name), item.clone()))
        })
        .collect();
    // Whatever is made, hosts must take it well.
    all.push((KERNELS.name.to_owned(), Item::Between(KERNELS, native)));
    Ok(all)
}

/// Makes them one after the other, each with a line.
fn make_all(hosts: &mut Hosts, options: &Options, items: Vec<(String, Item)>) -> Tally {
    let mut tally = Tally::default();
    for (name, item) in items {
        let begin = Instant::now();
        let outcome = match item {
            Item::Skip(why) => Ok(Outcome::Skipped(why)),
            Item::Inside(one) => suite::make(hosts, &one),
            Item::Between(test, backend) => {
                let mut scene = Scene {
                    hosts,
                    backend,
                    brief: options.brief,
                    seed: options.seed,
                };
                let outcome = (test.make)(&mut scene);
                bring_logs(hosts, &name);
                outcome
            }
        };
        let failed = outcome.is_err();
        tally.add(count(&name, begin, outcome));
        if failed && let Err(error) = alive(hosts) {
            eprintln!("fault: what follows {name} was not made: {error:#}");
            tally.add(Tally::failed());
            break;
        }
    }
    tally
}

/// Says what came of one, in one line.
fn count(name: &str, begin: Instant, outcome: anyhow::Result<Outcome>) -> Tally {
    let took = begin.elapsed().as_secs_f64();
    match outcome {
        Ok(Outcome::Passed(figures)) => {
            println!("{name:<44} ok {took:>6.1} s  {figures}");
            Tally::passed()
        }
        Ok(Outcome::InPart(parts)) => {
            println!("{name:<44} ok {took:>6.1} s  but for {}", parts.join("; "));
            let mut tally = Tally::passed();
            for part in parts {
                tally.add(Tally::skipped(format!("lab {name}"), part));
            }
            tally
        }
        Ok(Outcome::Skipped(why)) => {
            println!("{name:<44} SKIPPED: {why}");
            Tally::skipped(format!("lab {name}"), why)
        }
        Err(error) => {
            println!("{name:<44} FAILED {took:>6.1} s");
            Tally::of_faults(&[format!("{name}: {error:#}")])
        }
    }
}

/// A failure to bring logs is told, and fails no test: a host may be switched off.
fn bring_logs(hosts: &mut Hosts, name: &str) {
    let folder = hosts.plan().folder.join(name.replace("::", "."));
    if let Err(error) = hosts.bring_logs(&folder) {
        eprintln!("logs of {name}: {error:#}");
    }
}

/// Whether every host serves commands.
fn alive(hosts: &mut Hosts) -> anyhow::Result<()> {
    for host in hosts.numbers() {
        hosts.try_run(host, "true", SHORT)?;
    }
    Ok(())
}

/// Why VMs on KVM cannot be had; nothing when they can. Hosts have KVM in any case, so it is the
/// build that lacks it.
fn without_kvm(hosts: &mut Hosts, machine: Machine) -> anyhow::Result<Option<String>> {
    let mut fleet = Fleet::start(hosts).context("starting a fleet")?;
    let host = fleet.ask("get host host-1")?;
    let backends = host["backends"].as_array().map_or(&[][..], Vec::as_slice);
    if backends.iter().any(|backend| backend == "BACKEND_KVM") {
        return Ok(None);
    }
    let said = host["backendMessage"].as_str().unwrap_or_default();
    Ok(Some(format!(
        "no KVM backend for {} in this build ({said})",
        machine.name()
    )))
}
