//! The copy of the workspace that bugs are planted in, below `target/planted`, with build artefacts
//! of its own.
//!
//! The sources themselves are never touched, and what an interrupted run leaves planted is written
//! over by the next. A file that did not change keeps its time, so cargo builds only what an edit
//! makes necessary.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use super::{
    fit,
    table::{Bug, Edit},
    target::Target,
    verdict::{judge, panic_of},
};
use crate::{
    interleavings,
    shell::{self, Ended},
    tally::Tally,
    workspace::Workspace,
};

/// Of shuttle's schedules, so that a verdict can be had twice.
const SEED: &str = "1";

/// What bugs are planted in.
pub(super) struct Tree {
    copy: Workspace,
    target: PathBuf,
    /// The folder above those in which the models are built. Not those of the workspace: cargo
    /// takes the same crate at another place for the same, and would run there what was planted
    /// here.
    models: PathBuf,
    /// Held for as long as the copy is used: two runs in one would judge each other's bugs.
    _lock: File,
}

/// A built test program.
struct Program {
    path: PathBuf,
    folder: PathBuf,
}

impl Tree {
    /// Brings the copy up to date.
    ///
    /// # Errors
    /// When files cannot be read or written, or another run uses the copy.
    pub(super) fn of(workspace: &Workspace) -> anyhow::Result<Self> {
        let folder = workspace.target_dir()?.join("planted");
        fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join("lock"))?;
        lock.try_lock()
            .with_context(|| format!("another run plants bugs in {}", folder.display()))?;
        let tree = Self {
            copy: Workspace {
                root: folder.join("tree"),
            },
            target: folder.join("target"),
            models: folder,
            _lock: lock,
        };
        let files = workspace.files(&["."], &[""])?;
        for file in &files {
            tree.write(file, &fs::read(workspace.root.join(file))?)?;
        }
        for file in tree.copy.files(&["."], &[""])? {
            if !files.contains(&file) {
                fs::remove_file(tree.copy.root.join(file))?;
            }
        }
        Ok(tree)
    }

    fn write(&self, file: &Path, text: &[u8]) -> anyhow::Result<()> {
        let to = self.copy.root.join(file);
        if fs::read(&to).is_ok_and(|there| there == text) {
            return Ok(());
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&to, text).with_context(|| format!("writing {}", to.display()))
    }

    /// All tests that the bugs name, without a bug: each must pass.
    ///
    /// # Errors
    /// When one cannot be built or run.
    pub(super) fn unplanted(&self, bugs: &[Bug]) -> anyhow::Result<Tally> {
        let mut programs: Vec<(&Target, Vec<&str>)> = Vec::new();
        for Bug { target, .. } in bugs {
            match programs.iter_mut().find(|(it, _)| it.is_beside(target)) {
                Some((_, names)) if names.contains(&target.name.as_str()) => {}
                Some((_, names)) => names.push(&target.name),
                None => programs.push((target, vec![&target.name])),
            }
        }
        let mut tally = Tally::default();
        for (target, names) in programs {
            let bound = target.bound().saturating_mul(u32::try_from(names.len())?);
            let ended = self.run(&self.build(target)?, &names, bound)?;
            let program = target.arguments().join(" ");
            match judge(ended.as_ref(), names.len(), false) {
                Ok(_) => {
                    println!("{program}: {} tests pass with no bug planted", names.len());
                    tally.add(Tally::passed());
                }
                Err(error) => {
                    eprintln!("fault: {program}, with no bug planted: {error:#}");
                    tally.add(Tally::failed());
                }
            }
        }
        Ok(tally)
    }

    /// Plants one bug, builds its test and runs it, and takes the bug out again. Says how the test
    /// failed.
    ///
    /// # Errors
    /// When the test passes, does not build, or is not there; when the bug does not fit.
    pub(super) fn catches(&self, bug: &Bug) -> anyhow::Result<String> {
        let mut clean = Vec::new();
        for file in bug.files() {
            let edits: Vec<&Edit> = bug.edits.iter().filter(|it| it.file == file).collect();
            let source = self.copy.read(file)?;
            let planted = fit::replaced(&source, &edits)?;
            clean.push((Path::new(file), source, planted));
        }
        let mut result = clean
            .iter()
            .try_for_each(|(file, _, planted)| self.write(file, planted.as_bytes()));
        let how = match result {
            Ok(()) => self.fails(&bug.target),
            Err(error) => Err(error),
        };
        result = clean
            .iter()
            .try_for_each(|(file, source, _)| self.write(file, source.as_bytes()));
        result.context("taking the bug out again")?;
        how
    }

    fn fails(&self, target: &Target) -> anyhow::Result<String> {
        let ended = self.run(&self.build(target)?, &[&target.name], target.bound())?;
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

    /// One format of each kind (`few_formats`), little optimised: what takes time is compiling. A
    /// model is built as `cargo xtask interleavings` builds it, because what takes time there is
    /// the schedules.
    fn build(&self, target: &Target) -> anyhow::Result<Program> {
        let mut command = self.copy.cargo();
        command.args(["test", "--quiet", "--locked", "--no-run"]);
        command.arg("--message-format=json");
        command.args(target.arguments());
        if let Some(feature) = &target.feature {
            interleavings::built(&mut command, &self.models, feature);
        } else {
            for (name, level) in [("slat-mmu", 1), ("slat-arch", 0)] {
                command.arg("--config");
                command.arg(format!("profile.dev.package.{name}.opt-level={level}"));
            }
            command.env("RUSTFLAGS", "--cfg few_formats -Awarnings");
            command.env("CARGO_TARGET_DIR", &self.target);
        }
        let said = shell::output(&mut command).map_err(|error| {
            let text = error.to_string();
            let first = text.lines().find(|line| line.starts_with("error"));
            anyhow!("does not build: {}", first.unwrap_or(text.as_str()))
        })?;
        let library = target.package.replace('-', "_");
        let wanted = target.program.as_ref().unwrap_or(&library);
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
