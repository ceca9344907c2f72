//! FleetService: agents register and report.
//!
//! An address is stored before the registration is answered, and the agent called back there: with
//! the answer a host that can be reached is READY. A report that changes what is remembered of a
//! host waits for the disk, but not for long: agents are the truth, and report again.

use slat_proto::{
    ApiError, Reason,
    model::{HostName, Labels, is_uid},
    transport::{Address, Caller},
    v1::{self, fleet_service_server::FleetService},
};
use tonic::{Request, Response, Status};

use super::services::Services;

/// Of the text that tells one start of an agent from another, bytes.
const LONGEST_INCARNATION: usize = 64;

impl Services {
    fn interval_millis(&self) -> u32 {
        u32::try_from(self.fleet.interval().as_millis()).unwrap_or(u32::MAX)
    }
}

/// Refuses who speaks for another host. Without certificates nobody can be told apart.
///
/// # Errors
/// IDENTITY_WRONG.
fn is_its_agent(caller: Option<&Caller>, host: &str) -> Result<(), ApiError> {
    let Some((caller, found)) = caller.and_then(|it| Some((it, it.identity.as_deref()?))) else {
        return Ok(());
    };
    let id = host.strip_prefix("hosts/").unwrap_or(host);
    if caller.agent() == Some(id) {
        return Ok(());
    }
    let domain = found
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.split('/').next());
    let wanted = format!("spiffe://{}/slat/agent/{id}", domain.unwrap_or_default());
    Err(ApiError::new(
        Reason::IdentityWrong,
        format!("{found} speaks for {host}: only {wanted} may"),
    )
    .with("host", host)
    .with("found", found)
    .with("wanted", wanted)
    .with(
        "advice",
        "give the agent the name of its certificate, or a certificate of its name",
    ))
}

/// Refuses a way to an agent that goes around its certificate: behind a Unix socket nobody shows
/// one.
///
/// # Errors
/// BAD_PARAMETER.
fn check_address(caller: Option<&Caller>, address: &Address) -> Result<(), ApiError> {
    let known = caller.is_some_and(|caller| caller.identity.is_some());
    if known && matches!(address, Address::Unix(_)) {
        let words = "is a Unix socket, where no certificate is shown: advertise host:port";
        return Err(ApiError::bad_parameter("host.address", words).with("address", address));
    }
    Ok(())
}

#[tonic::async_trait]
impl FleetService for Services {
    async fn register_host(
        &self,
        request: Request<v1::RegisterHostRequest>,
    ) -> Result<Response<v1::RegisterHostResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let mut host = request
            .into_inner()
            .host
            .ok_or_else(|| ApiError::bad_parameter("host", "is missing"))?;
        let name = HostName::parse(&host.name)?.to_string();
        is_its_agent(caller.as_ref(), &name)?;
        let labels = Labels::from_field("host.labels", &host.labels)?;
        host.labels = labels.to_field();
        let address = host.address.parse::<Address>()?;
        check_address(caller.as_ref(), &address)?;
        let address = address.to_string();
        // A fence's hook is told it.
        if !is_uid(&host.incarnation) || host.incarnation.len() > LONGEST_INCARNATION {
            let words = "is 1 to 64 visible ASCII characters";
            return Err(ApiError::bad_parameter("host.incarnation", words).into());
        }
        if !host.uid.is_empty() && !is_uid(&host.uid) {
            let words = "is 1 to 128 visible ASCII characters, or empty";
            return Err(ApiError::bad_parameter("host.uid", words).into());
        }
        host.name.clone_from(&name);
        host.address.clone_from(&address);
        self.fleet.admit(&host)?;
        let stored = (name.clone(), address.clone());
        self.store
            .with(move |store| store.put_host(&stored.0, &stored.1))
            .await
            .map_err(ApiError::from)?;
        tracing::info!(host = %name, %address, incarnation = %host.incarnation, "a host registers");
        self.fleet.register(host.clone())?;
        self.fleet.call_back(&host).await;
        Ok(Response::new(v1::RegisterHostResponse {
            report_interval_millis: self.interval_millis(),
            grant_keys: self.grants.announced(self.fleet.ahead_ms(&name)),
        }))
    }

    async fn report_host(
        &self,
        request: Request<v1::ReportHostRequest>,
    ) -> Result<Response<v1::ReportHostResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let mut report = request.into_inner();
        report.host = HostName::parse(&report.host)?.to_string();
        is_its_agent(caller.as_ref(), &report.host)?;
        let host = report.host.clone();
        let samples = self.history.samples_of(&report);
        let sides = std::mem::take(&mut report.transfers);
        // What an unfinished migration keeps is its own to end.
        report
            .leftovers
            .retain(|left| !self.migrations.explains(&left.migration));
        let came = self.fleet.report(report)?;
        self.history.vms(&host, samples);
        self.migrations.sweep(&host, sides);
        // Said in the log by who writes.
        drop(self.fleet.settled_report().await);
        if let Some(came) = came {
            self.fleet.clocks().answered(came);
        }
        Ok(Response::new(v1::ReportHostResponse {
            report_interval_millis: self.interval_millis(),
            grant_keys: self.grants.announced(self.fleet.ahead_ms(&host)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_with_a_certificate_is_called_where_it_shows_one() {
        let caller = |identity: Option<&str>| Caller {
            identity: identity.map(Into::into),
            peer: "192.0.2.1:5".into(),
        };
        let known = caller(Some("spiffe://d.example/slat/agent/a"));
        let socket: Address = "unix:/run/a.sock".parse().unwrap();
        let tcp: Address = "192.0.2.1:7401".parse().unwrap();
        let refused = check_address(Some(&known), &socket).unwrap_err();
        assert_eq!(refused.reason, Reason::BadParameter);
        assert_eq!(refused.metadata["field"], "host.address");
        check_address(Some(&known), &tcp).unwrap();
        for nobody in [Some(&caller(None)), None] {
            check_address(nobody, &socket).unwrap();
        }
    }

    #[test]
    fn an_agent_speaks_for_its_own_host() {
        let caller = |identity: Option<&str>| Caller {
            identity: identity.map(Into::into),
            peer: "192.0.2.1:5".into(),
        };
        let refused = |identity: &str| {
            let caller = caller(Some(identity));
            let error = is_its_agent(Some(&caller), "hosts/a").unwrap_err();
            assert_eq!(error.reason, Reason::IdentityWrong);
            assert_eq!(error.metadata["found"], identity);
            error.metadata["wanted"].clone()
        };
        let own = caller(Some("spiffe://d.example/slat/agent/a"));
        is_its_agent(Some(&own), "hosts/a").unwrap();
        for other in [
            "agent/b",
            "agent/a.b",
            "server/a",
            "user/a",
            "agent/hosts/a",
        ] {
            let wanted = refused(&format!("spiffe://d.example/slat/{other}"));
            assert_eq!(wanted, "spiffe://d.example/slat/agent/a");
        }
        // Where nobody shows a certificate nobody can be told apart.
        is_its_agent(Some(&caller(None)), "hosts/a").unwrap();
        is_its_agent(None, "hosts/a").unwrap();
    }
}
