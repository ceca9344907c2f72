//! Filters of system calls, compiled and installed.
//!
//! The kernel runs all filters of a thread and takes the strictest answer, so each says one thing:
//! * the list: what is not on it gets the mode's answer;
//! * what no VM process does ends the process, unless calls are only logged;
//! * what makes a process, or on a thread with a role a thread, gets an error (EPERM), in the mode
//!   that refuses;
//! * clone3 is answered ENOSYS, so that libc makes threads by clone, whose flags can be seen;
//! * a role's list, narrower than the process's, on the thread that enters the role.
//!
//! A filter costs each system call some tens of nanoseconds, less for those that it lets pass
//! whatever their arguments: those the kernel remembers.

use std::{collections::BTreeMap, sync::OnceLock};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use super::{
    calls::{self, Role, Rules},
    wanted::Seccomp,
};

/// For what is not listed.
fn answer(mode: Seccomp) -> SeccompAction {
    match mode {
        Seccomp::Refuse => SeccompAction::Trap,
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Off => SeccompAction::Allow,
    }
}

/// For what makes processes and threads.
fn answer_quietly(mode: Seccomp) -> SeccompAction {
    match mode {
        Seccomp::Refuse => SeccompAction::Errno(libc::EPERM as u32),
        other => answer(other),
    }
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch = std::env::consts::ARCH
        .try_into()
        .map_err(|error| format!("{error}"))?;
    SeccompFilter::new(rules, otherwise, listed, arch)
        .and_then(TryInto::try_into)
        .map_err(|error| format!("{error}"))
}

fn install(program: &BpfProgram) -> Result<(), String> {
    apply_filter(program).map_err(|error| format!("{error}"))
}

/// Installs the process's filters on the calling thread and those it will start.
pub(super) fn install_process(mode: Seccomp, looks_up_hosts: bool) -> Result<(), String> {
    let rules = calls::process(std::process::id(), looks_up_hosts);
    let rules = rules.map_err(|error| error.to_string())?;
    let list = compile(rules, answer(mode), SeccompAction::Allow)?;
    let never = calls::NEVER.iter().map(|number| (*number, Vec::new()));
    let deadly = match mode {
        Seccomp::Log => SeccompAction::Log,
        _ => SeccompAction::KillProcess,
    };
    let never = compile(never.collect(), SeccompAction::Allow, deadly)?;
    let processes = calls::new_process().map_err(|error| error.to_string())?;
    let processes = compile(processes, SeccompAction::Allow, answer_quietly(mode))?;
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let clone3 = compile(clone3, SeccompAction::Allow, absent)?;
    for program in [clone3, processes, never, list] {
        install(&program)?;
    }
    Ok(())
}

/// Installs a role's list on the calling thread. Compiled once a process.
pub(super) fn install_role(mode: Seccomp, role: Role) -> Result<(), &'static str> {
    type Programs = OnceLock<Result<[BpfProgram; 2], String>>;
    static VCPU: Programs = OnceLock::new();
    static STREAM: Programs = OnceLock::new();
    static PAGER: Programs = OnceLock::new();
    let programs = match role {
        Role::Vcpu => &VCPU,
        Role::Stream => &STREAM,
        Role::Pager => &PAGER,
    };
    let programs = programs.get_or_init(|| {
        let rules = calls::role(role, std::process::id()).map_err(|error| error.to_string())?;
        let threads = calls::new_thread();
        Ok([
            compile(threads, SeccompAction::Allow, answer_quietly(mode))?,
            compile(rules, answer(mode), SeccompAction::Allow)?,
        ])
    });
    match programs {
        // The list comes last: it has no place for the call that installs filters.
        Ok(programs) => programs
            .iter()
            .try_for_each(install)
            .map_err(|_| "the kernel takes no further filter"),
        Err(_) => Err("its filter does not compile"),
    }
}
