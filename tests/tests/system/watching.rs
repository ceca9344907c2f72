//! Commands that stay: `get --watch` through a restart of the server, and a demo that is kept while
//! others use it.

use std::{
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use slat_proto::v1::{self, Backend};
use slat_tests::{
    Fleet, Layout, binary, guest::usual, process::leftovers, scene, wait::eventually,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    task::JoinHandle,
};

/// Longest time a command may take to end.
const LIMIT: Duration = Duration::from_secs(120);

/// A command that runs, and what it has said so far.
struct Running {
    child: Child,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    /// End when the command has closed the streams.
    readers: [JoinHandle<()>; 2],
}

fn gather(from: impl AsyncRead + Unpin + Send + 'static) -> (Arc<Mutex<String>>, JoinHandle<()>) {
    let text = Arc::new(Mutex::new(String::new()));
    let kept = Arc::clone(&text);
    let reader = tokio::spawn(async move {
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut kept = kept.lock().expect("no panic holds it");
            kept.push_str(&line);
            kept.push('\n');
        }
    });
    (text, reader)
}

impl Running {
    fn start(args: &[&str], envs: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut child = Command::new(binary::slat()?)
            .env("SLAT_INSECURE_PLAINTEXT", "true")
            .args(args)
            .envs(envs.iter().copied())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (stdout, out) = gather(child.stdout.take().context("standard output")?);
        let (stderr, err) = gather(child.stderr.take().context("standard error")?);
        Ok(Self {
            child,
            stdout,
            stderr,
            readers: [out, err],
        })
    }

    fn said(&self) -> (String, String) {
        let text = |kept: &Mutex<String>| kept.lock().expect("no panic holds it").clone();
        (text(&self.stdout), text(&self.stderr))
    }

    /// Waits until it has said that on either stream; what it had said on standard error by then.
    async fn until(&self, words: &str) -> anyhow::Result<String> {
        eventually(words, || async {
            let (stdout, stderr) = self.said();
            let found = stdout.contains(words) || stderr.contains(words);
            ensure!(found, "stdout: {stdout}\nstderr: {stderr}");
            Ok(stderr)
        })
        .await
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self
            .child
            .id()
            .and_then(|pid| Pid::from_raw(pid.cast_signed()));
        Ok(kill_process(pid.context("it has ended")?, signal)?)
    }

    /// Waits for its end; all that it said is read by then.
    async fn ended(&mut self) -> anyhow::Result<Option<i32>> {
        let end = tokio::time::timeout(LIMIT, async {
            let status = self.child.wait().await?;
            for reader in &mut self.readers {
                reader.await?;
            }
            anyhow::Ok(status.code())
        });
        end.await.context("it does not end")?
    }
}

#[test]
fn a_watch_survives_a_restart_of_the_server() {
    scene::run(Layout::two(Backend::Software), async |fleet: &mut Fleet| {
        let address = fleet.server().to_string();
        let env = [("SLAT_SERVER", address.as_str())];
        let vm = fleet
            .run_vm("web", "host-a", usual(fleet.backend()))
            .await?;
        let watches = [
            Running::start(&["get", "vms", "--watch"], &env)?,
            Running::start(&["get", "vm", "web", "--watch"], &env)?,
        ];
        let mut hasty = Running::start(
            &[
                "get",
                "hosts",
                "--watch",
                "--reconnect-timeout",
                "1s",
                "-o",
                "json",
            ],
            &env,
        )?;
        for watch in &watches {
            watch.until("RUNNING").await?;
        }
        hasty.until("hosts/host-a").await?;
        fleet.kill_server();
        for watch in &watches {
            watch.until("asking again for 1m00s").await?;
        }
        ensure!(hasty.ended().await? == Some(5), "{:?}", hasty.said());
        let (_, stderr) = hasty.said();
        let last = stderr.lines().last().context("it says why")?;
        let error: serde_json::Value = serde_json::from_str(last)?;
        ensure!(error["error"]["reason"] == "PEER_UNREACHABLE", "{error:#}");

        fleet.start_server()?;
        for watch in &watches {
            watch.until("there are answers again").await?;
        }
        fleet.hosts_ready().await?;
        let request = v1::PauseVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).pause_vm(request).await?;
        for watch in &watches {
            watch.until("PAUSED").await?;
            let (_, stderr) = watch.said();
            ensure!(!stderr.contains("no longer here"), "{stderr}");
        }
        Ok(())
    });
}

#[test]
fn an_agent_creates_no_vm_for_another_host() {
    scene::run(Layout::two(Backend::Software), async |fleet: &mut Fleet| {
        let agent = fleet.agent("host-a").to_string();
        let line = [
            "create", "vm", "web", "--memory", "16MiB", "--host", "host-b", "--server", &agent,
        ];
        let mut command = Running::start(&line, &[])?;
        ensure!(command.ended().await? == Some(2), "{:?}", command.said());
        command
            .until("--host this is the agent of hosts/host-a")
            .await?;
        let mut vms = fleet.vms(&fleet.server());
        let list = vms.list_vms(v1::ListVmsRequest::default()).await?;
        let list = list.into_inner();
        ensure!(list.vms.is_empty(), "{list:?}");
        Ok(())
    });
}

#[test]
fn a_kept_demo_ends_with_the_vms_that_others_made_on_it() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime
        .block_on(async {
            // Short: the demo's own directory and a VM's socket are below it.
            let home = slat_test_dir::TestDir::with_prefix("slat-d")?;
            let tmp = home.path().to_string_lossy().into_owned();
            let args = [
                "demo",
                "--backend",
                "software",
                "--memory",
                "16MiB",
                "--migrations",
                "1",
                "--keep",
            ];
            let mut demo = Running::start(&args, &[("TMPDIR", &tmp)])?;
            let stderr = demo.until("Ctrl-C ends everything").await?;
            let server = stderr
                .lines()
                .find_map(|line| line.strip_prefix("server"))
                .context("where is the server?")?
                .trim();
            // As its last line tells whoever wants to try it.
            let admin = stderr
                .lines()
                .find_map(|line| Some(line.split_once("--tls-dir ")?.1.trim()))
                .context("where is the certificate?")?;
            let env = [("SLAT_TLS_DIR", admin)];
            for name in ["theirs", "paused"] {
                let line = [
                    "create",
                    "vm",
                    name,
                    "--memory",
                    "8MiB",
                    "--backend",
                    "software",
                    "--server",
                    server,
                ];
                let mut create = Running::start(&line, &env)?;
                ensure!(create.ended().await? == Some(0), "{:?}", create.said());
            }
            let pause = ["pause", "vm", "paused", "--server", server];
            let mut pause = Running::start(&pause, &env)?;
            ensure!(pause.ended().await? == Some(0), "{:?}", pause.said());
            demo.signal(Signal::INT)?;
            let code = demo.ended().await?;
            ensure!(code == Some(0), "{code:?} {:?}", demo.said());
            let left = leftovers(home.path());
            ensure!(left.is_empty(), "{left:#?}");
            let files: Vec<_> = std::fs::read_dir(home.path())?.collect();
            ensure!(files.is_empty(), "{files:?}");
            Ok(())
        })
        .unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}
