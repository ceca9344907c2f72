//! Whether hardware's answer is the one software gave.
//!
//! An access that is allowed must have reached exactly the word that software named. For a fault
//! each family says more than that it happened: its cause or exit code must fit the access and the
//! reason, and the guest physical address it reports must be the one asked for.

use super::{
    answer::{Answer, STORE_LOST},
    layout::named_by,
    patch::Family,
    query::{Expected, Query},
};
use slat_mmu::Access;

/// VM exit: EPT violation, EPT misconfiguration (Intel SDM vol. 3, appendix C).
const EXIT_VIOLATION: u64 = 48;
const EXIT_MISCONFIGURATION: u64 = 49;
/// #VMEXIT(NPF) (AMD APM vol. 2, appendix C).
const EXIT_NPF: u64 = 0x400;

/// Guest-page faults of the RISC-V privileged specification.
const LOAD_GUEST_PAGE_FAULT: u64 = 21;
const STORE_GUEST_PAGE_FAULT: u64 = 23;
/// What QEMU (10.0 at least) says for HLVX, because the hart that asks is not in a virtual mode.
/// htval holds a guest physical address all the same, which a page fault of the first stage has
/// not.
const INSTRUCTION_PAGE_FAULT: u64 = 12;

/// Whether they agree.
pub fn agrees(family: Family, query: &Query, answer: &Answer) -> bool {
    match query.expected {
        Expected::Leads(hpa) => answer.status == 0 && named_by(answer.first) == Some(hpa),
        _ => match family {
            Family::RiscV => riscv(query, answer),
            Family::Ept => ept(query, answer),
            Family::Npt => npt(query, answer),
        },
    }
}

fn riscv(query: &Query, answer: &Answer) -> bool {
    // HLVX is a load that needs X: its fault is a load's.
    let cause = match query.access {
        Access::Read => answer.status == LOAD_GUEST_PAGE_FAULT,
        Access::Write => answer.status == STORE_GUEST_PAGE_FAULT,
        Access::Execute => [LOAD_GUEST_PAGE_FAULT, INSTRUCTION_PAGE_FAULT].contains(&answer.status),
    };
    let reported = answer.second << 2 | answer.first & 3;
    cause && answer.first == query.gpa && reported == query.gpa
}

fn ept(query: &Query, answer: &Answer) -> bool {
    let (qualification, gpa) = (answer.first, answer.second);
    let tried = match query.access {
        Access::Read => 1,
        Access::Write => 2,
        Access::Execute => 4,
    };
    let allowed = qualification >> 3 & 7;
    gpa == query.gpa
        && match query.expected {
            Expected::Malformed | Expected::Mmio => answer.status == EXIT_MISCONFIGURATION,
            // A leaf that is access-tracked has no permission, whatever its real ones are.
            Expected::NotPresent | Expected::AccessedDirty => {
                answer.status == EXIT_VIOLATION && qualification & tried != 0 && allowed == 0
            }
            Expected::Permission => {
                answer.status == EXIT_VIOLATION
                    && qualification & tried != 0
                    && allowed & tried == 0
            }
            Expected::Leads(_) => false,
        }
}

fn npt(query: &Query, answer: &Answer) -> bool {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 2;
    const RESERVED: u64 = 8;
    const FETCH: u64 = 16;
    let (code, gpa) = (answer.first, answer.second);
    let tried = match query.access {
        Access::Read => 0,
        Access::Write => WRITE,
        Access::Execute => FETCH,
    };
    answer.status == EXIT_NPF
        && gpa == query.gpa
        && code & (WRITE | FETCH) == tried
        && match query.expected {
            Expected::NotPresent => code & (PRESENT | RESERVED) == 0,
            Expected::Permission => code & (PRESENT | RESERVED) == PRESENT,
            // A missing U is a matter of permission; hardware does not call it reserved.
            Expected::Malformed if query.kind == "U clear" => {
                code & (PRESENT | RESERVED) == PRESENT
            }
            Expected::Malformed | Expected::Mmio => code & RESERVED != 0,
            Expected::AccessedDirty | Expected::Leads(_) => false,
        }
}

