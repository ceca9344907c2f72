//! Whose a directory is, and which agent this is: what keeps its meaning over restarts.

use std::{fs::File, io, io::Write as _, path::Path};

use prost::Message as _;
use slat_proto::{model::VmName, v1};
use slat_record::{dir::VmDir, journal::Journal, uid::VmUid};

/// Whose a directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Who {
    /// The VM's identity; while it is not certain, the directory's name in its place.
    pub(super) uid: VmUid,
    /// The VM's name, a label; while nothing says it, the directory's name.
    pub(super) name: VmName,
    /// Whether journal or cache say the uid.
    pub(super) certain: bool,
}

impl Who {
    /// From what is in a directory: its journal, else the VM as last seen, else the directory's own
    /// name. `None` for a directory that can be no VM's.
    pub(super) fn of(dir: &VmDir) -> Option<Self> {
        let folder = dir.path().file_name().and_then(|name| name.to_str())?;
        let said = match Journal::read(&dir.journal()) {
            Ok(Some(state)) => Some((state.uid, VmName::from_id(&state.vm).ok())),
            _ => load_seen(dir).map(|vm| (vm.uid, VmName::parse(&vm.name).ok())),
        };
        let (uid, name) = said.map_or((None, None), |(uid, name)| (VmUid::parse(&uid).ok(), name));
        let certain = uid.is_some();
        Some(Self {
            uid: match uid {
                Some(uid) => uid,
                None => VmUid::parse(folder).ok()?,
            },
            name: match name {
                Some(name) => name,
                None => VmName::from_id(folder).ok()?,
            },
            certain,
        })
    }
}

/// Where the agent keeps a VM as it first saw it here, and again when it had arrived, for the time
/// when its process is gone: what was asked for is in no journal.
fn seen_path(dir: &VmDir) -> std::path::PathBuf {
    dir.path().join("seen.pb")
}

/// Writes a VM beside its journal. Best effort: losing it costs a lost VM its specification,
/// nothing else.
pub(super) fn save_seen(dir: &VmDir, vm: &v1::Vm) {
    let aside = dir.path().join("seen.new");
    let written = std::fs::write(&aside, vm.encode_to_vec())
        .and_then(|()| std::fs::rename(&aside, seen_path(dir)));
    if let Err(error) = written {
        tracing::warn!(dir = %dir.path().display(), %error, "cannot keep a VM's description");
    }
}

/// The VM as written by [`save_seen`].
pub(super) fn load_seen(dir: &VmDir) -> Option<v1::Vm> {
    let bytes = std::fs::read(seen_path(dir)).ok()?;
    v1::Vm::decode(bytes.as_slice()).ok()
}

/// The agent's own identity, kept in its state directory: made once, durable before it is told.
///
/// # Errors
/// When it cannot be read or written.
pub(super) fn agent_uid(state_dir: &Path) -> io::Result<String> {
    let path = state_dir.join("agent-id");
    match std::fs::read_to_string(&path) {
        Ok(text) => match uuid::Uuid::parse_str(text.trim()) {
            Ok(uid) => return Ok(uid.to_string()),
            // Cut off by a crash of the host: it was never told, or somebody edited it.
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no agent's identity: made anew");
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let uid = uuid::Uuid::now_v7().to_string();
    let aside = state_dir.join("agent-id.new");
    let mut file = File::create(&aside)?;
    writeln!(file, "{uid}")?;
    file.sync_all()?;
    std::fs::rename(&aside, &path)?;
    File::open(state_dir)?.sync_all()?;
    Ok(uid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slat_record::journal::Entry;

    #[test]
    fn an_agent_is_the_same_over_its_restarts_and_two_are_not() {
        let (one, other) = (slat_test_dir::TestDir::new(), slat_test_dir::TestDir::new());
        let uid = agent_uid(one.path()).unwrap();
        assert_eq!(agent_uid(one.path()).unwrap(), uid);
        assert_ne!(agent_uid(other.path()).unwrap(), uid);
        std::fs::write(one.path().join("agent-id"), "").unwrap();
        let anew = agent_uid(one.path()).unwrap();
        assert_ne!(anew, uid);
        assert_eq!(agent_uid(one.path()).unwrap(), anew);
    }

    #[test]
    fn a_directory_is_the_vm_s_of_its_journal_whatever_it_is_called() {
        let state = slat_test_dir::TestDir::new();
        let path = state.path().join("web");
        std::fs::create_dir(&path).unwrap();
        let dir = VmDir::new(&path);
        let who = Who::of(&dir).unwrap();
        assert_eq!((who.uid.as_str(), who.certain), ("web", false));
        let mut journal = Journal::open(&dir.journal()).unwrap();
        journal
            .append(&Entry::Created {
                vm: "db".into(),
                uid: "u-1".into(),
                epoch: 1,
            })
            .unwrap();
        let who = Who::of(&dir).unwrap();
        assert_eq!((who.uid.as_str(), who.name.id()), ("u-1", "db"));
        assert!(who.certain);
    }
}
