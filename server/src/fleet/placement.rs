//! Where a new VM goes. Pure.

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, VmSpec},
    v1,
};

/// A host that could take a VM, and what is free there.
pub(super) struct Candidate<'a> {
    pub(super) host: &'a v1::Host,
    /// Bytes, reservations taken off.
    pub(super) free: u64,
}

/// Whether a host has the backend a VM asks for; any will do when it asks for none.
pub(super) fn has_backend(host: &v1::Host, backend: Option<BackendKind>) -> bool {
    match backend {
        None => !host.backends.is_empty(),
        Some(kind) => host.backends.contains(&kind.to_message().into()),
    }
}

/// The candidate with most free memory among those that fit; the first by name when equal.
///
/// # Errors
/// NO_HOST with what was needed and the most that was free.
pub(super) fn choose<'a>(
    candidates: &[Candidate<'a>],
    spec: &VmSpec,
) -> Result<&'a v1::Host, ApiError> {
    let fitting = candidates
        .iter()
        .filter(|candidate| has_backend(candidate.host, spec.backend))
        .filter(|candidate| candidate.free >= spec.memory_bytes)
        .max_by(|a, b| {
            a.free
                .cmp(&b.free)
                .then_with(|| b.host.name.cmp(&a.host.name))
        });
    fitting.map(|candidate| candidate.host).ok_or_else(|| {
        let most = candidates.iter().map(|c| c.free).max().unwrap_or(0);
        ApiError::new(
            Reason::NoHost,
            format!(
                "none of {} ready hosts can take a VM of {} bytes{}; the most that is free is {most} bytes",
                candidates.len(),
                spec.memory_bytes,
                spec.backend
                    .map_or_else(String::new, |backend| format!(" on backend {backend}")),
            ),
        )
        .with("needed_bytes", spec.memory_bytes)
        .with("free_bytes", most)
        .with("ready_hosts", candidates.len())
        .with("advice", "start an agent on another host, or delete or move VMs")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, backend: v1::Backend) -> v1::Host {
        v1::Host {
            name: name.into(),
            backends: vec![backend.into()],
            ..Default::default()
        }
    }

    #[test]
    fn the_most_free_that_fits_wins_and_none_is_an_error() {
        let (a, b) = (
            host("hosts/a", v1::Backend::Software),
            host("hosts/b", v1::Backend::Kvm),
        );
        let candidates = [
            Candidate {
                host: &a,
                free: 64 << 20,
            },
            Candidate {
                host: &b,
                free: 96 << 20,
            },
        ];
        let mut spec = VmSpec::from_message(&v1::VmSpec {
            memory_bytes: 32 << 20,
            vcpus: 1,
            ..Default::default()
        })
        .unwrap();
        assert_eq!(choose(&candidates, &spec).unwrap().name, "hosts/b");
        spec.backend = Some(BackendKind::Software);
        assert_eq!(choose(&candidates, &spec).unwrap().name, "hosts/a");
        spec.memory_bytes = 80 << 20;
        let error = choose(&candidates, &spec).unwrap_err();
        assert_eq!(error.reason, Reason::NoHost);
        assert_eq!(error.metadata["free_bytes"], (96_u64 << 20).to_string());
    }
}
