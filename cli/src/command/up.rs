//! `slat up`: a server, agents and certificates for one machine, in one command.
//!
//! The daemons are processes of their own, which end when this one ends; VMs stay, as they do
//! without their agent, and the next `slat up` over the same directory finds them again. The
//! certificates are made by a CA of that directory, and renewed by it while this runs. The user's
//! is put where `slat` looks for it by itself, unless another one is there.
//!
//! | below the directory | what |
//! |---|---|
//! | `server`, `server.log` | the server's state and log |
//! | `hosts/NAME`, `hosts/NAME.log` | an agent's: a host may be called as anything else here |
//! | `trust` | the CA and its certificates |

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
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

Every endpoint speaks TLS, by certificates that are made at the first start and renewed in time while
it runs. Ctrl-C ends server and agents; VMs stay, and are found again by the next slat up with the same --state-dir.";

/// How often it is looked whether a certificate ends soon.
const RENEWAL: Duration = Duration::from_secs(24 * 3600);

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
    let ports = ports(args.listen, names.len())?;
    let dir = state::directory(args.state_dir.clone(), "up")?;
    state::prepare(&dir)?;
    // Until this process ends, however it does.
    let _lock = lock(&dir)?;
    let trust = dir.join("trust");
    let ca = make(&trust, &names).await?;
    let mut daemons = Vec::new();
    let result = tokio::select! {
        started = start(&args, (&names, &ports), &dir, &ca, &mut daemons) => started,
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
                never = renew(&trust, &names, RENEWAL) => match never {},
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

/// The agents' ports: those after the server's. One that was left to the kernel is left to it
/// again.
fn ports(listen: SocketAddr, agents: usize) -> Result<Vec<u16>, Failure> {
    let port = |number: usize| match listen.port() {
        0 => Some(0),
        port => u16::try_from(number)
            .ok()
            .and_then(|number| port.checked_add(number)),
    };
    let ports: Option<Vec<u16>> = (1..=agents).map(port).collect();
    ports.ok_or_else(|| {
        Failure::value(
            format!("--listen {listen} has no {agents} ports after it, one for each agent"),
            "give a lower port, or port 0 for free ones",
        )
    })
}

/// Makes the certificates that are missing, and renews those that end soon.
async fn make(trust: &Path, names: &[&str]) -> Result<LocalCa, Failure> {
    let (trust, own) = (trust.to_owned(), names.iter().map(ToString::to_string));
    let own: Vec<String> = own.collect();
    let made = tokio::task::spawn_blocking(move || {
        let names: Vec<&str> = own.iter().map(String::as_str).collect();
        LocalCa::make(&trust, &names)
    });
    made.await
        .map_err(|error| Failure::local(format!("making certificates: {error}")))?
}

/// Does it again and again: whoever uses a certificate takes the new one by itself. What fails is
/// said, and tried again.
async fn renew(trust: &Path, names: &[&str], every: Duration) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(every).await;
        if let Err(failure) = make(trust, names).await {
            out::report(&failure);
        }
    }
}

async fn start(
    args: &UpArgs,
    (names, ports): (&[&str], &[u16]),
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
    let hosts = dir.join("hosts");
    state::prepare(&hosts)?;
    for (name, port) in names.iter().zip(ports) {
        let listen = SocketAddr::new(args.listen.ip(), *port);
        let mut arguments = common("agent", listen, ca.agent(name), hosts.join(name));
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
        let log = hosts.join(format!("{name}.log"));
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use slat_trust::{
        Credentials,
        pki::{Ca, Validity},
    };

    use super::*;

    #[test]
    fn agents_have_the_ports_after_the_servers() {
        let of = |listen: &str, agents| ports(listen.parse().unwrap(), agents).ok();
        assert_eq!(of("127.0.0.1:7400", 2), Some(vec![7401, 7402]));
        assert_eq!(of("127.0.0.1:0", 2), Some(vec![0, 0]));
        assert_eq!(of("127.0.0.1:65534", 1), Some(vec![65535]));
        assert_eq!(of("127.0.0.1:65534", 2), None);
        assert_eq!(of("127.0.0.1:65535", 1), None);
    }

    #[tokio::test]
    async fn what_ends_soon_is_renewed_while_it_runs() {
        let dir = slat_test_dir::TestDir::new();
        let local = make(dir.path(), &["host-a"]).await.unwrap();
        let agent = Credentials::load(&local.agent("host-a")).unwrap();
        let soon = Validity::from_now(Duration::from_secs(3600)).unwrap();
        let ca = Ca::open(&dir.path().join("ca")).unwrap();
        ca.renew(agent.dir(), Some(soon)).unwrap();
        assert!(agent.refresh().unwrap());
        let server = Credentials::load(&local.server()).unwrap();
        let renewing = renew(dir.path(), &["host-a"], Duration::from_millis(10));
        let lasts = || {
            // What is half renewed is no error of the reader's.
            let _ = agent.refresh();
            let left = agent.not_after().duration_since(SystemTime::now());
            left.unwrap() > Duration::from_secs(80 * 86_400)
        };
        let renewed = async {
            // Between two looks at what has no events.
            while !lasts() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            never = renewing => match never {},
            () = renewed => {}
            () = tokio::time::sleep(Duration::from_secs(30)) => panic!("it was not renewed"),
        }
        assert!(!server.refresh().unwrap(), "what lasts is left alone");
    }
}
