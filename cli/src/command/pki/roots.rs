//! `slat pki rotate` and `slat pki retire`: the CA's root is replaced while everything goes on.

use serde_json::json;

use super::{
    place::{CaArgs, failed},
    show::{clock, root_document},
};
use crate::{
    failure::Failure,
    output::{self, Format},
};

const ROTATE_EXAMPLES: &str = "\
Examples:
  slat pki rotate                                       a new root issues; the old ones are trusted
  slat pki publish --out host-a-tls --out server-tls    everybody learns it
  slat pki renew --out host-a-tls --out server-tls      certificates under the new root
  slat pki retire                                       the old root's end
  slat pki publish --out host-a-tls --out server-tls

The old root vouches for the new one, so certificates issued before everybody knows it are taken.";

/// Options of `slat pki rotate`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = ROTATE_EXAMPLES)]
pub(crate) struct RotateArgs {
    #[command(flatten)]
    ca: CaArgs,
}

const RETIRE_EXAMPLES: &str = "\
Examples:
  slat pki retire                  when everything was renewed since `slat pki rotate`
  slat pki retire --force          although certificates of an old root are in use

Each --tls-dir trusts the old roots until `slat pki publish` or `renew` has written into it.";

/// Options of `slat pki retire`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = RETIRE_EXAMPLES)]
pub(crate) struct RetireArgs {
    /// Although certificates that are in use were issued under an old root: they are refused then
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    ca: CaArgs,
}

/// Makes a new root.
pub(super) fn rotate(args: RotateArgs, output: Format) -> Result<(), Failure> {
    let ca = args.ca.open()?;
    let root = ca.rotate().map_err(|error| failed("rotate", &error))?;
    output::answer(
        output,
        || json!({"root": root_document(&root)}),
        &root.serial,
        || {
            format!(
                "root {} issues from now on, until {}\nnext: slat pki publish, then renew, then retire (slat pki rotate --help)",
                root.serial,
                clock(root.not_after)
            )
        },
    )
}

/// Ends the old ones.
pub(super) fn retire(args: RetireArgs, output: Format) -> Result<(), Failure> {
    let ca = args.ca.open()?;
    let retired = ca
        .retire(args.force)
        .map_err(|error| failed("retire", &error))?;
    let serials: Vec<&str> = retired.iter().map(|root| &*root.serial).collect();
    output::answer(
        output,
        || {
            let roots: Vec<_> = retired.iter().map(root_document).collect();
            json!({"retired": roots})
        },
        &serials.join("\n"),
        || {
            format!(
                "no longer trusted: {}\nnext: slat pki publish, into every directory",
                serials.join(", ")
            )
        },
    )
}
