//! Test programs that run inside host 1, as they run on any machine: the whole-system tests
//! (`system::`) and those beside the code of the VM's process (`vmm::`).
//!
//! Each test is one run of its program with a bound of its own, so that one that hangs costs no
//! other. Unless a filter says otherwise those on KVM are made: the others are the same on any
//! machine. Of one that fails, what KVM did last is kept where the host can trace it.

use std::{fs, time::Duration};

use anyhow::{Context as _, bail};

use super::{
    host::SHORT,
    hosts::Hosts,
    kind::Kind,
    options::Options,
    programs::{SYSTEM, VMM},
    tests::Outcome,
};

/// No test takes a third of it on a host that does nothing else.
const BOUND: Duration = Duration::from_secs(300);
/// For a list of tests.
const LIST: Duration = Duration::from_secs(60);
/// How often agents of a whole-system test report, in milliseconds: hosts are slow.
const REPORTS: u32 = 2000;
/// Begins a trace of what KVM does: see `init.sh`.
const TRACE: &str = "cd /sys/kernel/tracing && echo >trace && echo 1 >tracing_on";
/// Its last lines.
const TRACED: &str = "tail -n 500 /sys/kernel/tracing/trace";
/// What names of tests on KVM contain.
const ON_KVM: [(&str, &[&str]); 2] = [
    (
        SYSTEM,
        &[
            "kvm::",
            "rings",
            "set_memory_region_test::",
            "mmu_stress_test::",
            "slot_protection::",
            "confined::",
            "admission::another_cpu",
            "paging::oracles::",
            "paging::saves::a_running_vm_is_saved_and_restored_lazily",
            "paging::forks::parent_and_child",
        ],
    ),
    (
        VMM,
        &[
            "backend::kvm::",
            "machine::tests::real::",
            "tests_dirty_log::",
            "confine::",
        ],
    ),
];
/// What names of tests contain that are none.
const ELSEWHERE: &str = "software::";
/// Of these the brief form: what is the same however slow a host is.
const BRIEF: [(&str, &str); 4] = [
    (
        VMM,
        "backend::kvm::tests::dirty::the_log_holds_exactly_what_was_written",
    ),
    (
        SYSTEM,
        "set_memory_region_test::kvm::slots_move_and_go_and_overlaps_are_refused",
    ),
    (
        SYSTEM,
        "confined::kvm::every_thread_of_a_vm_process_is_confined",
    ),
    (
        SYSTEM,
        "paging::oracles::the_mirror_is_what_the_kernel_maps",
    ),
];
/// Tests that need what hosts have not.
const WITHOUT: [(&str, &str); 1] = [("clocks::", "needs a C compiler on the host")];

/// A test program and a test of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct One {
    program: &'static str,
    test: String,
}

impl One {
    /// `system::happy::kvm::there_and_back`, say.
    pub(crate) fn name(&self) -> String {
        format!("{}::{}", self.program, self.test)
    }

    /// What it is a test of.
    pub(crate) fn program(&self) -> &'static str {
        self.program
    }
}

/// The programs that are needed for what is asked for.
pub(crate) fn programs(options: &Options) -> Vec<&'static str> {
    if options.kind == Kind::Mixed {
        return Vec::new();
    }
    let wanted = |program: &&str| {
        if options.brief {
            brief().any(|one| one.program == *program && options.wants(&one.name()))
        } else {
            let of_it = |one: &String| one.starts_with(*program);
            options.filter.is_empty() || options.filter.iter().any(of_it)
        }
    };
    [SYSTEM, VMM].into_iter().filter(wanted).collect()
}

/// The tests of the brief form.
pub(crate) fn brief() -> impl Iterator<Item = One> {
    let one = |(program, test): &(&'static str, &'static str)| One {
        program,
        test: (*test).to_owned(),
    };
    BRIEF.iter().map(one)
}

/// The tests that are to be made of the whole form.
///
/// # Errors
/// When a program does not say which it has.
pub(crate) fn list(hosts: &mut Hosts, filter: &[String]) -> anyhow::Result<Vec<One>> {
    let mut found = Vec::new();
    for (program, on_kvm) in ON_KVM {
        let starts = |word: &String| word.starts_with(program);
        if !filter.is_empty() && !filter.iter().any(starts) {
            continue;
        }
        let command = format!("{program} --list --format terse");
        let said = hosts.try_run(1, &command, LIST)?.good(&command)?;
        let all = said.lines().filter_map(|line| line.strip_suffix(": test"));
        let wanted = all.map(|test| One {
            program,
            test: test.to_owned(),
        });
        found.extend(wanted.filter(|one| {
            if filter.is_empty() {
                let test = &one.test;
                on_kvm.iter().any(|word| test.contains(word)) && !test.contains(ELSEWHERE)
            } else {
                filter.iter().any(|word| one.name().contains(word))
            }
        }));
    }
    Ok(found)
}

