//! The system calls of a VM process, by thread role.
//!
//! | role | threads | may, beyond what every thread does |
//! |---|---|---|
//! | process | main, runtime, drivers | files, sockets, memory, KVM, threads |
//! | [`Role::Vcpu`] | one a vCPU | run it, read where it stands, kick others, print the console |
//! | [`Role::Stream`] | senders, receivers, introductions | send, receive, place pages |
//! | [`Role::Pager`] | one a connection of a pager | send, receive, drop mappings, wake |
//!
//! Lists were found by tracing the whole-system tests on both backends, by thread, on glibc; what
//! musl, riscv64 and libc's rarer paths (signals, aborts, descriptors that run out) make instead
//! stands beside them. Arguments are looked at where that narrows much: which ioctl, which kind of
//! socket, whom a signal may reach, that memory is never made executable and limits only read.
//!
//! Which file a call is about is not the filter's matter but landlock's.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword, SeccompCmpOp,
    SeccompCondition as Cond, SeccompRule as Rule,
};

use super::arch;

/// What a thread is for, when it is for one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs one vCPU, of either backend.
    Vcpu,
    /// Moves pages or frames of a migration.
    Stream,
    /// Talks to a pager, or to an agent about pages.
    Pager,
}

/// System calls and what their arguments must be; any of the rules will do, none means all.
pub(super) type Rules = BTreeMap<i64, Vec<Rule>>;

/// Of every thread: memory, locks, time, its log and its end.
const EVERY: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_renameat2,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Of threads that move pages, besides.
const STREAM: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_getsockopt,
    libc::SYS_ppoll,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// Of threads that talk to pagers, besides.
const PAGER: &[i64] = &[
    libc::SYS_ppoll,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// Of the process, besides: files, sockets, events, threads.
const PROCESS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_accept,
    libc::SYS_bind,
    libc::SYS_clone3,
    libc::SYS_close_range,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getuid,
    libc::SYS_listen,
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_mkdirat,
    libc::SYS_msync,
    libc::SYS_pidfd_open,
    libc::SYS_pipe2,
    libc::SYS_readlinkat,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_set_tid_address,
    libc::SYS_sync_file_range,
    libc::SYS_sysinfo,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    // Installs further filters only; new privileges are off.
    libc::SYS_seccomp,
];

/// Made by nothing in a VM process, whatever it is linked with: starting programs, looking into
/// other processes, and what takes the host itself. They end the process, also where others are
/// only refused.
pub(super) const NEVER: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
];

/// Of prctl: what the kernel told the program of the machine when it began. libc has no name for
/// it; it is "AUXV".
const PR_GET_AUXV: u64 = 0x4155_5856;

/// Other ioctls, in a type that does not differ between libcs: how much a socket has not sent yet,
/// blocking and inheritance of descriptors, whether the log is a terminal.
const TIOCOUTQ: u64 = 0x5411;
const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;
const TCGETS: u64 = 0x5401;
/// Which of its own pages are huge.
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// Type of all ioctls of KVM.
const KVM: u64 = 0xae;
/// Numbers of those that a vCPU's thread makes, the most frequent first: run, the registers that
/// say where it stands (x86-64, RISC-V), and what takes entries out of a dirty ring.
const VCPU_IOCTLS: &[u64] = &[0x80, 0x81, 0x83, 0xab, 0xc7];
/// Of those that a stream's thread makes: pages are protected just before it reads them first.
const STREAM_IOCTLS: &[u64] = &[0xc0];
/// Numbers of the others that this process makes. VM and vCPU are made, memory mapped, capabilities
/// asked and enabled, the dirty log read, registers of both architectures moved.
const KVM_IOCTLS: &[u64] = &[
    0x00, // KVM_GET_API_VERSION
    0x01, // KVM_CREATE_VM
    0x02, // KVM_GET_MSR_INDEX_LIST
    0x03, // KVM_CHECK_EXTENSION
    0x04, // KVM_GET_VCPU_MMAP_SIZE
    0x05, // KVM_GET_SUPPORTED_CPUID
    0x41, // KVM_CREATE_VCPU
    0x42, // KVM_GET_DIRTY_LOG
    0x46, // KVM_SET_USER_MEMORY_REGION
    0x47, // KVM_SET_TSS_ADDR
    0x82, // KVM_SET_REGS
    0x84, // KVM_SET_SREGS
    0x88, // KVM_GET_MSRS
    0x89, // KVM_SET_MSRS
    0x90, // KVM_SET_CPUID2
    0x98, // KVM_GET_MP_STATE
    0x99, // KVM_SET_MP_STATE
    0x9f, // KVM_GET_VCPU_EVENTS
    0xa0, // KVM_SET_VCPU_EVENTS
    0xa1, // KVM_GET_DEBUGREGS
    0xa2, // KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ
    0xa3, // KVM_ENABLE_CAP, KVM_GET_TSC_KHZ
    0xa4, // KVM_GET_XSAVE
    0xa5, // KVM_SET_XSAVE
    0xa6, // KVM_GET_XCRS
    0xa7, // KVM_SET_XCRS
    0xac, // KVM_SET_ONE_REG
    0xb0, // KVM_GET_REG_LIST
    0xc0, // KVM_CLEAR_DIRTY_LOG
    0xce, // KVM_GET_STATS_FD
    0xcf, // KVM_GET_XSAVE2
];

/// Type of all ioctls of userfaultfd.
const UFFD: u64 = 0xaa;
/// Numbers of those that this process makes: register, unregister, wake. Others are the pager's.
const UFFD_IOCTLS: &[u64] = &[0x00, 0x01, 0x02];
/// Of those that a pager's thread makes.
const PAGER_IOCTLS: &[u64] = &[0x02];

