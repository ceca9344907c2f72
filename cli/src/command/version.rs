//! `slat version`.

use serde_json::json;

use crate::{
    failure::Failure,
    output::{self, Format},
    roles,
};

const EXAMPLES: &str = "\
Examples:
  slat version
  slat version -o json";

/// Options of `slat version`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct VersionArgs {
    /// How to print it
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

impl VersionArgs {
    /// How to print it.
    pub(crate) fn output(self) -> Format {
        self.output
    }
}

/// Prints the version of this binary, the API it speaks and the host's architecture.
pub(crate) fn run(args: &VersionArgs) -> Result<(), Failure> {
    let arch = std::env::consts::ARCH;
    output::answer(
        args.output,
        || json!({"version": roles::VERSION, "api": "slat.v1", "arch": arch}),
        roles::VERSION,
        || format!("slat {} (api slat.v1, {arch})", roles::VERSION),
    )
}
