//! The two streams: data on standard output, messages on standard error.
//!
//! Nothing here panics when the reader of a pipe has gone: on standard output that ends the command
//! quietly with [`Failure::BrokenPipe`], on standard error it is ignored. What a terminal would
//! obey is escaped on the way out; pieces from outside are escaped where they are put into a line.

use std::io::{self, IsTerminal as _, Write as _};

use crate::{escape, failure::Failure};

/// How a client command prints its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people; its layout may change.
    #[default]
    Table,
    /// For programs: the messages of slat.v1 as proto JSON.
    Json,
}

/// Writes `text` and a line end to standard output.
pub(crate) fn line(text: impl AsRef<str>) -> Result<(), Failure> {
    raw_line(&escape::lines(text.as_ref()))
}

fn raw_line(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .map_err(Failure::from_stdout)
}

/// One JSON value, indented, on standard output.
pub(crate) fn json(value: &serde_json::Value) -> Result<(), Failure> {
    raw_line(&escape::json(&format!("{value:#}")))
}

/// One JSON value on one line: an element of a stream.
pub(crate) fn json_line(value: &serde_json::Value) -> Result<(), Failure> {
    raw_line(&escape::json(&value.to_string()))
}

/// Writes a message to standard error.
pub(crate) fn say(text: impl AsRef<str>) {
    // Nobody is left to be told when this fails.
    drop(writeln!(
        io::stderr().lock(),
        "{}",
        escape::lines(text.as_ref())
    ));
}

/// Says why a command failed, unless everything is said already.
pub(crate) fn report(failure: &Failure) {
    let text = failure.render();
    if !text.is_empty() {
        say(text);
    }
}

/// Writes to standard error without a line end, and as it is: what came from outside is escaped
/// already.
pub(crate) fn say_raw(text: &str) {
    let mut stderr = io::stderr().lock();
    // Nobody is left to be told when this fails.
    drop(write!(stderr, "{text}").and_then(|()| stderr.flush()));
}

fn plain_environment() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    set("NO_COLOR") || dumb()
}

fn dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term == "dumb")
}

/// Whether standard output takes colours.
pub(crate) fn stdout_colours() -> bool {
    io::stdout().is_terminal() && !plain_environment()
}

/// Whether a line on standard error can be drawn over.
pub(crate) fn stderr_is_live() -> bool {
    io::stderr().is_terminal() && !dumb()
}

/// Width of the terminal behind standard error; 80 when it does not say.
pub(crate) fn stderr_width() -> usize {
    rustix::termios::tcgetwinsize(io::stderr())
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|width| *width >= 20)
        .unwrap_or(80)
}
