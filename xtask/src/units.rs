//! The systemd units of deploy/: systemd accepts them, where it is installed.

use std::{fs, path::Path, process::Command};

use anyhow::Context as _;

use crate::{shell, tally::Tally, workspace::Workspace};

const UNITS: [&str; 2] = ["slat-server.service", "slat-agent.service"];
/// Where the units expect the binary.
const INSTALLED: &str = "/usr/local/bin/slat";

/// `systemd-analyze verify`, over copies that name a program which exists on this machine: it looks
/// for it.
///
/// # Errors
/// When a unit cannot be read or copied.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    if shell::output(Command::new("systemd-analyze").arg("--version")).is_err() {
        return Ok(Tally::skipped(
            "systemd units",
            "systemd-analyze is not installed",
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
