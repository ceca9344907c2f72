//! The workspace's tests, with what they skipped brought to the end, and a look at what they left
//! behind.
//!
//! A test that lacks something (`/dev/kvm`) prints a line `SKIPPED: <why>` and returns. libtest
//! hides what passing tests print, so the run asks for it (`--show-output`) and this command keeps
//! everything else of it back.

use self::command::cargo_test;
pub(crate) use self::command::counted;
use crate::{
    leftovers::{self, Scratch},
    tally::Tally,
    workspace::Workspace,
};

mod again;
mod command;
mod reader;

/// The tests beside the code: those that need no other process and no built binary.
///
/// # Errors
/// As for [`run`].
pub(crate) fn beside_the_code(workspace: &Workspace) -> anyhow::Result<Tally> {
    run(workspace, &["--lib".to_owned(), "--bins".to_owned()])
}

/// `cargo test --workspace`, or of what `args` choose.
///
/// # Errors
/// When cargo cannot be started.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> anyhow::Result<Tally> {
    let (own, to_tests) = match args.iter().position(|arg| arg == "--") {
        Some(at) => (&args[..at], &args[at + 1..]),
        None => (args, &[][..]),
    };
    let mut command = cargo_test(workspace, own);
    command.args(["--", "--show-output"]).args(to_tests);
    let scratch = Scratch::new("test")?;
    scratch.give(&mut command);
    let (mut tally, status) = counted(&mut command)?;
    again::run(workspace, own, &scratch, &mut tally)?;
    // A test that failed may have stopped before it cleaned up; one that passed may not.
    if status.success() {
        let mut left = scratch.remains();
        left.extend(leftovers::processes(&workspace.target_dir()?));
        tally.add(Tally::of_faults(&left));
    }
    Ok(tally)
}
