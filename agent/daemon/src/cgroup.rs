//! A cgroup for each VM's process, where this agent may make cgroups (version 2 only).
//!
//! The kernel then accounts memory and processor time by VM, and an operator may limit them there.
//! Nothing depends on it: where it cannot be done, VM processes stay in the agent's own cgroup, and
//! that is said once in the log and shown with the host. Only a cgroup that an operator named must
//! be had: without it the agent does not start.
//!
//! # Which
//! Under systemd the agent's unit has `Delegate=` and `DelegateSubgroup=agent`: the agent runs in
//! `UNIT/agent`, and VMs go to `UNIT/vms/UID`. Only processes in leaves leave the controllers free
//! to be handed down, and the agent never moves itself. Without the subgroup VMs go below the
//! agent's own cgroup, where the kernel accounts processor time alone. Elsewhere an operator names
//! a cgroup that is the agent's to change.
//!
//! # Ends
//! A cgroup goes when no process is in it: [`Cgroups::sweep`], called every few seconds and at
//! start, removes those that are empty, however their processes and agents ended. The kernel
//! refuses to remove any other. Only what is named as a VM's is looked at: whatever else is in the
//! same cgroup is an operator's.
//!
//! *Locking*: `moving` is held from making a cgroup until its process is in it, and by a sweep, so
//! that no sweep takes it in between. Only file operations happen meanwhile.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::fs::{Access, access, getxattr, statfs};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::error::HostError;

/// How often empty ones are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// The subgroup that a unit's own processes are in.
const SUBGROUP: &str = "agent";
/// What accounts, and can limit.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// `statfs` of cgroup version 2.
const MAGIC: u64 = 0x6367_7270;

/// Where VM processes get cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VmCgroup {
    /// Below the agent's own, where that was delegated to it.
    #[default]
    Auto,
    /// Nowhere.
    None,
    /// Below this one.
    At(PathBuf),
}

impl FromStr for VmCgroup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            path if path.starts_with('/') => Ok(Self::At(path.into())),
            _ => Err("auto, none, or the path of a cgroup, as /sys/fs/cgroup/slat".to_owned()),
        }
    }
}

/// The cgroup that those of VMs are in, if any.
#[derive(Debug, Default)]
pub(super) struct Cgroups {
    base: Option<PathBuf>,
    /// Why there is none, or what those there are do not account.
    message: String,
    moving: Mutex<()>,
}

impl Cgroups {
    /// Finds it, and makes it when it is missing.
    ///
    /// # Errors
    /// Why the one that was named cannot be used.
    pub(super) fn find(choice: &VmCgroup) -> Result<Self, HostError> {
        let found = match choice {
            VmCgroup::None => Err("switched off".to_owned()),
            VmCgroup::At(path) => Ok(path.clone()),
            VmCgroup::Auto => own().and_then(|own| below(&own)),
        };
        let made = found.and_then(|base| {
            prepare(&base)
                .map(|lacks| (base.clone(), lacks))
                .map_err(|error| format!("{}: {error}", base.display()))
        });
        match made {
            Ok((base, message)) => {
                // Not called `message`, which is the event's own.
                tracing::info!(cgroup = %base.display(), lacks = message, "VMs get cgroups of their own");
                let found = Self {
                    base: Some(base),
                    message,
                    ..Self::default()
                };
                found.sweep();
                Ok(found)
            }
            Err(why) if matches!(choice, VmCgroup::At(_)) => Err(HostError::Config {
                message: format!(
                    "VMs cannot have cgroups where --vm-cgroup says: {why}; name a cgroup of version 2 that the agent's \
                     user may change, or take auto or none"
                ),
            }),
            Err(message) => {
                tracing::info!(why = message, "VMs stay in the agent's cgroup");
                Ok(Self {
                    message,
                    ..Self::default()
                })
            }
        }
    }

    /// The cgroup that those of VMs are in; empty when there is none.
    pub(super) fn base(&self) -> String {
        let base = self.base.as_deref().unwrap_or(Path::new(""));
        base.display().to_string()
    }

    /// Why there is none, or what is not accounted; empty when nothing is wrong.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// Puts a process into a cgroup of its own.
    pub(super) fn enter(&self, uid: &str, pid: u32) {
        let Some(base) = &self.base else { return };
        let cgroup = base.join(uid);
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let entered =
            made(&cgroup).and_then(|()| fs::write(cgroup.join("cgroup.procs"), pid.to_string()));
        if let Err(error) = entered {
            tracing::warn!(cgroup = %cgroup.display(), %error, "a VM stays in the agent's cgroup");
        }
    }

