//! Texts: what a user reads about a [`Cause`], and the refusals of a migration's API.

use slat_proto::{
    ApiError, Reason,
    model::MigrationName,
    v1::{self, MigrationPhase as Phase, VmLocation as Location},
};

use super::{
    protocol::{Cause, Side},
    subject::{Subject, side_name},
};
use crate::phase::has_ended;

/// What the sides said, kept until a cause needs it. The newest of each.
#[derive(Debug, Default)]
pub(super) struct Texts {
    /// Who refused to take part or did not answer.
    pub(super) refusal: Option<(Side, ApiError)>,
    pub(super) source: Option<v1::MigrationError>,
    pub(super) destination: Option<v1::MigrationError>,
}

fn made(phase: Phase, side: Side, reason: Reason, text: &str, advice: &str) -> v1::MigrationError {
    ApiError::new(reason, text)
        .with("advice", advice)
        .to_migration_error(phase, side_name(side))
}

/// What to do about a refusal that brings no advice of its own.
const fn advice(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::CpuIncompatible => "name a host whose CPU has what the VM was told of",
        Reason::IsaMismatch => "name a host of the same architecture",
        Reason::PageSizeMismatch => "name a host that counts pages of the same size",
        Reason::StateVersionUnsupported => "upgrade the older of the two agents",
        Reason::CapabilityMissing => "name a host that has it",
        Reason::PeerUnreachable | Reason::HostUnreachable | Reason::VmUnreachable => {
            "migrate again when it answers"
        }
        _ => return None,
    })
}

impl Texts {
    /// The error that goes with a cause: `phase` is the migration's phase before, `location` where
    /// its VM is now.
    pub(super) fn error(
        &self,
        cause: Cause,
        phase: Phase,
        location: Location,
        subject: &Subject,
    ) -> Option<v1::MigrationError> {
        Some(match cause {
            Cause::Barred => self.refused(phase, location, Side::Destination),
            Cause::Refused(side) => self.refused(phase, location, side),
            Cause::SourceFailed if self.destination_broke_it() => self.destination_gone(phase)?,
            Cause::SourceFailed => self.source.clone().unwrap_or_else(|| {
                made(
                    phase,
                    Side::Source,
                    Reason::Internal,
                    "the source failed without saying why",
                    "the VM runs on at the source; migrate again",
                )
            }),
            Cause::SourceDied => self.source.clone().unwrap_or_else(|| {
                made(
                    phase,
                    Side::Source,
                    Reason::VmProcessDied,
                    "the VM's process died at the source before the commit; its memory is lost",
                    "create the VM again",
                )
            }),
            // Ended all the same, and said so.
            Cause::CancelledAtSource => return self.source.clone(),
            Cause::SourceForgot => made(
                phase,
                Side::Source,
                Reason::PeerRestarted,
                "the source keeps no record of the migration; the VM is still there",
                "migrate again",
            ),
            Cause::SourceGone => made(
                phase,
                Side::Source,
                Reason::VmProcessDied,
                "the VM is gone from the source and was not handed over",
                "create the VM again",
            ),
            Cause::DestinationDied => self.destination_died(phase, location, subject),
            Cause::OwnerDied { kept } => self.owner_died(subject, kept),
            Cause::HostForgotten { side, kept } => {
                host_forgotten(phase, location, subject, side, kept)
            }
            Cause::HostFenced { side, kept } => host_fenced(phase, location, subject, side, kept),
            Cause::Doubt => ApiError::new(
                Reason::InDoubt,
                "the source cannot be asked whether it handed the VM over",
            )
            .with(
                "advice",
                "bring the source host's agent back: its journal decides. If the host is gone, `slat fence host` it: that it runs \
                 nothing any more decides too, nothing else does",
            )
            .to_migration_error(Phase::Switchover, "server"),
        })
    }

    /// The source saw no more than a broken connection, and the destination's agent says why.
    fn destination_broke_it(&self) -> bool {
        let reason = |error: &Option<v1::MigrationError>, reason: Reason| {
            error
                .as_ref()
                .is_some_and(|error| error.reason == reason.as_str())
        };
        reason(&self.source, Reason::ConnectionLost)
            && reason(&self.destination, Reason::VmProcessDied)
    }

    /// Of an end before the commit: the better reason, once the destination's agent gave it.
    pub(super) fn better(
        &self,
        phase: Phase,
        known: &v1::MigrationError,
    ) -> Option<v1::MigrationError> {
        (self.source.as_ref() == Some(known) && self.destination_broke_it())
            .then(|| self.destination_gone(phase))?
    }

