//! `slat migrate`: moves a running VM and shows how it goes.

use slat_proto::{
    ApiError, Reason,
    json::to_json,
    model::{HostName, MigrationName, MigrationParams, proto_duration},
    v1,
};

use super::{follow::follow, patience::PatienceArgs, target::VmTarget};
use crate::{
    client::{ClientArgs, Session},
    daemon::stop::Stop,
    escape,
    failure::{self, Failure},
    output::{Format, Resource as _},
    term::{
        out,
        units::{Rate, Span},
    },
    view::{self, Progress},
};

const EXAMPLES: &str = "\
Examples:
  slat migrate web --to host-b
  slat migrate web --to host-b --max-downtime 50ms --streams 4
  slat migrate web --host host-a --to host-b             of two VMs of that name, the one on host-a
  slat migrate --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --to host-b
  slat migrate web --to host-b --max-bandwidth 100MiB/s  leave room for others
  slat migrate web --to host-b --verify after-commit     compare memory digests, without downtime
  slat migrate web --to host-b --max-total-time 5m --on-timeout force-switchover
  slat migrate web --to host-b --dry-run                 check everything, move nothing
  slat migrate web --to host-b --no-wait                 start it, do not watch

Ctrl-C stops watching and leaves the migration alone; slat cancel NAME ends it.
The exit code is 0 only when the VM runs at its destination (and the digests match, if asked for): a comparison
that could not be had is exit code 1.";

/// When to compare memory digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum VerifyChoice {
    /// Not at all
    None,
    /// Before the commit: adds to the downtime; a mismatch fails the migration
    BeforeCommit,
    /// After the commit, from the frozen source: no downtime; a mismatch is reported
    AfterCommit,
}

/// What to do when the VM is paused and the accepted downtime is about to be broken.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum OverrunChoice {
    /// Back to precopy: the VM runs again where it is
    Resume,
    /// The switchover goes on
    Finish,
}

/// What to do when time or iterations are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum TimeoutChoice {
    /// Give up; the VM runs on at the source
    Cancel,
    /// Switch over whatever the downtime
    ForceSwitchover,
}

/// Options of `slat migrate`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    target: VmTarget,
    /// The host to move it to, as host-b
    #[arg(long, value_name = "HOST")]
    to: HostName,
    /// Accepted downtime, as 50ms: 1ms to 2000s; the switchover begins when the estimate is below
    /// it [default: 300ms]
    #[arg(long, value_name = "DURATION")]
    max_downtime: Option<Span>,
    /// Time the whole migration may take, as 10m: at least 1s [default: 1h]
    #[arg(long, value_name = "DURATION")]
    max_total_time: Option<Span>,
    /// TCP streams that carry pages, as 4: 1 to 16 [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    streams: Option<u32>,
    /// Ceiling over all streams a second, as 100MiB/s [default: none]
    #[arg(long, value_name = "RATE")]
    max_bandwidth: Option<Rate>,
    /// Iterations after which precopy counts as not converging, as 10 [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_iterations: Option<u32>,
    /// When to compare the memory of both sides, as after-commit
    #[arg(long, value_enum, default_value = "none", value_name = "WHEN")]
    verify: VerifyChoice,
    /// What to do when time or iterations are used up, as force-switchover
    #[arg(long, value_enum, default_value = "cancel", value_name = "ACTION")]
    on_timeout: TimeoutChoice,
    /// What to do when the VM is paused and --max-downtime is about to be broken
    #[arg(long, value_enum, default_value = "resume", value_name = "ACTION")]
    on_overrun: OverrunChoice,
    /// Name of the migration, never used before [default: the server chooses]
    /// (as m1)
    #[arg(long, value_name = "NAME")]
    id: Option<MigrationName>,
    /// Check everything, move nothing
    #[arg(long)]
    dry_run: bool,
    /// Return when the migration is accepted
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    patience: PatienceArgs,
    #[command(flatten)]
    client: ClientArgs,
}

