//! What must fit before anything is reserved or moved: versions, architecture, page size, backend,
//! CPU.
//!
//! The source describes what its VM was told (`describe`), the server carries that to the
//! destination, and the destination compares ([`admit`]) before it takes memory or starts a
//! process. Its daemon asks first, the VM's process once more. What differs is refused by name:
//!
//! | what differs | reason |
//! |---|---|
//! | no common version of the protocol or of the state | STATE_VERSION_UNSUPPORTED |
//! | the architecture | ISA_MISMATCH |
//! | the page size | PAGE_SIZE_MISMATCH |
//! | the backend is not here | CAPABILITY_MISSING |
//! | one end protects page streams, the other was started without | CAPABILITY_MISSING |
//! | the VM's spec asks for dirty rings, which are not here | CAPABILITY_MISSING |
//! | its memory is of a kind that this host's settings or kernel do not give | CAPABILITY_MISSING |
//! | too few pages are set aside for it | NO_HUGE_PAGES |
//! | a fact about the CPU | CPU_INCOMPATIBLE |
//!
//! Pages that are set aside are counted here only for a trial: a repeated request would find those
//! gone that the first one took. Otherwise they are reserved when the empty VM is built, before the
//! source hears of it.
//!
//! # Versions
//! Each end says which it speaks, the newest and the one before. The destination chooses the
//! highest that both have; the source checks the choice in StartOutgoing; every frame carries it.

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, DirtyEngine, PAGE_SIZE, VmSpec},
    v1,
};

use crate::{
    backend::{CpuFact, compare_facts, host_facts, offers_dirty_rings},
    machine::no_dirty_rings,
    memory::{Mode, check_mode, check_room},
};

/// Versions of the data port's protocol spoken here. 2: state in sections; 3: Echo.
const PROTOCOL: v1::VersionRange = v1::VersionRange { min: 2, max: 3 };
/// Versions of the sections' contents.
const STATE: v1::VersionRange = v1::VersionRange { min: 1, max: 1 };

/// What this program says of itself, for a VM of `backend` that was told `cpu` of its CPU.
pub(crate) fn describe(backend: BackendKind, cpu: Vec<CpuFact>) -> v1::Preamble {
    v1::Preamble {
        protocol: Some(PROTOCOL),
        state: Some(STATE),
        architecture: std::env::consts::ARCH.to_owned(),
        page_bytes: PAGE_SIZE,
        backends: vec![backend.to_message().into()],
        cpu: cpu
            .into_iter()
            .map(|fact| v1::CpuFact {
                name: fact.name,
                value: fact.value,
            })
            .collect(),
        channels: Vec::new(),
    }
}

/// How pages may travel to and from here: by TLS, unless the agent was started without.
pub(crate) fn channels(insecure_pages: bool) -> Vec<i32> {
    vec![own_channel(insecure_pages).into()]
}

fn own_channel(insecure_pages: bool) -> v1::PageChannel {
    if insecure_pages {
        v1::PageChannel::Plain
    } else {
        v1::PageChannel::Tls
    }
}

/// How pages will travel from where `source` was said.
///
/// # Errors
/// CAPABILITY_MISSING when both ends have nothing in common.
pub(crate) fn choose_channel(
    source: &v1::Preamble,
    insecure_pages: bool,
) -> Result<v1::PageChannel, ApiError> {
    let own = own_channel(insecure_pages);
    // Who says nothing knows nothing else.
    let unsaid = source.channels.is_empty() && own == v1::PageChannel::Plain;
    if unsaid || source.channels().any(|channel| channel == own) {
        return Ok(own);
    }
    let (with, without) = if insecure_pages {
        ("source", "destination")
    } else {
        ("destination", "source")
    };
    Err(ApiError::new(
        Reason::CapabilityMissing,
        format!("the {with} protects page streams by TLS and the {without} does not"),
    )
    .with("capability", "PAGE_CHANNEL_TLS")
    .with("vm_location", "SOURCE")
    .with(
        "advice",
        "start both agents alike: with --insecure-pages or without, and bring both to the same version of slat",
    ))
}

/// The same of this host: all that a VM of `backend` could be told here.
///
/// # Errors
/// KVM_IOCTL when the CPU cannot be described.
pub fn describe_host(backend: BackendKind) -> Result<v1::Preamble, ApiError> {
    Ok(describe(backend, host_facts(backend)?))
}

