//! Families of samples in the making, and their text as Prometheus reads it.
//!
//! Samples of one family stay together whatever order they come in; a family without samples is
//! left out.

use std::{collections::BTreeMap, fmt::Write as _};

#[derive(Clone, Copy)]
pub(super) enum Kind {
    Counter,
    Gauge,
}

/// Families in the making; samples of one stay together whatever order they come in.
#[derive(Default)]
pub(super) struct Families(BTreeMap<&'static str, Family>);

struct Family {
    help: &'static str,
    kind: Kind,
    samples: String,
}

impl Families {
    pub(super) fn add(
        &mut self,
        name: &'static str,
        kind: Kind,
        help: &'static str,
        labels: &[(&str, &str)],
        value: impl std::fmt::Display,
    ) {
        let family = self.0.entry(name).or_insert_with(|| Family {
            help,
            kind,
            samples: String::new(),
        });
        let samples = &mut family.samples;
        samples.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            samples.push(if index == 0 { '{' } else { ',' });
            samples.push_str(label);
            samples.push_str("=\"");
            for c in text.chars() {
                match c {
                    '\\' => samples.push_str("\\\\"),
                    '"' => samples.push_str("\\\""),
                    '\n' => samples.push_str("\\n"),
                    c => samples.push(c),
                }
            }
            samples.push('"');
        }
        if !labels.is_empty() {
            samples.push('}');
        }
        // Writing to a String does not fail.
        let _ = writeln!(samples, " {value}");
    }

    pub(super) fn counter(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
        value: Option<u64>,
    ) {
        if let Some(value) = value {
            self.add(name, Kind::Counter, help, labels, value);
        }
    }

    pub(super) fn gauge(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
        value: Option<u64>,
    ) {
        if let Some(value) = value {
            self.add(name, Kind::Gauge, help, labels, value);
        }
    }

    pub(super) fn render(self) -> String {
        let mut text = String::new();
        for (name, family) in self.0 {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
            };
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
            text.push_str(&family.samples);
        }
        text
    }
}