impl MigrateArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }

    fn request(&self) -> Result<v1::CreateMigrationRequest, Failure> {
        use v1::migration_params::{OnOverrun, OnTimeout, Verify};
        let params = v1::MigrationParams {
            max_downtime: self.max_downtime.map(|span| proto_duration(span.0)),
            max_total_time: self.max_total_time.map(|span| proto_duration(span.0)),
            streams: self.streams.unwrap_or(0),
            max_bandwidth_bytes_per_second: self.max_bandwidth.map_or(0, |rate| rate.0),
            max_iterations: self.max_iterations.unwrap_or(0),
            verify: match self.verify {
                VerifyChoice::None => Verify::None,
                VerifyChoice::BeforeCommit => Verify::BeforeCommit,
                VerifyChoice::AfterCommit => Verify::AfterCommit,
            }
            .into(),
            on_timeout: match self.on_timeout {
                TimeoutChoice::Cancel => OnTimeout::Cancel,
                TimeoutChoice::ForceSwitchover => OnTimeout::ForceSwitchover,
            }
            .into(),
            on_overrun: match self.on_overrun {
                OverrunChoice::Resume => OnOverrun::Resume,
                OverrunChoice::Finish => OnOverrun::Finish,
            }
            .into(),
        };
        // The server checks again. Here a mistake costs no round trip and has exit code 2.
        MigrationParams::from_message(Some(&params))?;
        Ok(v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: self.target.name(),
                vm_uid: self.target.uid(),
                source: self.target.host(),
                destination: self.to.to_string(),
                params: Some(params),
                ..Default::default()
            }),
            migration_id: self
                .id
                .as_ref()
                .map(|id| id.id().to_owned())
                .unwrap_or_default(),
            validate_only: self.dry_run,
        })
    }
}

