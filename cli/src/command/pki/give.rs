//! `slat pki issue`, `renew`, `publish` and `revoke`: what goes into the directories that
//! `--tls-dir` reads, and what is refused from then on.

use std::{path::PathBuf, time::SystemTime};

use serde_json::{Value, json};

use super::{
    place::{CaArgs, failed, lifetime, shown},
    show::{clock, document, left_words, short},
};
use crate::{
    failure::Failure,
    output::{self, Format},
    roles::{Issued, Kind, PkiError, Validity, usual_lifetime},
    term::{out, units::Span},
};

const ISSUE_EXAMPLES: &str = "\
Examples:
  slat pki issue server main --out server-tls
  slat pki issue agent host-a --out host-a-tls          NAME as in slat agent --name
  slat pki issue user ann --out ann-tls --lifetime 8h

It writes ca.crt, tls.crt, tls.key and crl.pem: copy them to the host, and let nobody else read tls.key.";

/// What an identity is.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum KindArg {
    /// The agent of a host
    Agent,
    /// A server
    Server,
    /// A person, or a program that acts for one
    User,
}

impl From<KindArg> for Kind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Agent => Self::Agent,
            KindArg::Server => Self::Server,
            KindArg::User => Self::User,
        }
    }
}

/// Options of `slat pki issue`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = ISSUE_EXAMPLES)]
pub(crate) struct IssueArgs {
    /// Whose it is
    #[arg(value_enum, value_name = "KIND")]
    kind: KindArg,
    /// Name, as host-a: an agent's is its host's
    #[arg(value_name = "NAME")]
    name: String,
    /// Directory to write the files into, as host-a-tls; made if need be, without a certificate
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How long it is valid, as 90d or 8h [default: 90d for agents and servers, 30d for users]
    #[arg(long, value_name = "DURATION")]
    lifetime: Option<Span>,
    #[command(flatten)]
    ca: CaArgs,
}

const RENEW_EXAMPLES: &str = "\
Examples:
  slat pki renew --out host-a-tls
  slat pki renew --out host-a-tls --out host-b-tls --lifetime 90d
  slat pki renew --out /etc/slat/tls --within 30d       only if it ends within 30 days

Processes that use a directory take the new files by themselves; connections go on.";

/// Options of `slat pki renew`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = RENEW_EXAMPLES)]
pub(crate) struct RenewArgs {
    /// Directory that a certificate was issued into, as host-a-tls; several times for several
    #[arg(long, value_name = "DIR", required = true)]
    out: Vec<PathBuf>,
    /// How long it is valid, as 90d or 8h [default: 90d for agents and servers, 30d for users]
    #[arg(long, value_name = "DURATION")]
    lifetime: Option<Span>,
    /// Leave certificates alone that are valid for longer, as 30d
    #[arg(long, value_name = "DURATION")]
    within: Option<Span>,
    #[command(flatten)]
    ca: CaArgs,
}

const PUBLISH_EXAMPLES: &str = "\
Examples:
  slat pki publish --out host-a-tls --out server-tls    after a revocation or a rotation
  slat pki publish --out host-a-tls --force             in place of another CA of the same domain

Certificates and keys stay as they are.";

/// Options of `slat pki publish`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = PUBLISH_EXAMPLES)]
pub(crate) struct PublishArgs {
    /// Directory that a certificate was issued into, as host-a-tls; several times for several
    #[arg(long, value_name = "DIR", required = true)]
    out: Vec<PathBuf>,
    /// Also where another CA issued the certificate: its roots are trusted there no longer
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    ca: CaArgs,
}

const REVOKE_EXAMPLES: &str = "\
Examples:
  slat pki revoke agent/host-a                          all of it that were issued until now
  slat pki revoke 5f0c3a8e6b1d4f2790ab12cd34ef5678      one, by its serial number
  slat pki publish --out server-tls --out host-b-tls    then tell the others

One that is issued to the identity later is good.";

/// Options of `slat pki revoke`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = REVOKE_EXAMPLES)]
pub(crate) struct RevokeArgs {
    /// Identity, as agent/host-a or its URI, or a serial number of `slat pki list`
    #[arg(value_name = "WHICH")]
    which: String,
    #[command(flatten)]
    ca: CaArgs,
}

fn validity(asked: Option<Span>, doing: &str) -> Result<Option<Validity>, Failure> {
    let asked = lifetime(asked)?.map(Validity::from_now).transpose();
    asked.map_err(|error| failed(doing, &error))
}

/// Prints certificates that are there now.
fn answer(output: Format, issued: &[Issued], text: String) -> Result<(), Failure> {
    let now = SystemTime::now();
    let names: Vec<String> = issued.iter().map(short).collect();
    if output == Format::Name && issued.is_empty() {
        return Ok(());
    }
    output::answer(
        output,
        || {
            let certificates: Vec<Value> = issued.iter().map(|it| document(it, now)).collect();
            json!({"certificates": certificates})
        },
        &names.join("\n"),
        || text,
    )
}

