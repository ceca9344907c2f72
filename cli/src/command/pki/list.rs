//! `slat pki list`.

use std::time::SystemTime;

use serde_json::json;

use super::{
    place::{CaArgs, failed},
    show::{HEADS, WIDE, document, root_document, row, short},
};
use crate::{
    failure::Failure,
    output::{self, Format},
    roles::Issued,
    term::{out, table::Table},
};

const EXAMPLES: &str = "\
Examples:
  slat pki list                     what is in use, the soonest to end first, and what is revoked
  slat pki list --all               also what has expired and what was renewed since
  slat pki list -o json             with the roots";

/// Options of `slat pki list`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ListArgs {
    /// Also what has expired, and what a renewal has replaced
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    ca: CaArgs,
}

/// Shows it.
pub(super) fn run(args: ListArgs, output: Format) -> Result<(), Failure> {
    let ca = args.ca.open()?;
    let failed = |error| failed("list", &error);
    let (mut issued, roots) = (ca.issued().map_err(failed)?, ca.roots().map_err(failed)?);
    let now = SystemTime::now();
    let is_shown = |it: &Issued| it.is_in_use(now) || (it.revoked.is_some() && it.not_after >= now);
    issued.retain(|it| args.all || is_shown(it));
    issued.sort_by(|a, b| (a.not_after, &a.identity).cmp(&(b.not_after, &b.identity)));
    match output {
        Format::Json | Format::Yaml => {
            let certificates: Vec<_> = issued.iter().map(|it| document(it, now)).collect();
            let roots: Vec<_> = roots.iter().map(root_document).collect();
            let value = || json!({"certificates": certificates, "roots": roots});
            output::answer(output, value, "", String::new)
        }
        Format::Name => issued.iter().try_for_each(|it| out::line(short(it))),
        Format::Table | Format::Wide if issued.is_empty() => {
            out::say("no certificates");
            Ok(())
        }
        Format::Table | Format::Wide => {
            let is_wide = output == Format::Wide;
            let mut heads = HEADS.to_vec();
            if is_wide {
                heads.extend(WIDE);
            }
            let rows: Vec<_> = issued.iter().map(|it| row(it, is_wide, now)).collect();
            out::line(Table::new(&heads, out::stdout_colours()).render(&rows))
        }
    }
}