/// As [`admit_here`]; where `request` is a migration's, page streams must fit, too.
///
/// # Errors
/// As [`admit`].
pub fn admit_on_host(
    request: &v1::PrepareIncomingRequest,
    insecure_pages: bool,
) -> Result<v1::ChosenVersions, ApiError> {
    let chosen = admit_here(request)?;
    // A copy is announced in the same form, and has no page streams.
    if let Some(source) = request
        .preamble
        .as_ref()
        .filter(|_| !request.migration.is_empty())
    {
        let vm = request.vm.as_ref().map_or("", |vm| vm.name.as_str());
        choose_channel(source, insecure_pages).map_err(|error| error.with("vm", vm))?;
    }
    Ok(chosen)
}

/// Whether the VM that `request` announces can be taken by this program on this host. Reserves
/// nothing. May block on the kernel.
///
/// # Errors
/// As [`admit`].
pub fn admit_here(request: &v1::PrepareIncomingRequest) -> Result<v1::ChosenVersions, ApiError> {
    let missing = |field| ApiError::bad_parameter(field, "is missing");
    let source = request
        .preamble
        .as_ref()
        .ok_or_else(|| missing("preamble"))?;
    let vm = request.vm.as_ref().ok_or_else(|| missing("vm"))?;
    let spec = vm.spec.as_ref().ok_or_else(|| missing("vm.spec"))?;
    let spec = VmSpec::from_resource(spec)?;
    let backend = spec
        .backend
        .ok_or_else(|| ApiError::bad_parameter("vm.spec.backend", "the source says which"))?;
    let chosen =
        admit(source, &describe_host(backend)?).map_err(|error| error.with("vm", &vm.name))?;
    if spec.dirty_engine == Some(DirtyEngine::Ring) && !offers_dirty_rings(backend) {
        return Err(no_dirty_rings(backend)
            .with("vm", &vm.name)
            .with("vm_location", "SOURCE"));
    }
    let mode = Mode::from(&spec);
    let fits = if request.validate_only {
        let pages = request.slots.iter().map(|slot| slot.pages);
        let pages = pages.fold(0, u64::saturating_add);
        let bytes = pages.saturating_mul(PAGE_SIZE).max(spec.memory_bytes);
        check_room(mode, bytes)
    } else {
        check_mode(mode)
    };
    fits.map_err(|error| error.with("vm", &vm.name).with("vm_location", "SOURCE"))?;
    Ok(chosen)
}

/// Whether a VM that comes from where `source` was said can be taken where `own` holds, and in
/// which versions. `own.backends` are all that work here.
///
/// # Errors
/// BAD_PARAMETER when `source` is not whole; see the module for the others.
pub fn admit(source: &v1::Preamble, own: &v1::Preamble) -> Result<v1::ChosenVersions, ApiError> {
    let protocol = common("protocol", source.protocol, own.protocol)?;
    let state = common("state", source.state, own.state)?;
    if source.architecture != own.architecture {
        return Err(differs(
            Reason::IsaMismatch,
            "architecture",
            &source.architecture,
            &own.architecture,
        ));
    }
    if source.page_bytes != own.page_bytes {
        return Err(differs(
            Reason::PageSizeMismatch,
            "page_bytes",
            &source.page_bytes,
            &own.page_bytes,
        ));
    }
    if let Some(missing) = source
        .backends()
        .find(|backend| !own.backends().any(|own| own == *backend))
    {
        return Err(ApiError::new(
            Reason::CapabilityMissing,
            format!("the destination has no backend {}", missing.as_str_name()),
        )
        .with("capability", missing.as_str_name())
        .with("vm_location", "SOURCE")
        .with("advice", "take a destination that has it"));
    }
    let differences = compare_facts(&facts(source), &facts(own));
    if differences.is_empty() {
        return Ok(v1::ChosenVersions { protocol, state });
    }
    let names: Vec<&str> = differences.iter().map(|fact| fact.name.as_str()).collect();
    let words: Vec<String> = differences.iter().map(ToString::to_string).collect();
    Err(ApiError::new(
        Reason::CpuIncompatible,
        format!("the destination's CPU differs: {}", words.join("; ")),
    )
    .with("differs", names.join(","))
    .with("vm_location", "SOURCE")
    .with(
        "advice",
        "take a destination whose CPU has all that the source's has",
    ))
}

fn facts(preamble: &v1::Preamble) -> Vec<CpuFact> {
    preamble
        .cpu
        .iter()
        .map(|fact| CpuFact {
            name: fact.name.clone(),
            value: fact.value.clone(),
        })
        .collect()
}

/// Whether this program speaks what the destination chose.
///
/// # Errors
/// BAD_PARAMETER without a choice; STATE_VERSION_UNSUPPORTED.
pub(crate) fn accept(chosen: Option<&v1::ChosenVersions>) -> Result<v1::ChosenVersions, ApiError> {
    let chosen =
        chosen.ok_or_else(|| ApiError::bad_parameter("versions", "PrepareIncoming says them"))?;
    let one = |version| {
        Some(v1::VersionRange {
            min: version,
            max: version,
        })
    };
    common("protocol", one(chosen.protocol), Some(PROTOCOL))?;
    common("state", one(chosen.state), Some(STATE))?;
    Ok(*chosen)
}

