//! Tests that failed are run again by themselves, twice. One that passes both times is flaky: it
//! failed by how the threads of a whole run fell, or by what ran beside it. The run goes on to
//! count it as passed, says so with the words it failed with, and a flaky test is a bug to be
//! mended (CONTRIBUTING.md). More than [`MOST`] in one run are no luck, and fail it.

use super::command::{cargo_test, counted};
use crate::{
    leftovers::Scratch,
    tally::{Fault, Tally},
    workspace::Workspace,
};

/// How many flaky tests a run may have.
const MOST: usize = 2;

/// How often each is run again, and has to pass.
const TIMES: usize = 2;

/// Runs what failed again, and moves what is flaky from the failures to the flaky ones.
///
/// # Errors
/// When cargo cannot be started.
pub(super) fn run(
    workspace: &Workspace,
    own: &[String],
    scratch: &Scratch,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    // A program that died, or a build that failed, says nothing of a test.
    let known = tally.faults.len() == tally.failed;
    if tally.failed == 0 || tally.failed > MOST || !known {
        return Ok(());
    }
    let names: Vec<String> = tally.faults.iter().map(name_of).collect();
    for time in 1..=TIMES {
        println!("again, {time} of {TIMES}: {}", names.join(", "));
        let mut command = cargo_test(workspace, own);
        if own.is_empty() {
            // Without what is in comments, whose collecting takes longer than the tests.
            command.arg("--tests");
        }
        command
            .args(["--", "--show-output", "--exact"])
            .args(&names);
        scratch.give(&mut command);
        let (again, status) = counted(&mut command)?;
        // None may hide by not being found.
        if !status.success() || again.failed > 0 || again.passed < names.len() {
            return Ok(());
        }
    }
    for fault in &mut tally.faults {
        fault.said.insert(
            0,
            format!(
                "failed among all, and passed {TIMES} times of {TIMES} by itself; it had said:"
            ),
        );
    }
    tally.passed += tally.failed;
    tally.failed = 0;
    tally.flaky.append(&mut tally.faults);
    Ok(())
}

fn name_of(fault: &Fault) -> String {
    let name = fault.name.strip_prefix("test ").unwrap_or(&fault.name);
    name.to_owned()
}