    fn destination_gone(&self, phase: Phase) -> Option<v1::MigrationError> {
        let mut error = self.destination.clone()?;
        error.set_phase(phase);
        error.message =
            "the destination's process died before the commit; the VM runs on at the source".into();
        error.advice = "see the log of the destination's host, then migrate again".into();
        let place = ("vm_location".to_owned(), "SOURCE".to_owned());
        error.metadata.extend([place]);
        Some(error)
    }

    fn refused(&self, phase: Phase, location: Location, side: Side) -> v1::MigrationError {
        let (side, mut error) = self.refusal.clone().unwrap_or_else(|| {
            let text = format!("the {} did not take part", side_name(side));
            (side, ApiError::new(Reason::Internal, text))
        });
        let word = if location == Location::Lost {
            if error.reason != Reason::NoSuchVm {
                error.reason = Reason::VmProcessDied;
            }
            "LOST"
        } else {
            "SOURCE"
        };
        if let Some(advice) = advice(error.reason)
            && !error.metadata.contains_key("advice")
        {
            error = error.with("advice", advice);
        }
        error
            .with("vm_location", word)
            .to_migration_error(phase, side_name(side))
    }

    /// The destination cannot know what its end means; the commit makes it the loss of what it had
    /// received.
    fn destination_died(
        &self,
        phase: Phase,
        location: Location,
        subject: &Subject,
    ) -> v1::MigrationError {
        let lost = location == Location::Lost;
        let (text, advice) = if lost {
            (
                "the destination's process died after the source had handed the VM over, and the source's process is gone"
                    .to_owned(),
                "delete the VM and create it anew".to_owned(),
            )
        } else {
            (
                format!(
                    "the destination's process died after the source had handed the VM over: the VM runs nowhere; a \
                     frozen copy was left at {}",
                    subject.source
                ),
                copy_advice(&subject.vm_uid, &subject.source),
            )
        };
        let reason = Reason::VmProcessDied;
        let mut error = made(phase, Side::Destination, reason, &text, &advice);
        let mut note = |key: &str, value: &str| {
            error.metadata.insert(key.to_owned(), value.to_owned());
        };
        note("vm_location", if lost { "LOST" } else { "UNKNOWN" });
        note("frozen_copy", if lost { "" } else { &subject.source });
        if let Some(cause) = &self.destination {
            note("cause", &cause.message);
        }
        error
    }

    /// Handed over, and dead there. What the guest did at the destination nobody knows: it may have
    /// run, and written to the outside world, before its process died.
    fn owner_died(&self, subject: &Subject, kept: bool) -> v1::MigrationError {
        let Subject {
            source,
            destination,
            vm_uid,
            ..
        } = subject;
        let text = format!(
            "the VM was handed over to {destination}, and its process died there{}",
            if kept {
                format!("; a frozen copy was left at {source}")
            } else {
                String::new()
            }
        );
        let advice = if kept {
            copy_advice(vm_uid, source)
        } else {
            "delete the VM and create it anew".to_owned()
        };
        let reason = Reason::VmProcessDied;
        let mut error = made(Phase::Committed, Side::Destination, reason, &text, &advice);
        let mut note = |key: &str, value: &str| {
            error.metadata.insert(key.to_owned(), value.to_owned());
        };
        note("vm_location", "LOST");
        note("frozen_copy", if kept { source } else { "" });
        if let Some(cause) = &self.destination {
            note("cause", &cause.message);
            if let Some(log) = cause.metadata.get("log") {
                note("log", log);
            }
        }
        error
    }

    /// What the source is told when the migration cannot go on.
    pub(super) fn for_source(&self, phase: Phase) -> v1::MigrationError {
        match &self.refusal {
            Some((side, error)) => error.to_migration_error(phase, side_name(*side)),
            None => made(
                phase,
                Side::Destination,
                Reason::ConnectionLost,
                "the destination's side ended; the VM runs on at the source",
                "see the destination host's log, then migrate again",
            ),
        }
    }
}

/// The refusal of a cancel that comes too late.
pub(super) fn past_point(migration: &v1::Migration) -> ApiError {
    let phase = migration.phase().as_str_name();
    let location = migration.vm_location().as_str_name();
    let location = location.trim_start_matches("VM_LOCATION_");
    let (text, place, advice) = if has_ended(migration.phase()) {
        (
            format!("{} has ended: there is nothing to cancel", migration.name),
            location,
            "look at how it ended: slat get migration",
        )
    } else {
        (
            format!(
                "{} is past the point of no return: {} goes to {}",
                migration.name, migration.vm, migration.destination
            ),
            "DESTINATION",
            "migrate it back when it has arrived",
        )
    };
    ApiError::new(Reason::PastPointOfNoReturn, text)
        .with("migration", &migration.name)
        .with("vm", &migration.vm)
        .with("phase", phase)
        .with("vm_location", place)
        .with("advice", advice)
}

