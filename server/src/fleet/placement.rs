//! Where a new VM goes. Pure.

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, Paging, VmSpec},
    v1,
};

use super::pools::NeededPages;

/// Hosts whose reasons a refusal names.
const MOST_TOLD: usize = 10;

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

/// Why a host cannot have a VM of such a spec whose memory is watched; `None` when it can, when the
/// VM is not to be watched, and when its agent does not say.
pub(crate) fn why_not_watched(host: &v1::Host, paging: Paging) -> Option<&str> {
    if paging != Paging::Agent {
        return None;
    }
    if !has_backend(host, Some(BackendKind::Kvm)) {
        return Some(match host.backend_message.as_str() {
            "" => "it has no KVM",
            why => why,
        });
    }
    let said = host.paging.as_ref().filter(|said| !said.can_watch)?;
    Some(match said.message.as_str() {
        "" => "it does not say why",
        why => why,
    })
}

/// The refusal of a VM that is to be watched, where none of these hosts can.
pub(crate) fn cannot_watch<'a>(
    what: &str,
    hosts: impl Iterator<Item = (&'a str, &'a str)>,
) -> ApiError {
    let hosts: Vec<(&str, &str)> = hosts.collect();
    let told = |(host, why): &(&str, &str)| format!("{host}: {why}");
    let whys: Vec<String> = hosts.iter().take(MOST_TOLD).map(told).collect();
    let whys = whys.join("; ");
    let more = match hosts.len().saturating_sub(MOST_TOLD) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    ApiError::new(
        Reason::CapabilityMissing,
        format!("{what} cannot be watched (paging AGENT): {whys}{more}"),
    )
    .with("capability", v1::Capability::Paging.as_str_name())
    .with("hosts", hosts.len())
    .with("why", format!("{whys}{more}"))
    .with(
        "advice",
        "give the agent's user access to /dev/userfaultfd there, or let the kernel page the VM",
    )
}

/// The candidate with most free pages of those that the VM takes, then with most free memory, among
/// those that fit; the first by name when equal. A host that does not say how many pages it has
/// comes after those that have enough.
///
/// # Errors
/// NO_HOST with what was needed and the most that was free; CAPABILITY_MISSING when the VM is to be
/// watched and all else but that fits somewhere; NO_HUGE_PAGES when all else fits.
pub(super) fn choose<'a>(
    candidates: &[Candidate<'a>],
    spec: &VmSpec,
) -> Result<&'a v1::Host, ApiError> {
    let fitting: Vec<&Candidate<'a>> = candidates
        .iter()
        .filter(|candidate| has_backend(candidate.host, spec.backend))
        .filter(|candidate| candidate.free >= spec.ordinary_bytes())
        .collect();
    let why_not = |candidate: &&Candidate<'a>| why_not_watched(candidate.host, spec.paging);
    let (unable, fitting): (Vec<_>, Vec<_>) = fitting
        .into_iter()
        .partition(|candidate| why_not(candidate).is_some());
    if fitting.is_empty() && !unable.is_empty() {
        let hosts = unable
            .iter()
            .filter_map(|candidate| Some((candidate.host.name.as_str(), why_not(candidate)?)));
        return Err(cannot_watch("the VM", hosts));
    }
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
    fn a_vm_that_is_to_be_watched_passes_by_hosts_that_cannot() {
        let said = |can_watch, message: &str| v1::HostPaging {
            can_watch,
            can_protect: can_watch,
            message: message.into(),
        };
        let of = |name: &str, backend, paging| v1::Host {
            paging,
            ..host(name, backend)
        };
        let (kvm, software) = (v1::Backend::Kvm, v1::Backend::Software);
        let no = Some(said(false, "no userfaultfd"));
        let a = of("hosts/a", kvm, no.clone());
        let b = of("hosts/b", kvm, Some(said(true, "")));
        let c = of("hosts/c", software, Some(said(true, "")));
        // An older agent.
        let d = of("hosts/d", kvm, None);
        let candidate = |host, free: u64| Candidate {
            host,
            free: free << 20,
            pages: None,
        };
        let spec = |paging: v1::Paging| {
            let message = v1::VmSpec {
                memory_bytes: 32 << 20,
                vcpus: 1,
                paging: paging.into(),
                ..Default::default()
            };
            VmSpec::from_message(&message).unwrap()
        };
        let (agent, kernel) = (spec(v1::Paging::Agent), spec(v1::Paging::Kernel));
        let all = [candidate(&a, 900), candidate(&b, 64), candidate(&c, 800)];
        assert_eq!(choose(&all, &kernel).unwrap().name, "hosts/a");
        assert_eq!(choose(&all, &agent).unwrap().name, "hosts/b");
        let old = [candidate(&a, 900), candidate(&d, 64)];
        assert_eq!(choose(&old, &agent).unwrap().name, "hosts/d");
        let none = [candidate(&a, 900), candidate(&c, 800)];
        let refused = choose(&none, &agent).unwrap_err();
        assert_eq!(refused.reason, Reason::CapabilityMissing);
        assert_eq!(refused.metadata["capability"], "CAPABILITY_PAGING");
        for told in ["hosts/a: no userfaultfd", "hosts/c: it has no KVM"] {
            assert!(refused.message.contains(told), "{refused}");
            assert!(refused.metadata["why"].contains(told), "{refused:?}");
        }
        // One that could and is full is not what is missing, but memory.
        let full = [candidate(&b, 1)];
        assert_eq!(choose(&full, &agent).unwrap_err().reason, Reason::NoHost);
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
