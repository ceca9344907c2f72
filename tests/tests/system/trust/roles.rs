//! Every method, at a real server and a real agent, by every kind of caller: it passes exactly
//! where the table says so, and stands in the audit log once, as what its caller heard.
//!
//! Calls have no message to speak of, so nothing comes of those that pass: they name no VM.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use prost_reflect::MethodDescriptor;
use slat_proto::{
    Reason,
    transport::{Role, TracedChannel, connect_by, role_may},
    v1::{
        self, Backend, host_service_client::HostServiceClient, vm_service_client::VmServiceClient,
    },
};
use slat_tests::{guest::usual, wait::eventually};
use slat_trust::{Credentials, Kind, Refusal, pki::Ca};

use super::{
    caller::{call, methods, name, without_certificate},
    rig::{Secured, link, within},
};

const USERS: &str = "users:
  admin: {role: admin, vms: all}
  olga: {role: operator, vms: all}
  vera: {role: viewer, vms: all}
  lim: {role: operator, vms: {team: web}}
";

/// Services of each end; what is common to all is not among them.
const AT_SERVER: [&str; 7] = [
    "Vm",
    "Memory",
    "Host",
    "Migration",
    "Fleet",
    "Snapshot",
    "Paging",
];
const AT_AGENT: [&str; 6] = ["Vm", "Memory", "Host", "Transfer", "Snapshot", "Paging"];

/// One who is let in.
struct Caller {
    credentials: Credentials,
    role: Option<Role>,
    limited: bool,
}

impl Caller {
    fn role(&self) -> &'static str {
        self.role.map_or("none", Role::as_str)
    }

    /// Whether a method is for this one.
    fn may(&self, method: &str, at_agent: bool) -> bool {
        // What is for those who have no role is for all that have one.
        let users = [Role::Viewer, Role::Agent, Role::Server];
        let anyone = users.into_iter().all(|role| role_may(role, method));
        match self.role {
            _ if anyone => true,
            Some(_) if self.limited && at_agent => false,
            Some(role) => role_may(role, method),
            None => false,
        }
    }
}

/// Hosts and VMs, without what changes by itself.
async fn fleet(channel: TracedChannel) -> anyhow::Result<Vec<String>> {
    let mut hosts = HostServiceClient::new(channel.clone());
    let hosts = hosts.list_hosts(v1::ListHostsRequest::default()).await?;
    let mut vms = VmServiceClient::new(channel);
    let vms = vms.list_vms(v1::ListVmsRequest::default()).await?;
    let hosts = hosts.into_inner().hosts.into_iter().map(|host| {
        let state = host.state();
        format!("{} {state:?} cordoned: {}", host.name, host.cordoned)
    });
    let vms = vms.into_inner().vms.into_iter().map(|vm| {
        let state = vm.state();
        format!("{} {} on {} {state:?}", vm.name, vm.uid, vm.host)
    });
    Ok(hosts.chain(vms).collect())
}

/// Calls everything at one end, and compares with what it audited.
async fn every_method(
    fleet: &Secured,
    end: &'static str,
    callers: &[Caller],
    all: &[MethodDescriptor],
) -> anyhow::Result<()> {
    let at_agent = end != "server";
    let served: &[&str] = if at_agent { &AT_AGENT } else { &AT_SERVER };
    for caller in callers {
        let who = caller.credentials.identity().to_string();
        let channel = fleet.channel(end, &caller.credentials)?;
        let mut heard = BTreeMap::new();
        for method in all {
            let service = method.parent_service();
            let ours = service.full_name().starts_with("slat.v1.");
            let here = served
                .iter()
                .any(|it| format!("{it}Service") == service.name());
            let name = name(method);
            let answer = call(&channel, method).await?;
            let reason = answer.as_ref().err().map(|error| error.reason);
            let say = || {
                format!(
                    "{who} ({}) calls {name} at {end}: {answer:?}",
                    caller.role()
                )
            };
            if caller.may(&name, at_agent) {
                let code = reason.map(|reason| reason.code());
                ensure!(reason != Some(Reason::Permission), "{}", say());
                ensure!(code != Some(tonic::Code::Unauthenticated), "{}", say());
                if ours && !here {
                    ensure!(reason == Some(Reason::NoSuchMethod), "{}", say());
                }
            } else {
                ensure!(reason == Some(Reason::Permission), "{}", say());
            }
            // Health and reflection decide nothing, and are not audited.
            if ours {
                let said = reason.map_or("OK", |reason| reason.as_str());
                heard.insert(name, vec![(caller.role().to_owned(), said.to_owned())]);
            }
        }
        let mut found = BTreeMap::new();
        eventually("everything is audited", || {
            let audited = audited(fleet, end, &who);
            found = audited.as_ref().ok().cloned().unwrap_or_default();
            let calls = heard.len();
            async move {
                let lines: usize = audited?.values().map(Vec::len).sum();
                ensure!(lines >= calls, "{lines} of {calls}");
                Ok(())
            }
        })
        .await?;
        ensure!(
            found == heard,
            "{who} at {end}: {found:#?}\nnot\n{heard:#?}"
        );
    }
    Ok(())
}

