//! How a VM's memory is paged, in words.

use std::{fmt::Write as _, time::Duration};

use slat_proto::v1::{self, paging_status::State};

use super::words::pages;
use crate::term::units::{Size, Span};

/// Lines of a VM's page, labels and words.
pub(super) fn lines(vm: &v1::Vm) -> Vec<(&'static str, String)> {
    let Some(status) = &vm.paging else {
        return Vec::new();
    };
    vec![
        ("paging", how(status)),
        ("page source", source(status)),
        ("to do", advice(vm, status)),
        ("snapshots", snapshots(status)),
        ("faults", faults(status)),
        ("mirror", mirror(status)),
    ]
}

/// A short word for a NOTE column; `None` while nothing is wrong and all memory is there.
pub(super) fn note(vm: &v1::Vm) -> Option<String> {
    let status = vm.paging.as_ref()?;
    match status.state() {
        State::SourceFailed => Some(format!("PAGE SOURCE FAILED: {}", status.reason)),
        State::NoPager => Some("NO PAGER: its guest waits".to_owned()),
        _ if status.loaded_bytes < status.source_bytes => {
            // What it does not touch stays its parent's.
            let fork = status.because.iter().any(|why| why == "a fork");
            Some(if fork { "FORK" } else { "LOADING" }.to_owned())
        }
        _ => None,
    }
}

fn how(status: &v1::PagingStatus) -> String {
    let state = match status.state() {
        State::Serving => "by the Common MMU",
        State::NoPager => "no pager: the agent starts one, the guest waits at its next fault",
        State::SourceFailed => "its page source failed: who touches one of its pages waits",
        State::Unspecified => "in a way that this slat does not know",
    };
    let mut words = vec![state.to_owned()];
    if !status.because.is_empty() {
        words.push(format!("because of: {}", status.because.join(", ")));
    }
    if status.pager_pid != 0 {
        words.push(format!("pager {}", status.pager_pid));
    }
    if status.pager_restarts > 0 {
        words.push(format!("{} pagers before it", status.pager_restarts));
    }
    words.join("; ")
}

fn source(status: &v1::PagingStatus) -> String {
    if status.source_bytes == 0 {
        return String::new();
    }
    let (loaded, all) = (Size(status.loaded_bytes), Size(status.source_bytes));
    let mut far = format!("{loaded} of {all} loaded");
    if status.working_set_bytes > 0 {
        let (loaded, all) = (
            Size(status.working_set_loaded_bytes),
            Size(status.working_set_bytes),
        );
        let _ = write!(far, ", first its working set: {loaded} of {all}");
    }
    match status.message.as_str() {
        "" => far,
        what => format!("{far}; {what} ({})", status.reason),
    }
}

fn advice(vm: &v1::Vm, status: &v1::PagingStatus) -> String {
    let id = super::words::id(&vm.name);
    match (status.state(), status.reason.as_str()) {
        (State::SourceFailed, "PAGE_SOURCE_TRUNCATED" | "PAGE_SOURCE_CORRUPT") => format!(
            "slat delete vm {id}, then restore another save: what is missing is nowhere else"
        ),
        (State::SourceFailed, "NO_MEMORY") => {
            format!("free memory on its host, then: slat retry vm {id}")
        }
        (State::SourceFailed, _) => {
            format!("bring back what is missing, then: slat retry vm {id}")
        }
        _ => String::new(),
    }
}

fn snapshots(status: &v1::PagingStatus) -> String {
    if status.snapshots == 0 && status.kept_bytes == 0 {
        return String::new();
    }
    let kept = Size(status.kept_bytes);
    format!("{} kept now, {kept} copied for them", status.snapshots)
}

fn faults(status: &v1::PagingStatus) -> String {
    let mut words = vec![format!(
        "{} without contents, {} not mapped, {} protected; {} mapped beside; {} wait",
        status.faults_missing,
        status.faults_minor,
        status.faults_write_protect,
        pages(status.pages_prefetched),
        status.faults_waiting,
    )];
    let served: u64 = status.latency_buckets.iter().sum();
    if let Some(mean) = status.latency_nanos.checked_div(served) {
        words.push(format!("{} on average", Span(Duration::from_nanos(mean))));
    }
    let blocked: u64 = status.vcpu_blocked_nanos.iter().sum();
    if blocked > 0 {
        let blocked = Span(Duration::from_nanos(blocked));
        words.push(format!("vCPUs waited {blocked} in all"));
    }
    words.join("; ")
}

fn mirror(status: &v1::PagingStatus) -> String {
    let refused = match status.changes_refused {
        0 => String::new(),
        refused => format!(", {refused} refused by the kernel"),
    };
    format!(
        "{} mapped, {} table pages, {}; {} changes{refused}",
        pages(status.mapped_pages),
        status.table_pages,
        Size(status.mirror_bytes),
        status.changes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(state: State, reason: &str) -> v1::Vm {
        v1::Vm {
            name: "vms/web".into(),
            paging: Some(v1::PagingStatus {
                state: state.into(),
                reason: reason.into(),
                message: "/s/web.slatsave: gone".into(),
                because: vec!["restored lazily".into()],
                loaded_bytes: 64 << 20,
                source_bytes: 1 << 30,
                latency_buckets: vec![0, 2],
                latency_nanos: 4_000_000,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn line(vm: &v1::Vm, label: &str) -> String {
        let lines = lines(vm);
        let found = lines.iter().find(|(known, _)| *known == label);
        found.map(|(_, words)| words.clone()).unwrap_or_default()
    }

    #[test]
    fn a_failed_source_says_what_and_the_way_on() {
        let gone = vm(State::SourceFailed, "PAGE_SOURCE_GONE");
        assert_eq!(
            line(&gone, "page source"),
            "64 MiB of 1 GiB loaded; /s/web.slatsave: gone (PAGE_SOURCE_GONE)"
        );
        assert!(line(&gone, "to do").ends_with("slat retry vm web"));
        assert!(line(&gone, "paging").contains("because of: restored lazily"));
        assert_eq!(
            note(&gone).as_deref(),
            Some("PAGE SOURCE FAILED: PAGE_SOURCE_GONE")
        );
        let corrupt = vm(State::SourceFailed, "PAGE_SOURCE_CORRUPT");
        assert!(line(&corrupt, "to do").starts_with("slat delete vm web"));
    }

    #[test]
    fn a_vm_that_loads_is_marked_and_one_that_the_kernel_pages_says_nothing() {
        let loading = vm(State::Serving, "");
        assert_eq!(note(&loading).as_deref(), Some("LOADING"));
        let mut fork = loading.clone();
        fork.paging.as_mut().unwrap().because = vec!["a fork".into()];
        assert_eq!(note(&fork).as_deref(), Some("FORK"));
        assert!(
            line(&loading, "faults").contains("2.00 ms on average"),
            "{}",
            line(&loading, "faults")
        );
        let mut set = loading.clone();
        let paging = set.paging.as_mut().unwrap();
        (paging.working_set_loaded_bytes, paging.working_set_bytes) = (1 << 20, 2 << 20);
        let words = "64 MiB of 1 GiB loaded, first its working set: 1 MiB of 2 MiB";
        assert!(line(&set, "page source").starts_with(words));
        assert_eq!(lines(&v1::Vm::default()), []);
        assert_eq!(note(&v1::Vm::default()), None);
    }
}