    /// Removes those of VMs without a process.
    pub(super) fn sweep(&self) {
        let Some(base) = &self.base else { return };
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in fs::read_dir(base).into_iter().flatten().flatten() {
            if is_of_vm(&entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                match fs::remove_dir(entry.path()) {
                    Ok(()) => {}
                    // It has a process.
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                    Err(error) => {
                        tracing::debug!(cgroup = %entry.path().display(), %error, "an empty cgroup stays");
                    }
                }
            }
        }
    }
}

/// Sweeps until the agent stops.
pub(super) async fn keep_clean(cgroups: Arc<Cgroups>, stop: CancellationToken) {
    while cgroups.base.is_some() {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        let swept = Arc::clone(&cgroups);
        if let Err(error) = tokio::task::spawn_blocking(move || swept.sweep()).await {
            // Cancelled with the runtime it ends quietly; a sweep that panicked is a fault.
            if error.is_panic() {
                tracing::error!(%error, "cgroups of ended VMs stay");
            }
            return;
        }
    }
}

/// Whether a cgroup's name is a VM's uid as hosts make them ([`VmUid::fresh`]): a UUID. What may be
/// a uid otherwise is any word, and an operator's as well.
///
/// [`VmUid::fresh`]: slat_record::uid::VmUid::fresh
fn is_of_vm(name: &OsStr) -> bool {
    let parsed = |text: &str| Uuid::parse_str(text).ok().map(|uuid| uuid.to_string());
    // A UUID has other forms, too, which no uid is written in.
    name.to_str()
        .is_some_and(|name| parsed(name).as_deref() == Some(name))
}

/// Makes a cgroup unless it is there.
fn made(cgroup: &Path) -> io::Result<()> {
    match fs::create_dir(cgroup) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Makes the cgroup that those of VMs will be in, and has controllers handed down to them. Says
/// what those will not account.
fn prepare(base: &Path) -> io::Result<String> {
    // Looked at first: elsewhere a plain folder would be made, and stay.
    let parent = base.parent().unwrap_or(base);
    let there = if base.exists() { base } else { parent };
    let kind = match statfs(there) {
        Ok(found) => found.f_type,
        Err(rustix::io::Errno::NOENT) => {
            let words = "there is neither such a cgroup nor the one that it would be made in";
            return Err(io::Error::other(words));
        }
        Err(error) => return Err(error.into()),
    };
    if u64::try_from(kind) != Ok(MAGIC) {
        return Err(io::Error::other(if there == base {
            "this is no cgroup of version 2".to_owned()
        } else {
            let parent = parent.display();
            format!(
                "it does not exist, and {parent}, where it would be made, is no cgroup of version 2"
            )
        }));
    }
    made(base)?;
    access(base, Access::WRITE_OK | Access::EXEC_OK)?;
    // Refused where processes are in it, which is so when the agent itself is.
    let hand_down = |cgroup: &Path, controller: &str| {
        fs::write(
            cgroup.join("cgroup.subtree_control"),
            format!("+{controller}"),
        )
    };
    let mut lacks = Vec::new();
    for controller in CONTROLLERS {
        // Already so, where an operator has prepared it: then a refusal says nothing, and what
        // counts is whether it can be handed on.
        if let Some(parent) = base.parent()
            && let Err(error) = hand_down(parent, controller)
        {
            tracing::debug!(cgroup = %parent.display(), controller, %error, "not handed down");
        }
        if hand_down(base, controller).is_err() {
            lacks.push(controller);
        }
    }
    Ok(if lacks.is_empty() {
        String::new()
    } else {
        format!("without the controllers {}", lacks.join(", "))
    })
}

/// This process's own cgroup of version 2.
fn own() -> Result<PathBuf, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let mount = mount_point(&read("/proc/self/mountinfo")?)
        .ok_or_else(|| "no cgroups of version 2 are mounted".to_owned())?;
    let path = read("/proc/self/cgroup")?;
    let path = path.lines().find_map(|line| line.strip_prefix("0::/"));
    path.map(|path| mount.join(path))
        .ok_or_else(|| "this process is in no cgroup of version 2".to_owned())
}

/// Where the whole hierarchy of version 2 is mounted.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (filesystem.starts_with("cgroup2 ") && root == "/").then(|| point.into())
    })
}

/// Where cgroups may be made, for a process in the cgroup `own`.
fn below(own: &Path) -> Result<PathBuf, String> {
    let parent = own.parent().filter(|_| own.ends_with(SUBGROUP));
    [parent, Some(own)]
        .into_iter()
        .flatten()
        .find(|cgroup| delegated(cgroup))
        .map(|cgroup| cgroup.join("vms"))
        .ok_or_else(|| format!("{} was not delegated to this agent", own.display()))
}

