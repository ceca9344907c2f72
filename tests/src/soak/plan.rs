//! From a seed to steps. Pure: no I/O, no clock.
//!
//! A plan knows what it has asked for, so it asks only for what can be: no pause of a VM that was
//! deleted, no start of an agent that runs. It is told of VMs that could not be made. Where a VM is
//! by then it does not know: places are told relative to where the VM is found.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Hosts of the fleet, `host-a` and so on.
pub const HOSTS: [&str; 4] = ["host-a", "host-b", "host-c", "host-d"];
/// The host whose disk can be filled.
pub const SMALL_DISK: usize = 3;

/// VMs at one time.
const MOST_VMS: usize = 7;
/// Steps of a burst.
const BURST: std::ops::RangeInclusive<usize> = 2..=5;
/// A migration at full speed takes about as long.
const MILLIS: u64 = 400;
/// How far a clock is set ahead, seconds.
const AHEAD: [i64; 7] = [-7200, -600, -3, 0, 3, 600, 7200];
/// Agents that are down at one time.
const MOST_DOWN: usize = 2;

/// One thing that is done to the fleet. VMs are numbered as they are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Through the server, which chooses the host where none is named.
    Create {
        /// The new one.
        vm: u32,
        /// Index into [`HOSTS`].
        host: Option<usize>,
    },
    /// Behind the server's back at an agent, under the name that another VM has.
    Twin {
        /// The new one.
        vm: u32,
        /// Whose name it gets.
        of: u32,
        /// So many hosts after that one's.
        after: usize,
    },
    /// Stop the vCPUs.
    Pause(u32),
    /// And run them again.
    Resume(u32),
    /// Through the server, by uid.
    Delete(u32),
    /// To the host so many after its own.
    Migrate {
        /// Which.
        vm: u32,
        /// 1 to 3.
        after: usize,
        /// So slow that later steps find it under way.
        slow: bool,
    },
    /// And its destination's process is killed just after the source gave the VM away, so that only
    /// a frozen copy is left.
    Freeze {
        /// Which.
        vm: u32,
        /// As for `Migrate`.
        after: usize,
    },
    /// A frozen copy is taken back at its source.
    Adopt(u32),
    /// And in the midst of it somebody is killed; agents and the server come back at once.
    MigrateAndKill {
        /// Which.
        vm: u32,
        /// As for `Migrate`.
        after: usize,
        /// Who is killed.
        victim: Victim,
        /// So long after the migration was accepted.
        millis: u64,
    },
    /// The migration that the VM was asked to make last.
    Cancel(u32),
    /// The VM's process is stopped, is not deleted by that, and is deleted by force.
    ForceDelete(u32),
    /// kill -9 of the VM's process.
    KillVm(u32),
    /// kill -9 of a host's agent.
    KillAgent(usize),
    /// The agent again.
    StartAgent(usize),
    /// kill -9 of the server, and the server again.
    RestartServer,
    /// No more VMs there.
    Cordon(usize),
    /// VMs again.
    Uncordon(usize),
    /// The host's clock, whatever runs there.
    SetClock {
        /// Index into [`HOSTS`].
        host: usize,
        /// Of the server's, seconds.
        ahead: i64,
    },
    /// A second agent under the name of one that reports, for as long as it takes to be refused.
    AgentTwin(usize),
    /// No byte left on the disk of [`SMALL_DISK`] while a VM is created there.
    FullAgentDisk {
        /// The new one.
        vm: u32,
    },
    /// No byte left on the server's disk while a VM is to migrate.
    FullServerDisk {
        /// Which.
        vm: u32,
        /// As for `Migrate`.
        after: usize,
    },
    /// Several at once: nobody looks before the last.
    Burst(Vec<Step>),
}

/// Who is killed in the midst of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The source's process.
    Source,
    /// The destination's process.
    Destination,
    /// The source's agent.
    SourceAgent,
    /// The destination's agent.
    DestinationAgent,
    /// The server.
    Server,
}

impl Victim {
    const ALL: [Self; 5] = [
        Self::Source,
        Self::Destination,
        Self::SourceAgent,
        Self::DestinationAgent,
        Self::Server,
    ];
}

