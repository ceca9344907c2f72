//! What a tracepoint of the kernel saw, counted by `perf_event_open`: for what a kernel's
//! statistics lack.
//!
//! # Which threads
//! An event is opened for the calling thread and inherited by those that it starts, and by theirs;
//! a read is the sum over all, the ended ones included. So whoever opens one before there is a
//! second thread counts the whole process. It must be so early for another reason too: opening
//! takes a capability and a file that a confined process has no more ([`crate::confine`]). Reading
//! takes neither.
//!
//! # Cost
//! Nothing is sampled or written down: the kernel adds one where its tracepoint is passed and the
//! filter matches. A read takes no lock of a VM and stops no vCPU; it interrupts each processor
//! that runs one of the threads, for a microsecond, and so costs a running vCPU one exit.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{FromRawFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use vmm_sys_util::{
    ioctl::{ioctl, ioctl_with_ptr},
    ioctl_io_nr, ioctl_iow_nr,
};

/// `'$'`, the type of perf's ioctls.
const PERF: u32 = 0x24;
ioctl_io_nr!(PERF_EVENT_IOC_ENABLE, PERF, 0);
ioctl_iow_nr!(PERF_EVENT_IOC_SET_FILTER, PERF, 6, *const libc::c_char);

/// Where tracefs is mounted.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
const PARANOID: &str = "/proc/sys/kernel/perf_event_paranoid";

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
/// Of [`Attributes::flags`].
const DISABLED: u64 = 1 << 0;
const INHERIT: u64 = 1 << 1;

/// `struct perf_event_attr` in its first version, which every kernel takes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

/// A tracepoint, and which of its events count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tracepoint {
    pub(super) system: &'static str,
    pub(super) name: &'static str,
    /// In the kernel's words; empty: all.
    pub(super) filter: &'static str,
}

impl Tracepoint {
    /// Counts for the calling thread and those it starts from now on.
    ///
    /// # Errors
    /// Why it cannot, in words for an operator.
    pub(super) fn count(&self) -> Result<Count, String> {
        self.count_in(&TRACEFS.map(PathBuf::from))
    }

    /// As [`Tracepoint::count`], with tracefs at one of these places.
    fn count_in(&self, tracefs: &[PathBuf]) -> Result<Count, String> {
        let Self { system, name, .. } = self;
        let attributes = Attributes {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<Attributes>() as u32,
            config: self.id(tracefs)?,
            flags: DISABLED | INHERIT,
            ..Attributes::default()
        };
        // SAFETY: the kernel reads the structure, as long as it says it is; this thread on any
        // processor, no group.
        let opened = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                0,
                -1,
                -1,
                PERF_FLAG_FD_CLOEXEC,
            )
        };
        let Ok(descriptor @ 0..) = i32::try_from(opened) else {
            return Err(refused(&io::Error::last_os_error()));
        };
        // SAFETY: the kernel just gave it, so it is nobody else's.
        let event = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
        if !self.filter.is_empty() {
            let filter = CString::new(self.filter).map_err(|error| error.to_string())?;
            // SAFETY: the kernel reads a string that ends with 0 and lives until it has.
            if unsafe { ioctl_with_ptr(&event, PERF_EVENT_IOC_SET_FILTER(), filter.as_ptr()) } < 0 {
                let error = io::Error::last_os_error();
                return Err(format!(
                    "tracepoint {system}:{name} of this kernel has no filter \"{}\": {error}",
                    self.filter
                ));
            }
        }
        // SAFETY: it takes nothing.
        if unsafe { ioctl(&event, PERF_EVENT_IOC_ENABLE()) } < 0 {
            let error = io::Error::last_os_error();
            return Err(format!(
                "tracepoint {system}:{name} does not begin: {error}"
            ));
        }
        Ok(Count(event))
    }

    /// Its number, by which perf knows it.
    fn id(&self, tracefs: &[PathBuf]) -> Result<u64, String> {
        let Self { system, name, .. } = self;
        let mut closed = None;
        for place in tracefs {
            let events = place.join("events");
            match fs::read_dir(&events) {
                Ok(_) => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::NotFound {
                        closed.get_or_insert((place, error));
                    }
                    continue;
                }
            }
            let file = events.join(system).join(name).join("id");
            return match fs::read_to_string(&file) {
                Ok(id) => id
                    .trim()
                    .parse()
                    .map_err(|_| format!("{} has no number", file.display())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(format!("this kernel has no tracepoint {system}:{name}"))
                }
                Err(error) => Err(format!("{}: {error}", file.display())),
            };
        }
        Err(match closed {
            Some((place, error)) => {
                format!("tracefs at {} cannot be read: {error}", place.display())
            }
            None => {
                let places: Vec<_> = tracefs
                    .iter()
                    .map(|one| one.display().to_string())
                    .collect();
                format!("tracefs is not mounted at {}", places.join(" or "))
            }
        })
    }
}

