//! `slat pki init`.

use serde_json::json;

use super::{
    place::{CaArgs, failed, shown},
    show::{clock, root_document},
};
use crate::{
    failure::Failure,
    output::{self, Format},
    roles::Ca,
};

const EXAMPLES: &str = "\
Examples:
  slat pki init --domain example.org
  slat pki init --dir /srv/pki --domain lab.example.org";

/// Options of `slat pki init`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InitArgs {
    /// Trust domain, as example.org: both ends of a connection are of the same one
    #[arg(long, value_name = "DOMAIN")]
    domain: String,
    #[command(flatten)]
    ca: CaArgs,
}

/// Makes it.
pub(super) fn run(args: InitArgs, output: Format) -> Result<(), Failure> {
    let dir = args.ca.dir()?;
    let doing = format!("make a CA in {}", dir.display());
    let ca = Ca::init(&dir, &args.domain).map_err(|error| failed(&doing, &error))?;
    let roots = ca.roots().map_err(|error| failed(&doing, &error))?;
    let ends = roots.first().map(|root| clock(root.not_after));
    output::answer(
        output,
        || {
            let roots: Vec<_> = roots.iter().map(root_document).collect();
            json!({"dir": shown(&dir), "domain": args.domain, "roots": roots})
        },
        &shown(&dir),
        || {
            format!(
                "{} holds the CA of {}; its root ends {}\nkeep ca.key there: who has it can be anybody",
                dir.display(),
                args.domain,
                ends.unwrap_or_default()
            )
        },
    )
}
