//! What lies on hosts and is no VM of the fleet: what the server knows of it beyond its host, and
//! so what adopting or deleting it gives up.
//!
//! An agent sees its own host only. Whether the VM lives elsewhere, or could live on a host that
//! does not answer, is for the server to say: a leftover whose VM lives on is not adopted, and one
//! whose VM could is adopted only by who gives that other VM up. What its agent takes for a VM may
//! be a leftover, too: see [`super::superseded`].

use std::time::Instant;

use slat_proto::{ApiError, Reason, v1};

use super::{
    errors::no_such_host,
    rank::{Seen, lives},
    shared::Fleet,
    table::{HostEntry, Table},
};

/// How a leftover can be ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending {
    /// Above every epoch ever seen of the uid.
    pub(crate) epoch: u64,
    /// What adopting gives up; empty when nothing.
    pub(crate) adopt_gives_up: String,
    /// What deleting gives up; empty when nothing, `None` when only the agent knows.
    pub(crate) delete_gives_up: Option<String>,
    /// Where the VM lives, on a host that answers: no reason to adopt this.
    pub(crate) lives_on: Option<String>,
    /// Its agent has it as a VM, which was taken over elsewhere.
    pub(crate) superseded: bool,
}

fn join(parts: &[&str]) -> String {
    let parts: Vec<&str> = parts
        .iter()
        .copied()
        .filter(|part| !part.is_empty())
        .collect();
    parts.join("; ")
}

impl Table {
    /// What is known of a uid beyond `host`.
    fn ending(&self, host: &str, uid: &str, at: Instant) -> Ending {
        let left = |entry: &HostEntry| -> Option<v1::Leftover> {
            entry.leftovers.iter().find(|left| left.uid == uid).cloned()
        };
        let of_leftovers = self.hosts.values().filter_map(left).map(|left| left.epoch);
        let here = self.hosts.get(host);
        let superseded = here.and_then(|entry| {
            let mut those = entry.superseded.list(&entry.records, &self.epochs);
            those.find(|left| left.uid == uid)
        });
        let is_superseded = superseded.is_some();
        let found = superseded.or_else(|| here.and_then(left));
        let highest = of_leftovers.max().unwrap_or(0).max(self.epochs.of(uid));
        let epoch = highest.saturating_add(1);
        let living = self.hosts.values().filter(|entry| entry.host.name != host);
        let living = living.filter_map(|entry| {
            let vm = entry.records.get(uid)?;
            let ready = self.is_ready(entry, at);
            (lives(vm) && !self.epochs.undercut(vm)).then_some(Seen { vm, ready })
        });
        let living = living.reduce(|a, b| if b.outranks(&a) { b } else { a });
        let lives_on = living
            .filter(|seen| seen.ready)
            .map(|seen| seen.vm.host.clone());
        let mut silent = self.silent(at);
        silent.retain(|other| other != host);
        let unsure = if lives_on.is_some() || silent.is_empty() {
            String::new()
        } else {
            format!(
                "{} cannot be asked and may have the VM: if it runs there, it runs twice",
                silent.join(", ")
            )
        };
        let agents = found.as_ref().map_or("", |left| &left.adopt_gives_up);
        Ending {
            epoch,
            adopt_gives_up: join(&[agents, &unsure]),
            // Nothing is lost of a VM that lives, unless it lives here as well.
            delete_gives_up: if lives_on.is_some() && !is_superseded {
                Some(String::new())
            } else {
                found.map(|left| left.delete_gives_up)
            },
            lives_on,
            superseded: is_superseded,
        }
    }
}

impl Fleet {
    /// How a leftover can be ended.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_UNREACHABLE.
    pub(crate) fn ending(&self, host: &str, uid: &str) -> Result<Ending, ApiError> {
        self.ready_host(host)?;
        Ok(self.table().ending(host, uid, Instant::now()))
    }

    /// Leftovers as the agents reported them last, with what the server knows: by host, then uid.
    ///
    /// # Errors
    /// NO_SUCH_HOST.
    pub(crate) fn leftovers(&self, host: Option<&str>) -> Result<Vec<v1::Leftover>, ApiError> {
        let at = Instant::now();
        let table = self.table();
        if let Some(host) = host
            && !table.hosts.contains_key(host)
        {
            return Err(no_such_host(host));
        }
        let wanted = |name: &str| host.is_none_or(|host| host == name);
        let entries = table.hosts.iter().filter(|(name, _)| wanted(name));
        let mut found = Vec::new();
        for (name, entry) in entries {
            let superseded = entry.superseded.list(&entry.records, &table.epochs);
            for mut left in entry.leftovers.iter().cloned().chain(superseded) {
                let ending = table.ending(name, &left.uid, at);
                left.adopt_gives_up = ending.adopt_gives_up;
                if let Some(words) = ending.delete_gives_up {
                    left.delete_gives_up = words;
                }
                if let Some(home) = ending.lives_on {
                    left.adoptable = false;
                    left.message = join(&[&left.message, &format!("its VM lives on {home}")]);
                }
                if !left.adoptable {
                    left.adopt_gives_up.clear();
                }
                found.push(left);
            }
        }
        found.sort_by(|a, b| (&a.host, &a.uid).cmp(&(&b.host, &b.uid)));
        Ok(found)
    }
}

impl Fleet {
    /// What an agent just answered.
    pub(crate) fn note_leftovers(&self, host: &str, leftovers: Vec<v1::Leftover>) {
        if let Some(entry) = self.table().hosts.get_mut(host) {
            entry.keep_leftovers(leftovers);
        }
    }

    /// A leftover that its agent just ended.
    pub(crate) fn forget_leftover(&self, host: &str, uid: &str) {
        if let Some(entry) = self.table().hosts.get_mut(host) {
            entry.leftovers.retain(|left| left.uid != uid);
            entry.superseded.forget(uid);
        }
    }
}

/// The refusal of adopting what is left of a VM that lives.
pub(crate) fn lives_elsewhere(uid: &str, left_on: &str, home: &str) -> ApiError {
    ApiError::new(
        Reason::VmExists,
        format!("the VM with uid {uid} lives on {home}: what is on {left_on} is only left of it"),
    )
    .with("uid", uid)
    .with("host", home)
    .with("advice", "delete the leftover instead")
}

/// The refusal of adopting a VM that was taken over elsewhere and does not live there.
pub(crate) fn taken_over(uid: &str, host: &str) -> ApiError {
    ApiError::new(
        Reason::VmState,
        format!("the VM with uid {uid} was taken over from {host} at a newer epoch: it is not taken back here"),
    )
    .with("uid", uid)
    .with("host", host)
    .with("advice", "delete the leftover; a VM that is to live on is taken from where it was last")
}

/// The refusal of an order that does not say what it gives up.
pub(crate) fn give_up_required(uid: &str, host: &str, gives_up: &str) -> ApiError {
    ApiError::new(
        Reason::GiveUpRequired,
        format!("this gives something up: {gives_up}"),
    )
    .with("uid", uid)
    .with("host", host)
    .with("gives_up", gives_up)
    .with("advice", "repeat it with --give-up if you accept that")
}
