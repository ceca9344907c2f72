//! What a guest has to bear: readers of its dirty pages, and its memory being a VM's.
//!
//! Random access is a chain of loads, each at an address that depends on the one before: a guest of
//! x86-64 code, and the same steps in this process over anonymous memory with transparent huge
//! pages. They run in turns, never at once.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, Backend, vm_spec::Guest};
use tokio::time::sleep;

use super::{HOST, Lab, size};
use crate::{
    bench::{
        mapping::Mapping,
        readers::{Readers, window},
        rows::{Goal, Row},
    },
    guest::{MIB, busy},
    memory_file::MemoryFile,
};

/// Of the windows in which a guest writes.
const WRITING: Duration = Duration::from_secs(1);
const PACE: Duration = Duration::from_millis(100);
/// Of the windows of random access.
const ACCESS: Duration = Duration::from_millis(500);
/// How long huge pages are waited for.
const HUGE_LIMIT: Duration = Duration::from_secs(90);
const LOW_END: u64 = 3 << 30;
const HOLE: u64 = 1 << 30;
/// Where the guest of [`chain`] counts its loads, once in so many.
const COUNTER: u64 = 0x30_0000;
const COUNTED: u64 = 4096;
/// Of the generator.
const FACTOR: u64 = 6_364_136_223_846_793_005;
const STEP: u64 = 1_442_695_040_888_963_407;

/// The guest's time for a page that it writes, with no reader of dirty pages, with one, with four.
///
/// # Errors
/// When something refuses.
pub async fn readers(lab: &Lab, memory_mib: u64) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, memory_mib, 1, None);
    let vm = lab.fleet.run_vm("writer", HOST, spec).await?;
    let what = format!("a guest writes a page, {}", size(memory_mib));
    let mut rows = vec![
        Row::new(format!("{what}, one cursor"), "no cursor", None),
        Row::new(format!("{what}, four cursors"), "no cursor", None),
        Row::new(
            format!("{what}, four cursors"),
            "one cursor",
            Some(Goal::AtMost(1.1)),
        ),
    ];
    // The first writes to new memory.
    for run in 0..=lab.runs * 3 {
        let mut nanos = [0.0; 3];
        for (nanos, readers) in nanos.iter_mut().zip([0, 1, 4]) {
            let how = Readers {
                readers,
                together: true,
                length: WRITING,
                pace: PACE,
            };
            *nanos = 1e9 / window(&lab.fleet, &vm.name, how).await?.rate;
        }
        let [none, one, four] = nanos;
        if run > 0 {
            rows[0].add(one, none);
            rows[1].add(four, none);
            rows[2].add(four, one);
        }
    }
    lab.delete(&vm).await?;
    Ok(rows)
}

/// Loads at random from 2^`bits` bytes of memory from address 0 on, without the hole.
fn chain(bits: u8) -> Vec<u8> {
    [
        &[0x49, 0xb8][..],               // mov r8, FACTOR
        &FACTOR.to_le_bytes(),           //
        &[0x49, 0xb9],                   // mov r9, STEP
        &STEP.to_le_bytes(),             //
        &[0x49, 0xba],                   // mov r10, LOW_END
        &LOW_END.to_le_bytes(),          //
        &[0x49, 0xbb],                   // mov r11, HOLE
        &HOLE.to_le_bytes(),             //
        &[0xbe, 0, 0, 0x30, 0],          // mov esi, COUNTER
        &[0x31, 0xc9],                   // xor ecx, ecx
        &[0x31, 0xc0],                   // xor eax, eax
        &[0x49, 0x0f, 0xaf, 0xc0],       // again: imul rax, r8
        &[0x4c, 0x01, 0xc8],             // add rax, r9
        &[0x48, 0x89, 0xc3],             // mov rbx, rax
        &[0x48, 0xc1, 0xeb, 64 - bits],  // shr rbx, 64 - bits
        &[0x48, 0x83, 0xe3, 0xf8],       // and rbx, -8
        &[0x4c, 0x39, 0xd3],             // cmp rbx, r10
        &[0x72, 0x03],                   // jb load
        &[0x4c, 0x01, 0xdb],             // add rbx, r11
        &[0x48, 0x03, 0x03],             // load: add rax, [rbx]
        &[0x48, 0xff, 0xc1],             // inc rcx
        &[0xf7, 0xc1, 0xff, 0x0f, 0, 0], // test ecx, COUNTED - 1
        &[0x75, 0xd8],                   // jnz again
        &[0x48, 0x89, 0x0e],             // mov [rsi], rcx
        &[0xeb, 0xd3],                   // jmp again
    ]
    .concat()
}

