//! The file of users (`--access`): who may do what, and with which VMs.
//!
//! Somebody may be writing it while it is read, and a part of it may be a good file that gives more
//! than was meant: `role: operator` without the limits that were to follow. So a content is taken
//! only when two looks some time apart find it, and whoever is limited by nothing must be said to
//! be (`vms: all`). What cannot be used leaves in force what was read before.
//!
//! Metric: `slat_access_file_ok`.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use metrics::gauge;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use slat_proto::{
    model::Labels,
    transport::{Access, Permit, Scope, Users},
};
use slat_trust::read_file;

/// Whether the file is in force as it is.
pub(super) const OK: &str = "slat_access_file_ok";
/// A file of users is no larger.
const LARGEST: u64 = 1 << 20;
/// Between two looks at the start, and how many there are at most.
const APART: Duration = Duration::from_millis(100);
const LOOKS: usize = 10;
/// After so many looks in a row that each found something else, that is said.
const RESTLESS: u32 = 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    users: BTreeMap<String, User>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    role: String,
    #[serde(default, deserialize_with = "limit")]
    vms: Option<Limit>,
    #[serde(default, deserialize_with = "limit")]
    hosts: Option<Limit>,
}

/// What a user is limited to.
enum Limit {
    All,
    Labels(BTreeMap<String, String>),
}

/// A limit that is there: nothing after its colon is none.
fn limit<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Limit>, D::Error> {
    struct Reads;
    impl<'de> Visitor<'de> for Reads {
        type Value = Limit;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("all, or labels as {team: web}")
        }

        fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Limit, E> {
            match word {
                "all" => Ok(Limit::All),
                other => Err(E::invalid_value(serde::de::Unexpected::Str(other), &self)),
            }
        }

        fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Limit, M::Error> {
            BTreeMap::deserialize(MapAccessDeserializer::new(map)).map(Limit::Labels)
        }
    }
    value.deserialize_any(Reads).map(Some)
}

/// The labels of one limit of a user.
fn labels(name: &str, field: &str, limit: Option<Limit>) -> Result<Labels, String> {
    match limit {
        None | Some(Limit::All) => Ok(Labels::default()),
        Some(Limit::Labels(labels)) if labels.is_empty() => Err(format!(
            "{name}: {field} has no labels, which would be no limit: write {field}: all if that is \
             meant"
        )),
        Some(Limit::Labels(labels)) => Labels::from_field(field, &labels.into_iter().collect())
            .map_err(|error| format!("{name}: {}", error.message)),
    }
}

fn permit((name, user): (String, User)) -> Result<(String, Permit), String> {
    let role = user
        .role
        .parse()
        .map_err(|error: slat_proto::ApiError| format!("{name}: {}", error.message))?;
    if user.vms.is_none() && user.hosts.is_none() {
        return Err(format!(
            "{name}: nothing says which VMs: write vms: all, or the labels of some, as \
             vms: {{team: web}}"
        ));
    }
    let scope = Scope {
        vms: labels(&name, "vms", user.vms)?,
        hosts: labels(&name, "hosts", user.hosts)?,
    };
    let role = Some(role);
    Ok((name, Permit { role, scope }))
}

/// The users that a file's content names.
fn users(content: &[u8]) -> Result<Users, String> {
    let text = std::str::from_utf8(content).map_err(|_| "it is no text".to_owned())?;
    let document: Document = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    document.users.into_iter().map(permit).collect()
}

/// A file's content, or why there is none.
type Content = Result<Vec<u8>, String>;

fn read(path: &Path) -> Content {
    read_file(path, LARGEST).map_err(|error| error.to_string())
}

/// The file, and what it says in force.
#[derive(Clone, Debug)]
pub(super) struct AccessFile {
    path: PathBuf,
    access: Access,
    /// In force.
    users: Users,
    /// What the last look found.
    last: Content,
    /// What was found twice, and judged.
    judged: Content,
    /// Whether that is in force.
    is_good: bool,
    /// Looks in a row that each found something else.
    restless: u32,
}

