//! `cargo xtask structure`: the shape of the code, against the table `structure.toml`.
//!
//! Arrows between crates and between the modules of a crate point down only; files have an opening,
//! a length and a width; `unsafe` stands where the table has it. Everything is read from the
//! sources; nothing is built.

mod crates;
mod files;
mod known;
mod layers;
mod modules;
mod source;
mod table;

use std::{fs, path::Path};

use clap::Args;

use self::{
    known::Finding,
    modules::Modules,
    table::{FILE, Structure},
};
use crate::{example, tally::Tally, workspace::Workspace};

/// What to do about exceptions.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Lower the exceptions in structure.toml to what is there still; none is ever raised or added
    #[arg(long)]
    lower: bool,
}

/// The check.
///
/// # Errors
/// When the table, a file or cargo's metadata cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    run_with(workspace, &Options::default())
}

/// The check, with exceptions lowered before it if asked for.
///
/// # Errors
/// As for [`run`].
pub(crate) fn run_with(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    let mut structure = Structure::of(workspace)?;
    let findings = findings(workspace, &structure)?;
    if options.lower {
        let text = table::lowered(&workspace.read(FILE)?, &known::counts(&findings));
        fs::write(workspace.root.join(FILE), text)?;
        structure = Structure::of(workspace)?;
    }
    let known: usize = structure.known.values().sum();
    println!(
        "{} crates, {known} known exceptions",
        structure.crates.len()
    );
    Ok(Tally::of_faults(&known::faults(
        &findings,
        &structure.known,
    )))
}

fn findings(workspace: &Workspace, structure: &Structure) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for path in workspace.files(&["."], &[".rs"])? {
        findings.extend(files::findings(structure, &path, &workspace.read(&path)?));
    }
    let mut crates = Vec::new();
    for (name, layout) in &structure.crates {
        // One that is not there is told of below.
        if workspace.root.join(&layout.root).exists() {
            crates.push((name, layout, Modules::of(workspace, &layout.root)?));
        }
    }
    let mut sources: Vec<(&Path, bool)> = Vec::new();
    for (name, layout, modules) in &crates {
        findings.extend(layers::findings(name, modules, &layout.lists));
        for (path, unsafe_lines) in modules.files() {
            findings.extend(files::unsafe_findings(structure, path, unsafe_lines));
            sources.push((path, !unsafe_lines.is_empty()));
        }
    }
    findings.extend(files::unneeded(structure, &sources));
    let (metadata, bare) = (
        workspace.metadata()?,
        workspace.metadata_of(example::MANIFEST)?,
    );
    findings.extend(crates::findings(structure, &metadata));
    findings.extend(crates::findings(structure, &bare));
    let packages = [metadata.own(), bare.own()].concat();
    findings.extend(crates::missing(structure, &packages));
    Ok(findings)
}