/// Notes that a certificate ends before it was asked to.
fn note_short(issued: &Issued, asked: Option<Validity>) {
    let asked = asked.map(|asked| asked.not_after).or_else(|| {
        issued
            .not_before
            .checked_add(usual_lifetime(issued.identity.kind()))
    });
    let far = asked.and_then(|asked| asked.duration_since(issued.not_after).ok());
    if far.is_some_and(|far| far.as_secs() >= 24 * 3600) {
        out::say(format!(
            "{} ends {} with the CA's root; `slat pki rotate` makes a new one",
            short(issued),
            clock(issued.not_after)
        ));
    }
}

fn valid(issued: &Issued) -> String {
    let left = left_words(issued.not_after, SystemTime::now());
    format!("valid for {left}, until {}", clock(issued.not_after))
}

/// Issues.
pub(super) fn issue(args: IssueArgs, output: Format) -> Result<(), Failure> {
    let kind = Kind::from(args.kind);
    let doing = format!("issue {kind}/{}", args.name);
    let validity = validity(args.lifetime, &doing)?;
    let ca = args.ca.open()?;
    let issued = ca
        .issue(kind, &args.name, validity, &args.out)
        .map_err(|error| failed(&doing, &error))?;
    note_short(&issued, validity);
    let text = format!(
        "{} holds the files of {}, {}",
        shown(&args.out),
        issued.identity,
        valid(&issued)
    );
    answer(output, &[issued], text)
}

/// Renews, all that can be.
pub(super) fn renew(args: RenewArgs, output: Format) -> Result<(), Failure> {
    let validity = validity(args.lifetime, "renew")?;
    let ca = args.ca.open()?;
    let (mut renewed, mut lines) = (Vec::new(), Vec::new());
    let result = each(&args.out, |out| {
        let before = args.within.and_then(|within| {
            let end = SystemTime::now().checked_add(within.0)?;
            Some(ca.holds(out).map(|issued| (issued, end)))
        });
        if let Some(before) = before {
            let (issued, end) = before?;
            if issued.not_after > end {
                lines.push(format!("{}: not yet, {}", shown(out), valid(&issued)));
                return Ok(());
            }
        }
        let issued = ca.renew(out, validity)?;
        note_short(&issued, validity);
        lines.push(format!(
            "{}: {} renewed, {}",
            shown(out),
            short(&issued),
            valid(&issued)
        ));
        renewed.push(issued);
        Ok(())
    });
    answer_all(output, &renewed, &lines, result)
}

/// Publishes, wherever it can be.
pub(super) fn publish(args: PublishArgs, output: Format) -> Result<(), Failure> {
    let ca = args.ca.open()?;
    let mut lines = Vec::new();
    let mut published = Vec::new();
    let result = each(&args.out, |out| {
        let identity = if args.force {
            ca.publish_by_force(out)?
        } else {
            ca.publish(out)?
        };
        lines.push(format!(
            "{}: {identity} knows roots and revocations",
            shown(out)
        ));
        published.push(json!({"dir": shown(out), "identity": identity.to_string()}));
        Ok(())
    });
    if !lines.is_empty() {
        output::answer(
            output,
            || json!({"published": published}),
            &args
                .out
                .iter()
                .map(|out| shown(out))
                .collect::<Vec<_>>()
                .join("\n"),
            || lines.join("\n"),
        )?;
    }
    result
}

/// Revokes.
pub(super) fn revoke(args: RevokeArgs, output: Format) -> Result<(), Failure> {
    let ca = args.ca.open()?;
    let revoked = ca
        .revoke(&args.which)
        .map_err(|error| failed("revoke", &error))?;
    let mut lines: Vec<String> = revoked
        .iter()
        .map(|it| format!("{} {} is revoked", short(it), it.serial))
        .collect();
    lines.push(
        "who refuses it is to be told: `slat pki publish --out DIR`, or copy crl.pem".to_owned(),
    );
    answer(output, &revoked, lines.join("\n"))
}

/// Works on one directory after the other, also after an error; the last error ends the command.
fn each(
    dirs: &[PathBuf],
    mut work: impl FnMut(&PathBuf) -> Result<(), PkiError>,
) -> Result<(), Failure> {
    let mut last = Ok(());
    for dir in dirs {
        if let Err(error) = work(dir) {
            let failure = failed(&format!("work on {}", dir.display()), &error);
            if let Err(earlier) = std::mem::replace(&mut last, Err(failure)) {
                out::report(&earlier);
            }
        }
    }
    last
}

fn answer_all(
    output: Format,
    issued: &[Issued],
    lines: &[String],
    result: Result<(), Failure>,
) -> Result<(), Failure> {
    if !lines.is_empty() {
        answer(output, issued, lines.join("\n"))?;
    }
    result
}