/// Hardware's answer in words.
pub fn describe(family: Family, answer: &Answer) -> String {
    let Answer {
        status,
        first,
        second,
    } = *answer;
    match (status, named_by(first)) {
        (0, Some(hpa)) => format!("led to {hpa:#x}"),
        (0, None) => format!("found the word {first:#x}, which no window holds"),
        (STORE_LOST, _) => "stored elsewhere than it loaded from".to_owned(),
        _ => match family {
            Family::RiscV => {
                format!("trapped: cause {status}, stval {first:#x}, htval {second:#x}")
            }
            Family::Ept => {
                format!("exited: reason {status}, qualification {first:#x}, gpa {second:#x}")
            }
            Family::Npt => format!("exited: code {status:#x}, info {first:#x}, gpa {second:#x}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::layout::pattern;

    fn query(access: Access, expected: Expected) -> Query {
        Query {
            gpa: 0x4_0000_1008,
            access,
            kind: "test",
            expected,
        }
    }

    fn answer(status: u64, first: u64, second: u64) -> Answer {
        Answer {
            status,
            first,
            second,
        }
    }

    #[test]
    fn a_translation_must_reach_the_very_word() {
        let leads = query(Access::Read, Expected::Leads(0x400_0008));
        for family in [Family::Ept, Family::Npt, Family::RiscV] {
            assert!(agrees(family, &leads, &answer(0, pattern(0x400_0008), 0)));
            assert!(!agrees(family, &leads, &answer(0, pattern(0x400_1008), 0)));
            assert!(!agrees(family, &leads, &answer(0, 0, 0)));
            assert!(!agrees(family, &leads, &answer(STORE_LOST, 0, 0)));
            let faults = query(Access::Read, Expected::NotPresent);
            assert!(!agrees(family, &faults, &answer(0, pattern(0x400_0008), 0)));
        }
    }

    #[test]
    fn a_g_stage_fault_has_its_cause_and_both_addresses() {
        let write = query(Access::Write, Expected::Permission);
        let gpa = write.gpa;
        let agrees = |answer| agrees(Family::RiscV, &write, &answer);
        assert!(agrees(answer(23, gpa, gpa >> 2)));
        assert!(!agrees(answer(21, gpa, gpa >> 2)), "a load's cause");
        assert!(!agrees(answer(15, gpa, gpa >> 2)), "a first-stage fault");
        assert!(!agrees(answer(7, gpa, gpa >> 2)), "an access fault");
        assert!(!agrees(answer(23, gpa, (gpa + 4096) >> 2)));
        assert!(!agrees(answer(23, gpa + 4096, gpa >> 2)));
    }

    #[test]
    fn ept_tells_misconfiguration_from_violation() {
        let gpa = 0x4_0000_1008;
        let agrees =
            |expected, answer| agrees(Family::Ept, &query(Access::Write, expected), &answer);
        assert!(agrees(Expected::Malformed, answer(49, 0, gpa)));
        assert!(!agrees(Expected::Malformed, answer(48, 0x2, gpa)));
        assert!(!agrees(Expected::NotPresent, answer(49, 0, gpa)));
        assert!(agrees(Expected::NotPresent, answer(48, 0x182, gpa)));
        assert!(agrees(Expected::Permission, answer(48, 0x1aa, gpa)));
        assert!(
            !agrees(Expected::NotPresent, answer(48, 0x1aa, gpa)),
            "it is readable"
        );
        assert!(
            !agrees(Expected::Permission, answer(48, 0x1b2, gpa)),
            "it is writable"
        );
        assert!(
            !agrees(Expected::NotPresent, answer(48, 0x181, gpa)),
            "a load"
        );
        assert!(!agrees(Expected::NotPresent, answer(48, 0x182, gpa + 4096)));
    }

    #[test]
    fn npt_tells_reserved_bits_from_permissions() {
        let gpa = 0x4_0000_1008;
        let agrees =
            |expected, answer| agrees(Family::Npt, &query(Access::Write, expected), &answer);
        let info = |bits: u64| answer(0x400, 1 << 32 | 4 | bits, gpa);
        assert!(agrees(Expected::NotPresent, info(2)));
        assert!(agrees(Expected::Permission, info(3)));
        assert!(agrees(Expected::Malformed, info(11)));
        assert!(!agrees(Expected::Malformed, info(3)));
        assert!(!agrees(Expected::NotPresent, info(3)));
        assert!(!agrees(Expected::NotPresent, info(0)), "a load");
        assert!(
            !agrees(Expected::NotPresent, answer(0x4e, 2, gpa)),
            "a page fault of the guest"
        );
    }
}