/// The same steps in this process, until `length` is over; nanoseconds a load.
fn own(memory: &Mapping, bits: u8, state: &mut u64, length: Duration) -> f64 {
    let words = memory.words();
    let begun = Instant::now();
    let mut loads = 0;
    while begun.elapsed() < length {
        for _ in 0..COUNTED {
            let next = state.wrapping_mul(FACTOR).wrapping_add(STEP);
            let at = (next >> (64 - bits)) / 8;
            *state = next.wrapping_add(words[at as usize].load(Ordering::Relaxed));
        }
        loads += COUNTED;
    }
    begun.elapsed().as_nanos() as f64 / loads as f64
}

/// Loads that the guest has counted, now.
fn counted(memory: &MemoryFile) -> anyhow::Result<(u64, Instant)> {
    Ok((memory.word(COUNTER)?, Instant::now()))
}

/// Waits until nearly all of the guest's memory is of 2 MiB pages, within a bound; returns per
/// cent.
async fn huge(lab: &Lab, vm: &v1::Vm, memory_mib: u64) -> anyhow::Result<u64> {
    let begun = Instant::now();
    loop {
        let now = lab.fleet.vm(&lab.fleet.agent(HOST), &vm.name).await?;
        let stats = now.mmu_stats.unwrap_or_default();
        let percent = stats.backing_2m_bytes.unwrap_or(0) * 100 / (memory_mib * MIB);
        if percent >= 99 || begun.elapsed() > HUGE_LIMIT {
            return Ok(percent);
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Random access of a guest beside the same in this process; `None`, and why, where this cannot be
/// measured.
///
/// # Errors
/// When something refuses.
pub async fn access(lab: &Lab, memory_mib: u64) -> anyhow::Result<Option<Row>> {
    if cfg!(not(target_arch = "x86_64")) {
        eprintln!("SKIPPED: random access: its guest is x86-64 code");
        return Ok(None);
    }
    let bits = u8::try_from((memory_mib * MIB).ilog2())?;
    let spec = v1::VmSpec {
        memory_bytes: memory_mib * MIB,
        vcpus: 1,
        backend: Backend::Kvm.into(),
        guest: Some(Guest::RawImage(v1::RawImage {
            image: chain(bits),
            ..Default::default()
        })),
        // As the process beside it: all there before the first load. A guest that touches memory
        // by itself gets its huge pages later, a little at a time.
        prefault: true,
        ..Default::default()
    };
    let vm = lab.create("access", spec).await?;
    let there = |vm: &v1::Vm| vm.prefault.as_ref().is_none_or(|it| it.done);
    let agent = lab.fleet.agent(HOST);
    lab.fleet
        .vm_until(&agent, &vm.name, "its memory is populated", there)
        .await?;
    lab.start(&vm).await?;
    let percent = huge(lab, &vm, memory_mib).await?;
    lab.pause(&vm).await?;
    let pid = lab.fleet.vm(&agent, &vm.name).await?.pid;
    let counter = MemoryFile::of(pid, 0)?;
    let mut memory = Mapping::anonymous_huge(1 << bits)?;
    let mut row = Row::new(
        format!(
            "random access, guest of {} ({percent} % in 2 MiB pages)",
            size(memory_mib)
        ),
        "a process with transparent huge pages",
        None,
    );
    let mut state = 0;
    for run in 0..=lab.runs * 2 {
        lab.resume(&vm).await?;
        // After a resume translations may be cold.
        sleep(ACCESS / 2).await;
        let (before, begun) = counted(&counter)?;
        sleep(ACCESS).await;
        let (after, ended) = counted(&counter)?;
        lab.pause(&vm).await?;
        ensure!(after > before, "the guest does nothing");
        let slat = (ended - begun).as_nanos() as f64 / (after - before) as f64;
        let from = state;
        let task = tokio::task::spawn_blocking(move || {
            let mut state = from;
            own(&memory, bits, &mut state, ACCESS / 2);
            let nanos = own(&memory, bits, &mut state, ACCESS);
            (memory, state, nanos)
        });
        let (back, last, peer) = task.await.context("random access")?;
        (memory, state) = (back, last);
        if run > 0 {
            row.add(slat, peer);
        }
    }
    lab.delete(&vm).await?;
    Ok(Some(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_jumps_to_where_its_loop_begins() {
        let code = chain(32);
        let find = |bytes: &[u8]| code.windows(bytes.len()).position(|at| at == bytes);
        let again = find(&[0x49, 0x0f, 0xaf]).unwrap();
        for jump in [find(&[0x75, 0xd8]).unwrap(), find(&[0xeb, 0xd3]).unwrap()] {
            let by = i8::from_le_bytes([code[jump + 1]]);
            let to = (jump + 2).checked_add_signed(isize::from(by)).unwrap();
            assert_eq!(to, again, "the jump at {jump}");
        }
    }

    #[test]
    fn a_process_goes_through_its_memory() {
        let memory = Mapping::anonymous_huge(2 << 20).unwrap();
        let mut state = 0;
        let nanos = own(&memory, 21, &mut state, Duration::from_millis(1));
        assert!(nanos > 0.0 && state != 0);
    }
}
