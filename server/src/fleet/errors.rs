//! Refusals about hosts, and about names that are taken.

use slat_proto::{ApiError, Reason, v1};

pub(crate) fn no_such_host(name: &str) -> ApiError {
    ApiError::new(Reason::NoSuchHost, format!("no host {name}")).with("host", name)
}

pub(crate) fn host_unreachable(name: &str) -> ApiError {
    ApiError::new(
        Reason::HostUnreachable,
        format!("the agent of {name} does not answer"),
    )
    .with("host", name)
    .with(
        "advice",
        "see that `slat agent` runs there and reaches the server",
    )
}

/// A host that is shown as UNREACHABLE, and why.
pub(super) fn unreachable_because(host: &v1::Host) -> ApiError {
    let last_seen = host.last_seen_time.map_or_else(
        || "not since the server started".to_owned(),
        |time| time.to_string(),
    );
    let mut error = host_unreachable(&host.name).with("last_seen", last_seen);
    if !host.state_message.is_empty() {
        error.message = format!("{} cannot be used: {}", host.name, host.state_message);
        error = error.with("cause", &host.state_message);
    }
    error
}

pub(super) fn host_cordoned(name: &str) -> ApiError {
    ApiError::new(
        Reason::HostCordoned,
        format!("{name} is cordoned: it takes no new VM and no migration"),
    )
    .with("host", name)
    .with(
        "advice",
        format_args!("name another host, or `slat uncordon host {}`", id(name)),
    )
}

/// A name that a VM or a side of one has.
pub(crate) fn vm_exists(vm: &v1::Vm, ready: bool) -> ApiError {
    let state = vm.state().as_str_name().trim_start_matches("STATE_");
    let error = ApiError::new(
        Reason::VmExists,
        format!(
            "{} exists already, on {} ({state}{})",
            vm.name,
            vm.host,
            if ready {
                ""
            } else {
                " when its host was last heard"
            },
        ),
    )
    .with("vm", &vm.name)
    .with("uid", &vm.uid)
    .with("host", &vm.host)
    .with("state", state);
    if ready {
        return error.with("advice", "choose another name");
    }
    let last_seen = vm
        .last_seen_time
        .map_or_else(|| "unknown".to_owned(), |time| time.to_string());
    error.with("last_seen", last_seen).with(
        "advice",
        format_args!(
            "choose another name, or bring that host back; if it is gone for good: `slat delete host {} --give-up-vms`",
            id(&vm.host)
        ),
    )
}

/// A name that is being given to a VM.
pub(super) fn vm_in_the_making(vm: &str, host: &str) -> ApiError {
    ApiError::new(
        Reason::VmExists,
        format!("{vm} is being created already, on {host}"),
    )
    .with("vm", vm)
    .with("host", host)
    .with("advice", "choose another name")
}

/// The refusal of a second agent under a host's name. `reports`: the first one does.
pub(super) fn host_name_taken(holder: &v1::Host, reports: bool) -> ApiError {
    let (how, advice) = if reports {
        (
            "reports",
            "give the second agent another --name, or stop the first".to_owned(),
        )
    } else {
        (
            "was here last, and its VMs may still run",
            format!(
                "bring the first agent back, or give its VMs up: `slat delete host {} --give-up-vms`",
                id(&holder.name)
            ),
        )
    };
    let uid = if holder.uid.is_empty() {
        String::new()
    } else {
        format!(" (uid {})", holder.uid)
    };
    ApiError::new(
        Reason::HostNameTaken,
        format!(
            "{} is another agent's name, which {how}: {}{uid}",
            holder.name, holder.address
        ),
    )
    .with("host", &holder.name)
    .with("address", &holder.address)
    .with("uid", &holder.uid)
    .with("advice", advice)
}

/// The refusal of an agent whose host is being deleted by order.
pub(super) fn host_being_deleted(name: &str) -> ApiError {
    ApiError::new(
        Reason::HostDeleted,
        format!("{name} is being deleted by order"),
    )
    .with("host", name)
    .with(
        "advice",
        "try again, as agents do by themselves: it can register when that has ended",
    )
}

/// The refusal of fencing a host whose agent reports. `reports`: it does; else the server has just
/// started and does not know.
pub(super) fn host_reports(name: &str, reports: bool) -> ApiError {
    let why = if reports {
        "its agent reports: VMs there would end"
    } else {
        "the server has just started and does not know yet whether its agent reports"
    };
    ApiError::new(Reason::HostInUse, format!("{name} is not fenced: {why}"))
        .with("host", name)
        .with(
            "advice",
            format_args!(
                "to end all that runs there: `slat fence host {} --force`",
                id(name)
            ),
        )
}

/// The refusal of a migration with a host that is being fenced.
pub(super) fn host_being_fenced(name: &str) -> ApiError {
    ApiError::new(
        Reason::HostFenced,
        format!("{name} is being fenced: no migration begins from it or to it meanwhile"),
    )
    .with("host", name)
    .with(
        "advice",
        "wait until that order has ended, or name another host",
    )
}

/// The refusal of a migration with a host that was fenced while it was looked at.
pub(crate) fn fenced_meanwhile(name: &str) -> ApiError {
    ApiError::new(Reason::HostFenced, format!("{name} was fenced meanwhile"))
        .with("host", name)
        .with(
            "advice",
            "see `slat get hosts`; migrate again when it is back",
        )
}

/// The hook did its work on a host whose agent registered another start of itself meanwhile.
pub(super) fn started_anew(name: &str, fence: &v1::Fence, found: &str) -> ApiError {
    ApiError::new(
        Reason::FenceFailed,
        format!("{name} is not fenced: its agent started anew while the hook ran; order it again"),
    )
    .with("host", name)
    .with("hook", &fence.hook)
    .with("incarnation", &fence.incarnation)
    .with("found", found)
    .with(
        "advice",
        "nothing was decided: if that start is to end too, fence the host again",
    )
}

/// The refusal of a start of an agent that is over.
pub(super) fn host_fenced(name: &str, fence: &v1::Fence) -> ApiError {
    let time = fence
        .time
        .as_ref()
        .map(ToString::to_string)
        .unwrap_or_default();
    ApiError::new(
        Reason::HostFenced,
        format!("{name} was fenced at {time}: this start of its agent is over"),
    )
    .with("host", name)
    .with("incarnation", &fence.incarnation)
    .with("fence", &fence.id)
    .with(
        "advice",
        "what its VM processes hold may run elsewhere by now: end those that are left on this host, then start the agent \
         anew; a new start is welcome",
    )
}

/// The refusal of forgetting a host: it reports, or something was last seen there.
pub(super) fn host_in_use(
    host: &v1::Host,
    reports: bool,
    vms: &[v1::Vm],
    migrations: &[String],
) -> ApiError {
    let names: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
    let (why, advice) = if reports {
        (
            "its agent reports".to_owned(),
            "stop its agent first; to keep VMs away from it, cordon it",
        )
    } else {
        (
            format!(
                "{} VMs and sides of {} unfinished migrations were last seen there",
                vms.len(),
                migrations.len()
            ),
            "bring it back, or give them up with --give-up-vms: they may still run there",
        )
    };
    ApiError::new(Reason::HostInUse, format!("{} is in use: {why}", host.name))
        .with("host", &host.name)
        .with("vms", names.join(","))
        .with("migrations", migrations.join(","))
        .with("advice", advice)
}

/// `hosts/a` as `a`, as commands take it.
fn id(host: &str) -> &str {
    host.trim_start_matches("hosts/")
}
