//! What figures of every benchmark have in common: a median with its spread, the machine they were
//! made on, and a table's place in `docs/benchmarks.md`.

use std::{fs, path::Path};

use anyhow::{Context as _, ensure};

/// Least, median and greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Spread {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 || values.is_empty() {
            at(middle)
        } else {
            f64::midpoint(at(middle - 1), at(middle))
        };
        Self {
            min: at(0),
            median,
            max: at(values.len().saturating_sub(1)),
        }
    }

    pub(super) fn show(self, scale: f64, digits: usize) -> String {
        format!(
            "{:.digits$} ({:.digits$}–{:.digits$})",
            self.median * scale,
            self.min * scale,
            self.max * scale
        )
    }
}

/// The lines that a benchmark's table stands between.
fn markers(bench: &str) -> [String; 2] {
    ["begin", "end"].map(|at| format!("<!-- cargo xtask bench {bench} --update-docs: {at} -->"))
}

/// Puts a table between the two marker lines of a page.
///
/// # Errors
/// When the page lacks the markers or cannot be written.
pub fn put_table(page: &Path, bench: &str, table: &str) -> anyhow::Result<()> {
    let shown = || page.display().to_string();
    let old = fs::read_to_string(page).with_context(shown)?;
    let new = replace(&old, bench, table).with_context(shown)?;
    fs::write(page, new).with_context(shown)
}

fn replace(page: &str, bench: &str, table: &str) -> anyhow::Result<String> {
    let [first, last] = markers(bench);
    let begin = page.find(&first).context("no line that begins the table")? + first.len();
    let end = page.find(&last).context("no line that ends the table")?;
    ensure!(begin <= end, "the table ends before it begins");
    Ok(format!("{}\n\n{table}\n{}", &page[..begin], &page[end..]))
}

/// What the figures were made on, for the line below a table.
#[must_use]
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{cores} cores, Linux {}, load average {}",
        rustix::system::uname().release().to_string_lossy(),
        load_average()
    )
}

/// Of the last minute; the benchmark's own work is in it.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_ignore_the_order() {
        let even = Spread::of([4.0, 1.0, 2.0, 3.0].into_iter());
        assert_eq!(
            even,
            Spread {
                min: 1.0,
                median: 2.5,
                max: 4.0
            }
        );
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let [begin, end] = markers("migration");
        let [other, its_end] = markers("kvm");
        let page = format!("before\n{begin}\nold\n{end}\nafter\n{other}\nkept\n{its_end}\n");
        let once = replace(&page, "migration", "new\n").unwrap();
        assert!(
            once.starts_with("before\n") && once.ends_with(&page[page.find("\nafter").unwrap()..])
        );
        assert!(once.contains("new") && !once.contains("old"));
        assert_eq!(replace(&once, "migration", "new\n").unwrap(), once);
        assert!(replace("nothing", "migration", "new").is_err());
    }
}
