//! KVM's binary statistics: found by name once, then read by `pread` alone, which locks and stops
//! nothing.
//!
//! A name that the kernel does not have stays unset; so does a vCPU sum of which one vCPU lacks a
//! part, and what the kernel counts wrongly. What that leaves out is said with the counters
//! ([`Truth`], and the gaps of [`v1::MmuStats`]).
//!
//! # What kernels count
//! | | x86-64 | RISC-V | arm64 |
//! |---|---|---|---|
//! | faults (`pf_*`), by vCPU | yes | no: a [tracepoint](super::tracepoint) | no |
//! | `remote_tlb_flush_requests` | yes | full flushes | full flushes |
//! | `remote_tlb_flush` | those that reached a vCPU | stays 0 | every request |
//! | flushes of a range | as full ones | uncounted since Linux 6.17 | uncounted |
//! | `tlb_flush`, by vCPU | yes | no | no |
//! | `pages_*` | yes | no | no |
//!
//! A kernel that carries out the flush of a range itself returns before the common code counts it.
//! Which kernels do so cannot be asked, so where an architecture may, the gap is always said.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _};

use slat_proto::v1;

use super::tracepoint::FaultEvents;

/// Of the header: flags, name size, descriptors, id offset, descriptor offset, data offset.
const HEADER: usize = 24;
/// Of a descriptor before its name: flags, exponent, size, offset, bucket size.
const DESCRIPTOR: usize = 16;
/// Bounds on what the kernel says, far above what it has.
const MAX_DESCRIPTORS: usize = 4096;
const MAX_NAME: usize = 256;

/// The statistics of one VM or vCPU.
#[derive(Debug)]
struct StatsFile {
    file: File,
    /// Where each single-valued statistic is in the file.
    offsets: HashMap<String, u64>,
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    let word = bytes[at..at + 4].try_into().unwrap_or_default();
    u32::from_ne_bytes(word) as usize
}

impl StatsFile {
    fn new(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let (name_size, count) = (u32_at(&header, 4), u32_at(&header, 8));
        let (descriptors, data) = (u32_at(&header, 16), u32_at(&header, 20));
        if count > MAX_DESCRIPTORS || name_size > MAX_NAME {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let step = DESCRIPTOR + name_size;
        let mut block = vec![0; step * count];
        file.read_exact_at(&mut block, descriptors as u64)?;
        let offsets = block
            .chunks_exact(step)
            // A size above 1 is a histogram.
            .filter(|descriptor| descriptor[6..8] == 1u16.to_ne_bytes())
            .map(|descriptor| {
                let name: Vec<u8> = descriptor[DESCRIPTOR..]
                    .iter()
                    .copied()
                    .take_while(|byte| *byte != 0)
                    .collect();
                (
                    String::from_utf8_lossy(&name).into_owned(),
                    (data + u32_at(descriptor, 8)) as u64,
                )
            })
            .collect();
        Ok(Self { file, offsets })
    }

    fn get(&self, name: &str) -> Option<u64> {
        let mut word = [0; 8];
        self.file
            .read_exact_at(&mut word, *self.offsets.get(name)?)
            .ok()?;
        Some(u64::from_ne_bytes(word))
    }

    fn has(&self, name: &str) -> bool {
        self.offsets.contains_key(name)
    }
}

/// What an architecture's kernels count of flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Truth {
    /// `remote_tlb_flush` counts requests that reached a vCPU.
    pub(super) remote_flushes: bool,
    /// Flushes of a range are among the requests.
    pub(super) ranges: bool,
}

/// The statistics of a VM and its vCPUs; by default nothing is offered.
#[derive(Debug, Default)]
pub(super) struct Stats {
    truth: Truth,
    vm: Option<StatsFile>,
    vcpus: Vec<StatsFile>,
    /// What counts page faults where the files do not, and what it said when the VM was made: a
    /// process runs vCPUs to ask the CPU, too.
    events: FaultEvents,
    events_before: u64,
}

impl Stats {
    /// From the files the kernel gave.
    pub(super) fn new(vm: File, vcpus: Vec<File>, truth: Truth) -> io::Result<Self> {
        Ok(Self {
            truth,
            vm: Some(StatsFile::new(vm)?),
            vcpus: vcpus
                .into_iter()
                .map(StatsFile::new)
                .collect::<io::Result<_>>()?,
            ..Self::default()
        })
    }

    /// Takes page faults from `events`, from now on, if the files have none.
    pub(super) fn stand_in(&mut self, events: FaultEvents) {
        self.events_before = events.read().unwrap_or(0);
        self.events = events;
    }

    pub(super) fn offers_faults(&self) -> bool {
        self.faults_source() != v1::CounterSource::Unspecified
    }

