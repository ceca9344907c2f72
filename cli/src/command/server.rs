//! `slat server`: the control plane.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{Access, access};
use slat_trust::Kind;

use crate::{
    daemon::{
        self, DaemonArgs, notify,
        recorder::Recorder,
        secrecy, state, stop, telemetry,
        trust::{Trust, TrustArgs},
    },
    failure::Failure,
    roles::{self, ServerRole},
    term::units::Span,
};

const EXAMPLES: &str = "\
Examples:
  slat server --tls-dir /etc/slat/tls --listen 0.0.0.0:7400
  slat server --tls-dir /etc/slat/tls --access /etc/slat/access.yaml --state-dir /srv/slat
  slat server --insecure-plaintext        anyone who reaches it is in control
  slat server --tls-dir /etc/slat/tls --fence-hook /usr/local/sbin/power-off

The dashboard is at https://ADDRESS/, Prometheus text at https://ADDRESS/metrics; both ask for a certificate, too.
One line on standard output says `listening on IP:PORT` when the server is ready.";

/// Who waits for a migration must still find it when it has ended.
const SHORTEST_KEPT: Duration = Duration::from_secs(60);

/// A host that has been quiet for longer is gone, whatever the network.
const LONGEST_SILENCE: Duration = Duration::from_secs(3600);

/// Options of `slat server`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServerArgs {
    /// Address to listen on, for gRPC, dashboard and metrics, as 192.0.2.1:7400; port 0 takes a
    /// free one
    #[arg(
        long,
        env = "SLAT_LISTEN",
        default_value = "127.0.0.1:7400",
        value_name = "IP:PORT"
    )]
    listen: SocketAddr,
    /// Where to keep hosts, VMs and migrations, as /srv/slat [default: /var/lib/slat/server, or the
    /// XDG state directory]
    #[arg(long, env = "SLAT_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// How often agents report, as 500ms: 50ms to 60s
    #[arg(
        long,
        env = "SLAT_REPORT_INTERVAL",
        default_value = "1s",
        value_name = "DURATION"
    )]
    report_interval: Span,
    /// How long an agent may be quiet before its host is UNREACHABLE, as 30s: two report intervals
    /// to 1h [default: three report intervals]
    #[arg(long, env = "SLAT_HOST_SILENCE", value_name = "DURATION")]
    host_silence: Option<Span>,
    /// How many migrations to keep that have ended, as 5000; older ones are forgotten
    #[arg(
        long,
        env = "SLAT_KEEP_MIGRATIONS",
        default_value_t = 1000,
        value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    keep_migrations: u32,
    /// How long to keep a migration that has ended, as 7d: at least 1m
    #[arg(
        long,
        env = "SLAT_KEEP_MIGRATIONS_FOR",
        default_value = "30d",
        value_name = "DURATION"
    )]
    keep_migrations_for: Span,
    /// What powers a host off, as /usr/local/sbin/power-off: called with its name; exit code 0 says
    /// that nothing of it runs any more. One that cannot be run is warned of at the start
    #[arg(long, env = "SLAT_FENCE_HOOK", value_name = "PROGRAM")]
    fence_hook: Option<PathBuf>,
    /// How long the hook may take, as 2m: 1s to 1h; then it is killed, and the host not fenced
    #[arg(
        long,
        env = "SLAT_FENCE_TIMEOUT",
        default_value = "60s",
        value_name = "DURATION"
    )]
    fence_timeout: Span,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Why a hook cannot be run; `None` when it can.
fn unfit(hook: &Path) -> Option<String> {
    match std::fs::metadata(hook) {
        Err(error) => Some(error.to_string()),
        Ok(metadata) if !metadata.is_file() => Some("it is no regular file".to_owned()),
        Ok(_) => match access(hook, Access::EXEC_OK) {
            Ok(()) => None,
            Err(errno) => Some(format!("it is not executable: {errno}")),
        },
    }
}

/// Runs until told to stop.
pub(crate) async fn run(args: ServerArgs) -> Result<(), Failure> {
    if !(50..=60_000).contains(&args.report_interval.0.as_millis()) {
        return Err(Failure::Usage(format!(
            "--report-interval {} is not between 50ms and 60s",
            args.report_interval
        )));
    }
    let silence = args.report_interval.0 * 2..=LONGEST_SILENCE;
    if let Some(asked) = args.host_silence
        && !silence.contains(&asked.0)
    {
        return Err(Failure::Usage(format!(
            "--host-silence {asked} is not between two report intervals ({}) and 1h",
            Span(args.report_interval.0 * 2)
        )));
    }
    if args.keep_migrations_for.0 < SHORTEST_KEPT {
        return Err(Failure::Usage(format!(
            "--keep-migrations-for {} is shorter than 1m",
            args.keep_migrations_for
        )));
    }
    if let Some(hook) = &args.fence_hook
        && !hook.is_absolute()
    {
        return Err(Failure::Usage(format!(
            "--fence-hook {} is not an absolute path",
            hook.display()
        )));
    }
    if !(1..=3600).contains(&args.fence_timeout.0.as_secs()) {
        return Err(Failure::Usage(format!(
            "--fence-timeout {} is not between 1s and 1h",
            args.fence_timeout
        )));
    }
    let hook = args.fence_hook.as_deref();
    let unfit = hook.and_then(|hook| Some((hook.display().to_string(), unfit(hook)?)));
    let mut stop = stop::Stop::listen()?;
    let telemetry = telemetry::install("server", &args.daemon.log, "info")?;
    if let Some((hook, why)) = unfit {
        // It may be put there later, before it is needed.
        tracing::warn!(
            hook,
            why,
            "the fence hook cannot be run: no host can be fenced until it can"
        );
    }
    stop::die_with(args.daemon.die_with)?;
    secrecy::begin()?;
    let trust = Trust::open(args.trust, Kind::Server)?;
    let state_dir = state::directory(args.state_dir, "server")?;
    state::prepare(&state_dir)?;
    let recorder = Recorder::install()?;
    trust.keep();
    let server = ServerRole {
        credentials: trust.credentials,
        access: trust.access,
        listen: args.listen,
        state_dir,
        report_interval: args.report_interval.0,
        host_silence: args.host_silence.map(|silence| silence.0),
        fence: args.fence_hook.map(|hook| (hook, args.fence_timeout.0)),
        keep_migrations: (args.keep_migrations as usize, args.keep_migrations_for.0),
        render: recorder.render(),
    }
    .start()
    .await
    .map_err(|error| roles::start_failure("server", args.listen, &*error))?;
    daemon::announce(server.address())?;
    let cause = stop.wait().await;
    tracing::info!(?cause, "stopping");
    notify::notify("STOPPING=1");
    daemon::bounded(&mut stop, server.stop()).await?;
    telemetry.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_hook_is_a_file_that_can_be_run() {
        let dir = slat_test_dir::TestDir::new();
        let hook = dir.path().join("hook");
        assert!(unfit(&hook).unwrap().contains("No such file"));
        std::fs::write(&hook, "#!/bin/sh\n").unwrap();
        let mode = |mode| std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(mode));
        mode(0o644).unwrap();
        assert!(unfit(&hook).unwrap().contains("not executable"));
        mode(0o755).unwrap();
        assert_eq!(unfit(&hook), None);
        assert!(unfit(dir.path()).unwrap().contains("no regular file"));
    }
}