/// Why perf_event_open does not let this process count.
fn refused(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            let level = fs::read_to_string(PARANOID);
            let level = level.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned());
            format!(
                "perf_event_open: {error}; it takes CAP_PERFMON, or kernel.perf_event_paranoid of \
                 at most 1 (here {level}), and no filter against that call"
            )
        }
        Some(libc::ENOSYS) => format!("perf_event_open: {error}; this kernel has no perf events"),
        _ => format!("perf_event_open: {error}"),
    }
}

/// An event that counts. Closing it ends that.
#[derive(Debug)]
pub(super) struct Count(File);

impl Count {
    /// How often it came, in all threads.
    pub(super) fn read(&self) -> Option<u64> {
        let mut word = [0; 8];
        (&self.0).read_exact(&mut word).ok()?;
        Some(u64::from_ne_bytes(word))
    }
}

/// Page faults of the guest that vCPUs of this process met, by a tracepoint where the kernel's
/// statistics have none.
#[derive(Clone, Debug, Default)]
pub struct FaultEvents(Opened);

#[derive(Clone, Debug, Default)]
enum Opened {
    /// Nobody tried: this architecture's kernels have statistics.
    #[default]
    Unasked,
    Refused(Arc<str>),
    Counting(Arc<Count>),
}

impl FaultEvents {
    /// By that tracepoint, from now on; without one not at all.
    pub(super) fn by(tracepoint: Option<Tracepoint>) -> Self {
        let Some(tracepoint) = tracepoint else {
            return Self::default();
        };
        Self(match tracepoint.count() {
            Ok(count) => Opened::Counting(Arc::new(count)),
            Err(why) => Opened::Refused(format!("no tracepoint in their place: {why}").into()),
        })
    }

    /// Why it does not count where it should.
    #[must_use]
    pub fn why_not(&self) -> Option<&str> {
        match &self.0 {
            Opened::Refused(why) => Some(why),
            Opened::Unasked | Opened::Counting(_) => None,
        }
    }

    /// So many until now; `None` where it does not count.
    pub(super) fn read(&self) -> Option<u64> {
        match &self.0 {
            Opened::Counting(count) => count.read(),
            Opened::Unasked | Opened::Refused(_) => None,
        }
    }

    pub(super) fn counts(&self) -> bool {
        matches!(self.0, Opened::Counting(_))
    }