    /// Who counts page faults.
    fn faults_source(&self) -> v1::CounterSource {
        let in_files = !self.vcpus.is_empty() && self.vcpus.iter().all(|one| one.has("pf_taken"));
        match (in_files, self.events.counts()) {
            (true, _) => v1::CounterSource::KvmStatistics,
            (false, true) => v1::CounterSource::Tracepoint,
            (false, false) => v1::CounterSource::Unspecified,
        }
    }

    /// Page faults until now.
    fn faults(&self) -> Option<u64> {
        match self.faults_source() {
            v1::CounterSource::Tracepoint => {
                Some(self.events.read()?.saturating_sub(self.events_before))
            }
            _ => self.sum("pf_taken"),
        }
    }

    pub(super) fn offers_flushes(&self) -> bool {
        self.vm
            .as_ref()
            .is_some_and(|vm| vm.has("remote_tlb_flush_requests"))
    }

    /// What of faults, flushes and mappings is not counted, or not all of it.
    fn gaps(&self) -> Vec<v1::CounterGap> {
        use v1::CounterGap as Gap;
        let of_vm = |name| self.vm.as_ref().is_some_and(|vm| vm.has(name));
        let of_vcpus = |name| !self.vcpus.is_empty() && self.vcpus.iter().all(|one| one.has(name));
        let reached = self.truth.remote_flushes && of_vm("remote_tlb_flush");
        let mappings = ["pages_4k", "pages_2m", "pages_1g"].into_iter().all(of_vm);
        let counted = [
            (Gap::Faults, self.offers_faults()),
            // A tracepoint tells that a fault came, and not what became of it.
            (
                Gap::FaultOutcomes,
                self.faults_source() != v1::CounterSource::Tracepoint,
            ),
            (Gap::FlushRequests, self.offers_flushes()),
            // Where no request is counted, no range is missing among them.
            (
                Gap::RangeFlushes,
                self.truth.ranges || !self.offers_flushes(),
            ),
            (Gap::FlushesThatReached, reached),
            (Gap::VcpuFlushes, of_vcpus("tlb_flush")),
            (Gap::Mappings, mappings),
        ];
        let gaps = counted.into_iter().filter(|(_, counted)| !counted);
        gaps.map(|(gap, _)| gap).collect()
    }

    /// Who counted; nobody where the kernel has no such files.
    fn source(&self) -> v1::CounterSource {
        match self.vm {
            Some(_) => v1::CounterSource::KvmStatistics,
            None => v1::CounterSource::Unspecified,
        }
    }

    fn sum(&self, name: &str) -> Option<u64> {
        if self.vcpus.is_empty() {
            return None;
        }
        self.vcpus
            .iter()
            .try_fold(0u64, |sum, vcpu| Some(sum.wrapping_add(vcpu.get(name)?)))
    }

