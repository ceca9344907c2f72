//! `slat cancel`: asks for the end of migrations.

use slat_proto::{json::to_json, model::MigrationName, v1};

use super::several::Several;
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::out,
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat cancel m1
  slat cancel m1 m2            several at once; each is tried, the worst result counts
  slat get migrations          finds the name

Before the point of no return the VM stays on its source and runs on. After it the migration
completes, and cancel is refused with PAST_POINT_OF_NO_RETURN.";

/// Options of `slat cancel`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CancelArgs {
    /// The migrations, as m1
    #[arg(required = true, value_name = "MIGRATION")]
    migrations: Vec<MigrationName>,
    #[command(flatten)]
    client: ClientArgs,
}

impl CancelArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

/// Asks, and shows what each migration has become.
pub(crate) async fn run(args: CancelArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let mut several = Several::new(&session, args.migrations.len());
    for migration in &args.migrations {
        let done = cancel(&session, &several, migration).await;
        several.note(done)?;
    }
    several.end()
}

/// What may become of a cancel that is not carried out yet.
fn outlook(phase: v1::MigrationPhase) -> &'static str {
    match phase {
        v1::MigrationPhase::InDoubt => {
            "it is in doubt, and the cancel ends no doubt: the source's journal decides, CANCELLED or COMPLETED, once it \
             can be read"
        }
        _ => {
            "it ends as CANCELLED, unless the source hands the VM over at this moment: then it completes"
        }
    }
}

async fn cancel(
    session: &Session,
    several: &Several,
    migration: &MigrationName,
) -> Result<(), Failure> {
    let name = migration.to_string();
    let request = v1::CancelMigrationRequest { name: name.clone() };
    let cancelled = session.client.migrations().cancel_migration(request).await;
    let cancelled = cancelled
        .map_err(|status| Failure::call(format!("cancel {name}"), status))?
        .into_inner();
    several.answer(session, &to_json(&cancelled), &name, || {
        format!("{name} {}", view::phase(cancelled.phase()))
    })?;
    if !view::ended(cancelled.phase()) {
        out::say(format!(
            "{}: slat get migration {} --watch",
            outlook(cancelled.phase()),
            migration.id()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_promises_no_end_that_may_not_come() {
        let doubt = outlook(v1::MigrationPhase::InDoubt);
        assert!(doubt.contains("journal decides"), "{doubt}");
        let under_way = outlook(v1::MigrationPhase::Cancelling);
        assert!(under_way.contains("completes"), "{under_way}");
    }
}