/// Role and result of each line of a caller, by method.
fn audited(
    fleet: &Secured,
    end: &str,
    who: &str,
) -> anyhow::Result<BTreeMap<String, Vec<(String, String)>>> {
    let mut found: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for line in fleet.audited(end)? {
        let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        if text("peer") == who {
            found
                .entry(text("method"))
                .or_default()
                .push((text("role"), text("result")));
        }
    }
    Ok(found)
}

/// Those who are not let in hear why, whatever they ask for.
async fn refused(
    fleet: &Secured,
    end: &'static str,
    callers: &[(Credentials, Reason)],
    trusts: &Credentials,
    all: &[MethodDescriptor],
) -> anyhow::Result<()> {
    // Each call is a connection of its own.
    for (caller, reason) in callers {
        for method in all {
            let channel = connect_by(&fleet.address(end), &link(caller))?;
            let answer = call(&channel, method).await?;
            let error = answer.err().context("it passes")?;
            ensure!(
                error.reason == *reason,
                "{} at {end}: {error:?}",
                name(method)
            );
        }
    }
    // Nobody comes so far as to name a method.
    for _ in 0..all.len() {
        let refusal = without_certificate(&fleet.address(end), trusts).await?;
        ensure!(refusal == Refusal::NoCertificate, "{refusal:?}");
    }
    let required = (Reason::CertificateRequired, all.len());
    let expected = callers.iter().map(|(_, reason)| (*reason, all.len()));
    for (reason, times) in expected.chain([required]) {
        eventually("refusals are audited", || async {
            let lines = fleet.audited(end)?;
            let of_reason = |line: &&serde_json::Value| line["result"] == reason.as_str();
            let lines = lines.iter().filter(of_reason).count();
            ensure!(lines == times, "{lines} of {times} {reason:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_by_every_caller() -> anyhow::Result<()> {
    let all = methods()?;
    for method in &all {
        let name = name(method);
        let somebodys = Role::ALL.into_iter().any(|role| role_may(role, &name));
        ensure!(somebodys, "{name} has no row in the table of roles");
    }
    let mut fleet = Secured::new()?;
    let revoked = fleet.issue(Kind::Agent, "revoked", None)?;
    fleet.ca.revoke("agent/revoked")?;
    let caller = |kind, name: &str, role, limited| {
        let credentials = fleet.issue(kind, name, None)?;
        anyhow::Ok(Caller {
            credentials,
            role,
            limited,
        })
    };
    let callers = [
        caller(Kind::User, "vera", Some(Role::Viewer), false)?,
        caller(Kind::User, "olga", Some(Role::Operator), false)?,
        caller(Kind::User, "admin", Some(Role::Admin), false)?,
        caller(Kind::User, "nobody", None, false)?,
        caller(Kind::User, "lim", Some(Role::Operator), true)?,
        caller(Kind::Agent, "probe", Some(Role::Agent), false)?,
        caller(Kind::Server, "probe", Some(Role::Server), false)?,
    ];
    let expired = fleet.issue(Kind::User, "late", Some(within(-240, -120)))?;
    let early = fleet.issue(Kind::User, "early", Some(within(3600, 7200)))?;
    let other = Ca::init(&fleet.root().join("other-ca"), "example.org")?;
    let out = fleet.root().join("other-admin");
    other.issue(Kind::User, "admin", None, &out)?;
    // It trusts the fleet; the fleet does not trust it.
    let admin = callers[2].credentials.clone();
    let mut trusted = std::fs::read(out.join("ca.crt"))?;
    trusted.extend(std::fs::read(admin.dir().join("ca.crt"))?);
    std::fs::write(out.join("ca.crt"), trusted)?;
    let foreign = Credentials::load(&out)?;
    let not_let_in = [
        (foreign, Reason::CertificateUnknownCa),
        (expired, Reason::CertificateExpired),
        (early, Reason::CertificateNotYetValid),
        (revoked, Reason::CertificateRevoked),
    ];
    // One whose calls are not counted.
    let maker = fleet.issue(Kind::Server, "maker", None)?;
    let hosts = [("host-a", 512, "rack=r1")];
    fleet.start(USERS, &hosts, &maker).await?;
    let mut vms = VmServiceClient::new(fleet.channel("server", &maker)?);
    let spec = v1::VmSpec {
        labels: [("team".to_owned(), "web".to_owned())].into(),
        ..usual(Backend::Software)
    };
    let request = v1::CreateVmRequest {
        vm_id: "web".to_owned(),
        spec: Some(spec),
        ..Default::default()
    };
    vms.create_vm(request).await?;
    let looks = || fleet.channel("server", &maker);
    let before = self::fleet(looks()?).await?;
    for end in ["server", "host-a"] {
        every_method(&fleet, end, &callers, &all).await?;
        refused(&fleet, end, &not_let_in, &admin, &all).await?;
    }
    let after = self::fleet(looks()?).await?;
    ensure!(before == after, "{before:#?}\nbecame\n{after:#?}");
    fleet.finish(&maker).await
}
