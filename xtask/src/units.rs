//! The files of deploy/ against the binary: every environment variable they set is one that `slat` reads, and systemd
//! accepts the units where it is installed.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::Context as _;

use crate::{shell, tally::Tally, workspace::Workspace};

const UNITS: [&str; 2] = ["slat-server.service", "slat-agent.service"];
/// Where the units expect the binary.
const INSTALLED: &str = "/usr/local/bin/slat";

/// The variables that sources read.
fn names_in(workspace: &Workspace, folders: &[&str]) -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for path in workspace.files(folders, &[".rs"])? {
        names.extend(read_by(&workspace.read(path)?).map(str::to_owned));
    }
    Ok(names)
}

/// The variables that a source reads: by `env::var`, as an option's `env`, or through a function of its own that does so.
fn read_by(source: &str) -> impl Iterator<Item = &str> {
    let quotes: Vec<usize> = source.match_indices('"').map(|(at, _)| at).collect();
    let pairs = quotes.into_iter().zip(source.split('"').skip(1));
    pairs
        .filter(|(at, word)| is_variable(word) && is_read(source, source[..*at].trim_end()))
        .map(|(_, word)| word)
}

/// Whether a name in quotes that stands behind `before` is read.
fn is_read(source: &str, before: &str) -> bool {
    let calls = |before: &str| before.ends_with("env::var") || before.ends_with("env::var_os");
    let assigned = before.strip_suffix('=').map(str::trim_end);
    if assigned.is_some_and(|before| before.ends_with("env")) {
        return true;
    }
    let Some(before) = before.strip_suffix('(') else {
        return false;
    };
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let name = before.rsplit(|c| !word(c)).next().unwrap_or_default();
    let body = source
        .split_once(&format!("fn {name}("))
        .and_then(|(_, rest)| rest.split("\n}").next());
    let through = body.is_some_and(|body| body.contains("env::var"));
    calls(before) || (through && !name.is_empty() && !before.ends_with(&format!(".{name}")))
}

/// Both checks.
///
/// # Errors
/// When a file cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let slat = names_in(workspace, &["cli/src"])?;
    // Pages for developers also name what tests and tools read.
    let tools = names_in(
        workspace,
        &["arch/tests", "mmu/tests", "tests", "xtask/src"],
    )?;
    let mut faults = Vec::new();
    let mut used = 0;
    for path in workspace.files(
        &["deploy", "docs", "README.md"],
        &[".env", ".service", ".md"],
    )? {
        for name in variables(&workspace.read(&path)?) {
            used += 1;
            let is_read =
                slat.contains(&name) || (path.starts_with("docs") && tools.contains(&name));
            if !is_read {
                faults.push(format!("{}: nothing reads {name}", path.display()));
            }
        }
    }
    println!("{used} uses of {} environment variables", slat.len());
    let mut tally = Tally::of_faults(&faults);
    tally.add(verify(workspace)?);
    Ok(tally)
}

fn is_variable(word: &str) -> bool {
    let ours = |c: u8| c.is_ascii_uppercase() || c == b'_';
    word.len() > 5 && word.starts_with("SLAT_") && word.bytes().all(ours)
}

fn variables(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !word(c))
        .filter(|word| is_variable(word))
        .map(str::to_owned)
        .collect()
}

/// `systemd-analyze verify`, over copies that name a program which exists on this machine: it looks for it.
fn verify(workspace: &Workspace) -> anyhow::Result<Tally> {
    if shell::output(Command::new("systemd-analyze").arg("--version")).is_err() {
        return Ok(Tally::skipped(
            "systemd units: systemd-analyze is not installed",
        ));
    }
    let folder = workspace.target_dir()?.join("xtask/units");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let stand_in = if Path::new(INSTALLED).exists() {
        INSTALLED
    } else {
        "/bin/true"
    };
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--recursive-errors=no", "--man=no"]);
    for unit in UNITS {
        let text = workspace.read(Path::new("deploy/systemd").join(unit))?;
        let copy = folder.join(unit);
        fs::write(&copy, text.replace(INSTALLED, stand_in))?;
        command.arg(copy);
    }
    let shown = shell::line(&command);
    println!("{shown}");
    let output = command.output().context(shown)?;
    // It warns of unknown settings and still ends with 0: whatever it says of ours is a fault.
    let said = String::from_utf8_lossy(&output.stderr);
    let faults: Vec<String> = said
        .lines()
        .filter(|line| UNITS.iter().any(|unit| line.contains(unit)))
        .map(str::to_owned)
        .collect();
    Ok(Tally::of_faults(&faults))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_read_counts() {
        let source = r#"#[arg(long, env = "SLAT_A")] #[arg(env="SLAT_B")] env::var( "SLAT_C") std::env::var_os("SLAT_D")
            number("SLAT_E") command.env("SLAT_NO", 1) const NO: &str = "SLAT_NONE"; say("SLAT_NEVER")
            fn number(name: &str) { env::var(name) }
            fn say(name: &str) { println!("{name}") }"#;
        let source = source.replace(" }", "\n}");
        let found: Vec<&str> = read_by(&source).collect();
        assert_eq!(found, ["SLAT_A", "SLAT_B", "SLAT_C", "SLAT_D", "SLAT_E"]);
    }

    #[test]
    fn variables_are_found_where_they_stand() {
        let text = "#SLAT_LISTEN=1\nEnvironment=SLAT_STATE_DIR=%S SLAT_ MY_SLAT_X ${SLAT_MEMORY}";
        let found: Vec<_> = variables(text).into_iter().collect();
        assert_eq!(found, ["SLAT_LISTEN", "SLAT_MEMORY", "SLAT_STATE_DIR"]);
    }
}
