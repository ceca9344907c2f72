//! FleetService: agents register and report.
//!
//! An address is stored before the registration is answered, and the agent called back there: with
//! the answer a host that can be reached is READY. A report that changes what is remembered of a
//! host waits for the disk, but not for long: agents are the truth, and report again.

use slat_proto::{
    ApiError,
    model::{HostName, is_uid},
    transport::Address,
    v1::{self, fleet_service_server::FleetService},
};
use tonic::{Request, Response, Status};

use super::services::Services;

impl Services {
    fn interval_millis(&self) -> u32 {
        u32::try_from(self.fleet.interval().as_millis()).unwrap_or(u32::MAX)
    }
}

#[tonic::async_trait]
impl FleetService for Services {
    async fn register_host(
        &self,
        request: Request<v1::RegisterHostRequest>,
    ) -> Result<Response<v1::RegisterHostResponse>, Status> {
        let mut host = request
            .into_inner()
            .host
            .ok_or_else(|| ApiError::bad_parameter("host", "is missing"))?;
        let name = HostName::parse(&host.name)?.to_string();
        let address = host.address.parse::<Address>()?.to_string();
        if !matches!(host.incarnation.len(), 1..=64) {
            return Err(ApiError::bad_parameter("host.incarnation", "is 1 to 64 bytes").into());
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
        }))
    }

    async fn report_host(
        &self,
        request: Request<v1::ReportHostRequest>,
    ) -> Result<Response<v1::ReportHostResponse>, Status> {
        let mut report = request.into_inner();
        report.host = HostName::parse(&report.host)?.to_string();
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
        }))
    }
}
