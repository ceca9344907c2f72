//! `slat up`: a server, agents and certificates for one machine, in one command.
//!
//! The daemons are processes of their own, which end when this one ends; VMs stay, as they do
//! without their agent, and the next `slat up` over the same directory finds them again. The
//! certificates are made by a CA of that directory. The user's is put where `slat` looks for it by
//! itself, unless another one is there.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use slat_proto::model::HostName;

use super::agent::machines_name;
use crate::{
    client::own_certificate_dir,
    daemon::{state, stop::Stop},
    failure::Failure,
    local::{Daemon, LocalCa},
    term::{out, units::Size},
};

const EXAMPLES: &str = "\
Examples:
  slat up
  slat up --agent host-a --agent host-b --memory 2GiB     two hosts on one machine
  slat up --listen 127.0.0.1:7500 --state-dir /tmp/slat

Every endpoint speaks TLS, by certificates that are made at the first start. Ctrl-C ends server and
agents; VMs stay, and are found again by the next slat up with the same --state-dir.";

/// Options of `slat up`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct UpArgs {
    /// A host of the fleet, as host-a; may be given several times [default: this machine's name]
    #[arg(long = "agent", value_name = "NAME")]
    agents: Vec<HostName>,
    /// Memory for the VMs of each host, as 2GiB [default: as slat agent, shared among them]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Address of the server, as 127.0.0.1:7400; agents take the ports after it
    #[arg(long, default_value = "127.0.0.1:7400", value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Where to keep everything, as /srv/slat [default: /var/lib/slat/up, or the XDG state
    /// directory]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Runs until told to stop, or until a daemon ends.
pub(crate) async fn run(args: UpArgs) -> Result<(), Failure> {
    let mut stop = Stop::listen()?;
    let agents = match args.agents.as_slice() {
        [] => vec![machines_name()?],
        named => named.to_vec(),
    };
    let names: Vec<&str> = agents.iter().map(HostName::id).collect();
    if names.iter().collect::<BTreeSet<_>>().len() != names.len() {
        return Err(Failure::Usage("two hosts have the same name".to_owned()));
    }
    if args.listen.ip().is_unspecified() {
        return Err(Failure::value(
            format!(
                "--listen {} is no address that agents can report to",
                args.listen
            ),
            "give one address of this machine",
        ));
    }
    let dir = state::directory(args.state_dir.clone(), "up")?;
    state::prepare(&dir)?;
    // Until this process ends, however it does.
    let _lock = lock(&dir)?;
    let trust = dir.join("trust");
    let own: Vec<String> = names.iter().map(ToString::to_string).collect();
    let made = tokio::task::spawn_blocking(move || {
        let names: Vec<&str> = own.iter().map(String::as_str).collect();
        LocalCa::make(&trust, &names)
    });
    let ca = made
        .await
        .map_err(|error| Failure::local(format!("making certificates: {error}")))??;
    let mut daemons = Vec::new();
    let result = tokio::select! {
        started = start(&args, &names, &dir, &ca, &mut daemons) => started,
        _ = stop.wait() => Ok(()),
    };
    let result = match result {
        Ok(()) if daemons.len() == names.len() + 1 => match say(&daemons, &ca) {
            Ok(()) => tokio::select! {
                cause = stop.wait() => {
                    tracing::debug!(?cause, "asked to end");
                    Ok(())
                }
                (number, why) = died(&mut daemons) => {
                    let log = daemons.remove(number).log().display().to_string();
                    Err(Failure::advised(why, format!("its log is {log}")))
                }
            },
            untold => untold,
        },
        other => other,
    };
    for daemon in &daemons {
        daemon.terminate();
    }
    for daemon in daemons {
        if let Some(wrong) = daemon.join().await {
            out::say(wrong);
        }
    }
    result
}

