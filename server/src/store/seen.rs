//! The fleet as last seen, to be remembered: hosts, the records of VMs on them, and the highest
//! epoch of each uid.

use slat_proto::v1;

use super::error::StoreError;

/// What the store has of the fleet.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SeenFleet {
    /// With name and address; the rest as its agent said last.
    pub(crate) hosts: Vec<v1::Host>,
    /// With name, uid and host; without statistics.
    pub(crate) vms: Vec<v1::Vm>,
    /// By uid.
    pub(crate) epochs: Vec<(String, u64)>,
}

/// What has changed of it; `None` is gone.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SeenChanges {
    /// By name.
    pub(crate) hosts: Vec<(String, Option<v1::Host>)>,
    /// By host and uid.
    pub(crate) vms: Vec<((String, String), Option<v1::Vm>)>,
    /// By uid.
    pub(crate) epochs: Vec<(String, Option<u64>)>,
}

/// The part of a store that remembers the fleet. Every method blocks on the disk.
pub(crate) trait FleetStore {
    /// Writes all of it or nothing; durable when it returns.
    fn put_seen(&self, changes: &SeenChanges) -> Result<(), StoreError>;
    /// All of it.
    fn seen(&self) -> Result<SeenFleet, StoreError>;
}
