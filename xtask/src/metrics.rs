//! Metric names: what deploy/ and docs/ use must be exported, and what is exported must be explained.
//!
//! A name counts as exported when a non-test source of the agent, the server or proto has it as a whole string
//! literal. The series that Prometheus derives from a histogram (`_bucket`, `_sum`, `_count`) count as the histogram.

use std::collections::BTreeSet;

use crate::{tally::Tally, workspace::Workspace};

const EXPLAINED: &str = "docs/operations.md";
const PREFIXES: [&str; 3] = ["slat_", "kvm_", "rpc_"];
/// What a metric's name ends in, or is as a level.
const LABELS: [&str; 3] = ["rpc_method", "rpc_status_code", "rpc_system"];

/// Both directions.
///
/// # Errors
/// When a file cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut exported = BTreeSet::new();
    for path in workspace.files(
        &[
            "agent/daemon/src",
            "agent/vmm/src",
            "server/src",
            "proto/src",
        ],
        &[".rs"],
    )? {
        exported.extend(literals(&without_tests(&workspace.read(path)?)));
    }
    let mut faults = Vec::new();
    let mut used = 0;
    for path in workspace.files(&["deploy", EXPLAINED], &[".yml", ".yaml", ".json", ".md"])? {
        for name in names(&workspace.read(&path)?) {
            used += 1;
            if !exported.contains(&name) && !exported.contains(histogram(&name)) {
                faults.push(format!("{}: nothing exports {name}", path.display()));
            }
        }
    }
    let explained = names(&workspace.read(EXPLAINED)?);
    for name in exported.iter().filter(|name| !explained.contains(*name)) {
        faults.push(format!("{EXPLAINED} does not explain {name}"));
    }
    println!("{} metrics exported, {used} uses", exported.len());
    Ok(Tally::of_faults(&faults))
}

/// The histogram that a derived series belongs to.
fn histogram(name: &str) -> &str {
    ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|suffix| name.strip_suffix(suffix))
        .unwrap_or(name)
}

/// A source up to its test module, which by custom stands last.
fn without_tests(source: &str) -> String {
    source
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn is_metric(word: &str) -> bool {
    PREFIXES
        .iter()
        .any(|prefix| word.len() > prefix.len() && word.starts_with(prefix))
        && !LABELS.contains(&word)
}

/// Metric names that are whole string literals.
fn literals(source: &str) -> BTreeSet<String> {
    let whole = |word: &&str| {
        is_metric(word)
            && word
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    source.split('"').filter(whole).map(str::to_owned).collect()
}

/// Metric names anywhere in a text, comments included: a page that names one promises it. `slat_x:y` is a recording rule's.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let found = text
        .split(|c| !word(c))
        .map(|name| name.trim_end_matches(':'));
    found
        .filter(|name| is_metric(name) && !name.contains(':'))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_where_they_stand() {
        let source = "gauge!(\"slat_vms\", \"state\" => s); \"slat_server=debug\" \"slat_x:\" \"slat_\"\n#[cfg(test)]\nmod tests { \"slat_y\" }";
        let exported = literals(&without_tests(source));
        assert_eq!(exported.into_iter().collect::<Vec<_>>(), ["slat_vms"]);
        let used = names("expr: rate(slat_a_bucket{rpc_method=\"x\"}[5m]) > slat:b # kvm_c_total");
        assert_eq!(
            used.iter().map(String::as_str).collect::<Vec<_>>(),
            ["kvm_c_total", "slat_a_bucket"]
        );
        assert_eq!(histogram("slat_a_bucket"), "slat_a");
    }
}
