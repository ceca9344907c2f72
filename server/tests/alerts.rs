//! The alert rules that come with Slat: each names only metrics that the operations page explains,
//! and what an operator must be told has its alert.

use std::{collections::BTreeSet, fs, path::Path};

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_to_string(root.join(path)).unwrap()
}

/// Words of a text that look like Slat's metrics, without the parts of a histogram.
fn metrics(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| word.starts_with("slat_"))
        .map(|word| word.trim_end_matches("_bucket"))
        .collect()
}

#[test]
fn rules_name_metrics_that_are_explained() {
    let (rules, page) = (
        read("deploy/prometheus/slat.rules.yml"),
        read("docs/operations.md"),
    );
    let expressions: String = rules
        .lines()
        .filter(|line| !line.trim_start().starts_with(['#', 's']))
        .flat_map(|line| [line, "\n"])
        .collect();
    let named = metrics(&expressions);
    assert!(named.len() > 10, "{named:?}");
    for metric in named {
        assert!(page.contains(&format!("| `{metric}` |")), "{metric}");
    }
}

#[test]
fn names_that_collide_have_an_alert() {
    let rules = read("deploy/prometheus/slat.rules.yml");
    let (_, rule) = rules.split_once("- alert: SlatVmNameConflict\n").unwrap();
    let expression = rule.lines().next().unwrap().trim();
    assert_eq!(expression, "expr: slat_vm_name_conflicts > 0");
}

#[test]
fn guests_that_wait_for_pages_and_pagers_that_die_have_alerts() {
    let rules = read("deploy/prometheus/slat.rules.yml");
    for (alert, metrics) in [
        (
            "SlatVmWaitsForPages",
            &["slat_vm_paging_up == 0", "slat_vm_pager_faults_waiting"][..],
        ),
        ("SlatPagersDie", &["increase(slat_pager_restarts_total["]),
    ] {
        let (_, rule) = rules.split_once(&format!("- alert: {alert}\n")).unwrap();
        let (expression, _) = rule.split_once("labels:").unwrap();
        for metric in metrics {
            assert!(expression.contains(metric), "{expression}");
        }
    }
}
