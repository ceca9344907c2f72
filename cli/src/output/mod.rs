//! How answers are printed, once for all commands: a [`Resource`] says its name, its columns and
//! its page, and every format follows from that. JSON and YAML are the API's messages as canonical
//! proto JSON, whatever the columns show.
//!
//! * [`columns`] is a table as a list of functions, and the order of its rows.
//! * [`resource`] prints lists, single resources and streams of changes.

mod columns;
mod resource;

use serde_json::Value;

pub(crate) use columns::{Column, SortBy};
pub(crate) use resource::{Changes, ListStyle, Resource, cells, heads, list, one};

use crate::{failure::Failure, term::out};

/// How a client command prints its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people; its layout may change
    #[default]
    Table,
    /// As table, with more columns
    Wide,
    /// For programs: the API's messages as canonical proto JSON
    Json,
    /// The same as YAML
    Yaml,
    /// Resource names, one a line: vms/web
    Name,
}

impl Format {
    /// Whether programs read it: then messages on standard error are JSON.
    pub(crate) fn is_for_programs(self) -> bool {
        matches!(self, Self::Json | Self::Yaml)
    }
}

/// One answer: `value` for programs, `name` under `-o name`, else `text`.
pub(crate) fn answer(
    format: Format,
    value: impl FnOnce() -> Value,
    name: &str,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    match format {
        Format::Json => out::json(&format!("{:#}", value())),
        Format::Yaml => out::line(yaml(&value())?),
        Format::Name => out::line(name),
        Format::Table | Format::Wide => out::line(text()),
    }
}

/// One element of a stream for programs: JSON on a line of its own, YAML as a document.
pub(crate) fn element(format: Format, value: &Value) -> Result<(), Failure> {
    match format {
        Format::Yaml => out::line(format!("---\n{}", yaml(value)?)),
        _ => out::json(&value.to_string()),
    }
}

fn yaml(value: &Value) -> Result<String, Failure> {
    serde_saphyr::to_string(value)
        .map(|text| text.trim_end().to_owned())
        .map_err(|error| Failure::local(format!("the answer makes no YAML: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_keeps_the_types_of_json() {
        let value = json!({
            "name": "vms/web", "epoch": "7", "text": "yes", "more": "a: b\nc", "none": "",
            "stale": false, "vcpus": 2, "vms": [], "list": [{"a": "1"}],
        });
        let text = yaml(&value).unwrap();
        let quoted = |key: &str, word: &str| {
            [format!("{key}: \"{word}\""), format!("{key}: '{word}'")]
                .iter()
                .any(|line| text.contains(line.as_str()))
        };
        assert!(text.contains("name: vms/web"), "{text}");
        assert!(
            quoted("epoch", "7"),
            "a string of digits stays a string: {text}"
        );
        assert!(quoted("text", "yes"), "{text}");
        assert!(
            text.contains("stale: false") && text.contains("vcpus: 2"),
            "{text}"
        );
        assert!(text.contains("vms: []"), "{text}");
    }
}
