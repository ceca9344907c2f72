//! Changes of a slot, as the API has them and as the plain ioctls that its calls are held against,
//! which a thread of their own makes.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
    time::Instant,
};

use anyhow::Context as _;
use rustix::thread::CpuSet;
use slat_proto::v1;
use slat_vmm::{RawVm, SpareSlot};

use crate::{
    bench::affinity,
    slots::{create, delete, read_only, relocate},
};

pub(super) const PAGES: u64 = 1;
const PLACE: u64 = 1 << 20;
const ELSEWHERE: u64 = 3 << 20;

#[derive(Clone, Copy)]
pub(super) enum Change {
    Create,
    Move,
    Flags,
    Delete,
}

/// In this order, so that each finds what it needs.
pub(super) const ALL: [(Change, &str); 4] = [
    (Change::Create, "create"),
    (Change::Move, "move"),
    (Change::Flags, "set read-only"),
    (Change::Delete, "delete"),
];

fn at(base: u64, index: u32) -> u64 {
    base + u64::from(index) * 2 * PAGES
}

impl Change {
    /// Through the API, of the slot `index`.
    pub(super) fn message(self, index: u32) -> v1::SlotChange {
        let slot = index + 1;
        match self {
            Self::Create => create(slot, at(PLACE, index), PAGES),
            Self::Move => relocate(slot, at(ELSEWHERE, index)),
            Self::Flags => read_only(slot, true),
            Self::Delete => delete(slot),
        }
    }

    /// What it is to the kernel.
    pub(super) fn ioctls(self) -> &'static str {
        match self {
            Self::Flags => "two ioctls",
            _ => "the ioctl",
        }
    }

    fn raw(self, vm: &RawVm, index: u32) -> anyhow::Result<()> {
        let slot = |base, read_only| SpareSlot {
            index,
            base_gfn: at(base, index),
            read_only,
        };
        match self {
            Self::Create => vm.set(slot(PLACE, false))?,
            Self::Move => vm.set(slot(ELSEWHERE, false))?,
            Self::Flags => {
                vm.delete(slot(ELSEWHERE, false))?;
                vm.set(slot(ELSEWHERE, true))?;
            }
            Self::Delete => vm.delete(slot(ELSEWHERE, true))?,
        }
        Ok(())
    }
}

struct Order {
    change: Change,
    count: u32,
    cpus: CpuSet,
}

/// Makes the plain ioctls on a thread that was woken for them, as a VM's process is for a call: on
/// one that never slept the kernel's wait for its readers is shorter.
pub(super) struct Plain {
    orders: Option<SyncSender<Order>>,
    times: Receiver<anyhow::Result<f64>>,
    thread: Option<JoinHandle<()>>,
}

impl Plain {
    pub(super) fn new(vm: RawVm) -> anyhow::Result<Self> {
        let (orders, ordered) = sync_channel::<Order>(1);
        let (told, times) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("plain".to_owned())
            .spawn(move || {
                for order in ordered {
                    if told.send(made(&vm, &order)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            orders: Some(orders),
            times,
            thread: Some(thread),
        })
    }

    /// Nanoseconds of `count` such changes on these processors.
    pub(super) fn time(&self, change: Change, count: u32, cpus: &CpuSet) -> anyhow::Result<f64> {
        let orders = self.orders.as_ref().context("the thread has ended")?;
        orders.send(Order {
            change,
            count,
            cpus: *cpus,
        })?;
        self.times.recv()?
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn made(vm: &RawVm, order: &Order) -> anyhow::Result<f64> {
    affinity::keep(&order.cpus)?;
    let begun = Instant::now();
    for index in 0..order.count {
        order.change.raw(vm, index)?;
    }
    Ok(begun.elapsed().as_nanos() as f64)
}