    /// One that was refused, for tests of what is said then.
    #[cfg(test)]
    pub(super) fn refused(why: &str) -> Self {
        Self(Opened::Refused(why.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, ptr, sync::mpsc, thread};

    use super::*;

    /// A call that no library makes by itself in these threads.
    fn ask(times: u64) {
        for _ in 0..times {
            // SAFETY: it takes nothing and answers a number.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    }

    #[cfg(target_arch = "x86_64")]
    const ASKED: &str = "id == 110";
    #[cfg(not(target_arch = "x86_64"))]
    const ASKED: &str = "id == 173";

    const CALLS: Tracepoint = Tracepoint {
        system: "raw_syscalls",
        name: "sys_enter",
        filter: ASKED,
    };

    /// Runs `test` on a thread that sees tracefs in a place of its own. Skipped by name where that
    /// takes more than this user may.
    fn with_tracefs(test: impl FnOnce(&[PathBuf]) + Send) {
        let temp = slat_test_dir::TestDir::new();
        let place = temp.path().to_owned();
        let mount = |what: &str, at: &Path, kind: &str, flags| {
            let [what, at, kind] = [
                what.as_bytes(),
                at.as_os_str().as_encoded_bytes(),
                kind.as_bytes(),
            ]
            .map(|text| CString::new(text).unwrap());
            // SAFETY: the kernel reads three strings that live until it has.
            let done = unsafe {
                libc::mount(
                    what.as_ptr(),
                    at.as_ptr(),
                    kind.as_ptr(),
                    flags,
                    ptr::null(),
                )
            };
            (done == 0)
                .then_some(())
                .ok_or_else(io::Error::last_os_error)
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: mounts of this thread alone, which ends with the test.
                if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
                    println!("SKIPPED: own mounts: {}", io::Error::last_os_error());
                    return;
                }
                mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE).unwrap();
                if let Err(error) = mount("none", &place, "tracefs", 0) {
                    println!("SKIPPED: tracefs: {error}");
                    return;
                }
                test(std::slice::from_ref(&place));
            });
        });
    }

    #[test]
    fn this_thread_and_those_it_starts_are_counted_and_no_other() {
        let (go, told) = mpsc::channel::<()>();
        let (done, finished) = mpsc::channel();
        let other = thread::spawn(move || {
            if told.recv().is_ok() {
                ask(1000);
                done.send(()).unwrap();
            }
        });
        with_tracefs(move |tracefs| {
            let count = match CALLS.count_in(tracefs) {
                Ok(count) => count,
                Err(why) => return println!("SKIPPED: {why}"),
            };
            assert_eq!(
                count.read(),
                Some(0),
                "nothing came, whatever else is called"
            );
            ask(7);
            assert_eq!(count.read(), Some(7));
            // One that ended, and one that it started.
            thread::spawn(|| {
                ask(20);
                thread::spawn(|| ask(300)).join().unwrap();
            })
            .join()
            .unwrap();
            go.send(()).unwrap();
            finished.recv().unwrap();
            assert_eq!(count.read(), Some(327));
            // One that lives.
            thread::scope(|scope| {
                let (say, said) = mpsc::channel();
                let (end, ended) = mpsc::channel::<()>();
                scope.spawn(move || {
                    ask(4000);
                    say.send(()).unwrap();
                    ended.recv().unwrap_err();
                });
                said.recv().unwrap();
                assert_eq!(count.read(), Some(4327));
                drop(end);
            });
        });
        other.join().unwrap();
    }

    #[test]
    fn what_is_not_there_is_said_by_its_name() {
        let temp = slat_test_dir::TestDir::new();
        let nowhere = [temp.path().to_owned()];
        let why = CALLS.count_in(&nowhere).unwrap_err();
        assert!(why.starts_with("tracefs is not mounted at /"), "{why}");
        fs::create_dir_all(temp.path().join("events/raw_syscalls")).unwrap();
        let why = CALLS.count_in(&nowhere).unwrap_err();
        assert_eq!(why, "this kernel has no tracepoint raw_syscalls:sys_enter");
        fs::create_dir(temp.path().join("events/raw_syscalls/sys_enter")).unwrap();
        let id = temp.path().join("events/raw_syscalls/sys_enter/id");
        fs::write(&id, "many\n").unwrap();
        let why = CALLS.count_in(&nowhere).unwrap_err();
        assert!(why.ends_with("/id has no number"), "{why}");
        // No kernel has that many, whoever asks.
        fs::write(&id, "4294967295\n").unwrap();
        let why = CALLS.count_in(&nowhere).unwrap_err();
        assert!(why.starts_with("perf_event_open: "), "{why}");
        let refused = refused(&io::Error::from_raw_os_error(libc::EACCES));
        assert!(refused.contains("CAP_PERFMON"), "{refused}");
        let closed = [PathBuf::from("/proc/self/mem")];
        let why = CALLS.count_in(&closed).unwrap_err();
        assert!(why.contains("/proc/self/mem cannot be read"), "{why}");
    }

    #[test]
    fn a_filter_that_the_tracepoint_has_not_is_named() {
        with_tracefs(|tracefs| {
            let other = Tracepoint {
                filter: "scause == 20",
                ..CALLS
            };
            match other.count_in(tracefs) {
                Ok(_) => panic!("it took it"),
                Err(why) if why.contains("scause == 20") => {
                    assert!(why.contains("raw_syscalls:sys_enter"), "{why}");
                }
                Err(why) => println!("SKIPPED: {why}"),
            }
        });
    }
}
