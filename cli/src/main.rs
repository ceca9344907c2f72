//! `slat`: the one binary an operator installs. It parses the command line, starts a runtime for
//! the command and turns its end into an exit code; the server and the agent are libraries, the
//! commands are one file each.

mod args;
mod client;
mod command;
mod daemon;
mod demo;
mod dispatch;
mod escape;
mod failure;
mod local;
mod output;
mod roles;
mod term;
mod view;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let args = match args::Cli::try_parse() {
        Ok(args) => args,
        Err(error) => return ExitCode::from(dispatch::refused(&error, std::env::args_os())),
    };
    match dispatch::run(args.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            term::out::report(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}
