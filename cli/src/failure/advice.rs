//! What to do next: the endpoint's own words where it gave some, else by reason; for a migration by
//! what held it up. Advice names what can help: under a bandwidth cap the cap, not more streams.

use slat_proto::{ApiError, Reason, v1};

use super::options::in_options;

/// For an answer.
pub(super) fn of(error: &ApiError) -> String {
    match error.metadata.get("advice") {
        // Here the command can be named.
        Some(_)
            if error.reason == Reason::MigrationInProgress
                && error.metadata.contains_key("migration") =>
        {
            by_reason(error)
        }
        // What an endpoint says for every state helps in none that is final, except where it names
        // the migration that ended so.
        Some(_)
            if error.reason == Reason::VmNotRunning
                && is_final(error)
                && !error.metadata.contains_key("migration") =>
        {
            by_reason(error)
        }
        // A certificate of a host is none of a server, and may be meant.
        Some(_) if agent_in_place_of_server(error).is_some() => {
            let name = agent_in_place_of_server(error).unwrap_or("NAME");
            format!("that is the agent of {name}: add --agent {name} if it is to be asked")
        }
        // Its words name a field.
        Some(_) if is_unpopulated(error) => format!(
            "slat get vm {} shows how far it is; start it when all of it is populated",
            vm(error)
        ),
        Some(advice) if !advice.is_empty() => in_options(advice),
        _ => by_reason(error),
    }
}

/// The host whose agent answered where a server was to.
fn agent_in_place_of_server(error: &ApiError) -> Option<&str> {
    let of = |key: &str| error.metadata.get(key).map_or("", String::as_str);
    let (_, name) = of("found").rsplit_once("/slat/agent/")?;
    (error.reason == Reason::IdentityWrong && of("wanted").ends_with(": server")).then_some(name)
}

/// Whether the VM never runs again.
fn is_final(error: &ApiError) -> bool {
    let state = error.metadata.get("state").map_or("", String::as_str);
    matches!(state, "STATE_FAILED" | "STATE_STOPPED" | "STATE_LOST")
}

/// Whether a VM may not start until its memory is populated.
fn is_unpopulated(error: &ApiError) -> bool {
    error.reason == Reason::VmState && error.metadata.contains_key("populated_bytes")
}

/// The VM as it is typed, where the error names it.
fn vm(error: &ApiError) -> &str {
    let name = error.metadata.get("vm").map_or("", String::as_str);
    match name.strip_prefix("vms/").unwrap_or(name) {
        "" => "NAME",
        id => id,
    }
}

/// For a VM that does not run, by what its state allows.
fn not_running(error: &ApiError) -> String {
    let vm = vm(error);
    match error.metadata.get("state").map_or("", String::as_str) {
        "STATE_CREATED" => format!("slat start vm {vm}"),
        "STATE_PAUSED" => format!("slat resume vm {vm}"),
        "STATE_LOST" => {
            format!("its memory is gone with its process; slat delete vm {vm} takes it away")
        }
        // Its memory can be read until it is deleted.
        "STATE_FAILED" | "STATE_STOPPED" => format!(
            "it runs no more: slat get vm {vm} says why, slat memory digest {vm} still reads its \
             memory, slat delete vm {vm} ends it"
        ),
        _ => format!("slat get vm {vm}; slat start or resume vm {vm}"),
    }
}

/// For a migration that failed; empty when there is nothing to advise.
pub(crate) fn migration(migration: &v1::Migration) -> String {
    let Some(error) = &migration.error else {
        return String::new();
    };
    let reason = Reason::parse(&error.reason);
    let slow = matches!(
        reason,
        Some(Reason::NotConverging | Reason::CompletionTimeout | Reason::DowntimeUnreachable)
    );
    if slow {
        return pace(migration);
    }
    if !error.advice.is_empty() {
        return in_options(&error.advice);
    }
    reason.map_or_else(String::new, |reason| {
        by_reason(&ApiError {
            reason,
            message: String::new(),
            metadata: error.metadata.clone().into_iter().collect(),
        })
    })
}