impl AccessFile {
    /// Reads it for the first time. Takes a tenth of a second or, while somebody writes, a second.
    pub(super) fn open(path: PathBuf, access: Access) -> Result<Self, String> {
        let mut last = read(&path);
        for _ in 1..LOOKS {
            std::thread::sleep(APART);
            let again = read(&path);
            if again == last {
                let users = users(&again.clone()?)?;
                access.set_users(users.clone());
                return Ok(Self {
                    path,
                    access,
                    users,
                    last,
                    judged: again,
                    is_good: true,
                    restless: 0,
                });
            }
            last = again;
        }
        Err("it changes while it is read".to_owned())
    }

    /// Looks again; to be called some time after the last look.
    pub(super) fn look(&mut self) {
        let now = read(&self.path);
        if now != self.last {
            self.last = now;
            self.restless = self.restless.saturating_add(1);
            if self.restless == RESTLESS {
                self.bad("it changes each time that it is read");
            }
        } else if now != self.judged || self.restless >= RESTLESS {
            self.restless = 0;
            self.judge(&now);
            self.judged = now;
        } else {
            self.restless = 0;
        }
        gauge!(OK).set(if self.is_good { 1.0 } else { 0.0 });
    }

    fn judge(&mut self, content: &Content) {
        let read = content.clone().and_then(|content| users(&content));
        match read {
            Ok(users) => {
                self.is_good = true;
                self.access.set_users(users.clone());
                self.users = users;
                tracing::info!(file = %self.path.display(), "which users may do what was read");
            }
            Err(why) => self.bad(&why),
        }
    }