/// The end of a migration, or its doubt, whose host was deleted by order.
pub(super) fn host_forgotten(
    phase: Phase,
    location: Location,
    subject: &Subject,
    side: Side,
    kept: bool,
) -> v1::MigrationError {
    let (source, uid) = (&subject.source, &subject.vm_uid);
    let host = subject.host(side);
    let (outcome, advice) = match (side, location) {
        (_, Location::Source) => (
            "the VM runs on at the source".to_owned(),
            "migrate it to another host".to_owned(),
        ),
        (Side::Source, Location::Lost) => (
            "the VM was not handed over and is given up with it".to_owned(),
            "create the VM again".to_owned(),
        ),
        (Side::Source, _) => (
            format!(
                "whether it had handed the VM over is not known, and {} holds what it received",
                subject.destination
            ),
            copy_advice(uid, &subject.destination),
        ),
        (Side::Destination, _) if kept => (
            format!(
                "the VM had been handed over and is given up with it; a frozen copy was left at {source}"
            ),
            copy_advice(uid, source),
        ),
        (Side::Destination, _) => (
            "the VM had been handed over and is given up with it".to_owned(),
            "create the VM again".to_owned(),
        ),
    };
    let location = location.as_str_name();
    let location = location.trim_start_matches("VM_LOCATION_");
    ApiError::new(
        Reason::HostDeleted,
        format!("{host} was deleted by order; {outcome}"),
    )
    .with("host", host)
    .with("vm_location", location)
    .with("frozen_copy", if kept { source.as_str() } else { "" })
    .with("advice", advice)
    .to_migration_error(phase, side_name(side))
}

/// The end of a migration, or its doubt, whose host was fenced.
pub(super) fn host_fenced(
    phase: Phase,
    location: Location,
    subject: &Subject,
    side: Side,
    kept: bool,
) -> v1::MigrationError {
    let Subject {
        source,
        destination,
        vm_uid,
        ..
    } = subject;
    let host = subject.host(side);
    let (outcome, advice) = match (side, location) {
        (_, Location::Source) => (
            "the VM runs on at the source".to_owned(),
            "migrate it to another host".to_owned(),
        ),
        (_, Location::Lost) => (
            "the VM ended with it".to_owned(),
            "create the VM again".to_owned(),
        ),
        (Side::Source, _) => (
            format!("{destination} takes the VM if it has all of it"),
            format!("see that the agent of {destination} answers: it is told as soon as it does"),
        ),
        (Side::Destination, _) if kept => (
            format!(
                "the VM had been handed over and ended with it; a frozen copy was left at {source}"
            ),
            copy_advice(vm_uid, source),
        ),
        (Side::Destination, _) => (
            "whether the VM had been handed over is not known".to_owned(),
            format!("bring the agent of {source} back, or fence that host too"),
        ),
    };
    let location = location.as_str_name();
    let location = location.trim_start_matches("VM_LOCATION_");
    ApiError::new(Reason::HostFenced, format!("{host} was fenced; {outcome}"))
        .with("host", host)
        .with("vm_location", location)
        .with("frozen_copy", if kept { source.as_str() } else { "" })
        .with("advice", advice)
        .to_migration_error(phase, side_name(side))
}

/// What can be done about a frozen copy.
fn copy_advice(uid: &str, host: &str) -> String {
    let short = host.strip_prefix("hosts/").unwrap_or(host);
    format!(
        "if the copy is still there, `slat get leftovers` says what taking it back gives up, `slat adopt vm --uid {uid} \
         --host {short} --give-up` does it, `slat delete vm --uid {uid}` ends the VM and the copy"
    )
}

/// What is left of a VM is a copy that no process may run unless an operator says so.
pub(super) fn frozen_copy(vm: &v1::Vm, keeper: &str, host: &str) -> ApiError {
    let uid = &vm.uid;
    ApiError::new(
        Reason::VmNotRunning,
        format!(
            "{} runs nowhere: {keeper} ended after the commit, and what is left is a frozen copy on {host}",
            vm.name
        ),
    )
    .with("vm", &vm.name)
    .with("uid", uid)
    .with("host", host)
    .with("migration", keeper)
    .with("state", vm.state().as_str_name())
    .with("advice", copy_advice(uid, host))
}

/// The refusal of what cannot be done while a VM migrates.
pub(super) fn in_progress(vm: &str, migration: &str, what: &str) -> ApiError {
    ApiError::new(
        Reason::MigrationInProgress,
        format!("{vm} migrates now ({migration}): cannot {what}"),
    )
    .with("vm", vm)
    .with("migration", migration)
    .with("advice", "wait for its end, or cancel it")
}

pub(crate) fn no_such_migration(name: &MigrationName) -> ApiError {
    ApiError::new(Reason::NoSuchMigration, format!("no migration {name}")).with("migration", name)
}
