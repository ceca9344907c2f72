//! A confined thread, in a process of its own: this test binary, started again for one test.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, Output},
};

use super::*;

/// Says to [`child`] what to do.
const CASE: &str = "SLAT_TEST_CONFINED";
/// And where. The directory is made and removed outside: the child may be killed, and cannot reach
/// beyond its own when it is confined.
const DIR: &str = "SLAT_TEST_CONFINED_DIR";

/// Runs a case in a process of its own.
fn run(case: &str) -> Output {
    let temp = slat_test_dir::TestDir::new();
    run_in(temp.path(), case)
}

fn run_in(dir: &Path, case: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    Command::new(program)
        .args([
            "--exact",
            "confine::tests::child",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CASE, case)
        .env(DIR, dir)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap()
}

fn passes(case: &str) {
    let output = run(case);
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{case}: {}\n{said}", output.status);
    if let Some(skipped) = said.lines().find(|line| line.starts_with("SKIPPED")) {
        println!("{skipped}");
    }
}

fn dies(case: &str) {
    let output = run(case);
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGSYS),
        "{case}: {output:?}"
    );
}

/// A system call that no VM process makes and that harms nobody.
fn unlisted() -> io::Result<()> {
    // SAFETY: it takes two numbers and reads a priority.
    let result = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What a program that is started would need.
fn start_a_program() -> io::Result<()> {
    // SAFETY: without a path the call fails at once, where it is made at all.
    unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) };
    Err(io::Error::last_os_error())
}

/// What is in the VM's directory after its process aborted.
fn left_by_an_abort(case: &str) -> Vec<Vec<u8>> {
    let temp = slat_test_dir::TestDir::new();
    let output = run_in(temp.path(), case);
    let aborted = output.status.signal() == Some(libc::SIGABRT);
    assert!(aborted, "{case}: {output:?}");
    let files = std::fs::read_dir(temp.path().join("vm")).unwrap();
    files
        .map(|file| {
            let mut start = vec![0; 4];
            let mut file = File::open(file.unwrap().path()).unwrap();
            file.read_exact(&mut start).unwrap();
            start
        })
        .collect()
}

/// The soft limit; `None`: as high as it may be.
fn limit_cores_to(current: Option<u64>) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Core).maximum;
    let current = current.or(maximum);
    setrlimit(Resource::Core, Rlimit { current, maximum }).unwrap();
}

fn confined(dir: &Path, seccomp: Seccomp) -> Confined {
    apply(&Confinement {
        dir: dir.join("vm"),
        seccomp,
        core_dumps: false,
        looks_up_hosts: false,
    })
    .unwrap()
}

/// What a VM process does for its pager, from before it is confined to the end.
fn paged(dir: &Path) {
    use std::sync::Arc;

    use slat_paging::{
        Role,
        wire::{Ask, FromPager, Socket, ToPager, VERSION},
    };

    use crate::{
        backend::PagedGuest,
        memory::{GuestMemory, SlotMemory},
        pager::{Pager, PagerSocket, Watcher, Work},
    };

    confined(dir, Seccomp::Refuse);
    let watcher = Watcher::open();
    if let Err(why) = watcher.offer() {
        println!("SKIPPED: {why}");
        return;
    }
    let spec = slat_proto::model::SlotSpec::new(0, 0, 8, false).unwrap();
    let slot = Arc::new(SlotMemory::new(spec).unwrap());
    let memory = GuestMemory::new();
    memory.publish(vec![Arc::clone(&slot)]);
    watcher.watch_all(&memory.table()).unwrap();
    let pager = Arc::new(Pager::new("vms/web".to_owned(), watcher));
    let path = dir.join("vm").join(slat_paging::SOCKET);
    let served = PagerSocket::open(&path, &pager).unwrap();
    let guest = PagedGuest {
        format: "ept4".to_owned(),
        vcpus: vec![1],
    };
    let work = Work {
        guest,
        watched: true,
        mapped: true,
        load_all: false,
    };
    pager.begin(work, &[slot]);
    let socket = Socket::connect(&path).unwrap();
    let (role, version, pid) = (Role::Pager, VERSION, 1);
    let hello = FromPager::Hello { role, version, pid };
    socket.send(&hello, &[]).unwrap();
    for _ in ["setup", "memory", "ready"] {
        socket.receive::<ToPager>().unwrap();
    }
    socket.send(&FromPager::Attached, &[]).unwrap();
    let (request, memory_number) = (5, 1);
    for (pages, wanted) in [(8, 0), (9, libc::EINVAL)] {
        let drop = FromPager::DropMappings {
            request,
            memory: memory_number,
            page: 0,
            pages,
        };
        socket.send(&drop, &[]).unwrap();
        let errno = wanted;
        let answer = socket.receive::<ToPager>().unwrap().message;
        assert_eq!(answer, ToPager::Dropped { request, errno });
    }
    pager.add_snapshot(memory.table().slots(), false).unwrap();
    let asked = {
        let pager = Arc::clone(&pager);
        std::thread::spawn(move || pager.ask(Ask::State, std::time::Duration::from_secs(10)))
    };
    let (mut answered, mut packets) = (false, 0);
    while !answered {
        packets += 1;
        if let ToPager::Ask { request, .. } = socket.receive::<ToPager>().unwrap().message {
            let result = Ok(slat_paging::wire::Answer::Done);
            socket
                .send(&FromPager::Reply { request, result }, &[])
                .unwrap();
            answered = true;
        }
    }
    asked.join().unwrap().unwrap();
    assert_eq!(packets, 3, "the snapshot, its memory, the question");
    pager.watcher().unwatch_all(&memory.table());
    drop((socket, served));
    assert_eq!(newly_refused(), []);
}

