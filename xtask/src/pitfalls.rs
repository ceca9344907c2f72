//! `cargo xtask pitfalls`: docs/pitfalls.md against the sources, quickly: each of the sixty is there once, the tests it names
//! exist, and each bug that can be put back is named in its row, with the test that must fail first, and still fits the sources. The same for the models' bugs, which
//! are in a table of docs/proofs.md.

use crate::{
    mutations::{self, Mutation},
    tally::Tally,
    workspace::Workspace,
};

const PAGE: &str = "docs/pitfalls.md";
/// Where the bugs are that the models catch.
const PROOFS: &str = "docs/proofs.md";
/// What the names of their patches begin with.
const MODELS: [&str; 2] = ["loom-", "shuttle-"];
/// How many there are.
const COUNT: u32 = 60;

/// A row of the page.
#[derive(Debug)]
struct Row {
    number: u32,
    /// `path::name` of each test.
    tests: Vec<String>,
    /// The patch that puts the bug back, if there is one.
    mutation: Option<String>,
}

/// The check.
///
/// # Errors
/// When the page or the patches cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let page = workspace.read(PAGE)?;
    let rows: Vec<Row> = page.lines().filter_map(row).collect();
    let mut faults = numbers(&rows);
    let proofs = workspace.read(PROOFS)?;
    let mut tests: Vec<_> = tests_of(&page).into_iter().map(|it| (PAGE, it)).collect();
    tests.extend(tests_of(&proofs).into_iter().map(|it| (PROOFS, it)));
    tests.sort();
    tests.dedup();
    for (page, test) in &tests {
        let (file, name) = test.split_once("::").unwrap_or((test, ""));
        match workspace.read(file) {
            Ok(source) if defines(&source, name) => {}
            Ok(_) => faults.push(format!("{page}: {file} has no test {name}")),
            Err(error) => faults.push(format!("{page}: {error:#}")),
        }
    }
    let mutations = mutations::all(workspace)?;
    for mutation in &mutations {
        let name = &mutation.name;
        match mutation.pitfall {
            Some(number) => {
                let named = |row: &Row| {
                    row.number == number && row.mutation.as_deref() == Some(name.as_str())
                };
                match rows.iter().find(|row| named(row)) {
                    None => faults.push(format!("{PAGE}: row {number} does not name {name}")),
                    Some(row) => faults.extend(other_test(PAGE, mutation, &row.tests)),
                }
            }
            None => match proofs
                .lines()
                .find(|line| patches_of(line).any(|it| it == name))
            {
                None => faults.push(format!("{PROOFS}: no row names {name}")),
                Some(line) => faults.extend(other_test(PROOFS, mutation, &tests_of(line))),
            },
        }
        if let Err(error) = mutations::check(workspace, mutation) {
            faults.push(format!(
                "{} does not apply: {error:#}",
                mutation.path.display()
            ));
        }
    }
    for row in &rows {
        if let Some(name) = &row.mutation
            && !mutations.iter().any(|mutation| mutation.name == *name)
        {
            faults.push(format!("{PAGE}: no patch {name} in {}", mutations::FOLDER));
        }
    }
    for name in patches_of(&proofs) {
        if !mutations.iter().any(|mutation| mutation.name == name) {
            faults.push(format!(
                "{PROOFS}: no patch {name} in {}",
                mutations::FOLDER
            ));
        }
    }
    println!(
        "{} pitfalls, {} tests, {} patches",
        rows.len(),
        tests.len(),
        mutations.len()
    );
    Ok(Tally::of_faults(&faults))
}

/// A fault if the first test of a row is not the one that its patch must make fail.
fn other_test(page: &str, mutation: &Mutation, tests: &[String]) -> Option<String> {
    let named = tests.first().map_or("no test", String::as_str);
    (!mutation.is_caught_at(named)).then(|| {
        let name = &mutation.name;
        format!("{page}: {named} is not the test that {name} says must fail")
    })
}

fn row(line: &str) -> Option<Row> {
    let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
    let number = cells.first()?.parse().ok()?;
    let mutation = cells.get(4)?.trim_matches('`');
    Some(Row {
        number,
        tests: tests_of(cells.get(3)?),
        mutation: (!mutation.is_empty()).then(|| mutation.to_owned()),
    })
}

/// Each patch that the page of the proofs names between backticks.
fn patches_of(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|part| MODELS.iter().any(|start| part.starts_with(start)))
}

/// Each `path.rs::name` between backticks.
fn tests_of(text: &str) -> Vec<String> {
    let quoted = text.split('`').skip(1).step_by(2);
    let test = |part: &&str| part.contains(".rs::") && !part.contains(char::is_whitespace);
    quoted.filter(test).map(str::to_owned).collect()
}

/// Whether a source has a function of this name, with a word before and a bracket behind it.
fn defines(source: &str, name: &str) -> bool {
    let starts = [format!("fn {name}("), format!("fn {name}<")];
    starts.iter().any(|start| source.contains(start.as_str()))
}

/// Numbers that are missing or there twice, and rows that name no test.
fn numbers(rows: &[Row]) -> Vec<String> {
    let mut faults = Vec::new();
    for number in 1..=COUNT {
        match rows.iter().filter(|row| row.number == number).count() {
            1 => {}
            times => faults.push(format!("{PAGE}: pitfall {number} is there {times} times")),
        }
    }
    for row in rows {
        if row.number == 0 || row.number > COUNT {
            faults.push(format!("{PAGE}: there is no pitfall {}", row.number));
        }
        if row.tests.is_empty() {
            faults.push(format!("{PAGE}: pitfall {} names no test", row.number));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_its_tests_and_its_patch() {
        let found = row("| 4 | a | `b` | `x/y.rs::z`, `v.rs::w` | `04-n` |").unwrap();
        assert_eq!((found.number, found.mutation.as_deref()), (4, Some("04-n")));
        assert_eq!(found.tests, ["x/y.rs::z", "v.rs::w"]);
        assert!(
            row("| 5 | a | b | `x.rs::y` | |")
                .unwrap()
                .mutation
                .is_none()
        );
        assert!(row("| # | a | b | c | d |").is_none() && row("text").is_none());
    }

    #[test]
    fn the_models_patches_are_known_by_their_names() {
        let text = "| a `loom-x` | `b.rs::c` | ``` | not loom-y | `shuttle-z` |";
        let text = text.replace("```", "``");
        assert!(patches_of(&text).eq(["loom-x", "shuttle-z"]));
    }

    #[test]
    fn every_number_once_and_never_without_a_test() {
        let rows: Vec<Row> = (1..=COUNT)
            .filter(|number| *number != 7)
            .chain([9])
            .filter_map(|number| row(&format!("| {number} | a | b | `x.rs::y` | |")))
            .collect();
        let faults = numbers(&rows);
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].contains("pitfall 7 is there 0") && faults[1].contains("pitfall 9"));
        assert_eq!(
            numbers(&[row("| 61 | a | b | none | |").unwrap()]).len() as u32,
            COUNT + 2
        );
    }

    #[test]
    fn a_test_is_a_function_of_that_name() {
        assert!(defines("#[test]\nfn a_b() {}", "a_b") && defines("fn a<T>() {}", "a"));
        assert!(!defines("fn a_bc() {}", "a_b"));
    }
}
