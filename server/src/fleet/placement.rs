//! Where a new VM goes. Pure.

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, VmSpec},
    v1,
};

use super::pools::NeededPages;

/// A host that could take a VM, and what is free there.
pub(super) struct Candidate<'a> {
    pub(super) host: &'a v1::Host,
    /// Bytes, reservations taken off.
    pub(super) free: u64,
    /// Of the pages set aside that the VM takes, those that are free, reservations taken off;
    /// `None`: it takes none, or the host does not say.
    pub(super) pages: Option<u64>,
}

/// Whether a host has the backend a VM asks for; any will do when it asks for none.
pub(super) fn has_backend(host: &v1::Host, backend: Option<BackendKind>) -> bool {
    match backend {
        None => !host.backends.is_empty(),
        Some(kind) => host.backends.contains(&kind.to_message().into()),
    }
}

/// The candidate with most free pages of those that the VM takes, then with most free memory, among
/// those that fit; the first by name when equal. A host that does not say how many pages it has
/// comes after those that have enough.
///
/// # Errors
/// NO_HOST with what was needed and the most that was free; NO_HUGE_PAGES when all else fits
/// somewhere.
pub(super) fn choose<'a>(
    candidates: &[Candidate<'a>],
    spec: &VmSpec,
) -> Result<&'a v1::Host, ApiError> {
    let fitting: Vec<&Candidate<'a>> = candidates
        .iter()
        .filter(|candidate| has_backend(candidate.host, spec.backend))
        .filter(|candidate| candidate.free >= spec.ordinary_bytes())
        .collect();
    let needed = NeededPages::of(spec, spec.memory_bytes);
    let too_few = |candidate: &&&Candidate<'a>| {
        let needed = needed.map_or(0, |needed| needed.pages);
        candidate.pages.is_some_and(|free| free < needed)
    };
    let best = fitting
        .iter()
        .filter(|candidate| !too_few(candidate))
        .max_by(|a, b| {
            (a.pages, a.free)
                .cmp(&(b.pages, b.free))
                .then_with(|| b.host.name.cmp(&a.host.name))
        });
    if let Some(best) = best {
        return Ok(best.host);
    }
    if let Some(needed) = needed.filter(|_| !fitting.is_empty()) {
        let most = fitting.iter().filter_map(|c| c.pages).max().unwrap_or(0);
        let whose = format!("none of {} hosts has them, the most is", fitting.len());
        return Err(needed.refuse(&whose, most).with(
            "advice",
            "set more pages aside on a host (vm.nr_hugepages), or take another backing",
        ));
    }
    let most = candidates.iter().map(|c| c.free).max().unwrap_or(0);
    Err(ApiError::new(
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
    .with("advice", "start an agent on another host, or delete or move VMs"))
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
                pages: None,
            },
            Candidate {
                host: &b,
                free: 96 << 20,
                pages: None,
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

    #[test]
    fn a_vm_of_pages_set_aside_goes_where_there_are_some() {
        let hosts = ["hosts/a", "hosts/b", "hosts/c"].map(|name| host(name, v1::Backend::Kvm));
        let candidates = |pages: [Option<u64>; 3]| {
            let of = |(host, pages)| Candidate {
                host,
                free: if host == &hosts[0] { 1 << 30 } else { 0 },
                pages,
            };
            hosts.iter().zip(pages).map(of).collect::<Vec<_>>()
        };
        let spec = VmSpec::from_message(&v1::VmSpec {
            memory_bytes: 32 << 20,
            vcpus: 1,
            backing: v1::MemoryBacking::Hugetlb2m.into(),
            ..Default::default()
        })
        .unwrap();
        let chosen = |pages| choose(&candidates(pages), &spec).map(|host| host.name.clone());
        // Ordinary memory is not asked for.
        assert_eq!(chosen([Some(15), Some(16), Some(3)]).unwrap(), "hosts/b");
        assert_eq!(chosen([Some(16), Some(99), Some(99)]).unwrap(), "hosts/b");
        // One that does not say is better than one that has too few, and no better than others.
        assert_eq!(chosen([Some(15), Some(0), None]).unwrap(), "hosts/c");
        assert_eq!(chosen([None, Some(16), Some(0)]).unwrap(), "hosts/b");
        let refused = chosen([Some(15), Some(2), Some(0)]).unwrap_err();
        assert_eq!(refused.reason, Reason::NoHugePages);
        assert_eq!(refused.metadata["needed_pages"], "16");
        assert_eq!(refused.metadata["free_pages"], "15");
        assert!(refused.message.contains("none of 3 hosts"), "{refused}");
        // Where nothing else fits either, pages are not what is missing.
        let software = VmSpec {
            backend: Some(BackendKind::Software),
            ..spec.clone()
        };
        let refused = choose(&candidates([Some(0); 3]), &software).unwrap_err();
        assert_eq!(refused.reason, Reason::NoHost);
    }
}
