//! `cargo xtask mutations`: puts historical bugs back, one at a time, and demands that a test notices.
//!
//! A mutation is a patch in `tests/mutations`, whose first lines say which pitfall of `docs/pitfalls.md` it is, or that it is a bug
//! of the table in `docs/proofs.md`, and which test must fail. The work is done on a copy of `mmu` and `arch` below `target/mutations`, a workspace of its own with build artefacts
//! of its own, so the sources are never touched and an interrupted run leaves nothing. One format of each kind is compiled
//! (`few_formats`), little optimised: what takes time is compiling. A test with a feature is a model (loom, shuttle): it is built as
//! `cargo xtask interleavings` builds it, because what takes time there is the schedules.
//!
//! For each patch: it applies, the copy builds, and its test fails, or hangs until its bound, where the unpatched one passed. A
//! patch that does not apply, does not compile, or whose test does not exist is a fault like a bug that nobody noticed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use serde_json::Value;

use crate::{
    interleavings,
    shell::{self, Ended},
    tally::Tally,
    workspace::Workspace,
};

/// Where the patches are.
pub(crate) const FOLDER: &str = "tests/mutations";
/// The crates that are patched.
const CRATES: [&str; 2] = ["mmu", "arch"];
/// For one test; what runs longer hangs.
const BOUND: Duration = Duration::from_secs(60);
/// For one model, which has many schedules to try, on a machine that has other things to do.
const MODEL_BOUND: Duration = Duration::from_secs(600);
/// How many of those that need no model are put back in each run of `cargo xtask ci`.
const PLAIN: usize = 6;
/// And how many of loom's.
const LOOM: usize = 1;
/// Of shuttle's schedules, so that a verdict can be had twice.
const SEED: &str = "1";

/// Which ones.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only patches whose names contain this, e.g. `27`
    #[arg(long, default_value = "", conflicts_with = "sample")]
    only: String,
    /// The few that `cargo xtask ci` puts back at this commit
    #[arg(long)]
    sample: bool,
}

/// A bug that can be put back.
#[derive(Debug)]
pub(crate) struct Mutation {
    /// File name without its ending.
    pub(crate) name: String,
    /// Its row in `docs/pitfalls.md`; without one it is in the table of `docs/proofs.md`.
    pub(crate) pitfall: Option<u32>,
    pub(crate) path: PathBuf,
    /// Its test does not end before its bound.
    hangs: bool,
    test: Test,
}

impl Mutation {
    /// Whether a page's `path.rs::name` is the test that must fail.
    pub(crate) fn is_caught_at(&self, place: &str) -> bool {
        self.test.is_at(place)
    }
}

/// The test that must fail: `cargo test -p <package> [--features <feature>] <target> <name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Test {
    package: String,
    /// The model checker whose atomics it is built on.
    feature: Option<String>,
    /// `--lib`, or `--test` with its name.
    target: Vec<String>,
    name: String,
}

/// A built test program.
struct Program {
    path: PathBuf,
    folder: PathBuf,
}

/// All patches, by name.
///
/// # Errors
/// When the folder cannot be read, or a patch does not say what it is.
pub(crate) fn all(workspace: &Workspace) -> anyhow::Result<Vec<Mutation>> {
    let paths = workspace.files(&[FOLDER], &[".patch"])?;
    paths
        .into_iter()
        .map(|path| {
            let text = workspace.read(&path)?;
            mutation(&path, &text).with_context(|| path.display().to_string())
        })
        .collect()
}

fn mutation(path: &Path, text: &str) -> anyhow::Result<Mutation> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start));
    let pitfall = match (line("# Pitfall "), line("# Proof: ")) {
        (Some(rest), None) => {
            let (number, _) = rest
                .split_once(": ")
                .context("`# Pitfall N` says nothing")?;
            Some(number.parse().context("the pitfall's number")?)
        }
        (None, Some(_)) => None,
        _ => bail!("no line `# Pitfall N: what it breaks.` or `# Proof: what it breaks.`"),
    };
    let test = line("# Test: cargo test -p ").and_then(test_of);
    Ok(Mutation {
        name: name.into_owned(),
        pitfall,
        path: path.to_owned(),
        hangs: text
            .lines()
            .next()
            .is_some_and(|line| line.contains("(the test hangs)")),
        test: test.ok_or_else(|| anyhow!("no line `# Test: cargo test -p P --test T name`"))?,
    })
}

