//! `cargo xtask model`: explores the handover and says what it found.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use slat_tests::explorer::{
    explore::Handover,
    planted::Planted,
    replay,
    scenario::{BOUNDED, DEEP, Scenario},
};

/// Explores every order in which a handover can go, and fail.
///
/// Both sides and the server are the machines that run in production. Around them, within each
/// scenario's budget: VM processes are killed, hosts lose their power and with it what was not
/// synced, the server dies, calls are lost, repeated and late, connections break, disks fail,
/// grants end, hosts are fenced, users cancel. In every state the rules are checked, and an end
/// must be reachable. Then faults are planted, and each must be found.
///
/// Exit code 1 when a rule is broken or a planted fault is not found.
#[derive(Debug, Parser)]
#[command(name = "model")]
struct Args {
    /// Explore the scenarios of a long run as well: tens of minutes and several GiB of memory
    #[arg(long)]
    deep: bool,
    /// Only scenarios whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only planted faults whose name contains this
    #[arg(long, value_name = "TEXT", conflicts_with = "only")]
    planted: Option<String>,
    /// Explain journals instead: files, or folders that are searched for files named `journal*`
    #[arg(long, value_name = "PATH", num_args = 1..)]
    replay: Vec<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !args.replay.is_empty() {
        return explain(&args.replay);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let text = args.output == Output::Text;
    let mut states = 0;
    let mut violations = Vec::new();
    let deep: &[Scenario] = if args.deep { &DEEP } else { &[] };
    for scenario in BOUNDED.iter().chain(deep) {
        if args
            .only
            .as_ref()
            .is_some_and(|only| !scenario.name.contains(only))
            || args.planted.is_some()
        {
            continue;
        }
        let found = Handover::new(scenario.budget, None).explore(threads);
        states += found.states;
        if text {
            println!(
                "{:>9} states, {:>9} more to look for an end, {:>6.1} s  {}",
                found.states,
                found.calm_states,
                found.took.as_secs_f64(),
                scenario.name
            );
        }
        for (rule, steps) in found.violations {
            if text {
                println!("VIOLATION: {rule}\n    {}", steps.join("\n    "));
            }
            violations.push(serde_json::json!({
                "scenario": scenario.name, "rule": rule, "steps": steps,
            }));
        }
    }
    let mut planted = Vec::new();
    let mut missed = 0;
    let wanted = |fault: &Planted| {
        let named = args.planted.as_ref();
        args.only.is_none() && named.is_none_or(|named| fault.name().contains(named))
    };
    for fault in Planted::ALL.into_iter().filter(wanted) {
        let found = Handover::new(fault.budget(), Some(fault)).explore(threads);
        let caught = !found.violations.is_empty();
        missed += usize::from(!caught);
        if text {
            let by: Vec<&str> = found
                .violations
                .iter()
                .map(|(rule, _)| rule.as_str())
                .collect();
            let steps = found.violations.iter().map(|(_, steps)| steps.len()).min();
            let by = if caught {
                format!("{} ({} steps)", by.join("; "), steps.unwrap_or(0))
            } else {
                "NOT FOUND".to_owned()
            };
            println!(
                "planted {:<28} {:>9} states, {:>6.1} s  {by}",
                fault.name(),
                found.states,
                found.took.as_secs_f64()
            );
        }
        planted.push(serde_json::json!({ "name": fault.name(), "found": caught }));
    }
    if text {
        println!(
            "{states} states, {} violations, {} of {} planted faults found; bounded by each scenario's budget of faults: \
             one migration of one VM, every order, any depth",
            violations.len(),
            planted.len() - missed,
            planted.len()
        );
    } else {
        println!(
            "{}",
            serde_json::json!({ "states": states, "violations": violations, "planted": planted })
        );
    }
    ExitCode::from(u8::from(!violations.is_empty() || missed > 0))
}

fn explain(paths: &[PathBuf]) -> ExitCode {
    let mut journals = Vec::new();
    for path in paths {
        if let Err(error) = replay::collect(path, &mut journals) {
            eprintln!("{}: {error}", path.display());
            return ExitCode::from(2);
        }
    }
    match replay::replay(&journals) {
        Ok(count) => {
            println!("{count} journals explained");
            ExitCode::SUCCESS
        }
        Err(faults) => {
            eprintln!("{faults}");
            ExitCode::FAILURE
        }
    }
}