type Result<T> = std::result::Result<T, BackendError>;

fn one(cond: Cond) -> Result<Rule> {
    Rule::new(vec![cond])
}

/// Argument `index` is `value`, as an int.
fn is(index: u8, value: u64) -> Result<Cond> {
    Cond::new(index, Dword, SeccompCmpOp::Eq, value)
}

/// The bits of `mask` in argument `index` are `value`.
fn masked(index: u8, mask: u64, value: u64) -> Result<Cond> {
    Cond::new(index, Dword, SeccompCmpOp::MaskedEq(mask), value)
}

fn any_of(index: u8, values: &[u64]) -> Result<Vec<Rule>> {
    values.iter().map(|value| one(is(index, *value)?)).collect()
}

/// ioctls of KVM by number, whatever they say of direction and size: those differ by architecture.
fn of_kvm(numbers: &[u64]) -> Result<Vec<Rule>> {
    of_type(KVM, numbers)
}

/// The same of another type.
fn of_type(kind: u64, numbers: &[u64]) -> Result<Vec<Rule>> {
    numbers
        .iter()
        .map(|number| one(masked(1, 0xffff, kind << 8 | number)?))
        .collect()
}

fn listed(lists: &[&[i64]]) -> Rules {
    let all = lists.iter().flat_map(|list| list.iter());
    all.map(|number| (*number, Vec::new())).collect()
}

/// Memory that can be executed is mapped before this, and never after.
fn memory(rules: &mut Rules) -> Result<()> {
    for number in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(number, vec![one(masked(2, libc::PROT_EXEC as u64, 0)?)?]);
    }
    Ok(())
}

/// Signals reach this process alone: another thread by a kick or an abort, itself to stop.
fn signals(rules: &mut Rules, pid: u32) -> Result<()> {
    for number in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(number, any_of(0, &[pid.into()])?);
    }
    Ok(())
}

/// What any thread of the process `pid` may do.
pub(super) fn process(pid: u32, looks_up_hosts: bool) -> Result<Rules> {
    let mut rules = listed(&[
        EVERY,
        STREAM,
        PROCESS,
        arch::EVERY,
        arch::STREAM,
        arch::PROCESS,
        // Answered by a filter of their own.
        arch::FORKS,
    ]);
    memory(&mut rules)?;
    signals(&mut rules, pid)?;
    let mut ioctls = of_kvm(VCPU_IOCTLS)?;
    ioctls.extend(of_kvm(KVM_IOCTLS)?);
    ioctls.extend(of_type(UFFD, UFFD_IOCTLS)?);
    ioctls.extend(any_of(
        1,
        &[TIOCOUTQ, FIONBIO, FIOCLEX, TCGETS, PAGEMAP_SCAN],
    )?);
    rules.insert(libc::SYS_ioctl, ioctls);
    let mut families = vec![libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    if looks_up_hosts {
        // The resolver asks which addresses this host has.
        families.push(libc::AF_NETLINK);
    }
    let families: Vec<u64> = families.into_iter().map(|family| family as u64).collect();
    rules.insert(libc::SYS_socket, any_of(0, &families)?);
    rules.insert(libc::SYS_socketpair, any_of(0, &[libc::AF_UNIX as u64])?);
    // Of what kind: see `new_process`.
    rules.insert(libc::SYS_clone, Vec::new());
    rules.insert(
        libc::SYS_prctl,
        any_of(
            0,
            &[
                libc::PR_SET_NAME as u64,
                libc::PR_GET_NAME as u64,
                libc::PR_SET_NO_NEW_PRIVS as u64,
                libc::PR_SET_VMA as u64,
                PR_GET_AUXV,
            ],
        )?,
    );
    // Read, not set: the new limit is no pointer.
    let read = Cond::new(2, Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![one(read)?]);
    Ok(rules)
}

/// What makes a process and not a thread.
///
/// Not left to the lists: libc makes threads and processes with all signals blocked, and a call
/// that is refused by a signal which is blocked ends the process.
pub(super) fn new_process() -> Result<Rules> {
    let process = masked(0, libc::CLONE_THREAD as u64, 0)?;
    let mut rules = listed(&[arch::FORKS]);
    rules.insert(libc::SYS_clone, vec![one(process)?]);
    Ok(rules)
}

/// What makes a thread or a process: a thread with a role makes none.
pub(super) fn new_thread() -> Rules {
    listed(&[arch::FORKS, &[libc::SYS_clone]])
}

/// What a thread of that role may do, of what the process may.
pub(super) fn role(role: Role, pid: u32) -> Result<Rules> {
    let (mut rules, ioctls) = match role {
        Role::Vcpu => (listed(&[EVERY, arch::EVERY]), of_kvm(VCPU_IOCTLS)?),
        Role::Stream => {
            let mut ioctls = of_kvm(STREAM_IOCTLS)?;
            ioctls.extend(any_of(1, &[TIOCOUTQ, FIONBIO])?);
            (listed(&[EVERY, STREAM, arch::EVERY, arch::STREAM]), ioctls)
        }
        Role::Pager => {
            let ioctls = of_type(UFFD, PAGER_IOCTLS)?;
            (listed(&[EVERY, PAGER, arch::EVERY, arch::STREAM]), ioctls)
        }
    };
    memory(&mut rules)?;
    signals(&mut rules, pid)?;
    rules.insert(libc::SYS_ioctl, ioctls);
    // Answered by a filter of their own: see `new_thread`.
    rules.insert(libc::SYS_clone, Vec::new());
    rules.insert(libc::SYS_clone3, Vec::new());
    Ok(rules)
}
