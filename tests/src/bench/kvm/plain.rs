//! The plain ioctls that slot calls are held against, on a thread of their own.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
    time::Instant,
};

use anyhow::Context as _;
use rustix::thread::CpuSet;
use slat_vmm::RawVm;

use super::slots::Change;
use crate::bench::affinity;

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
