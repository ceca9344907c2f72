//! The parts of deny.toml that can be judged without cargo-deny and its advisory database: banned
//! crates and sources against Cargo.lock (so for every platform, not this one alone), licences
//! against cargo's metadata.

use anyhow::{Context as _, anyhow};
use toml_edit::{DocumentMut, Item, Value};

use crate::{
    example, licence,
    tally::Tally,
    workspace::{Package, Workspace},
};

/// A banned crate.
#[derive(Debug, PartialEq, Eq)]
struct Ban {
    name: String,
    reason: String,
}

/// What deny.toml demands.
#[derive(Debug)]
struct Policy {
    bans: Vec<Ban>,
    licences: Vec<String>,
    registries: Vec<String>,
}

fn strings(item: Option<&Item>, what: &str) -> anyhow::Result<Vec<String>> {
    let array = item
        .and_then(Item::as_array)
        .ok_or_else(|| anyhow!("deny.toml has no list {what}"))?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    array
        .iter()
        .map(|value| text(value).ok_or_else(|| anyhow!("{what}: not a string")))
        .collect()
}

impl Policy {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let document: DocumentMut = text.parse().context("deny.toml")?;
        let section =
            |section: &str, key: &str| document.get(section).and_then(|table| table.get(key));
        let bans = section("bans", "deny")
            .and_then(Item::as_array)
            .ok_or_else(|| anyhow!("deny.toml bans nothing"))?;
        let mut policy = Self {
            bans: Vec::new(),
            licences: strings(section("licenses", "allow"), "licenses.allow")?,
            registries: strings(
                section("sources", "allow-registry"),
                "sources.allow-registry",
            )?,
        };
        for ban in bans {
            let field = |key: &str| {
                let value = ban.as_inline_table().and_then(|table| table.get(key));
                value
                    .and_then(Value::as_str)
                    .filter(|text| !text.is_empty())
                    .map(str::to_owned)
            };
            policy.bans.push(Ban {
                name: field("crate")
                    .ok_or_else(|| anyhow!("bans.deny: an entry without a crate"))?,
                reason: field("reason")
                    .ok_or_else(|| anyhow!("bans.deny: an entry without a reason"))?,
            });
        }
        Ok(policy)
    }

    /// Faults of one locked package: its name and the place it comes from (`None`: this workspace).
    fn judge_locked(&self, name: &str, source: Option<&str>) -> Vec<String> {
        let mut faults = Vec::new();
        for ban in self.bans.iter().filter(|ban| ban.name == name) {
            faults.push(format!("{name} is banned: {}", ban.reason));
        }
        if let Some(source) = source {
            let known = source
                .strip_prefix("registry+")
                .is_some_and(|url| self.registries.iter().any(|known| known == url));
            if !known {
                faults.push(format!(
                    "{name} comes from {source}, which deny.toml does not allow"
                ));
            }
        }
        faults
    }

    fn judge_licence(&self, package: &Package) -> Option<String> {
        let Some(licence) = &package.license else {
            return Some(format!(
                "{} {} names no licence",
                package.name, package.version
            ));
        };
        let allowed = |name: &str| self.licences.iter().any(|known| known == name);
        (!licence::satisfied(licence, &allowed)).then(|| {
            format!(
                "{} {}: licence {licence} is not allowed",
                package.name, package.version
            )
        })
    }
}

/// Packages that a lock file holds and ours does not, with their versions.
fn unknown(ours: &DocumentMut, other: &DocumentMut) -> Vec<(String, String)> {
    let packages = |lock: &DocumentMut| -> Vec<(String, String)> {
        let tables = lock.get("package").and_then(Item::as_array_of_tables);
        let text = |table: &toml_edit::Table, key: &str| {
            let text = table.get(key).and_then(Item::as_str);
            text.unwrap_or_default().to_owned()
        };
        tables
            .into_iter()
            .flatten()
            .map(|table| (text(table, "name"), text(table, "version")))
            .collect()
    };
    let known = packages(ours);
    let mut found = packages(other);
    found.retain(|package| !known.contains(package));
    found
}

/// Judges what the workspace is built from.
///
/// # Errors
/// When deny.toml or Cargo.lock cannot be read.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let policy = Policy::parse(&workspace.read("deny.toml")?)?;
    let lock: DocumentMut = workspace
        .read("Cargo.lock")?
        .parse()
        .context("Cargo.lock")?;
    let locked = lock
        .get("package")
        .and_then(Item::as_array_of_tables)
        .ok_or_else(|| anyhow!("Cargo.lock locks nothing"))?;
    let mut faults = Vec::new();
    for package in locked {
        let text = |key: &str| package.get(key).and_then(Item::as_str);
        faults.extend(policy.judge_locked(text("name").unwrap_or_default(), text("source")));
    }
    // What the example locks is judged with it, if it is the same.
    let bare: DocumentMut = workspace
        .read(example::LOCK)?
        .parse()
        .context(example::LOCK)?;
    faults.extend(
        unknown(&lock, &bare)
            .into_iter()
            .filter(|(name, _)| name != example::NAME)
            .map(|(name, version)| {
                format!("{}: {name} {version} is not in Cargo.lock", example::LOCK)
            }),
    );
    let metadata = workspace.metadata()?;
    faults.extend(
        metadata
            .packages
            .iter()
            .filter_map(|package| policy.judge_licence(package)),
    );
    println!(
        "{} locked packages against {} bans and {} registries, {} licences of this platform against {}; advisories: run cargo-deny",
        locked.len(),
        policy.bans.len(),
        policy.registries.len(),
        metadata.packages.len(),
        policy.licences.len(),
    );
    Ok(Tally::of_faults(&faults))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_lock_file_may_hold_nothing_else() {
        let lock = |text: &str| text.parse::<DocumentMut>().unwrap();
        let one = "[[package]]\nname = \"spin\"\nversion = \"0.10.0\"\n";
        let two = "[[package]]\nname = \"spin\"\nversion = \"0.9.0\"\n";
        let both = lock(&format!("{one}{two}"));
        assert!(unknown(&both, &lock(one)).is_empty());
        assert_eq!(
            unknown(&lock(one), &both),
            [("spin".to_owned(), "0.9.0".to_owned())]
        );
    }

    const TEXT: &str = r#"
        [bans]
        deny = [{ crate = "openssl", reason = "C" }]
        [licenses]
        allow = ["MIT"]
        [sources]
        allow-registry = ["https://index.example/"]
    "#;

    #[test]
    fn bans_sources_and_licences_are_judged() {
        let policy = Policy::parse(TEXT).unwrap();
        assert_eq!(
            policy.judge_locked("openssl", None),
            ["openssl is banned: C"]
        );
        assert!(
            policy
                .judge_locked("serde", Some("registry+https://index.example/"))
                .is_empty()
        );
        assert_eq!(
            policy
                .judge_locked("serde", Some("git+https://index.example/"))
                .len(),
            1
        );
        let package = |license: Option<&str>| Package {
            id: String::new(),
            name: "a".into(),
            version: "1.0.0".into(),
            source: None,
            license: license.map(str::to_owned),
            dependencies: Vec::new(),
        };
        assert_eq!(policy.judge_licence(&package(Some("MIT"))), None);
        assert!(policy.judge_licence(&package(Some("GPL-3.0"))).is_some());
        assert!(policy.judge_licence(&package(None)).is_some());
    }

    #[test]
    fn a_ban_needs_its_reason() {
        assert!(Policy::parse(&TEXT.replace("\"C\"", "\"\"")).is_err());
        assert!(Policy::parse(&TEXT.replace(", reason = \"C\"", "")).is_err());
    }
}
