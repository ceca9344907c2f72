//! Which methods exist: of this package, of health and of reflection. Read once from the
//! descriptors of this build.

use std::{collections::BTreeSet, sync::LazyLock};

use prost_reflect::DescriptorPool;

use crate::v1;

/// The descriptor sets behind every endpoint.
pub(super) const DESCRIPTORS: [&[u8]; 4] = [
    v1::FILE_DESCRIPTOR_SET,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
];

/// Services that every endpoint has beside its own.
pub(super) const COMMON: [&str; 3] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

static ALL: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    let pools = DESCRIPTORS.iter().filter_map(|set| {
        // Our own descriptor sets. One that could not be read would leave its methods unknown.
        DescriptorPool::decode(*set).ok()
    });
    pools
        .flat_map(|pool| {
            pool.services()
                .flat_map(|service| {
                    let name = service.full_name().to_owned();
                    let methods = service.methods();
                    methods
                        .map(|method| format!("{name}/{}", method.name()))
                        .collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        })
        .collect()
});

/// A path as `service/method`, when it is one that exists.
pub(super) fn known(path: &str) -> Option<&'static str> {
    let path = path.strip_prefix('/').unwrap_or(path);
    ALL.get(path).map(String::as_str)
}

/// The service of a path `service/method`.
pub(super) fn service(path: &str) -> &str {
    let path = path.strip_prefix('/').unwrap_or(path);
    path.rsplit_once('/').map_or(path, |(service, _)| service)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_what_is_in_the_descriptors_is_known() {
        assert_eq!(
            known("/slat.v1.VmService/GetVm"),
            Some("slat.v1.VmService/GetVm")
        );
        assert!(known("/grpc.health.v1.Health/Check").is_some());
        assert!(known("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo").is_some());
        assert!(known("/slat.v1.VmService/GetVms").is_none());
        assert!(known("/slat.v1.VmService").is_none());
        assert!(known("/metrics").is_none());
        for name in COMMON {
            assert!(ALL.iter().any(|method| service(method) == name), "{name}");
        }
    }
}
