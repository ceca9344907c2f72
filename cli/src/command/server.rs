//! `slat server`: the control plane.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    daemon::{self, DaemonArgs, listen, notify, recorder::Recorder, state, stop, telemetry},
    failure::Failure,
    roles::{self, ServerRole},
    term::units::Span,
};

const EXAMPLES: &str = "\
Examples:
  slat server
  slat server --listen 127.0.0.1:7400 --state-dir /var/lib/slat/server
  slat server --listen 0.0.0.0:7400 --insecure-listen     on a network you trust

The dashboard is at http://ADDRESS/, Prometheus text at http://ADDRESS/metrics.
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
    #[command(flatten)]
    insecure: listen::InsecureArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
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
    let mut stop = stop::Stop::listen()?;
    let telemetry = telemetry::install("server", &args.daemon.log, "info")?;
    stop::die_with(args.daemon.die_with)?;
    listen::check("--listen", args.listen.ip(), args.insecure)?;
    let state_dir = state::directory(args.state_dir, "server")?;
    state::prepare(&state_dir)?;
    let recorder = Recorder::install()?;
    let server = ServerRole {
        listen: args.listen,
        state_dir,
        report_interval: args.report_interval.0,
        host_silence: args.host_silence.map(|silence| silence.0),
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