/// The highest version in both ranges.
fn common(
    what: &'static str,
    source: Option<v1::VersionRange>,
    own: Option<v1::VersionRange>,
) -> Result<u32, ApiError> {
    let whole = |range: Option<v1::VersionRange>| {
        range
            .filter(|range| 0 < range.min && range.min <= range.max)
            .ok_or_else(|| {
                ApiError::bad_parameter("preamble", format_args!("has no range of {what} versions"))
            })
    };
    let (source, own) = (whole(source)?, whole(own)?);
    let highest = source.max.min(own.max);
    if highest < source.min.max(own.min) {
        let text = |range: v1::VersionRange| format!("{}-{}", range.min, range.max);
        return Err(differs(
            Reason::StateVersionUnsupported,
            what,
            &text(source),
            &text(own),
        )
        .with("advice", "bring both hosts to the same version of slat"));
    }
    Ok(highest)
}

fn differs(
    reason: Reason,
    what: &str,
    source: &dyn std::fmt::Display,
    own: &dyn std::fmt::Display,
) -> ApiError {
    ApiError::new(
        reason,
        format!("{what}: {source} at the source, {own} at the destination"),
    )
    .with("differs", what)
    .with("source", source)
    .with("destination", own)
    .with("vm_location", "SOURCE")
    .with("advice", "take another destination")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> v1::Preamble {
        v1::Preamble {
            protocol: Some(PROTOCOL),
            state: Some(STATE),
            architecture: "x86_64".to_owned(),
            page_bytes: PAGE_SIZE,
            backends: vec![v1::Backend::Kvm.into(), v1::Backend::Software.into()],
            cpu: Vec::new(),
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut v1::Preamble)) -> ApiError {
        let mut source = own();
        source.backends.truncate(1);
        change(&mut source);
        admit(&source, &own()).unwrap_err()
    }

    #[test]
    fn like_meets_like_in_the_newest_version() {
        let chosen = admit(&own(), &own()).unwrap();
        assert_eq!((chosen.protocol, chosen.state), (3, 1));
        accept(Some(&chosen)).unwrap();
    }

    #[test]
    fn neighbours_meet_in_both_directions() {
        let range = |min, max| Some(v1::VersionRange { min, max });
        for (theirs, chosen) in [((2, 2), 2), ((3, 4), 3), ((1, 2), 2), ((1, 9), 3)] {
            let mut other = own();
            other.protocol = range(theirs.0, theirs.1);
            assert_eq!(admit(&other, &own()).unwrap().protocol, chosen);
            assert_eq!(admit(&own(), &other).unwrap().protocol, chosen);
        }
    }

    #[test]
    fn what_differs_is_named() {
        let far = Some(v1::VersionRange { min: 4, max: 5 });
        let error = refused(|source| source.protocol = far);
        assert_eq!(error.reason, Reason::StateVersionUnsupported);
        assert_eq!(error.metadata["differs"], "protocol");
        let error = refused(|source| source.state = far);
        assert_eq!(error.reason, Reason::StateVersionUnsupported);
        assert_eq!(error.metadata["differs"], "state");
        let error = refused(|source| source.architecture = "riscv64".to_owned());
        assert_eq!(error.reason, Reason::IsaMismatch);
        let error = refused(|source| source.page_bytes = 65536);
        assert_eq!(error.reason, Reason::PageSizeMismatch);
        let error = refused(|source| {
            source.cpu = vec![v1::CpuFact {
                name: "x86.cpuid.7.0.ebx".to_owned(),
                value: "0xffffffff".to_owned(),
            }];
        });
        assert_eq!(error.reason, Reason::CpuIncompatible);
        assert!(error.metadata["differs"].contains("x86.cpuid.7.0.ebx"));
        let mut alone = own();
        alone.backends = vec![v1::Backend::Software.into()];
        let error = admit(&own(), &alone).unwrap_err();
        assert_eq!(error.reason, Reason::CapabilityMissing);
    }

    #[test]
    fn a_choice_that_is_not_spoken_here_is_refused() {
        let chosen = v1::ChosenVersions {
            protocol: 4,
            state: 1,
        };
        let error = accept(Some(&chosen)).unwrap_err();
        assert_eq!(error.reason, Reason::StateVersionUnsupported);
        assert_eq!(accept(None).unwrap_err().reason, Reason::BadParameter);
    }
}
