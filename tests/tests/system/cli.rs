//! The command line as scripts use it: exit codes, JSON on standard output, and a demo that leaves
//! nothing.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use slat_proto::v1::Backend;
use slat_tests::{Fleet, Layout, binary, guest::usual, process::leftovers, scene};

/// Longest time one command may take.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) async fn slat(args: &[&str], envs: &[(&str, &str)]) -> anyhow::Result<Output> {
    let mut command = tokio::process::Command::new(binary::slat()?);
    command.env("SLAT_INSECURE_PLAINTEXT", "true");
    command.args(args).kill_on_drop(true).env_remove("RUST_LOG");
    for (name, value) in envs {
        command.env(name, value);
    }
    tokio::time::timeout(LIMIT, command.output())
        .await
        .with_context(|| format!("slat {args:?} does not end"))?
        .context("running slat")
}

async fn json(args: &[&str], envs: &[(&str, &str)]) -> anyhow::Result<Value> {
    let output = slat(args, envs).await?;
    ensure!(output.status.success(), "slat {args:?}: {output:?}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("slat {args:?}: {output:?}"))
}

/// The object about `name`, whether the command prints it alone, in a list, or in an object with a
/// list.
fn about<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) if fields.get("name").and_then(Value::as_str) == Some(name) => {
            Some(value)
        }
        Value::Object(fields) => fields.values().find_map(|value| about(value, name)),
        Value::Array(items) => items.iter().find_map(|value| about(value, name)),
        _ => None,
    }
}

#[test]
fn get_migrate_and_cancel() {
    scene::run(
        Layout::two(scene::best_backend()),
        async |fleet: &mut Fleet| {
            let address = fleet.server().to_string();
            let env = [("SLAT_SERVER", address.as_str())];
            let vm = fleet
                .run_vm("web", "host-a", usual(fleet.backend()))
                .await?;

            let hosts = json(&["get", "hosts", "-o", "json"], &env).await?;
            let host = about(&hosts, "hosts/host-b").context("no host-b")?;
            ensure!(host["state"] == "STATE_READY", "{hosts:#}");
            let vms = json(&["get", "vms", "-o", "json"], &env).await?;
            let web = about(&vms, &vm.name).context("no web")?;
            ensure!(
                web["state"] == "STATE_RUNNING" && web["host"] == "hosts/host-a",
                "{vms:#}"
            );

            let moved = json(&["migrate", "web", "--to", "host-b", "-o", "json"], &env).await?;
            ensure!(moved["phase"] == "MIGRATION_PHASE_COMPLETED", "{moved:#}");
            let name = moved["name"]
                .as_str()
                .context("a migration without a name")?;
            let all = json(&["get", "migrations", "-o", "json"], &env).await?;
            ensure!(about(&all, name).is_some(), "{all:#}");
            let table = slat(&["get", "migrations"], &env).await?;
            let text = String::from_utf8_lossy(&table.stdout).into_owned();
            let id = name.strip_prefix("migrations/").unwrap_or(name);
            ensure!(table.status.success() && text.contains(id), "{table:?}");

            // 2 wrong, 3 unknown, 4 refused, 5 unavailable.
            let codes: [(&[&str], i32); 9] = [
                (&["migrate", "web"], 2),
                (&["migrate", "web", "--to", "Host_B"], 2),
                (&["get", "everything"], 2),
                (&["get", "vm", "nobody"], 3),
                (&["migrate", "nobody", "--to", "host-b"], 3),
                (&["migrate", "web", "--to", "nowhere"], 3),
                (&["cancel", "none"], 3),
                (&["migrate", "web", "--to", "host-b"], 4),
                (&["get", "vms", "--server", "127.0.0.1:1"], 5),
            ];
            for (args, code) in codes {
                let output = slat(args, &env).await?;
                ensure!(
                    output.status.code() == Some(code),
                    "slat {args:?} is not {code}: {output:?}"
                );
                ensure!(output.stdout.is_empty(), "slat {args:?}: {output:?}");
                ensure!(!output.stderr.is_empty(), "slat {args:?} says nothing");
            }
            fleet.runs_soundly_on(&vm.name, "host-b").await?;

            // A migration that is cancelled from elsewhere ends `slat migrate` with 6.
            let back = [
                "migrate",
                "web",
                "--to",
                "host-a",
                "--id",
                "back",
                "--max-bandwidth",
                "4MiB/s",
                "-o",
                "json",
            ];
            let (migrate, cancelled) = tokio::join!(slat(&back, &env), async {
                fleet.migration_until_exists("migrations/back").await?;
                slat(&["cancel", "back"], &env).await
            });
            let (migrate, cancelled) = (migrate?, cancelled?);
            ensure!(cancelled.status.success(), "{cancelled:?}");
            ensure!(migrate.status.code() == Some(6), "{migrate:?}");
            let report: Value =
                serde_json::from_slice(&migrate.stdout).with_context(|| format!("{migrate:?}"))?;
            ensure!(report["phase"] == "MIGRATION_PHASE_CANCELLED", "{report:#}");
            // It goes on after an error.
            let deleted = slat(&["delete", "vm", "nobody", "web"], &env).await?;
            ensure!(deleted.status.code() == Some(3), "{deleted:?}");
            ensure!(slat(&["get", "vm", "web"], &env).await?.status.code() == Some(3));
            Ok(())
        },
    );
}

