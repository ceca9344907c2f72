//! `--keep`: the fleet stays up after the checks, for a look at it, and its VM goes on moving.
//! Others may use the fleet meanwhile; what they make on it ends with it.

use std::time::Duration;

use slat_proto::{model::VmName, v1};

use super::{
    args::DemoArgs,
    fleet::{Fleet, HOSTS, VM},
    report::Report,
    script::{move_vm, server},
};
use crate::{client::Client, failure::Failure, term::out, view};

/// Between two migrations.
const KEEP: Duration = Duration::from_secs(20);

/// Stays up, moving the VM now and then, until dropped. What goes wrong is noted and said; the
/// fleet stays for looking.
pub(super) async fn keep(args: &DemoArgs, fleet: &Fleet, report: &mut Report) {
    let (Some(address), Ok(client), Ok(vm)) = (fleet.address(), server(fleet), VmName::from_id(VM))
    else {
        return;
    };
    out::say(format!(
        "dashboard  https://{address}/ (asks for a certificate)\nserver     {address}"
    ));
    if let Some(admin) = fleet.admin() {
        out::say(format!(
            "try        slat get vms --server {address} --tls-dir {}",
            admin.display()
        ));
    }
    for (name, address) in fleet.agents() {
        out::say(format!("{name}     {address}"));
    }
    out::say(format!(
        "the VM goes on and moves every {} s; Ctrl-C ends everything",
        KEEP.as_secs()
    ));
    for number in 1u64.. {
        tokio::time::sleep(KEEP).await;
        if let Err(failure) = move_on(args, &client, &vm, number, report).await {
            out::report(&failure);
            report.check(format!("keep-{number}"), false, "see above");
        }
    }
}

async fn move_on(
    args: &DemoArgs,
    client: &Client,
    vm: &VmName,
    number: u64,
    report: &mut Report,
) -> Result<(), Failure> {
    let request = v1::GetVmRequest {
        name: vm.to_string(),
        ..Default::default()
    };
    let now = client.vms().get_vm(request).await;
    let now = now
        .map_err(|status| Failure::call(format!("get {vm}"), status))?
        .into_inner();
    let source = view::id(&now.host);
    let destination = if source == HOSTS[0] {
        HOSTS[1]
    } else {
        HOSTS[0]
    };
    let id = format!("keep-{number}");
    let migration = move_vm(args, client, vm, &id, source, destination).await?;
    let errors = now.guest_counters.map_or(0, |counters| counters.errors);
    report.check(
        format!("{id}: guest errors are 0"),
        errors == 0,
        errors.to_string(),
    );
    report.check(
        format!("{id} completed"),
        migration.phase() == v1::MigrationPhase::Completed,
        view::phase(migration.phase()),
    );
    Ok(())
}