/// No test by itself: what the others run in a process of its own.
#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let dir = std::path::PathBuf::from(std::env::var_os(DIR).unwrap());
    let dir = dir.as_path();
    match case.as_str() {
        "refuse" => {
            confined(dir, Seccomp::Refuse);
            let refused = unlisted().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ENOSYS));
            assert_eq!(unlisted().unwrap_err().raw_os_error(), Some(libc::ENOSYS));
            let number = libc::SYS_getpriority as usize;
            let told = newly_refused();
            assert_eq!(told, [refused::Refused { number, times: 2 }]);
            unlisted().unwrap_err();
            assert_eq!(newly_refused(), [], "said once, not each time");
            // A new process is no thread.
            assert!(Command::new("/bin/true").spawn().is_err());
            // Threads are; each is told no, too.
            let thread = std::thread::spawn(unlisted);
            let refused = thread.join().unwrap().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ENOSYS));
        }
        "kill" => {
            confined(dir, Seccomp::Kill);
            drop(unlisted());
            println!("alive");
        }
        "never" => {
            confined(dir, Seccomp::Refuse);
            drop(start_a_program());
            println!("alive");
        }
        "log" => {
            confined(dir, Seccomp::Log);
            unlisted().unwrap();
        }
        "off" => {
            assert_eq!(confined(dir, Seccomp::Off).seccomp, Seccomp::Off);
            unlisted().unwrap();
        }
        "others" => {
            confined(dir, Seccomp::Refuse);
            // SAFETY: signal 0 only asks whether that process could be signalled.
            assert_eq!(unsafe { libc::kill(1, 0) }, -1);
            let pid = i32::try_from(std::process::id()).unwrap();
            // SAFETY: as above.
            assert_eq!(unsafe { libc::kill(pid, 0) }, 0);
            // SAFETY: a new anonymous mapping, which nobody uses.
            let code = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_eq!(code, libc::MAP_FAILED, "memory that can be executed");
            // SAFETY: makes a descriptor, or not.
            let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
            assert_eq!(raw, -1);
        }
        "vcpu" | "stream" => {
            confined(dir, Seccomp::Refuse);
            let role = if case == "vcpu" {
                Role::Vcpu
            } else {
                Role::Stream
            };
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let stream = std::net::TcpStream::connect(address).unwrap();
            let thread = std::thread::spawn(move || {
                enter(role);
                let sends = rustix::net::send(&stream, b"page", rustix::net::SendFlags::empty());
                let connects = std::net::TcpStream::connect(address);
                let threads = std::thread::Builder::new().spawn(|| ());
                (sends.is_ok(), connects.is_ok(), threads.is_ok())
            });
            let (sends, connects, threads) = thread.join().unwrap();
            assert_eq!(sends, role == Role::Stream);
            assert!(!connects && !threads, "{role:?}");
            // The thread that started it keeps what the process may.
            std::net::TcpStream::connect(address).unwrap();
        }
        "paged" => paged(dir),
        "privileges" => {
            let mut status = File::open("/proc/thread-self/status").unwrap();
            let root = rustix::process::geteuid().is_root();
            let limits = confined(dir, Seccomp::Refuse);
            let mut text = String::new();
            status.read_to_string(&mut text).unwrap();
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().trim().to_owned()
            };
            assert_eq!(field("NoNewPrivs:"), "1");
            assert_eq!(field("Seccomp:"), "2");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set}");
            }
            if root {
                assert_eq!(u64::from_str_radix(&field("CapBnd:"), 16), Ok(0));
            }
            let core = rustix::process::getrlimit(rustix::process::Resource::Core);
            assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
            let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
            assert_eq!(files.current, Some(limits.descriptors));
            std::fs::write(dir.join("vm/file"), "").unwrap();
            let mode = std::fs::metadata(dir.join("vm/file")).unwrap();
            assert_eq!(
                std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o77,
                0
            );
        }
        "files" => {
            // As its agent's, beside the VM's directory.
            let key = dir.join("tls.key");
            std::fs::write(&key, "secret").unwrap();
            std::fs::read(&key).unwrap();
            let confined = confined(dir, Seccomp::Refuse);
            if confined.landlock.is_none() {
                println!("SKIPPED: {}", confined.lacks.join("; "));
                return;
            }
            let refused = |result: io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            };
            refused(std::fs::read("/etc/passwd").map(drop));
            refused(std::fs::read(&key).map(drop));
            refused(std::fs::write(&key, ""));
            refused(std::fs::write(dir.join("beside"), ""));
            refused(std::fs::read_dir("/").map(drop));
            refused(std::fs::read("/proc/self/environ").map(drop));
            let own = dir.join("vm");
            std::fs::write(own.join("a"), "a").unwrap();
            std::fs::rename(own.join("a"), own.join("b")).unwrap();
            drop(std::os::unix::net::UnixListener::bind(own.join("s")).unwrap());
            std::fs::remove_file(own.join("b")).unwrap();
            for readable in [
                "/proc/meminfo",
                "/proc/self/cgroup",
                "/proc/self/oom_score_adj",
            ] {
                std::fs::read(readable).unwrap();
            }
            if Path::new("/dev/kvm").exists() {
                drop(crate::available_backends());
            }
        }
        "core" => {
            // As in a usual shell.
            limit_cores_to(Some(0));
            let confined = apply(&Confinement {
                dir: dir.join("vm"),
                seccomp: Seccomp::Refuse,
                core_dumps: true,
                looks_up_hosts: false,
            });
            let lacks = confined.unwrap().lacks;
            assert!(!lacks.iter().any(|lack| lack.contains("core")), "{lacks:?}");
            std::process::abort();
        }
        "core-of-a-free-process" => {
            std::fs::create_dir(dir.join("vm")).unwrap();
            std::env::set_current_dir(dir.join("vm")).unwrap();
            limit_cores_to(None);
            std::process::abort();
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_core_dump_that_is_allowed_is_in_its_directory() {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.starts_with('|') || pattern.contains('/') {
        println!(
            "SKIPPED: core dumps of this machine go elsewhere: {}",
            pattern.trim()
        );
        return;
    }
    if rustix::process::getrlimit(rustix::process::Resource::Core).maximum == Some(0) {
        println!("SKIPPED: the hard limit on core dumps is 0");
        return;
    }
    if left_by_an_abort("core-of-a-free-process").is_empty() {
        println!("SKIPPED: this kernel writes no core dumps");
        return;
    }
    assert_eq!(left_by_an_abort("core"), [b"\x7fELF"]);
}

#[test]
fn what_is_not_listed_is_refused_counted_and_survived() {
    passes("refuse");
}

#[test]
fn what_is_not_listed_ends_the_process_when_so_asked() {
    dies("kill");
}

#[test]
fn starting_a_program_ends_the_process_in_any_case() {
    dies("never");
}

#[test]
fn without_refusals_nothing_is_refused() {
    passes("log");
    passes("off");
}

#[test]
fn other_processes_new_code_and_other_sockets_are_out_of_reach() {
    passes("others");
}

#[test]
fn what_a_pager_needs_is_listed() {
    passes("paged");
}

#[test]
fn a_thread_narrows_itself_to_its_role() {
    passes("vcpu");
    passes("stream");
}

#[test]
fn privileges_are_gone_and_limits_set() {
    passes("privileges");
}

#[test]
fn only_its_own_files_can_be_opened() {
    passes("files");
}

#[test]
fn modes_have_words() {
    for mode in Seccomp::ALL {
        assert_eq!(mode.word().parse(), Ok(mode));
    }
    assert!(
        "strict"
            .parse::<Seccomp>()
            .unwrap_err()
            .contains("kill, refuse, log, off")
    );
}