/// Runs `slat demo` in a directory of its own and checks its report and that it left nothing.
fn demo(backend: &str) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime
        .block_on(async {
            // Short: the demo's own directory and a VM's socket are below it.
            let home = slat_test_dir::TestDir::with_prefix("slat-d")?;
            let tmp = home.path().to_string_lossy().into_owned();
            let args = [
                "demo",
                "--backend",
                backend,
                "--memory",
                "64MiB",
                "--vcpus",
                "2",
                "--migrations",
                "2",
                "--streams",
                "2",
                "--output",
                "json",
            ];
            let report = json(&args, &[("TMPDIR", &tmp)]).await?;
            check_report(&report, backend).with_context(|| format!("{report:#}"))?;
            let left = leftovers(home.path());
            ensure!(left.is_empty(), "{left:#?}");
            let files: Vec<_> = std::fs::read_dir(home.path())?.collect();
            ensure!(files.is_empty(), "{files:?}");
            Ok(())
        })
        .unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys())
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

fn check_report(report: &Value, backend: &str) -> anyhow::Result<()> {
    let mut top = [
        "backend",
        "arch",
        "format",
        "memory_bytes",
        "vcpus",
        "streams",
        "endpoints",
        "pages",
        "migrations",
        "guest",
        "digest_match",
        "mmu",
    ];
    top.sort_unstable();
    ensure!(keys(report) == top, "{:?}", keys(report));
    ensure!(report["backend"] == backend);
    ensure!(report["arch"] == std::env::consts::ARCH);
    ensure!(report["format"].is_null() == (backend == "kvm"));
    ensure!(report["memory_bytes"] == 64 << 20);
    ensure!(report["vcpus"] == 2 && report["streams"] == 2);
    ensure!(report["digest_match"] == true);
    for way in [&report["endpoints"], &report["pages"][0]] {
        ensure!(
            way.as_str().is_some_and(|way| way.starts_with("TLS 1.3, ")),
            "{way}"
        );
    }
    let migrations = report["migrations"].as_array().context("no list")?;
    // The last one is of the paused VM: its digest is compared on both hosts.
    let names: Vec<_> = migrations.iter().map(|m| m["name"].as_str()).collect();
    ensure!(
        names == [Some("live-1"), Some("live-2"), Some("paused")],
        "{names:?}"
    );
    let mut fields = [
        "name",
        "source",
        "destination",
        "result",
        "iterations",
        "total_time_seconds",
        "downtime_seconds",
        "bytes_transferred",
        "pages_normal",
        "pages_zero",
        "throughput_bytes_per_second",
        "dirty_rate_bytes_per_second",
    ];
    fields.sort_unstable();
    for migration in migrations {
        ensure!(keys(migration) == fields, "{:?}", keys(migration));
        ensure!(migration["iterations"].as_u64() >= Some(2));
        ensure!(migration["result"] == "COMPLETED");
        ensure!(migration["downtime_seconds"].as_f64() > Some(0.0));
        ensure!(migration["bytes_transferred"].as_u64() > Some(0));
    }
    for pair in migrations.windows(2) {
        ensure!(pair[0]["destination"] == pair[1]["source"]);
    }
    ensure!(keys(&report["guest"]) == ["errors", "pages_written", "passes"]);
    ensure!(report["guest"]["errors"] == 0);
    ensure!(report["guest"]["passes"].as_u64() > Some(0), "no round");
    ensure!(report["guest"]["pages_written"].as_u64() > Some(0));
    let mmu = ["faults", "remote_tlb_flush_requests", "remote_tlb_flushes"];
    ensure!(keys(&report["mmu"]) == mmu);
    Ok(())
}