async fn start(
    args: &UpArgs,
    names: &[&str],
    dir: &Path,
    ca: &LocalCa,
    daemons: &mut Vec<Daemon>,
) -> Result<(), Failure> {
    let common = |role: &str, listen: SocketAddr, tls: PathBuf, state: PathBuf| -> Vec<OsString> {
        vec![
            role.into(),
            "--listen".into(),
            listen.to_string().into(),
            "--tls-dir".into(),
            tls.into(),
            "--state-dir".into(),
            state.into(),
        ]
    };
    let arguments = common("server", args.listen, ca.server(), dir.join("server"));
    let log = dir.join("server.log");
    let server = Daemon::start("the server", arguments, log).await?;
    let address = server.address();
    daemons.push(server);
    for (number, name) in (1_u16..).zip(names) {
        let mut listen = args.listen;
        // A port that was left to the kernel is left to it again.
        listen.set_port(match args.listen.port() {
            0 => 0,
            port => port.saturating_add(number),
        });
        let mut arguments = common("agent", listen, ca.agent(name), dir.join(name));
        arguments.extend(["--server".into(), address.to_string().into()]);
        arguments.push("--vms-stay".into());
        let memory = match args.memory {
            Some(memory) => Some(memory.0),
            None if names.len() > 1 => {
                Some(crate::daemon::memory::for_vms(None)? / names.len() as u64)
            }
            None => None,
        };
        if let Some(memory) = memory {
            arguments.extend(["--memory".into(), format!("{memory}B").into()]);
        }
        let log = dir.join(format!("{name}.log"));
        daemons.push(Daemon::start(name, arguments, log).await?);
    }
    Ok(())
}

/// Says where everything is, and how to go on.
fn say(daemons: &[Daemon], ca: &LocalCa) -> Result<(), Failure> {
    for (number, daemon) in daemons.iter().enumerate() {
        let what = if number == 0 { "server" } else { daemon.name() };
        out::line(format!("{what:<12} {}", daemon.address()))?;
    }
    let here = daemons
        .first()
        .is_some_and(|server| server.address().to_string() == "127.0.0.1:7400");
    let server = match daemons.first() {
        Some(server) if !here => format!(" --server {}", server.address()),
        _ => String::new(),
    };
    let tls = match place(ca) {
        Some(dir) => {
            out::line(format!("certificate  {} (user admin)", dir.display()))?;
            String::new()
        }
        None => format!(" --tls-dir {}", ca.admin().display()),
    };
    out::line(format!("try          slat get hosts{server}{tls}"))
}

/// Puts a link to the user's certificate where `slat` looks for it. `None` when something else is
/// there, or it cannot be made.
fn place(ca: &LocalCa) -> Option<PathBuf> {
    let dir = own_certificate_dir()?;
    let admin = std::fs::canonicalize(ca.admin()).ok()?;
    if std::fs::canonicalize(&dir).is_ok_and(|there| there == admin) {
        return Some(dir);
    }
    // A link whose target is gone is what an earlier fleet left.
    if std::fs::symlink_metadata(&dir).is_ok_and(|it| it.is_symlink()) && !dir.exists() {
        std::fs::remove_file(&dir).ok()?;
    }
    std::fs::create_dir_all(dir.parent()?).ok()?;
    std::os::unix::fs::symlink(&admin, &dir).ok()?;
    Some(dir)
}

/// Has the directory for this process alone.
fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join("up.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| Failure::local(format!("cannot open {}: {error}", path.display())))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::advised(
            format!("another slat up runs in {}", dir.display()),
            "end it, or choose another directory with --state-dir",
        )),
        Err(error) => Err(Failure::local(format!(
            "cannot lock {}: {error}",
            path.display()
        ))),
    }
}

/// Waits until one of them ends by itself: which, and how.
async fn died(daemons: &mut [Daemon]) -> (usize, String) {
    let ends = daemons.iter_mut().map(|daemon| Box::pin(daemon.ended()));
    let mut ends: Vec<_> = ends.collect();
    std::future::poll_fn(move |context| {
        for (number, end) in ends.iter_mut().enumerate() {
            if let std::task::Poll::Ready(why) = end.as_mut().poll(context) {
                return std::task::Poll::Ready((number, why));
            }
        }
        std::task::Poll::Pending
    })
    .await
}
