//! `cargo xtask bench dirty`: what readers of dirty pages cost a guest that writes as fast as it
//! can. Windows without a reader, with one and with four alternate, each reader harvesting and
//! acknowledging at one pace, so that what else the machine does meets all of them. Four look at
//! the same moments, and in a window of its own spread over the pace: memory is then protected four
//! times as often, which no way of reading can spare the guest. The cost is the guest's time for a
//! page it writes, as a ratio within one round of windows.

use std::{process::ExitCode, time::Duration};

use anyhow::ensure;
use clap::Parser;
use serde_json::{Value, json};
use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend, DirtyEngine},
};
use slat_tests::{
    Fleet, Layout,
    bench::{
        interrupt,
        readers::{Readers, Window, window},
    },
    binary,
    guest::busy,
    scene,
};

/// Goal: four readers cost at most so many times what one costs.
const GOAL: f64 = 1.1;
/// Windows of a round: readers, and whether they look at the same moments.
const WINDOWS: [(usize, bool); 4] = [(0, true), (1, true), (4, true), (4, false)];
const VM: &str = "bench";

/// Readers of dirty pages beside a guest that writes as fast as it can
#[derive(Debug, Parser)]
struct Args {
    /// Guest memory in MiB
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    /// Rounds of windows; the first warms up and is not counted
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Length of a window in milliseconds
    #[arg(long, default_value_t = 2000)]
    window_ms: u64,
    /// A reader harvests again after so many milliseconds
    #[arg(long, default_value_t = 100)]
    pace_ms: u64,
    /// Table for people or one JSON object
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

/// One engine: for each round a window of each number of readers.
struct Row {
    name: String,
    rounds: Vec<[Window; 4]>,
}

fn name() -> String {
    format!("vms/{VM}")
}

/// Measures one engine; `None` where there is none.
async fn measure(
    args: &Args,
    backend: Backend,
    engine: DirtyEngine,
    label: &str,
) -> anyhow::Result<Option<Row>> {
    let mut fleet = Fleet::start(Layout {
        backend,
        hosts: vec![("host-a", args.memory_mib + 64)],
        own_clocks: false,
    })
    .await?;
    let spec = v1::VmSpec {
        dirty_engine: engine.into(),
        ..busy(backend, args.memory_mib, 1, None)
    };
    let probe = v1::CreateVmRequest {
        vm_id: VM.into(),
        spec: Some(spec.clone()),
        host: "hosts/host-a".into(),
        validate_only: true,
    };
    if let Err(status) = fleet.vms(&fleet.server()).create_vm(probe).await {
        let error = ApiError::from(status);
        ensure!(error.reason == Reason::CapabilityMissing, "{error:?}");
        eprintln!("SKIPPED: {label}: {error}");
        fleet.finish().await?;
        return Ok(None);
    }
    fleet.run_vm(VM, "host-a", spec).await?;
    let mut rounds = Vec::new();
    for run in 0..=args.runs {
        let mut round = [Window::default(); WINDOWS.len()];
        for (place, (readers, together)) in round.iter_mut().zip(WINDOWS) {
            let how = Readers {
                readers,
                together,
                length: Duration::from_millis(args.window_ms),
                pace: Duration::from_millis(args.pace_ms),
            };
            *place = window(&fleet, &name(), how).await?;
        }
        if run > 0 {
            rounds.push(round);
        }
    }
    let request = v1::DeleteVmRequest {
        name: name(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).delete_vm(request).await?;
    fleet.finish().await?;
    let size = args.memory_mib;
    Ok(Some(Row {
        name: format!("{label}, {size} MiB"),
        rounds,
    }))
}

/// Median, least and greatest.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    [
        at(values.len() / 2),
        at(0),
        at(values.len().saturating_sub(1)),
    ]
}

impl Row {
    fn rate(&self, readers: usize) -> [f64; 3] {
        spread(self.rounds.iter().map(|round| round[readers].rate))
    }

    fn harvest(&self, readers: usize) -> [f64; 3] {
        spread(self.rounds.iter().map(|round| round[readers].harvest))
    }

    /// The guest's time for a page with one number of readers, over that with another.
    fn cost(&self, of: usize, over: usize) -> [f64; 3] {
        spread(
            self.rounds
                .iter()
                .map(|round| round[over].rate / round[of].rate),
        )
    }

    fn json(&self) -> Value {
        let [ratio, ..] = self.cost(2, 1);
        json!({
            "name": self.name,
            "pages_per_second": { "none": self.rate(0), "one": self.rate(1), "four": self.rate(2), "four_spread": self.rate(3) },
            "harvest_seconds": { "one": self.harvest(1), "four": self.harvest(2) },
            "slow_down": { "one": self.cost(1, 0), "four": self.cost(2, 0) },
            "ratio": self.cost(2, 1),
            "ratio_spread": self.cost(3, 1),
            "goal": GOAL,
            "met": ratio <= GOAL,
        })
    }

    fn text(&self) -> String {
        let show = |[median, min, max]: [f64; 3], scale: f64| {
            let (median, min, max) = (median * scale, min * scale, max * scale);
            format!("{median:.2} ({min:.2}-{max:.2})")
        };
        let ratio = self.cost(2, 1);
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.name,
            show(self.rate(0), 1e-3),
            show(self.rate(1), 1e-3),
            show(self.rate(2), 1e-3),
            show(self.harvest(1), 1e3),
            show(self.harvest(2), 1e3),
            show(ratio, 1.0),
            if ratio[0] <= GOAL { "yes" } else { "NO" },
            show(self.cost(3, 1), 1.0),
        )
    }
}

async fn run(args: &Args) -> anyhow::Result<()> {
    let all = [
        (Backend::Kvm, DirtyEngine::Bitmap, "kvm, bitmap"),
        (Backend::Kvm, DirtyEngine::Ring, "kvm, ring"),
        (Backend::Software, DirtyEngine::Bitmap, "software"),
    ];
    let mut rows = Vec::new();
    for (backend, engine, label) in all {
        if let Some(why) = scene::kvm_missing().filter(|_| backend == Backend::Kvm) {
            eprintln!("SKIPPED: {label}: {why}");
            continue;
        }
        rows.extend(measure(args, backend, engine, label).await?);
    }
    if args.output == "json" {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        println!("{}", json!({ "rows": rows }));
        return Ok(());
    }
    println!(
        "| engine | thousand pages/s, no reader | one | four | harvest ms, one | four | cost of four over one | at most {GOAL} | cost of four spread |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for row in &rows {
        println!("{}", row.text());
    }
    println!(
        "\nMedian (least-greatest) of {} rounds of windows of {} ms; each reader harvests every {} ms, all at the same moments unless spread.",
        args.runs, args.window_ms, args.pace_ms
    );
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures say little");
    }
    let done = binary::slat().and_then(|_| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        interrupt::measure(&runtime, run(&args))
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