impl Test {
    /// Whether `path.rs::name` may be this test: a function of its name, in its program's folder.
    fn is_at(&self, place: &str) -> bool {
        let Some((file, function)) = place.split_once("::") else {
            return false;
        };
        let folder = self.package.trim_start_matches("slat-");
        let Some(rest) = file.strip_prefix(folder) else {
            return false;
        };
        // A test program may take a module from its neighbours, so not all of the path is told by the program's name.
        let inside = match &self.target[..] {
            [_, _] => rest.starts_with("/tests/"),
            _ => rest.starts_with("/src/"),
        };
        inside && self.name.rsplit("::").next() == Some(function)
    }

    /// What runs longer hangs.
    fn bound(&self) -> Duration {
        if self.feature.is_some() {
            MODEL_BOUND
        } else {
            BOUND
        }
    }

    /// Which program it is in.
    fn shown(&self) -> String {
        let feature = self.feature.as_ref();
        let feature = feature.map_or_else(String::new, |name| format!("--features {name} "));
        feature + &self.target.join(" ")
    }
}

fn test_of(rest: &str) -> Option<Test> {
    let words: Vec<&str> = rest.split_whitespace().collect();
    let (package, words) = words.split_first()?;
    let (feature, words) = match words {
        ["--features", feature, words @ ..] => (Some((*feature).to_owned()), words),
        words => (None, words),
    };
    let (target, name) = match *words {
        ["--lib", name] => (vec!["--lib"], name),
        ["--test", target, name] => (vec!["--test", target], name),
        _ => return None,
    };
    Some(Test {
        package: (*package).to_owned(),
        feature,
        target: target.into_iter().map(str::to_owned).collect(),
        name: name.to_owned(),
    })
}

/// `git apply` in `folder`, whatever repository that is in.
fn apply(folder: &Path, patch: &Path, how: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("git");
    command
        .current_dir(folder)
        .arg("apply")
        .args(how)
        .arg(patch);
    if let Some(parent) = folder.parent() {
        command.env("GIT_CEILING_DIRECTORIES", parent);
    }
    shell::output(&mut command).map(drop)
}

/// Whether a patch still fits the sources.
///
/// # Errors
/// When it does not.
pub(crate) fn check(workspace: &Workspace, mutation: &Mutation) -> anyhow::Result<()> {
    apply(
        &workspace.root,
        &workspace.root.join(&mutation.path),
        &["--check"],
    )
}

/// Puts each bug back that was asked for.
///
/// # Errors
/// When the copy cannot be made or does not build unpatched.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    if options.sample {
        return sample(workspace);
    }
    let mutations: Vec<Mutation> = all(workspace)?
        .into_iter()
        .filter(|mutation| mutation.name.contains(&options.only))
        .collect();
    if mutations.is_empty() {
        bail!("no patch in {FOLDER} has {:?} in its name", options.only);
    }
    put_back(workspace, &mutations)
}

/// Puts a few back, another few for each commit, so that in time all have been; the same commit has the same ones.
///
/// # Errors
/// As for [`run`].
pub(crate) fn sample(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut command = Command::new("git");
    command
        .current_dir(&workspace.root)
        .args(["rev-parse", "HEAD"]);
    // Sources without their history draw the same few every time.
    let commit = shell::output(&mut command).unwrap_or_else(|_| "unknown".to_owned());
    let commit = commit.trim();
    let chosen = choose(all(workspace)?, commit);
    let names: Vec<&str> = chosen.iter().map(|it| it.name.as_str()).collect();
    println!("of commit {commit}: {}", names.join(", "));
    put_back(workspace, &chosen)
}

