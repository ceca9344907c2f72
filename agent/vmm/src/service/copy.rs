//! `CopyService` for the one VM of this process, served to its host's agent alone: snapshots, and a
//! VM that is made of one.

use slat_proto::{
    ApiError,
    model::{Paging, SlotSpec, VmName, check_slot_table},
    v1::{
        self, BuildCopyRequest, TakeSnapshotRequest, TakeSnapshotResponse, Vm,
        copy_service_server::CopyService,
    },
};
use tonic::{Request, Response, Status};

use super::{
    endpoint::VmEndpoint,
    monitor::{CopySpec, Monitor},
};

/// Of what a snapshot is for, so much is kept.
const PURPOSE: usize = 256;

fn copy_spec(monitor: &dyn Monitor, request: BuildCopyRequest) -> Result<CopySpec, ApiError> {
    let name = VmName::from_id(&request.vm_id)?;
    if name != *monitor.name() {
        let vm = monitor.name();
        let message = format_args!("this process is for {vm}");
        return Err(ApiError::bad_parameter("vm_id", message).with("vm", vm));
    }
    let manifest = request
        .manifest
        .ok_or_else(|| ApiError::bad_parameter("manifest", "is missing"))?;
    if manifest.vm.is_none() {
        return Err(ApiError::bad_parameter("manifest.vm", "is missing"));
    }
    let slots = manifest.slots.iter().map(SlotSpec::from_message);
    let slots: Vec<SlotSpec> = slots.collect::<Result<_, _>>()?;
    check_slot_table(&slots)?;
    let paging = match request.paging {
        value if value == i32::from(v1::Paging::Unspecified) => None,
        value => Some(Paging::from_field(value)?),
    };
    Ok(CopySpec {
        manifest,
        slots,
        state: request.state,
        lazy: request.lazy,
        start: request.start,
        paging,
    })
}

#[tonic::async_trait]
impl CopyService for VmEndpoint {
    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<TakeSnapshotResponse>, Status> {
        let request = request.into_inner();
        let purpose: String = request.purpose.chars().take(PURPOSE).collect();
        let meant = (request.name.as_str(), request.uid.as_str(), "");
        let may_pause = request.may_pause;
        let taken = self.on(meant, move |monitor| {
            monitor.take_snapshot(&purpose, may_pause)
        });
        Ok(Response::new(taken.await?))
    }

    async fn build_copy(&self, request: Request<BuildCopyRequest>) -> Result<Response<Vm>, Status> {
        let copy = copy_spec(&*self.monitor, request.into_inner())?;
        let vm = self.blocking(move |monitor| monitor.build_copy(&copy));
        Ok(Response::new(vm.await?))
    }
}