#[test]
fn slots_are_changed_and_memory_is_discarded() {
    scene::run(
        Layout::two(scene::best_backend()),
        async |fleet: &mut Fleet| {
            let address = fleet.server().to_string();
            let env = [("SLAT_SERVER", address.as_str())];
            let vm = fleet
                .run_vm("web", "host-a", usual(fleet.backend()))
                .await?;
            let says = async |line: &str, words: &[&str]| {
                let args: Vec<&str> = line.split(' ').collect();
                let output = slat(&args, &env).await?;
                ensure!(output.status.success(), "slat {line}: {output:?}");
                let text = String::from_utf8_lossy(&output.stdout);
                for words in words {
                    ensure!(text.contains(words), "slat {line}: {text}");
                }
                anyhow::Ok(())
            };
            let add = "memory add-slot web --slot 3 --base 4GiB --size 64MiB --read-only";
            says(add, &["read-only", "no vCPU was paused"]).await?;
            says("memory slots web", &["2 of at most", "slots"]).await?;
            let set = "memory set-slot web --slot 3 --access";
            says(&format!("{set} read-write"), &["vCPUs paused for"]).await?;
            says(
                "memory move-slot web --slot 3 --base 8GiB",
                &["0x200000000"],
            )
            .await?;
            says("get vm web", &["64 MiB of it added"]).await?;
            let discard = "memory discard web --base 8GiB --size 2MiB";
            says(discard, &["2 MiB discarded", "freed"]).await?;
            let args = format!("{set} read-only -o json");
            let changed = json(&args.split(' ').collect::<Vec<_>>(), &env).await?;
            ensure!(changed["pausedNanos"].is_string(), "{changed:#}");
            says("memory delete-slot web --slot 3", &["no vCPU was paused"]).await?;
            // Many at once: a batch of which one cannot be made changes nothing.
            let file = fleet.root().join("changes");
            let batch = format!("memory change-slots web -f {}", file.display());
            std::fs::write(
                &file,
                "add-slot --slot 4 --base 4GiB --size 2MiB\n\
                 add-slot --slot 5 --base 5GiB --size 2MiB\n\
                 delete-slot --slot 77\n",
            )?;
            let refused = slat(&batch.split(' ').collect::<Vec<_>>(), &env).await?;
            ensure!(!refused.status.success(), "{refused:?}");
            says("memory slots web", &["1 of at most"]).await?;
            std::fs::write(
                &file,
                "add-slot --slot 4 --base 4GiB --size 2MiB\n\
                 add-slot --slot 5 --base 5GiB --size 2MiB\n\
                 move-slot --slot 5 --base 6GiB\n",
            )?;
            says(&batch, &["0x100000000", "0x180000000", "vCPUs paused for"]).await?;
            says("memory slots web", &["3 of at most"]).await?;
            fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
        },
    );
}

#[test]
fn the_demo_on_software() {
    demo("software");
}

#[test]
fn the_demo_on_kvm() {
    match scene::kvm_missing() {
        Some(why) => println!("SKIPPED: {why}"),
        None => demo("kvm"),
    }
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing() {
    use rustix::process::{Pid, Signal, kill_process};
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime
        .block_on(async {
            // Short: the demo's own directory and a VM's socket are below it.
            let home = slat_test_dir::TestDir::with_prefix("slat-d")?;
            let mut child = tokio::process::Command::new(binary::slat()?)
                .env("SLAT_INSECURE_PLAINTEXT", "true")
                .args([
                    "demo",
                    "--backend",
                    "software",
                    "--memory",
                    "64MiB",
                    "--keep",
                ])
                .env("TMPDIR", home.path())
                .env_remove("RUST_LOG")
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .kill_on_drop(true)
                .spawn()?;
            let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
            let pid = pid.context("the demo ended at once")?;
            // A VM's process is there: the demo is in the middle of things.
            slat_tests::wait::eventually("the demo runs a VM", || async {
                let here = leftovers(home.path());
                ensure!(here.iter().any(|line| line.contains(" vm ")), "{here:?}");
                Ok(())
            })
            .await?;
            kill_process(pid, Signal::INT)?;
            let status = tokio::time::timeout(LIMIT, child.wait()).await??;
            ensure!(status.code() == Some(130), "{status:?}");
            let left = leftovers(home.path());
            ensure!(left.is_empty(), "{left:#?}");
            let files: Vec<_> = std::fs::read_dir(home.path())?.collect();
            ensure!(files.is_empty(), "{files:?}");
            Ok(())
        })
        .unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}

#[test]
fn version_and_completion() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime
        .block_on(async {
            let version = json(&["version", "-o", "json"], &[]).await?;
            ensure!(
                version.to_string().contains(env!("CARGO_PKG_VERSION")),
                "{version:#}"
            );
            for shell in ["bash", "zsh", "fish"] {
                let script = slat(&["completion", shell], &[]).await?;
                ensure!(
                    script.status.success() && script.stdout.len() > 500,
                    "{shell}"
                );
            }
            let nothing = slat(&[], &[]).await?;
            ensure!(nothing.status.code() == Some(2), "{nothing:?}");
            Ok(())
        })
        .unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}

/// The backend that a test names is the one it gets.
#[test]
fn a_vm_says_which_backend_it_has() {
    scene::run(Layout::two(Backend::Software), async |fleet: &mut Fleet| {
        let vm = fleet
            .run_vm("web", "host-a", usual(fleet.backend()))
            .await?;
        let spec = vm.spec.context("a VM without a spec")?;
        ensure!(spec.backend() == Backend::Software, "{spec:?}");
        Ok(())
    });
}