/// Makes one.
///
/// # Errors
/// When it fails, with what it said.
pub(crate) fn make(hosts: &mut Hosts, one: &One) -> anyhow::Result<Outcome> {
    let (program, test) = (one.program, &one.test);
    let lacking = WITHOUT.iter().find(|(start, _)| test.starts_with(start));
    if let Some((_, why)) = lacking {
        return Ok(Outcome::Skipped((*why).to_owned()));
    }
    let command = format!(
        "SLAT_BIN=/bin/slat SLAT_REPORT_MILLIS={REPORTS} RUST_BACKTRACE=0 {program} --exact {test} --show-output --test-threads 1"
    );
    // A host without it has no trace.
    hosts.try_run(1, TRACE, SHORT)?;
    let said = hosts.try_run(1, &command, BOUND)?;
    if said.code != 0 {
        let traced = hosts.try_run(1, TRACED, SHORT)?.out;
        let kept = format!("{}.trace", one.name().replace("::", "."));
        fs::write(hosts.plan().folder.join(kept), traced)?;
        // What it left would be in the way of the next.
        hosts.run(1, "killall -9 slat; rm -rf /tmp/slat-*; true")?;
        bail!("{}\n{}{}", said.ending(), said.out, said.err);
    }
    verdict(&said.out).with_context(|| format!("{} said {}", one.name(), said.out))
}

/// What the output of a run that ended with 0 means. A mode that the host has not is a part that
/// was skipped.
fn verdict(said: &str) -> anyhow::Result<Outcome> {
    let skipped = said.lines().filter_map(|line| line.split_once("SKIPPED:"));
    let skipped: Vec<&str> = skipped.map(|(_, why)| why.trim()).collect();
    if let Some(whole) = skipped.iter().find(|why| !why.starts_with("mode ")) {
        return Ok(Outcome::Skipped((*whole).to_owned()));
    }
    if !said.contains("test result: ok. 1 passed") {
        bail!("it made no test");
    }
    if skipped.is_empty() {
        return Ok(Outcome::Passed(String::new()));
    }
    Ok(Outcome::InPart(
        skipped.into_iter().map(str::to_owned).collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_made_no_test_is_no_success() {
        let passed = "test a ... ok\n\ntest result: ok. 1 passed; 0 failed;\n";
        assert_eq!(verdict(passed).unwrap(), Outcome::Passed(String::new()));
        let skipped = "SKIPPED: no /dev/kvm\ntest result: ok. 1 passed; 0 failed;\n";
        let why = Outcome::Skipped("no /dev/kvm".to_owned());
        assert_eq!(verdict(skipped).unwrap(), why);
        assert!(verdict("test result: ok. 0 passed; 0 failed;\n").is_err());
        let part = "SKIPPED: mode ring: no rings\ntest result: ok. 1 passed; 0 failed;\n";
        let why = Outcome::InPart(vec!["mode ring: no rings".to_owned()]);
        assert_eq!(verdict(part).unwrap(), why);
    }

    #[test]
    fn programs_are_asked_for_by_their_names() {
        let of = |kind, brief, filter: &str| {
            programs(&Options {
                brief,
                filter: filter.split_whitespace().map(str::to_owned).collect(),
                ..Options::brief(kind)
            })
        };
        let all = [SYSTEM, VMM];
        assert_eq!(of(Kind::X86_64, false, ""), all);
        assert_eq!(of(Kind::X86_64, true, ""), all);
        assert_eq!(of(Kind::X86_64, false, "kill:: system::happy"), [SYSTEM]);
        assert_eq!(of(Kind::Riscv64, true, "vmm::backend kill::"), [VMM]);
        let none: [&str; 0] = [];
        assert_eq!(of(Kind::Riscv64, true, "kill:: migrate::"), none);
        assert_eq!(of(Kind::Mixed, true, ""), none);
    }
}