/// For a migration that was too slow for its guest.
fn pace(migration: &v1::Migration) -> String {
    let is_of = |reason: Reason| {
        let error = migration.error.as_ref();
        error.is_some_and(|error| error.reason == reason.as_str())
    };
    // Neither the guest nor the wire was in the way.
    if is_of(Reason::DowntimeUnreachable) {
        return "Accept a longer --max-downtime; a faster disk below the agents' state directories \
                shortens a switchover"
            .to_owned();
    }
    let params = migration.params.unwrap_or_default();
    let progress = migration.progress.as_ref();
    let rate = progress.map_or(0, |progress| progress.throughput_bytes_per_second);
    let mut ways = Vec::new();
    match params.max_bandwidth_bytes_per_second {
        0 if params.streams > 0 && params.streams < 4 => {
            ways.push(format!("more --streams than {}", params.streams));
        }
        0 => {}
        // A cap that was not reached held nothing up.
        cap if rate == 0 || rate >= cap / 2 => {
            let cap = cap.div_ceil(1 << 20);
            ways.push(format!("raise or drop --max-bandwidth (it was {cap}MiB/s)"));
        }
        _ => {}
    }
    ways.push("accept a longer --max-downtime".to_owned());
    if params.on_timeout() != v1::migration_params::OnTimeout::ForceSwitchover {
        ways.push("--on-timeout force-switchover".to_owned());
    }
    if is_of(Reason::CompletionTimeout) {
        ways.push("allow a longer --max-total-time".to_owned());
    }
    ways.push("wait until the guest writes less".to_owned());
    let mut text = ways.join(", or ");
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

fn by_reason(error: &ApiError) -> String {
    let detail = |key: &str| error.metadata.get(key).map(String::as_str);
    let advice = match error.reason {
        Reason::NoSuchVm => "slat get vms",
        Reason::NoSuchHost => "slat get hosts",
        Reason::NoSuchMigration => "slat get migrations",
        Reason::NoSuchLeftover => "slat get leftovers",
        Reason::NoSuchSlot | Reason::BadSlotTable => "slat memory slots VM",
        Reason::NoSuchCursor => "slat memory dirty VM --cursor NAME makes one",
        Reason::NoSuchMethod => {
            "ask another endpoint with --server; migrations are served by the server alone"
        }
        Reason::VmExists => "choose another name; slat get vms shows who has this one",
        Reason::NameConflict => {
            "slat get vms -o wide lists them; repeat with --uid UID, or with --host HOST"
        }
        Reason::SaveExists => {
            "choose another name with --as; slat get saves shows who has this one"
        }
        Reason::NoSuchSave => "slat get saves",
        Reason::SaveInUse => "slat get vms and slat get saves show who needs it",
        Reason::SaveNotWritten => "slat get save SAVE --watch",
        Reason::SaveCorrupt => {
            "slat verify save SAVE says more; put whole copies of its files in their place, or take another save"
        }
        Reason::PageSourceGone | Reason::PageSourceStalled => {
            return format!(
                "bring back what it names, then: slat retry vm {}",
                vm(error)
            );
        }
        Reason::PageSourceTruncated | Reason::PageSourceCorrupt => {
            return format!("slat delete vm {}, then restore another save", vm(error));
        }
        Reason::PagerUnreachable => "repeat; pager.log in the VM's directory says why a pager ends",
        Reason::HostNameTaken => "give one of the two agents another --name",
        Reason::HostCordoned => "another host, or slat uncordon host NAME",
        Reason::HostInUse => {
            "stop its agent and move or delete its VMs first; --give-up-vms forgets VMs of a silent host"
        }
        Reason::HostFenced => {
            "its agent is welcome when it is started anew; see slat get host, and what is left on that host"
        }
        Reason::FenceFailed => {
            "nothing was decided: mend the hook, or see that the host is off, and fence it again"
        }
        Reason::NoFenceHook => {
            "slat server --fence-hook PROGRAM, or bring the host back: its journals decide too"
        }
        Reason::GiveUpRequired => "repeat with --give-up when that may go",
        Reason::DowntimeUnreachable => {
            "accept a longer --max-downtime; the figure is the least that can be kept"
        }
        Reason::MessageTooLarge => "ask for less at once: one VM, one slot, a smaller page",
        Reason::MessageUndecodable => "slat version at both ends: can they talk to each other?",
        Reason::Store => "see the server's log and its state directory",
        Reason::DiskFull => "free space there; what waits for it goes on by itself",
        Reason::DescriptorsExhausted => "raise LimitNOFILE of that process; see its connections",
        Reason::VmUnreachable => {
            "slat get vm NAME; slat delete vm --uid UID --force ends its process"
        }
        Reason::VmRunning => "slat pause vm NAME",
        Reason::VmNotRunning => return not_running(error),
        // Of a VM that has never run; a migration says where its VM is.
        Reason::VmProcessDied if is_final(error) => return not_running(error),
        Reason::MigrationInProgress => match detail("migration") {
            Some(migration) => {
                return format!(
                    "slat get migration {migration} --watch, or slat cancel {migration}"
                );
            }
            None => "slat get migrations",
        },
        Reason::PeerUnreachable => {
            "is it running? give the address of a server, agent or VM socket with --server or SLAT_SERVER"
        }
        Reason::HostUnreachable => "slat get hosts; start the agent there again",
        Reason::StaleGeneration => "look at the slots again and repeat",
        Reason::DstNoMemory | Reason::NoMemory | Reason::NoHost => {
            "slat get hosts shows what is free; choose less memory or another host"
        }
        Reason::NoSuchNode => "take one of its nodes, another host, or no --numa-node",
        Reason::NoHugePages => {
            "set more pages aside there (vm.nr_hugepages), or take --backing auto"
        }
        Reason::NotConverging | Reason::CompletionTimeout => {
            "allow a longer --max-downtime, or --on-timeout force-switchover"
        }
        Reason::InDoubt => {
            "bring the source's host back: its journal decides; or slat fence host it; nothing runs twice meanwhile"
        }
        _ => "",
    };
    advice.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slow(cap: u64, rate: u64) -> v1::Migration {
        v1::Migration {
            params: Some(v1::MigrationParams {
                streams: 2,
                max_bandwidth_bytes_per_second: cap,
                ..Default::default()
            }),
            progress: Some(v1::MigrationProgress {
                throughput_bytes_per_second: rate,
                ..Default::default()
            }),
            error: Some(v1::MigrationError {
                reason: "NOT_CONVERGING".into(),
                advice: "raise max_downtime or streams".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_vm_that_runs_no_more_is_not_to_be_started() {
        let refused = |state: &str| {
            ApiError::new(Reason::VmNotRunning, "it writes nothing")
                .with("vm", "vms/web")
                .with("state", state)
        };
        for state in ["STATE_FAILED", "STATE_STOPPED", "STATE_LOST"] {
            for error in [
                refused(state),
                refused(state).with("advice", "start or resume it"),
            ] {
                let advice = of(&error);
                assert!(advice.contains("slat delete vm web"), "{advice}");
                assert!(!advice.contains("resume"), "{advice}");
            }
            let copy = refused(state)
                .with("migration", "migrations/m1")
                .with("advice", "slat adopt vm --uid u --host a");
            assert_eq!(of(&copy), "slat adopt vm --uid u --host a");
        }
        assert_eq!(of(&refused("STATE_CREATED")), "slat start vm web");
        assert_eq!(of(&refused("STATE_PAUSED")), "slat resume vm web");
    }

    #[test]
    fn memory_that_is_not_there_yet_is_looked_at_by_a_command() {
        let error = ApiError::new(Reason::VmState, "cannot start yet")
            .with("vm", "vms/web")
            .with("populated_bytes", 0)
            .with("advice", "start it when Vm.prefault is done");
        let advice = of(&error);
        assert!(advice.starts_with("slat get vm web shows"), "{advice}");
        assert!(!advice.contains("Vm.prefault"), "{advice}");
    }

    #[test]
    fn under_a_cap_the_cap_is_named_and_streams_are_not() {
        let advice = migration(&slow(4 << 20, 4 << 20));
        assert!(
            advice.contains("--max-bandwidth (it was 4MiB/s)"),
            "{advice}"
        );
        assert!(!advice.contains("--streams"), "{advice}");
        let advice = migration(&slow(0, 4 << 20));
        assert!(
            advice.contains("--streams") && !advice.contains("--max-bandwidth"),
            "{advice}"
        );
        let advice = migration(&slow(1 << 40, 4 << 20));
        assert!(
            !advice.contains("--max-bandwidth"),
            "a cap far away: {advice}"
        );
    }

    #[test]
    fn other_failures_keep_the_words_they_came_with() {
        let mut failed = slow(0, 0);
        failed.error = Some(v1::MigrationError {
            reason: "CONNECTION_LOST".into(),
            advice: "raise max_total_time".into(),
            ..Default::default()
        });
        assert_eq!(migration(&failed), "raise --max-total-time");
    }
}
