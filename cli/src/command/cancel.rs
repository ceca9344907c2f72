//! `slat cancel`: asks for the end of a migration.

use slat_proto::{json::to_json, model::MigrationName, transport::Address, v1};

use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::out,
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat cancel m1
  slat get migrations          finds the name

Before the point of no return the VM stays on its source and runs on. After it the migration
completes, and cancel is refused with PAST_POINT_OF_NO_RETURN.";

/// Options of `slat cancel`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CancelArgs {
    /// The migration
    migration: MigrationName,
    #[command(flatten)]
    client: ClientArgs,
}

impl CancelArgs {
    /// The endpoint to ask.
    pub(crate) fn endpoint(&self) -> Option<Address> {
        Some(self.client.server.clone())
    }
}

/// Asks, and shows what the migration has become.
pub(crate) async fn run(args: CancelArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let name = args.migration.to_string();
    let request = v1::CancelMigrationRequest { name: name.clone() };
    let migration = session
        .client
        .migrations()
        .cancel_migration(request)
        .await
        .map_err(|status| Failure::call(format!("cancel {name}"), status))?
        .into_inner();
    session.answer(
        || to_json("slat.v1.Migration", &migration),
        || format!("{name} {}", view::phase(migration.phase())),
    )?;
    if !view::ended(migration.phase()) {
        out::say(format!(
            "it ends soon: slat get migration {} --watch",
            args.migration.id()
        ));
    }
    Ok(())
}