/// [`PLAIN`] and [`LOOM`] of them, drawn by the commit. None whose test takes until its bound: CI has better things to do.
fn choose(mut all: Vec<Mutation>, commit: &str) -> Vec<Mutation> {
    all.sort_by_cached_key(|it| (lot(commit, &it.name), it.name.clone()));
    let (mut plain, mut loom) = (PLAIN, LOOM);
    all.retain(|it| {
        if it.hangs {
            return false;
        }
        let left = match it.test.feature.as_deref() {
            None => &mut plain,
            Some("loom") => &mut loom,
            Some(_) => return false,
        };
        let take = *left > 0;
        *left = left.saturating_sub(1);
        take
    });
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// FNV-1a of both, then mixed: neighbours in the alphabet are to draw far from each other.
fn lot(commit: &str, name: &str) -> u64 {
    let bytes = commit.bytes().chain([0]).chain(name.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn put_back(workspace: &Workspace, mutations: &[Mutation]) -> anyhow::Result<Tally> {
    let copy = Copy::make(workspace)?;
    let begin = Instant::now();
    let mut tally = Tally::default();
    tally.add(copy.unpatched(mutations)?);
    for mutation in mutations {
        let start = Instant::now();
        let verdict = copy.with(workspace, mutation, |copy| copy.fails(&mutation.test));
        let (caught, how) = match verdict {
            Ok(how) => (true, how),
            Err(error) => (false, format!("{error:#}")),
        };
        let word = if caught { "caught" } else { "NOT CAUGHT" };
        let (name, test) = (&mutation.name, &mutation.test.name);
        let took = start.elapsed().as_secs_f64();
        println!("{name:<36} {word:<10} {took:>5.1} s  {test}: {how}");
        tally.add(if caught {
            Tally::passed()
        } else {
            Tally::failed()
        });
    }
    println!("in all {:.0} s", begin.elapsed().as_secs_f64());
    Ok(tally)
}

/// What is patched.
struct Copy {
    root: PathBuf,
    target: PathBuf,
    /// The folder above those in which the models are built. Not those of the workspace: cargo takes the same crate at another
    /// place for the same, and would run there what was patched here.
    models: PathBuf,
}

impl Copy {
    /// Brings the copy up to date. What did not change keeps its time, so cargo builds only what is needed.
    fn make(workspace: &Workspace) -> anyhow::Result<Self> {
        let folder = workspace.target_dir()?.join("mutations");
        let copy = Self {
            root: folder.join("tree"),
            target: folder.join("target"),
            models: folder,
        };
        let manifest = workspace.read("Cargo.toml")?;
        copy.write(Path::new("Cargo.toml"), manifest_of(&manifest)?.as_bytes())?;
        if !copy.root.join("Cargo.lock").exists() {
            fs::copy(
                workspace.root.join("Cargo.lock"),
                copy.root.join("Cargo.lock"),
            )?;
        }
        for name in CRATES {
            let files = workspace.files(&[name], &[""])?;
            for file in &files {
                copy.write(file, &fs::read(workspace.root.join(file))?)?;
            }
            copy.forget(name, &files)?;
        }
        Ok(copy)
    }

    fn write(&self, file: &Path, text: &[u8]) -> anyhow::Result<()> {
        let to = self.root.join(file);
        if fs::read(&to).is_ok_and(|there| there == text) {
            return Ok(());
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&to, text).with_context(|| format!("writing {}", to.display()))
    }

    /// Removes files that the sources do not have.
    fn forget(&self, name: &str, files: &[PathBuf]) -> anyhow::Result<()> {
        let own = Workspace {
            root: self.root.clone(),
        };
        for file in own.files(&[name], &[""])? {
            if !files.contains(&file) {
                fs::remove_file(self.root.join(file))?;
            }
        }
        Ok(())
    }

    /// All tests that patches name, on the sources as they are: each must pass.
    fn unpatched(&self, mutations: &[Mutation]) -> anyhow::Result<Tally> {
        let mut programs: Vec<(&Test, Vec<&str>)> = Vec::new();
        for Mutation { test, .. } in mutations {
            let same = |(other, _): &&mut (&Test, Vec<&str>)| {
                (&other.package, &other.feature, &other.target)
                    == (&test.package, &test.feature, &test.target)
            };
            match programs.iter_mut().find(same) {
                Some((_, names)) if names.contains(&test.name.as_str()) => {}
                Some((_, names)) => names.push(&test.name),
                None => programs.push((test, vec![&test.name])),
            }
        }
        let mut tally = Tally::default();
        for (test, names) in programs {
            let bound = test.bound().saturating_mul(u32::try_from(names.len())?);
            let ended = self.run(&self.build(test)?, &names, bound)?;
            let target = test.shown();
            match judge(ended.as_ref(), names.len(), false) {
                Ok(_) => {
                    println!(
                        "-p {} {target}: {} tests pass unpatched",
                        test.package,
                        names.len()
                    );
                    tally.add(Tally::passed());
                }
                Err(error) => {
                    eprintln!("-p {} {target}, unpatched: {error:#}", test.package);
                    tally.add(Tally::failed());
                }
            }
        }
        Ok(tally)
    }

    /// Does something with a patch applied.
    fn with<R>(
        &self,
        workspace: &Workspace,
        mutation: &Mutation,
        act: impl FnOnce(&Self) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        let patch = workspace.root.join(&mutation.path);
        apply(&self.root, &patch, &[]).context("the patch does not apply")?;
        let result = act(self);
        apply(&self.root, &patch, &["--reverse"]).context("taking the patch back")?;
        result
    }

    /// Builds and runs a test that must fail; says how it did.
    fn fails(&self, test: &Test) -> anyhow::Result<String> {
        let ended = self.run(&self.build(test)?, &[&test.name], test.bound())?;
        let how = judge(ended.as_ref(), 1, true)?;
        let why = ended.as_ref().and_then(|ended| panic_of(&ended.stdout));
        Ok(why.map_or_else(|| how.to_owned(), |why| format!("{how}: {why}")))
    }

    /// `None`: it had to be ended.
    fn run(
        &self,
        program: &Program,
        names: &[&str],
        bound: Duration,
    ) -> anyhow::Result<Option<Ended>> {
        let mut command = Command::new(&program.path);
        command.current_dir(&program.folder);
        command
            .arg("--exact")
            .args(names)
            .env("RUST_BACKTRACE", "0")
            .env("SLAT_SHUTTLE_SEED", SEED);
        Ok(shell::limited(&mut command, bound)?.ok())
    }

    fn build(&self, test: &Test) -> anyhow::Result<Program> {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        command.args(["test", "--quiet", "--offline", "--no-run"]);
        command.args(["--message-format=json", "-p", &test.package]);
        command.args(&test.target);
        if let Some(feature) = &test.feature {
            command.args(["--features", feature]);
            interleavings::built(&mut command, &self.models, feature);
        } else {
            for name in ["slat-mmu", "slat-arch"] {
                command.arg("--config");
                command.arg(format!(
                    "profile.dev.package.{name}.opt-level={}",
                    u32::from(name == "slat-mmu")
                ));
            }
            command.env("RUSTFLAGS", "--cfg few_formats -Awarnings");
            command.env("CARGO_TARGET_DIR", &self.target);
        }
        let said = shell::output(&mut command).map_err(|error| {
            let text = error.to_string();
            let first = text.lines().find(|line| line.starts_with("error"));
            anyhow!("does not build: {}", first.unwrap_or(text.as_str()))
        })?;
        let wanted = match &test.target[..] {
            [_, name] => name.clone(),
            _ => test.package.replace('-', "_"),
        };
        said.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find_map(|message| {
                let path = message["executable"].as_str()?;
                let manifest = Path::new(message["manifest_path"].as_str()?);
                (message["target"]["name"] == wanted.as_str()).then(|| Program {
                    path: path.into(),
                    folder: manifest.parent().unwrap_or(Path::new(".")).to_owned(),
                })
            })
            .ok_or_else(|| anyhow!("cargo built no test program {wanted}"))
    }
}

/// What the end of a test program says that was to run `count` tests; `None`: it did not end.
fn judge(ended: Option<&Ended>, count: usize, broken: bool) -> anyhow::Result<&'static str> {
    let plural = if count == 1 { "test" } else { "tests" };
    let header = format!("running {count} {plural}\n");
    match (ended, broken) {
        (Some(ended), _) if !ended.stdout.contains(&header) => bail!("there are no such {plural}"),
        (Some(ended), false) if ended.status.success() => Ok("passes"),
        (Some(ended), false) => bail!("fails\n{}{}", ended.stdout, ended.stderr),
        (None, false) => bail!("still runs at its bound"),
        (Some(ended), true) if ended.status.success() => bail!("passes"),
        (Some(ended), true) if ended.status.code().is_none() => Ok("crashes"),
        (Some(_), true) => Ok("fails"),
        (None, true) => Ok("hangs, ended at the bound"),
    }
}

/// What the first panic says.
fn panic_of(stdout: &str) -> Option<&str> {
    let mut lines = stdout.lines();
    lines.find(|line| line.contains(" panicked at "))?;
    lines.next()
}

/// The workspace's manifest with the patched crates alone.
fn manifest_of(text: &str) -> anyhow::Result<String> {
    let mut found = false;
    let members = CRATES.map(|name| format!("{name:?}")).join(", ");
    let lines = text.lines().filter_map(|line| {
        if line.starts_with("members = [") && line.ends_with(']') {
            found = true;
            return Some(format!("members = [{members}]"));
        }
        (!line.starts_with("default-members")).then(|| line.to_owned())
    });
    let manifest: Vec<String> = lines.collect();
    if !found {
        bail!("Cargo.toml has no line `members = [...]`");
    }
    Ok(manifest.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_patch_says_what_it_is() {
        let text = "# Pitfall 7: breaks x.\n# Test: cargo test -p slat-arch --test history a::b\n--- a/x\n";
        let found = mutation(Path::new("tests/mutations/07-x.patch"), text).unwrap();
        assert_eq!((found.name.as_str(), found.pitfall), ("07-x", Some(7)));
        assert_eq!(found.test.target, ["--test", "history"]);
        assert_eq!(
            (found.test.package.as_str(), found.test.name.as_str()),
            ("slat-arch", "a::b")
        );
        assert!(mutation(Path::new("x.patch"), "# Pitfall 7: breaks x.\n").is_err());
        assert!(test_of("slat-arch history a::b").is_none());
        let text =
            "# Proof: breaks y.\n# Test: cargo test -p slat-mmu --features loom --lib models::a\n";
        let found = mutation(Path::new("loom-y.patch"), text).unwrap();
        assert_eq!((found.pitfall, found.hangs), (None, false));
        let text = text.replace("breaks y.", "breaks y (the test hangs).");
        assert!(mutation(Path::new("loom-y.patch"), &text).unwrap().hangs);
        assert_eq!(found.test.shown(), "--features loom --lib");
        assert!(found.test.bound() > BOUND);
    }

    #[test]
    fn a_page_names_the_test_of_the_patch() {
        let test = test_of("slat-arch --test history flush::late").unwrap();
        assert!(test.is_at("arch/tests/history/flush.rs::late"));
        for other in [
            "arch/tests/history/flush.rs::early",
            "arch/src/flush.rs::late",
            "mmu/tests/history/flush.rs::late",
            "arch/tests/history/flush.rs",
        ] {
            assert!(!test.is_at(other), "{other}");
        }
    }

    #[test]
    fn a_commit_draws_its_own_few() {
        let all = || -> Vec<Mutation> {
            let features = [
                ("plain", ""),
                ("loom", "--features loom "),
                ("shuttle", "--features shuttle "),
            ];
            let one = |(kind, feature), number| {
                let text =
                    format!("# Proof: x.\n# Test: cargo test -p slat-mmu {feature}--lib a\n");
                mutation(Path::new(&format!("{kind}-{number}.patch")), &text).unwrap()
            };
            features
                .into_iter()
                .flat_map(|it| (0..20).map(move |n| one(it, n)))
                .collect()
        };
        let names = |commit: &str| -> Vec<String> {
            choose(all(), commit)
                .into_iter()
                .map(|it| it.name)
                .collect()
        };
        let drawn = names("0123abcd");
        assert_eq!(drawn, names("0123abcd"));
        let of = |kind: &str| drawn.iter().filter(|name| name.starts_with(kind)).count();
        assert_eq!(
            (of("plain"), of("loom"), drawn.len()),
            (PLAIN, LOOM, PLAIN + LOOM)
        );
        // In time everything has its turn.
        let mut seen: Vec<String> = (0..200).flat_map(|n| names(&format!("{n:08x}"))).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 40);
    }

    #[test]
    fn the_copy_has_the_patched_crates_alone() {
        let manifest = "[workspace]\nmembers = [\"proto\", \"mmu\"]\ndefault-members = [\"cli\"]\n[profile.dev]\n";
        let copy = manifest_of(manifest).unwrap();
        assert_eq!(
            copy,
            "[workspace]\nmembers = [\"mmu\", \"arch\"]\n[profile.dev]\n"
        );
        assert!(manifest_of("[workspace]\n").is_err());
    }

    #[test]
    fn why_a_test_failed_is_said() {
        let stdout =
            "---- a stdout ----\n\nthread 'a' (7) panicked at x.rs:1:2:\nleft is not right\nnote\n";
        assert_eq!(panic_of(stdout), Some("left is not right"));
        assert_eq!(panic_of("ok\n"), None);
    }

    #[test]
    fn only_a_test_that_ran_and_failed_has_caught_anything() {
        let ended = |raw, stdout: &str| Ended {
            status: std::process::ExitStatus::from_raw(raw),
            stdout: stdout.to_owned(),
            stderr: String::new(),
        };
        let one = "running 1 test\n";
        assert!(judge(Some(&ended(0, one)), 1, true).is_err());
        assert!(judge(Some(&ended(0, "running 0 tests\n")), 1, false).is_err());
        assert!(judge(Some(&ended(0, one)), 2, false).is_err());
        assert_eq!(
            judge(Some(&ended(101 << 8, one)), 1, true).unwrap(),
            "fails"
        );
        assert_eq!(judge(Some(&ended(6, one)), 1, true).unwrap(), "crashes");
        assert!(judge(None, 1, true).unwrap().starts_with("hangs"));
        assert!(judge(None, 1, false).is_err());
        assert!(judge(Some(&ended(101 << 8, one)), 1, false).is_err());
        assert_eq!(judge(Some(&ended(0, one)), 1, false).unwrap(), "passes");
    }
}
