//! KVM's binary statistics: found by name once, then read by `pread` alone, which locks and stops
//! nothing.
//!
//! A name that the kernel does not have stays unset; so does a vCPU sum of which one vCPU lacks a
//! part.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _};

use slat_proto::v1;

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

/// The statistics of a VM and its vCPUs; by default nothing is offered.
#[derive(Debug, Default)]
pub(super) struct Stats {
    vm: Option<StatsFile>,
    vcpus: Vec<StatsFile>,
}

impl Stats {
    /// From the files the kernel gave.
    pub(super) fn new(vm: File, vcpus: Vec<File>) -> io::Result<Self> {
        Ok(Self {
            vm: Some(StatsFile::new(vm)?),
            vcpus: vcpus
                .into_iter()
                .map(StatsFile::new)
                .collect::<io::Result<_>>()?,
        })
    }

    pub(super) fn offers_faults(&self) -> bool {
        !self.vcpus.is_empty() && self.vcpus.iter().all(|vcpu| vcpu.has("pf_taken"))
    }

    pub(super) fn offers_flushes(&self) -> bool {
        self.vm
            .as_ref()
            .is_some_and(|vm| vm.has("remote_tlb_flush"))
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
            faults_taken: self.sum("pf_taken"),
            faults_fixed: self.sum("pf_fixed"),
            faults_fast: self.sum("pf_fast"),
            faults_spurious: self.sum("pf_spurious"),
            faults_emulated: self.sum("pf_emulate"),
            faults_guest: self.sum("pf_guest"),
            remote_tlb_flush_requests: vm("remote_tlb_flush_requests"),
            remote_tlb_flushes: vm("remote_tlb_flush"),
            vcpu_tlb_flushes: self.sum("tlb_flush"),
            exits: self.sum("exits"),
            pages_4k: vm("pages_4k"),
            pages_2m: vm("pages_2m"),
            pages_1g: vm("pages_1g"),
            dirty_pages_harvested: None,
            table_pages: None,
            huge_pages_split: None,
            huge_pages_recovered: None,
            flushes: Vec::new(),
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

    #[test]
    fn names_are_found_vcpus_summed_and_what_is_absent_stays_unset() {
        let stats = Stats::new(
            file(&[("remote_tlb_flush", 7), ("pages_4k", 9)]),
            vec![
                file(&[("exits", 1), ("pf_taken", 100), ("tlb_flush", 3)]),
                file(&[("pf_taken", 20), ("exits", 2)]),
            ],
        )
        .unwrap();
        assert!(stats.offers_faults() && stats.offers_flushes());
        let read = stats.read();
        assert_eq!(read.faults_taken, Some(120));
        assert_eq!(read.exits, Some(3));
        assert_eq!(read.remote_tlb_flushes, Some(7));
        assert_eq!(read.pages_4k, Some(9));
        assert_eq!(read.vcpu_tlb_flushes, None, "one vCPU lacks it");
        assert_eq!(read.remote_tlb_flush_requests, None);
    }

    #[test]
    fn without_files_nothing_is_offered() {
        let stats = Stats::default();
        assert!(!stats.offers_faults() && !stats.offers_flushes());
        assert_eq!(stats.read(), v1::MmuStats::default());
    }
}
