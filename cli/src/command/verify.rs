//! `slat verify save`: a whole file compared with its checksums.

use slat_proto::{json::to_json, model::PAGE_SIZE, v1};

use super::saves::SaveTarget;
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::units::Size,
};

const EXAMPLES: &str = "\
Examples:
  slat verify save web-1
  slat verify save hosts/host-a/saves/web-1
  slat verify save web-1 --host host-a           of several saves of that name, the one there

What it builds on is read, too. One save is verified at a time on a host; it takes as long as its disk does.";

/// Options of `slat verify`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct VerifyArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl VerifyArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// A saved VM
    #[command(after_help = EXAMPLES)]
    Save(SaveTarget),
}

/// Verifies.
pub(crate) async fn run(args: VerifyArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Save(target) = args.kind;
    let name = target.resolve(&session.client).await?.to_string();
    let request = v1::VerifySaveRequest { name: name.clone() };
    let answer = session.client.snapshots().verify_save(request).await;
    let answer = answer
        .map_err(|status| Failure::call(format!("verify {name}"), status))?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &name,
        || {
            format!(
                "{name} is as it was written: {} of pages in {} of files",
                Size(answer.pages.saturating_mul(PAGE_SIZE)),
                Size(answer.file_bytes),
            )
        },
    )
}
