//! What one look brings: the resources that were asked for, all pages of them, and which hosts may
//! hold more.

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, SaveName, VmName},
    v1,
};
use tonic::Status;

use super::super::{saves, target::VmTarget};
use crate::{client::Client, failure::Failure, term::out};

/// Most entries that one page may have.
const PAGE: i32 = 1000;

/// What one look brought.
#[derive(Clone, Debug)]
pub(crate) struct Listing<T> {
    /// The resources.
    pub(crate) items: Vec<T>,
    /// Hosts that do not answer.
    pub(super) unreachable: Vec<String>,
    /// Of these, hosts that have not reported since the server started.
    pub(super) unreported: Vec<String>,
}

impl<T> From<Vec<T>> for Listing<T> {
    fn from(items: Vec<T>) -> Self {
        Self {
            items,
            unreachable: Vec::new(),
            unreported: Vec::new(),
        }
    }
}

impl<T> Listing<T> {
    /// Which hosts may hold more than is listed; `None` when none may.
    pub(super) fn gaps(&self) -> Option<String> {
        let id = |name: &String| name.strip_prefix("hosts/").unwrap_or(name).to_owned();
        let silent: Vec<String> = self
            .unreachable
            .iter()
            .filter(|host| !self.unreported.contains(host))
            .map(id)
            .collect();
        let unreported: Vec<String> = self.unreported.iter().map(id).collect();
        let mut gaps = Vec::new();
        if !unreported.is_empty() {
            gaps.push(format!(
                "{} did not report since the server started",
                unreported.join(", ")
            ));
        }
        if !silent.is_empty() {
            gaps.push(format!("no answer from {}", silent.join(", ")));
        }
        (!gaps.is_empty()).then(|| gaps.join("; "))
    }

    /// Says which hosts may hold more.
    pub(super) fn warn(&self) {
        if let Some(gaps) = self.gaps() {
            out::say(format!(
                "warning: {gaps}; what is there may be missing, or shown as it was last seen"
            ));
        }
    }

    /// Nothing may be said to be there only when every host was heard.
    pub(super) fn check(&self, collection: &str) -> Result<(), Failure> {
        let Some(gaps) = self.gaps().filter(|_| self.items.is_empty()) else {
            return Ok(());
        };
        let error = ApiError::new(
            Reason::HostUnreachable,
            format!("none are known, but {gaps}"),
        )
        .with("unreachable", self.unreachable.join(","))
        .with("unreported", self.unreported.join(","))
        .with("advice", "slat get hosts; ask again when they report");
        Err(Failure::api(format!("list {collection}"), error))
    }
}

/// Hosts, or one.
pub(super) async fn hosts(
    client: &Client,
    name: Option<&HostName>,
) -> Result<Listing<v1::Host>, Status> {
    if let Some(name) = name {
        let name = name.to_string();
        let host = client.hosts().get_host(v1::GetHostRequest { name }).await?;
        return Ok(vec![host.into_inner()].into());
    }
    let mut items = Vec::new();
    let mut request = v1::ListHostsRequest {
        page_size: PAGE,
        ..Default::default()
    };
    loop {
        let page = client
            .hosts()
            .list_hosts(request.clone())
            .await?
            .into_inner();
        items.extend(page.hosts);
        if page.next_page_token.is_empty() {
            return Ok(items.into());
        }
        request.page_token = page.next_page_token;
    }
}

/// One VM.
pub(super) async fn vm(client: &Client, target: &VmTarget) -> Result<Listing<v1::Vm>, Status> {
    let request = v1::GetVmRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let vm = client.vms().get_vm(request).await?;
    Ok(vec![vm.into_inner()].into())
}

/// VMs; only those of one host, when it is named.
pub(crate) async fn vms(
    client: &Client,
    host: Option<&HostName>,
) -> Result<Listing<v1::Vm>, Status> {
    let wanted = host.map(HostName::to_string);
    let of_host = |name: &String| wanted.as_ref().is_none_or(|wanted| wanted == name);
    let mut listing = Listing::from(Vec::new());
    let mut request = v1::ListVmsRequest {
        page_size: PAGE,
        ..Default::default()
    };
    loop {
        let page = client.vms().list_vms(request.clone()).await?.into_inner();
        let vms = page.vms.into_iter();
        listing.items.extend(vms.filter(|vm| of_host(&vm.host)));
        for (names, kept) in [
            (page.unreachable, &mut listing.unreachable),
            (page.unreported, &mut listing.unreported),
        ] {
            for name in names.into_iter().filter(of_host) {
                if !kept.contains(&name) {
                    kept.push(name);
                }
            }
        }
        if page.next_page_token.is_empty() {
            return Ok(listing);
        }
        request.page_token = page.next_page_token;
    }
}