    /// Now. Dirty pages are the caller's to add.
    pub(super) fn read(&self) -> v1::MmuStats {
        let vm = |name| self.vm.as_ref().and_then(|vm| vm.get(name));
        v1::MmuStats {
            faults_taken: self.faults(),
            faults_fixed: self.sum("pf_fixed"),
            faults_fast: self.sum("pf_fast"),
            faults_spurious: self.sum("pf_spurious"),
            faults_emulated: self.sum("pf_emulate"),
            faults_guest: self.sum("pf_guest"),
            remote_tlb_flush_requests: vm("remote_tlb_flush_requests"),
            remote_tlb_flushes: vm("remote_tlb_flush").filter(|_| self.truth.remote_flushes),
            vcpu_tlb_flushes: self.sum("tlb_flush"),
            exits: self.sum("exits"),
            pages_4k: vm("pages_4k"),
            pages_2m: vm("pages_2m"),
            pages_1g: vm("pages_1g"),
            dirty_pages_harvested: None,
            table_pages: None,
            huge_pages_split: None,
            huge_pages_recovered: None,
            backing_4k_bytes: None,
            backing_2m_bytes: None,
            backing_1g_bytes: None,
            read_only_writes: None,
            flushes: Vec::new(),
            source: self.source().into(),
            gaps: self.gaps().into_iter().map(Into::into).collect(),
            faults_source: self.faults_source().into(),
            faults_uncounted: match self.offers_faults() {
                true => String::new(),
                false => self.events.why_not().unwrap_or_default().to_owned(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A statistics file as the kernel lays it out, with these single values.
    fn file(values: &[(&str, u64)]) -> File {
        const NAME: usize = 48;
        let data = HEADER + values.len() * (DESCRIPTOR + NAME);
        let mut bytes = Vec::new();
        for word in [0, NAME, values.len(), 0, HEADER, data] {
            bytes.extend((word as u32).to_ne_bytes());
        }
        for (at, (name, _)) in values.iter().enumerate() {
            bytes.extend(0u32.to_ne_bytes());
            bytes.extend([0, 0, 1, 0]);
            bytes.extend((at as u32 * 8).to_ne_bytes());
            bytes.extend(0u32.to_ne_bytes());
            let mut padded = [0; NAME];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            bytes.extend(padded);
        }
        for (_, value) in values {
            bytes.extend(value.to_ne_bytes());
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    const WHOLE: Truth = Truth {
        remote_flushes: true,
        ranges: true,
    };

    fn gaps(stats: &Stats) -> Vec<v1::CounterGap> {
        stats.read().gaps().collect()
    }

    #[test]
    fn what_is_left_out_is_said_and_by_whom_the_rest_was_counted() {
        use v1::CounterGap::{
            Faults, FlushRequests, FlushesThatReached, Mappings, RangeFlushes, VcpuFlushes,
        };
        let all = [
            ("remote_tlb_flush", 7),
            ("remote_tlb_flush_requests", 8),
            ("pages_4k", 9),
            ("pages_2m", 1),
            ("pages_1g", 0),
        ];
        let vcpu = || file(&[("pf_taken", 1), ("tlb_flush", 2)]);
        let x86 = Stats::new(file(&all), vec![vcpu(), vcpu()], WHOLE).unwrap();
        assert_eq!(gaps(&x86), []);
        assert_eq!(x86.read().source(), v1::CounterSource::KvmStatistics);
        let riscv = Stats::new(
            file(&all[..2]),
            vec![file(&[("exits", 1)])],
            Truth::default(),
        );
        let missing = [
            Faults,
            RangeFlushes,
            FlushesThatReached,
            VcpuFlushes,
            Mappings,
        ];
        assert_eq!(gaps(&riscv.unwrap()), missing);
        // One vCPU that lacks a part makes the sum none.
        let torn = Stats::new(file(&all), vec![vcpu(), file(&[("pf_taken", 1)])], WHOLE).unwrap();
        assert_eq!(gaps(&torn), [VcpuFlushes]);
        assert_eq!(torn.read().vcpu_tlb_flushes, None);
        let nothing = gaps(&Stats::default());
        assert!(nothing.contains(&FlushRequests) && !nothing.contains(&RangeFlushes));
    }

    #[test]
    fn a_refused_tracepoint_says_why_and_is_asked_only_where_files_have_no_faults() {
        let why = "no tracepoint in their place: tracefs is not mounted";
        let with = |vcpu| {
            let mut stats = Stats::new(file(&[]), vec![file(vcpu)], Truth::default()).unwrap();
            stats.stand_in(FaultEvents::refused(why));
            stats
        };
        let riscv = with(&[("exits", 1)]);
        assert!(!riscv.offers_faults());
        let read = riscv.read();
        assert_eq!(
            (read.faults_taken, read.faults_uncounted.as_str()),
            (None, why)
        );
        assert_eq!(read.faults_source(), v1::CounterSource::Unspecified);
        let gaps: Vec<_> = read.gaps().collect();
        assert!(gaps.contains(&v1::CounterGap::Faults), "{gaps:?}");
        assert!(!gaps.contains(&v1::CounterGap::FaultOutcomes), "{gaps:?}");
        let read = with(&[("pf_taken", 5)]).read();
        assert_eq!(
            (read.faults_taken, read.faults_uncounted.as_str()),
            (Some(5), "")
        );
        assert_eq!(read.faults_source(), v1::CounterSource::KvmStatistics);
    }

    #[test]
    fn names_are_found_vcpus_summed_and_what_is_absent_stays_unset() {
        let stats = Stats::new(
            file(&[
                ("remote_tlb_flush", 7),
                ("remote_tlb_flush_requests", 8),
                ("pages_4k", 9),
            ]),
            vec![
                file(&[("exits", 1), ("pf_taken", 100), ("tlb_flush", 3)]),
                file(&[("pf_taken", 20), ("exits", 2)]),
            ],
            WHOLE,
        )
        .unwrap();
        assert!(stats.offers_faults() && stats.offers_flushes());
        let read = stats.read();
        assert_eq!(read.faults_taken, Some(120));
        assert_eq!(read.exits, Some(3));
        assert_eq!(read.remote_tlb_flushes, Some(7));
        assert_eq!(read.pages_4k, Some(9));
        assert_eq!(read.vcpu_tlb_flushes, None, "one vCPU lacks it");
        assert_eq!(read.remote_tlb_flush_requests, Some(8));
    }

    #[test]
    fn a_counter_that_does_not_count_is_not_offered() {
        let vm = file(&[("remote_tlb_flush", 0), ("remote_tlb_flush_requests", 8)]);
        let stats = Stats::new(vm, Vec::new(), Truth::default()).unwrap();
        assert!(stats.offers_flushes());
        assert_eq!(stats.read().remote_tlb_flushes, None);
        assert_eq!(stats.read().remote_tlb_flush_requests, Some(8));
    }

    #[test]
    fn without_files_nothing_is_offered() {
        let stats = Stats::default();
        assert!(!stats.offers_faults() && !stats.offers_flushes());
        let read = v1::MmuStats {
            gaps: Vec::new(),
            ..stats.read()
        };
        assert_eq!(read, v1::MmuStats::default(), "nothing is 0");
    }
}
