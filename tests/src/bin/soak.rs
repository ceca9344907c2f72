//! `cargo xtask soak`: a soak of random steps, and what it found.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{Parser, ValueEnum};
use slat_tests::{
    scene,
    soak::{self, Options},
};

/// Does random things to a fleet of four hosts and compares, after each, what API, command line,
/// page and metrics say with what is true.
///
/// VMs are created, paused, migrated, deleted and killed, also two of one name; agents and the
/// server are killed and restarted, a second agent comes under the name of one that reports, disks
/// fill up (as root). What is true is read from locks, journals and the VMs' own processes. Steps
/// come on standard error as they are done.
///
/// Exit code 1 when anything said was not true in time.
#[derive(Debug, Parser)]
#[command(name = "soak")]
struct Args {
    /// How long to go on, as 120 or 1.5
    #[arg(long, default_value_t = 2.0, value_parser = minutes)]
    minutes: f64,
    /// The same steps as another run's [default: by the time of day]
    #[arg(long)]
    seed: Option<u64>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|error| format!("{error}"))?;
    let fits = (0.0..=100_000.0).contains(&minutes);
    fits.then_some(minutes)
        .ok_or_else(|| "between 0 and 100000".to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn by_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = Options {
        seed: args.seed.unwrap_or_else(by_time),
        length: Duration::from_secs_f64(args.minutes * 60.0),
        backend: scene::best_backend(),
    };
    eprintln!("seed {}", options.seed);
    let run =
        || -> anyhow::Result<_> { tokio::runtime::Runtime::new()?.block_on(soak::run(options)) };
    match run() {
        Ok(report) => {
            match args.output {
                Output::Text => println!("{report}"),
                Output::Json => println!("{}", report.json()),
            }
            ExitCode::from(u8::from(!report.disagreements.is_empty()))
        }
        Err(error) => {
            eprintln!("error: seed {}: {error:#}", options.seed);
            ExitCode::from(2)
        }
    }
}
