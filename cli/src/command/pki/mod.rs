//! `slat pki`: a certificate authority in a directory, for those who have none. Nothing here asks
//! an endpoint: it works on files, and the library does the work.

mod give;
mod init;
mod list;
mod place;
mod roots;
mod show;

use crate::{failure::Failure, output::Format};

const EXAMPLES: &str = "\
Examples:
  slat pki init --domain example.org              a CA in ~/.config/slat/pki
  slat pki issue server main --out server-tls     files for slat server --tls-dir
  slat pki issue agent host-a --out host-a-tls    and for each slat agent
  slat pki issue user ann --out ann-tls           and for whoever types slat commands
  slat pki list                                   what ends when
  slat pki renew --out host-a-tls
  slat pki revoke agent/host-a

Keep the CA's directory on a machine that runs no agent: its keys make identities.";

/// Options of `slat pki`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PkiArgs {
    #[command(subcommand)]
    action: Action,
    /// How to print the answer; under json and yaml errors are JSON, too
    #[arg(
        short,
        long,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        global = true
    )]
    output: Format,
}

impl PkiArgs {
    /// How to print the answer.
    pub(crate) fn output(&self) -> Format {
        self.output
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Action {
    /// Make a CA for a trust domain
    Init(init::InitArgs),
    /// Issue the files of an identity into a directory
    Issue(give::IssueArgs),
    /// Replace certificate and key in directories, for the same identities
    Renew(give::RenewArgs),
    /// Show what was issued, and how long it is valid
    List(list::ListArgs),
    /// Revoke a certificate, or all of an identity that were issued until now
    Revoke(give::RevokeArgs),
    /// Write the trusted roots and the revocation list into directories, as they are now
    Publish(give::PublishArgs),
    /// Make a new root, which issues from now on; the old ones stay trusted
    Rotate(roots::RotateArgs),
    /// Trust no root any more but the one that issues
    Retire(roots::RetireArgs),
}

/// Does it.
pub(crate) fn run(args: PkiArgs) -> Result<(), Failure> {
    let output = args.output;
    match args.action {
        Action::Init(args) => init::run(args, output),
        Action::Issue(args) => give::issue(args, output),
        Action::Renew(args) => give::renew(args, output),
        Action::List(args) => list::run(args, output),
        Action::Revoke(args) => give::revoke(args, output),
        Action::Publish(args) => give::publish(args, output),
        Action::Rotate(args) => roots::rotate(args, output),
        Action::Retire(args) => roots::retire(args, output),
    }
}