    fn bad(&mut self, why: &str) {
        self.is_good = false;
        tracing::error!(file = %self.path.display(), %why, "the file of users cannot be used; what it said before holds");
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::transport::Role;

    use super::*;

    const LIMITED: &str = "users:\n  bob:\n    role: operator\n    vms:\n      team: web\n";

    fn said(text: &str) -> Result<Users, String> {
        users(text.as_bytes())
    }

    fn one(name: &str, role: Role, vms: &str) -> Users {
        let vms = vms.parse().unwrap();
        let scope = Scope {
            vms,
            ..Default::default()
        };
        let role = Some(role);
        std::iter::once((name.to_owned(), Permit { role, scope })).collect()
    }

    #[test]
    fn a_file_of_users_says_who_may_do_what() {
        let text =
            "users:\n  alice: {role: admin, vms: all}\n  bob: {role: operator, vms: {team: web}}\n";
        let scope = Scope {
            vms: "team=web".parse().unwrap(),
            ..Default::default()
        };
        let bob = Permit {
            role: Some(Role::Operator),
            scope,
        };
        let expected: Users = [
            ("alice".to_owned(), Permit::of(Role::Admin)),
            ("bob".to_owned(), bob),
        ]
        .into_iter()
        .collect();
        assert_eq!(said(text).unwrap(), expected);
        let text = "users: {bob: {role: operator, vms: all, hosts: all}}";
        assert_eq!(said(text).unwrap(), one("bob", Role::Operator, ""));
        said("users: {a: {role: viewer, hosts: {rack: r1}}}").unwrap();
        // A label's value may look like a number.
        said("users: {a: {role: viewer, vms: {tier: 1}}}").unwrap();
    }

    #[test]
    fn what_cannot_be_understood_is_refused_whole() {
        for text in [
            "users: {a: {role: king, vms: all}}",
            "users: {a: {role: agent, vms: all}}",
            "users: {a: {vms: all}}",
            "users: {a: {role: admin, vms: all, vm: {team: web}}}",
            "user: {a: {role: admin, vms: all}}",
            "users: {a: {role: viewer, vms: {Team: web}}}",
            "users: {a: {role: viewer, vms: some}}",
            "users: {a: {role: viewer, vms: }}",
            "users: {a: {role: viewer, vms: [team]}}",
            "users: {a: {role: viewer, vms: all, hosts: }}",
            "[",
        ] {
            assert!(said(text).is_err(), "{text}");
        }
    }

    #[test]
    fn who_is_limited_by_nothing_must_be_said_to_be() {
        for role in ["viewer", "operator", "admin"] {
            let why = said(&format!("users: {{bob: {{role: {role}}}}}")).unwrap_err();
            assert!(why.contains("bob") && why.contains("vms: all"), "{why}");
        }
        for field in ["vms", "hosts"] {
            let why = said(&format!("users: {{bob: {{role: viewer, {field}: {{}}}}}}"));
            let why = why.unwrap_err();
            assert!(why.contains(&format!("{field}: all")), "{why}");
        }
        // However much of it was written, nobody gets more than it says.
        for length in 0..=LIMITED.len() {
            if let Ok(users) = said(&LIMITED[..length]) {
                assert_ne!(users, one("bob", Role::Operator, ""), "{length}");
            }
        }
    }

    /// As they are written there.
    #[test]
    fn the_examples_of_the_docs_are_files_of_users() {
        for page in ["docs/access.md", "deploy/README.md"] {
            let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            let text = std::fs::read_to_string(workspace.join(page)).unwrap();
            let blocks = text.split("```yaml\n").skip(1);
            let blocks = blocks.filter_map(|block| block.split("```").next());
            let examples: Vec<&str> = blocks.filter(|block| block.contains("users:")).collect();
            assert!(!examples.is_empty(), "{page}");
            for example in examples {
                said(example).unwrap();
            }
        }
    }

    struct Rig {
        dir: slat_test_dir::TestDir,
        file: AccessFile,
    }

    impl Rig {
        fn new() -> Self {
            let dir = slat_test_dir::TestDir::new();
            let path = dir.path().join("access.yaml");
            std::fs::write(&path, LIMITED).unwrap();
            let file = AccessFile::open(path, Access::default()).unwrap();
            Self { dir, file }
        }

        fn write(&self, text: &str) {
            std::fs::write(&self.file.path, text).unwrap();
        }

        /// What two looks make of it.
        fn settle(&mut self, text: &str) {
            self.write(text);
            self.file.look();
            self.file.look();
        }

        fn permits(&self, users: &Users) -> bool {
            self.file.users == *users
        }
    }

    /// The first half of a file is a file.
    #[test]
    fn half_a_file_is_not_taken() {
        let mut rig = Rig::new();
        let limited = one("bob", Role::Operator, "team=web");
        let narrower = format!("{LIMITED}      tier: prod\n");
        rig.settle(&narrower);
        let narrow = one("bob", Role::Operator, "team=web,tier=prod");
        assert!(rig.permits(&narrow));
        // Truncated and half written when it is looked at, whole a second later.
        rig.write(LIMITED);
        rig.file.look();
        assert!(rig.permits(&narrow));
        rig.settle(&narrower);
        assert!(rig.permits(&narrow) && rig.file.is_good);
        rig.settle(LIMITED);
        assert!(rig.permits(&limited));
    }

    #[test]
    fn what_cannot_be_used_leaves_the_old_in_force() {
        let mut rig = Rig::new();
        let limited = one("bob", Role::Operator, "team=web");
        rig.write("users: {bob: {role: operator}}");
        rig.file.look();
        assert!(rig.file.is_good, "not before the second look");
        rig.file.look();
        assert!(!rig.file.is_good && rig.permits(&limited));
        rig.settle(LIMITED);
        assert!(rig.file.is_good);
        for nth in 0..RESTLESS {
            rig.write(&format!("# {nth}\n{LIMITED}"));
            rig.file.look();
        }
        assert!(!rig.file.is_good && rig.permits(&limited));
        rig.settle(LIMITED);
        assert!(rig.file.is_good);
        let none = AccessFile::open(rig.dir.path().join("none"), Access::default());
        assert!(none.unwrap_err().contains("missing"));
    }

    /// A look that waits for whoever opens the pipe's other end would be the last one.
    #[test]
    fn a_pipe_is_not_waited_for() {
        let mut rig = Rig::new();
        std::fs::remove_file(&rig.file.path).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(&rig.file.path)
            .status();
        if !made.is_ok_and(|made| made.success()) {
            println!("SKIPPED: no mkfifo here");
            return;
        }
        let (says, said) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            rig.file.look();
            rig.file.look();
            says.send((rig.file.is_good, rig.dir)).unwrap();
        });
        let (is_good, _) = said.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(!is_good);
    }
}