impl Step {
    /// The steps that it consists of.
    #[must_use]
    pub fn parts(&self) -> &[Self] {
        match self {
            Self::Burst(steps) => steps,
            step => std::slice::from_ref(step),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Planned {
    paused: bool,
    killed: bool,
    frozen: bool,
    moving: bool,
}

/// The steps of a seed, without an end.
#[derive(Debug)]
pub struct Plan {
    random: fastrand::Rng,
    /// Whether disks can be filled here.
    disks: bool,
    next: u32,
    vms: BTreeMap<u32, Planned>,
    down: BTreeSet<usize>,
    cordoned: BTreeSet<usize>,
}

impl Plan {
    /// The plan of a seed. `disks`: with steps that fill a disk.
    #[must_use]
    pub fn new(seed: u64, disks: bool) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            disks,
            next: 0,
            vms: BTreeMap::new(),
            down: BTreeSet::new(),
            cordoned: BTreeSet::new(),
        }
    }

    /// A VM could not be made, or is no more.
    pub fn without(&mut self, vm: u32) {
        self.vms.remove(&vm);
    }

    fn any_vm(&mut self, of: impl Fn(&Planned) -> bool) -> Option<u32> {
        let fit: Vec<u32> = self
            .vms
            .iter()
            .filter(|(_, planned)| of(planned))
            .map(|(vm, _)| *vm)
            .collect();
        self.random.choice(fit)
    }

    fn any_host(&mut self, of: impl Fn(&Self, usize) -> bool) -> Option<usize> {
        let fit: Vec<usize> = (0..HOSTS.len()).filter(|host| of(self, *host)).collect();
        self.random.choice(fit)
    }

    fn new_vm(&mut self) -> Option<u32> {
        if self.vms.len() >= MOST_VMS {
            return None;
        }
        let vm = self.next;
        self.next += 1;
        self.vms.insert(vm, Planned::default());
        Some(vm)
    }

    fn one(&mut self) -> Step {
        loop {
            if let Some(step) = self.draw() {
                return step;
            }
        }
    }

    /// A step of the drawn kind; `None` when it cannot be now.
    fn draw(&mut self) -> Option<Step> {
        let living = |planned: &Planned| !planned.killed && !planned.frozen;
        let still = |planned: &Planned| living(planned) && !planned.moving;
        let up = |plan: &Self, host| !plan.down.contains(&host);
        Some(match self.random.u32(0..100) {
            0..14 => {
                let host = self.random.usize(0..=HOSTS.len());
                Step::Create {
                    vm: self.new_vm()?,
                    host: (host < HOSTS.len() && up(self, host)).then_some(host),
                }
            }
            14..19 => {
                let of = self.any_vm(living)?;
                Step::Twin {
                    vm: self.new_vm()?,
                    of,
                    after: self.random.usize(1..HOSTS.len()),
                }
            }
            19..24 => {
                let vm = self.any_vm(|vm| still(vm) && !vm.paused)?;
                self.vms.entry(vm).or_default().paused = true;
                Step::Pause(vm)
            }
            24..30 => {
                let vm = self.any_vm(|vm| living(vm) && vm.paused)?;
                self.vms.entry(vm).or_default().paused = false;
                Step::Resume(vm)
            }
            30..37 => {
                let vm = self.any_vm(|vm| !vm.moving)?;
                self.vms.remove(&vm);
                Step::Delete(vm)
            }
            37..48 => {
                let vm = self.any_vm(still)?;
                Step::MigrateAndKill {
                    vm,
                    after: self.random.usize(1..HOSTS.len()),
                    victim: self.random.choice(Victim::ALL)?,
                    millis: self.random.u64(0..MILLIS),
                }
            }
            48..50 => {
                let vm = self.any_vm(still)?;
                self.vms.entry(vm).or_default().frozen = true;
                Step::Freeze {
                    vm,
                    after: self.random.usize(1..HOSTS.len()),
                }
            }
            50..52 => {
                let vm = self.any_vm(|vm| vm.frozen)?;
                let planned = self.vms.entry(vm).or_default();
                (planned.frozen, planned.paused) = (false, true);
                Step::Adopt(vm)
            }
            52..62 => {
                let vm = self.any_vm(still)?;
                let slow = self.random.bool();
                self.vms.entry(vm).or_default().moving = slow;
                Step::Migrate {
                    vm,
                    after: self.random.usize(1..HOSTS.len()),
                    slow,
                }
            }
            62..70 => {
                let vm = self.any_vm(|vm| vm.moving)?;
                self.vms.entry(vm).or_default().moving = false;
                Step::Cancel(vm)
            }
            70 => {
                let vm = self.any_vm(still)?;
                self.vms.remove(&vm);
                Step::ForceDelete(vm)
            }
            71..74 => {
                let vm = self.any_vm(living)?;
                self.vms.entry(vm).or_default().killed = true;
                Step::KillVm(vm)
            }
            74..79 if self.down.len() < MOST_DOWN => {
                let host = self.any_host(up)?;
                self.down.insert(host);
                Step::KillAgent(host)
            }
            74..88 => {
                let host = self.any_host(|plan, host| plan.down.contains(&host))?;
                self.down.remove(&host);
                Step::StartAgent(host)
            }
            88..90 => Step::SetClock {
                host: self.random.usize(0..HOSTS.len()),
                ahead: self.random.choice(AHEAD)?,
            },
            90..92 => Step::RestartServer,
            92..94 => match self.any_host(|plan, host| plan.cordoned.contains(&host)) {
                Some(host) => {
                    self.cordoned.remove(&host);
                    Step::Uncordon(host)
                }
                None => {
                    let host = self.any_host(up)?;
                    self.cordoned.insert(host);
                    Step::Cordon(host)
                }
            },
            94 => Step::AgentTwin(self.any_host(up)?),
            95..98 if self.disks && up(self, SMALL_DISK) => {
                Step::FullAgentDisk { vm: self.new_vm()? }
            }
            98.. if self.disks => Step::FullServerDisk {
                vm: self.any_vm(still)?,
                after: self.random.usize(1..HOSTS.len()),
            },
            _ => return None,
        })
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let first = self.one();
        if self.random.u32(0..100) >= 25 {
            return Some(first);
        }
        let mut burst = vec![first];
        let count = self.random.usize(BURST);
        burst.extend((1..count).map(|_| self.one()));
        Some(Step::Burst(burst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(seed: u64, disks: bool) -> Vec<Step> {
        let plan = Plan::new(seed, disks).take(2000);
        plan.flat_map(|step| step.parts().to_vec()).collect()
    }

    #[test]
    fn a_seed_is_a_plan() {
        assert_eq!(steps(7, true), steps(7, true));
        assert_ne!(steps(7, true), steps(8, true));
    }

    #[test]
    fn only_what_can_be_is_asked_for() {
        for seed in 0..20 {
            let (mut there, mut down) = (BTreeSet::new(), BTreeSet::new());
            for step in steps(seed, seed % 2 == 0) {
                match step {
                    Step::Create { vm, .. } | Step::FullAgentDisk { vm } => {
                        assert!(there.insert(vm));
                    }
                    Step::Twin { vm, of, after } => {
                        assert!(there.contains(&of) && (1..4).contains(&after));
                        assert!(there.insert(vm));
                    }
                    Step::Delete(vm) | Step::ForceDelete(vm) => assert!(there.remove(&vm)),
                    Step::Pause(vm)
                    | Step::Resume(vm)
                    | Step::Adopt(vm)
                    | Step::Cancel(vm)
                    | Step::KillVm(vm) => {
                        assert!(there.contains(&vm));
                    }
                    Step::Migrate { vm, after, .. }
                    | Step::MigrateAndKill { vm, after, .. }
                    | Step::Freeze { vm, after }
                    | Step::FullServerDisk { vm, after } => {
                        assert!(there.contains(&vm) && (1..4).contains(&after));
                    }
                    Step::KillAgent(host) => assert!(down.insert(host)),
                    Step::StartAgent(host) => assert!(down.remove(&host)),
                    Step::AgentTwin(host) => assert!(!down.contains(&host)),
                    Step::SetClock { host, .. } => assert!(host < HOSTS.len()),
                    Step::RestartServer | Step::Cordon(_) | Step::Uncordon(_) => {}
                    Step::Burst(_) => unreachable!("its parts were taken"),
                }
                assert!(there.len() <= MOST_VMS && down.len() <= MOST_DOWN);
            }
        }
    }

    #[test]
    fn every_kind_comes() {
        let kinds = |disks| -> BTreeSet<String> {
            let name = |step: Step| {
                let text = step.to_string();
                let end = text.find([' ', '(']).unwrap_or(text.len());
                text[..end].to_owned()
            };
            steps(3, disks).into_iter().map(name).collect()
        };
        assert_eq!(kinds(true).len(), 21);
        assert_eq!(kinds(false).len(), 19);
    }
}
