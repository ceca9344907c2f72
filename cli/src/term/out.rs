//! The two streams: data on standard output, messages on standard error. For programs (`-o json`,
//! `-o yaml`) the messages are JSON too, one object a line.
//!
//! Nothing here panics when the reader of a pipe has gone: on standard output that ends the command
//! quietly with [`Failure::BrokenPipe`], on standard error it is ignored. What a terminal would
//! obey is escaped on the way out; pieces from outside are escaped where they are put into a line.

use std::{
    io::{self, IsTerminal as _, Write as _},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{escape, failure::Failure};

/// Whether what is printed is read by a program: set once, before the command runs.
static FOR_PROGRAMS: AtomicBool = AtomicBool::new(false);

/// From now on every line on standard error is one JSON object: `{"note":...}` or `{"error":...}`.
pub(crate) fn for_programs() {
    FOR_PROGRAMS.store(true, Ordering::Relaxed);
}

fn is_for_programs() -> bool {
    FOR_PROGRAMS.load(Ordering::Relaxed)
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

/// JSON text, which means the same when a terminal has nothing to obey in it.
pub(crate) fn json(text: &str) -> Result<(), Failure> {
    raw_line(&escape::json(text))
}

/// Writes a message to standard error.
pub(crate) fn say(text: impl AsRef<str>) {
    if is_for_programs() {
        say_json(&serde_json::json!({"note": text.as_ref()}));
    } else {
        say_line(&escape::lines(text.as_ref()));
    }
}

fn say_json(value: &serde_json::Value) {
    say_line(&escape::json(&value.to_string()));
}

fn say_line(line: &str) {
    // Nobody is left to be told when this fails.
    drop(writeln!(io::stderr().lock(), "{line}"));
}

/// Says why a command failed, unless everything is said already.
pub(crate) fn report(failure: &Failure) {
    if is_for_programs() {
        if let Some(document) = failure.document() {
            say_json(&document);
        }
        return;
    }
    let text = failure.render();
    if !text.is_empty() {
        say_line(&text);
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
    io::stderr().is_terminal() && !dumb() && !is_for_programs()
}

/// Width of the terminal behind standard error; 80 when it does not say.
pub(crate) fn stderr_width() -> usize {
    rustix::termios::tcgetwinsize(io::stderr())
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|width| *width >= 20)
        .unwrap_or(80)
}