/// Starts it, follows it, reports on it.
pub(crate) async fn run(args: MigrateArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let doing = format!("migrate {} to {}", args.target, args.to);
    let request = args.request()?;
    let mut stop = Stop::listen()?;
    let created = tokio::select! {
        created = start(&session, request) => created,
        cause = stop.wait() => {
            out::say("interrupted before the server answered; it may have started: slat get migrations");
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    let migration = created.map_err(|status| Failure::call(doing, status))?;
    if args.dry_run || args.no_wait {
        return accepted(&session, &migration, args.dry_run);
    }
    let name = migration.name.clone();
    let mut progress = Progress::new(view::id(&name));
    progress.update(&migration);
    let followed = tokio::select! {
        followed = follow(&session.client, &name, args.patience.patience(), |migration| {
            progress.update(migration);
            Ok(())
        }) => followed,
        cause = stop.wait() => {
            progress.finish();
            let id = view::id(&name);
            out::say(format!(
                "{name} goes on without being watched\n  watch:  slat get migration {id} --watch\n  cancel: slat cancel {id}"
            ));
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    progress.finish();
    let migration = followed?;
    session.answer(
        || to_json(&migration),
        &migration.name,
        || migration.page(out::stdout_colours()),
    )?;
    outcome(&migration)
}

async fn start(
    session: &Session,
    request: v1::CreateMigrationRequest,
) -> Result<v1::Migration, tonic::Status> {
    let mut migrations = session.client.migrations();
    Ok(migrations.create_migration(request).await?.into_inner())
}

fn accepted(session: &Session, migration: &v1::Migration, dry_run: bool) -> Result<(), Failure> {
    let text = || {
        if dry_run {
            format!(
                "{} could move from {} to {}; nothing was moved",
                migration.vm,
                view::id(&migration.source),
                view::id(&migration.destination)
            )
        } else {
            migration.name.clone()
        }
    };
    if matches!(session.output, Format::Table | Format::Wide) && !dry_run {
        let id = view::id(&migration.name);
        out::say(format!(
            "accepted; watch it with: slat get migration {id} --watch"
        ));
    }
    session.answer(|| to_json(migration), &migration.name, text)
}

/// What a terminal migration means for the exit code.
fn outcome(migration: &v1::Migration) -> Result<(), Failure> {
    use v1::{MigrationPhase as Phase, migration_params::Verify};
    let verification = migration.progress.as_ref().map_or(
        v1::Verification::Unspecified,
        v1::MigrationProgress::verification,
    );
    let verify = migration
        .params
        .as_ref()
        .map_or(Verify::None, v1::MigrationParams::verify);
    let asked = matches!(verify, Verify::BeforeCommit | Verify::AfterCommit);
    match migration.phase() {
        // It moved, and is not what the user wanted to have moved any more.
        Phase::Completed if migration.vm_location() == v1::VmLocation::Lost => Err(ended(
            migration,
            "completed, and the VM died at its destination",
            Reason::VmProcessDied,
            1,
        )),
        Phase::Completed if verification == v1::Verification::Mismatch => Err(Failure::advised(
            format!(
                "{} completed, but the memory of source and destination differs",
                migration.name
            ),
            "trust nothing in that VM; keep both hosts' logs",
        )),
        Phase::Completed if asked && verification != v1::Verification::Match => {
            let why = migration
                .progress
                .as_ref()
                .map_or("", |progress| progress.verification_message.as_str());
            let why = match why {
                "" => "the source told no result",
                why => why,
            };
            Err(Failure::advised(
                format!(
                    "{} completed, but the memory of source and destination was not compared as asked: {}",
                    migration.name,
                    escape::one_line(why)
                ),
                "the VM runs at its destination, unverified; see the log of the source's host",
            ))
        }
        Phase::Completed => Ok(()),
        Phase::Cancelled => Err(ended(
            migration,
            "was cancelled",
            Reason::CancelledByUser,
            6,
        )),
        Phase::InDoubt => Err(ended(migration, "is in doubt", Reason::InDoubt, 7)),
        _ => {
            let reason = migration.error.as_ref().map(|error| error.reason.as_str());
            let reason = reason.and_then(Reason::parse).unwrap_or(Reason::Internal);
            let code = failure::exit_code(&ApiError::new(reason, ""));
            Err(ended(migration, "failed", reason, code))
        }
    }
}

/// A migration without success, in the words of its error.
fn ended(migration: &v1::Migration, how: &str, reason: Reason, code: u8) -> Failure {
    let place = migration.vm_location().as_str_name();
    let place = place.trim_start_matches("VM_LOCATION_");
    let mut error = ApiError::new(reason, "");
    if let Some(known) = &migration.error {
        error.message = known.message.clone();
        error.metadata = known.metadata.clone().into_iter().collect();
    }
    error = error
        .with("migration", &migration.name)
        .with("vm_location", place)
        .with("advice", failure::migration_advice(migration));
    Failure::Ended {
        what: format!("{} {how}", migration.name),
        error: Box::new(error),
        code,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn request(line: &str) -> Result<v1::CreateMigrationRequest, Failure> {
        let words = ["slat", "migrate"];
        let cli = Cli::try_parse_from(words.into_iter().chain(line.split_whitespace())).unwrap();
        let Command::Migrate(args) = cli.command else {
            panic!("another command");
        };
        args.request()
    }

    #[test]
    fn options_reach_the_message() {
        let request = request(
            "vms/web --to b --max-downtime 50ms --max-total-time 5m --streams 4 --max-bandwidth 100MiB/s \
             --max-iterations 7 --verify before-commit --on-timeout force-switchover --id m1",
        )
        .unwrap();
        assert_eq!(request.migration_id, "m1");
        let migration = request.migration.unwrap();
        assert_eq!(migration.vm, "vms/web");
        assert_eq!(migration.destination, "hosts/b");
        let params = MigrationParams::from_message(migration.params.as_ref()).unwrap();
        assert_eq!(params.max_downtime.as_millis(), 50);
        assert_eq!(params.max_total_time.as_secs(), 300);
        assert_eq!(params.streams, 4);
        assert_eq!(params.max_bandwidth, Some(100 << 20));
        assert_eq!(params.max_iterations, 7);
        assert_eq!(params.verify, slat_proto::model::Verify::BeforeCommit);
        assert_eq!(
            params.on_timeout,
            slat_proto::model::OnTimeout::ForceSwitchover
        );
    }

    #[test]
    fn what_the_server_would_refuse_is_a_usage_error() {
        for line in [
            "web --to b --max-downtime 0ms",
            "web --to b --max-total-time 5ms",
        ] {
            assert_eq!(request(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn only_a_sound_completion_is_success() {
        use v1::MigrationPhase as Phase;
        let ended = |phase: Phase, verification: v1::Verification| {
            let migration = v1::Migration {
                phase: phase.into(),
                progress: Some(v1::MigrationProgress {
                    verification: verification.into(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            outcome(&migration).map_or_else(|failure| failure.exit_code(), |()| 0)
        };
        assert_eq!(ended(Phase::Completed, v1::Verification::None), 0);
        assert_eq!(ended(Phase::Completed, v1::Verification::Match), 0);
        assert_eq!(ended(Phase::Completed, v1::Verification::Mismatch), 1);
        assert_eq!(ended(Phase::Cancelled, v1::Verification::None), 6);
        assert_eq!(ended(Phase::InDoubt, v1::Verification::None), 7);
        assert_eq!(ended(Phase::Failed, v1::Verification::None), 1);
    }

    #[test]
    fn a_vm_that_died_on_arrival_is_no_success() {
        let migration = v1::Migration {
            name: "migrations/m1".into(),
            phase: v1::MigrationPhase::Completed.into(),
            vm_location: v1::VmLocation::Lost.into(),
            error: Some(v1::MigrationError {
                reason: "VM_PROCESS_DIED".into(),
                message: "its process died there".into(),
                advice: "`slat adopt vm` takes the copy back".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let failure = outcome(&migration).unwrap_err();
        assert_eq!(failure.exit_code(), 1);
        let text = failure.render();
        assert!(text.contains("its process died there"), "{text}");
        let error = &failure.document().unwrap()["error"];
        assert_eq!(error["metadata"]["vm_location"], "LOST");
        let advice = error["advice"].as_str().unwrap();
        assert!(advice.contains("slat adopt vm"), "{advice}");
    }

    #[test]
    fn programs_read_why_a_migration_failed_and_where_the_vm_is() {
        let migration = v1::Migration {
            name: "migrations/m1".into(),
            phase: v1::MigrationPhase::Failed.into(),
            vm_location: v1::VmLocation::Source.into(),
            params: Some(v1::MigrationParams {
                max_bandwidth_bytes_per_second: 4 << 20,
                ..Default::default()
            }),
            error: Some(v1::MigrationError {
                reason: "NOT_CONVERGING".into(),
                message: "max_iterations 30 reached".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let failure = outcome(&migration).unwrap_err();
        assert_eq!(failure.exit_code(), 5);
        let error = &failure.document().unwrap()["error"];
        assert_eq!(error["reason"], "NOT_CONVERGING");
        assert_eq!(
            error["message"],
            "migrations/m1 failed: --max-iterations 30 reached"
        );
        assert_eq!(error["metadata"]["vm_location"], "SOURCE");
        let advice = error["advice"].as_str().unwrap();
        assert!(advice.contains("--max-bandwidth"), "{advice}");
    }

    #[test]
    fn a_uid_or_a_host_selects_the_vm() {
        let by_uid = request("--uid u-1 --to b").unwrap().migration.unwrap();
        assert_eq!((by_uid.vm.as_str(), by_uid.vm_uid.as_str()), ("", "u-1"));
        let by_host = request("web --host a --to b").unwrap().migration.unwrap();
        assert_eq!(by_host.source, "hosts/a");
    }

    #[test]
    fn a_verification_that_was_asked_for_and_not_done_is_no_success() {
        use v1::migration_params::Verify;
        for (verify, verification, code) in [
            (Verify::AfterCommit, v1::Verification::Pending, 1),
            (Verify::BeforeCommit, v1::Verification::Pending, 1),
            (Verify::AfterCommit, v1::Verification::None, 1),
            (Verify::AfterCommit, v1::Verification::Impossible, 1),
            (Verify::AfterCommit, v1::Verification::Match, 0),
            (Verify::None, v1::Verification::None, 0),
        ] {
            let migration = v1::Migration {
                phase: v1::MigrationPhase::Completed.into(),
                params: Some(v1::MigrationParams {
                    verify: verify.into(),
                    ..Default::default()
                }),
                progress: Some(v1::MigrationProgress {
                    verification: verification.into(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let ended = outcome(&migration).map_or_else(|failure| failure.exit_code(), |()| 0);
            assert_eq!(ended, code, "{verify:?} {verification:?}");
        }
    }
}