/// Which migrations.
#[derive(Clone, Debug, Default)]
pub(super) struct Migrations {
    /// Only this one.
    pub(super) name: Option<MigrationName>,
    /// Only those of the VM of this name.
    pub(super) vm: Option<VmName>,
    /// Only those of the VM of this uid.
    pub(super) vm_uid: String,
    /// At most so many, the newest.
    pub(super) limit: Option<u32>,
}

/// Migrations, newest first, or one.
pub(super) async fn migrations(
    client: &Client,
    which: &Migrations,
) -> Result<Listing<v1::Migration>, Status> {
    let mut migrations = client.migrations();
    if let Some(name) = &which.name {
        let name = name.to_string();
        let request = v1::GetMigrationRequest { name };
        let migration = migrations.get_migration(request).await?;
        return Ok(vec![migration.into_inner()].into());
    }
    let limit = which.limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    let mut items = Vec::new();
    let mut request = v1::ListMigrationsRequest {
        vm: which.vm.as_ref().map(VmName::to_string).unwrap_or_default(),
        vm_uid: which.vm_uid.clone(),
        ..Default::default()
    };
    loop {
        let wanted = limit - items.len();
        request.page_size = i32::try_from(wanted).unwrap_or(PAGE).min(PAGE);
        let page = migrations
            .list_migrations(request.clone())
            .await?
            .into_inner();
        items.extend(page.migrations.into_iter().take(wanted));
        if page.next_page_token.is_empty() || items.len() >= limit {
            return Ok(items.into());
        }
        request.page_token = page.next_page_token;
    }
}

/// Saves; only those of one host, when it is named.
pub(super) async fn saves(
    client: &Client,
    host: Option<&HostName>,
) -> Result<Listing<v1::Save>, Status> {
    let (items, unreachable) = saves::all(client, host).await?;
    Ok(Listing {
        items,
        unreachable,
        unreported: Vec::new(),
    })
}

/// One save.
pub(super) async fn save(client: &Client, name: &SaveName) -> Result<Listing<v1::Save>, Status> {
    let name = name.to_string();
    let request = v1::GetSaveRequest { name };
    let save = client.snapshots().get_save(request).await?;
    Ok(vec![save.into_inner()].into())
}

/// What lies on one host, or on all.
pub(crate) async fn leftovers(
    client: &Client,
    host: Option<&HostName>,
) -> Result<Listing<v1::Leftover>, Status> {
    let request = v1::ListLeftoversRequest {
        host: host.map(HostName::to_string).unwrap_or_default(),
    };
    let answer = client.hosts().list_leftovers(request).await?.into_inner();
    Ok(Listing {
        items: answer.leftovers,
        unreachable: answer.unreachable,
        unreported: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(unreachable: &[&str], unreported: &[&str], vms: usize) -> Listing<v1::Vm> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Listing {
            items: vec![v1::Vm::default(); vms],
            unreachable: owned(unreachable),
            unreported: owned(unreported),
        }
    }

    #[test]
    fn nothing_is_not_success_while_a_host_is_silent() {
        let failure = listing(&["hosts/a", "hosts/b"], &["hosts/a"], 0)
            .check("vms")
            .unwrap_err();
        assert_eq!(failure.exit_code(), 5);
        let text = failure.render();
        assert!(
            text.contains("a did not report since the server started; no answer from b"),
            "{text}"
        );
        listing(&[], &[], 0).check("vms").unwrap();
        listing(&["hosts/a"], &[], 1).check("vms").unwrap();
        assert_eq!(
            listing(&["hosts/a"], &["hosts/a"], 0)
                .check("vms")
                .unwrap_err()
                .exit_code(),
            5
        );
    }
}