/// Whether somebody gave a cgroup into this process's hands: a service manager's mark, or, for any
/// user but root, who can write everywhere, the permission.
fn delegated(cgroup: &Path) -> bool {
    let marked = ["user.delegate", "trusted.delegate"]
        .into_iter()
        .any(|name| {
            let mut value = [0; 1];
            getxattr(cgroup, name, &mut value).is_ok() && value == *b"1"
        });
    let given = !rustix::process::geteuid().is_root()
        && access(cgroup.join("cgroup.procs"), Access::WRITE_OK).is_ok();
    marked || given
}

#[cfg(test)]
mod tests {
    use slat_record::uid::VmUid;

    use super::*;

    #[test]
    fn the_hierarchy_is_found_among_mounts() {
        let hybrid = "25 1 0:20 / /sys/fs/cgroup rw shared:1 - tmpfs tmpfs rw\n\
                      36 25 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 25 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = mount_point(hybrid).unwrap();
        assert_eq!(found, Path::new("/sys/fs/cgroup/unified"));
        // A container's view begins below the root: paths of /proc do not lead there.
        let bound = "41 25 0:37 /kube/pod /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(bound), None);
        assert_eq!(mount_point(""), None);
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_refused_with_the_reason() {
        let folder = slat_test_dir::TestDir::new();
        let refused = |path: &Path| {
            let at = VmCgroup::At(path.to_owned());
            Cgroups::find(&at).unwrap_err().to_string()
        };
        let there = refused(folder.path());
        assert!(
            there.contains(": this is no cgroup of version 2; "),
            "{there}"
        );
        let vms = folder.path().join("vms");
        let absent = refused(&vms);
        assert!(absent.contains("it does not exist"), "{absent}");
        assert!(!vms.exists(), "nothing is left of the attempt");
        let nowhere = refused(&vms.join("a"));
        assert!(nowhere.contains("neither such a cgroup nor"), "{nowhere}");
        // What nobody named is done without.
        let none = Cgroups::find(&VmCgroup::None).unwrap();
        assert_eq!(
            (none.base(), none.message()),
            (String::new(), "switched off")
        );
        assert!("vms".parse::<VmCgroup>().is_err());
        assert_eq!("auto".parse(), Ok(VmCgroup::Auto));
    }

    #[test]
    fn a_process_is_alone_in_its_cgroup_which_goes_with_it() {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let Some(mount) = mount_point(&mountinfo) else {
            println!("SKIPPED: no cgroups of version 2 are mounted");
            return;
        };
        let base = mount.join(format!("slat-test-{}", std::process::id()));
        let cgroups = match Cgroups::find(&VmCgroup::At(base.clone())) {
            Ok(cgroups) => cgroups,
            Err(error) => {
                println!("SKIPPED: {error}");
                return;
            }
        };
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let uid = VmUid::fresh();
        let own = base.join(uid.as_str());
        cgroups.enter(uid.as_str(), child.id());
        let inside = fs::read_to_string(own.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), child.id().to_string());
        assert!(
            fs::read_to_string(own.join("cpu.stat"))
                .unwrap()
                .contains("usage_usec")
        );
        cgroups.sweep();
        assert!(own.exists(), "its process lives");
        child.kill().unwrap();
        child.wait().unwrap();
        // As an agent that begins after one that was killed.
        drop(Cgroups::find(&VmCgroup::At(base.clone())).unwrap());
        assert!(!own.exists());
        fs::remove_dir(&base).unwrap();
    }

    #[test]
    fn a_sweep_leaves_alone_what_is_not_named_as_a_vm_s() {
        let folder = slat_test_dir::TestDir::new();
        let base = folder.path();
        let cgroups = Cgroups {
            base: Some(base.to_owned()),
            ..Cgroups::default()
        };
        let uid = VmUid::fresh();
        let shouted = VmUid::fresh().as_str().to_uppercase();
        let plain = VmUid::fresh().as_str().replace('-', "");
        let others = ["reserve", "batch-1", "uid", &shouted, &plain];
        for name in others.into_iter().chain([uid.as_str()]) {
            fs::create_dir(base.join(name)).unwrap();
        }
        cgroups.sweep();
        assert!(!base.join(uid.as_str()).exists(), "its VM has ended");
        for name in others {
            assert!(base.join(name).exists(), "{name} is an operator's");
        }
    }
}
