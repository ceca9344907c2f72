//! The exploration: every state is visited, every rule checked in each, and from each an end must
//! be reachable once nothing more goes wrong.
//!
//! The first search is stateright's breadth-first search over all steps, faults among them. It
//! collects each state with its budget of faults taken away. The second search explores what can
//! follow from those without a fault and looks backwards from the ends: a state that no end can be
//! reached from is a violation.

use std::{
    collections::{HashMap, HashSet, VecDeque, hash_map::Entry},
    hash::BuildHasher as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::{
    planted::Planted,
    property::RULES,
    step::Step,
    world::{Budget, World},
};

/// What is explored.
#[derive(Debug)]
pub struct Handover {
    budget: Budget,
    planted: Option<Planted>,
    calm: Mutex<HashSet<World>>,
}

/// What an exploration found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Different states.
    pub states: usize,
    /// States that can follow once nothing more goes wrong.
    pub calm_states: usize,
    /// Rules that were broken, each with the steps that lead there.
    pub violations: Vec<(String, Vec<String>)>,
    /// How long it took.
    pub took: Duration,
}

const REACHABLE: &str = "an end is reachable once nothing more goes wrong";

impl Handover {
    /// All that can happen within `budget`.
    #[must_use]
    pub fn new(budget: Budget, planted: Option<Planted>) -> Self {
        Self {
            budget,
            planted,
            calm: Mutex::default(),
        }
    }

    /// Explores it. With a planted fault the second search is left out and the first violation ends
    /// it.
    #[must_use]
    pub fn explore(self, threads: usize) -> Found {
        let begin = Instant::now();
        let finish = match self.planted {
            Some(_) => HasDiscoveries::Any,
            None => HasDiscoveries::All,
        };
        let checker = self.checker().threads(threads).finish_when(finish);
        let checker = checker.spawn_bfs().join();
        let mut found = Found {
            states: checker.unique_state_count(),
            ..Found::default()
        };
        for (name, path) in checker.discoveries() {
            let steps = path
                .into_actions()
                .into_iter()
                .map(|step| format!("{step:?}"))
                .collect();
            found.violations.push((name.to_owned(), steps));
        }
        let model = checker.model();
        if model.planted.is_none() {
            let calm =
                std::mem::take(&mut *model.calm.lock().unwrap_or_else(PoisonError::into_inner));
            let (states, stuck) = without_end(calm);
            found.calm_states = states;
            if let Some(world) = stuck {
                found
                    .violations
                    .push((REACHABLE.to_owned(), vec![format!("{world:#?}")]));
            }
        }
        found.took = begin.elapsed();
        found
    }
}

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let mut world = World::new(self.budget);
        world.feed_server(
            slat_server::migration::protocol::Input::Admitted,
            self.planted,
        );
        vec![world]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(steps, self.planted);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take_step(step, self.planted);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! rules {
            ($($at:literal)*) => {
                vec![$(Property::always(RULES[$at].name, |model: &Self, world: &World| {
                    (RULES[$at].holds)(world, model.planted)
                }),)*]
            };
        }
        let mut properties = rules!(0 1 2 3 4 5 6);
        if self.planted.is_none() {
            properties.push(Property::always("", |model: &Self, world: &World| {
                let calm = World {
                    budget: Budget::NONE,
                    ..world.clone()
                };
                model
                    .calm
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(calm);
                true
            }));
        }
        properties
    }
}

/// How many states can follow `roots` without a fault, and one that no end can be reached from.
fn without_end(roots: HashSet<World>) -> (usize, Option<World>) {
    let hasher = std::hash::RandomState::new();
    let print = |world: &World| hasher.hash_one(world);
    // The roots are kept, what follows from them only by its print: a root that no end can be
    // reached from is what there is to show.
    let roots: Vec<World> = roots.into_iter().collect();
    let mut graph = Graph::default();
    let mut queue: VecDeque<World> = VecDeque::new();
    for world in &roots {
        if graph.meet(print(world)).1 {
            queue.push_back(world.clone());
        }
    }
    let mut steps = Vec::new();
    let mut at = 0_u32;
    while let Some(world) = queue.pop_front() {
        if world.has_ended() {
            graph.ends.push(at);
        }
        steps.clear();
        world.steps(&mut steps, None);
        for step in &steps {
            let mut next = world.clone();
            next.take_step(*step, None);
            next.budget = Budget::NONE;
            let (number, new) = graph.meet(print(&next));
            graph.before[number as usize].push(at);
            if new {
                queue.push_back(next);
            }
        }
        // States are looked at in the order of their numbers.
        at += 1;
    }
    let reaches = graph.reaches_an_end();
    let stuck = reaches.iter().position(|reaches| !reaches);
    let shown = stuck.map(|at| roots.get(at).unwrap_or(&roots[0]).clone());
    (graph.before.len(), shown)
}

/// What leads to what, by number.
#[derive(Debug, Default)]
struct Graph {
    numbers: HashMap<u64, u32>,
    before: Vec<Vec<u32>>,
    ends: Vec<u32>,
}

impl Graph {
    /// The number of a state, and whether it is new.
    fn meet(&mut self, print: u64) -> (u32, bool) {
        let next = self.numbers.len() as u32;
        match self.numbers.entry(print) {
            Entry::Occupied(known) => (*known.get(), false),
            Entry::Vacant(new) => {
                new.insert(next);
                self.before.push(Vec::new());
                (next, true)
            }
        }
    }

    fn reaches_an_end(&self) -> Vec<bool> {
        let mut reaches = vec![false; self.before.len()];
        let mut work = self.ends.clone();
        for end in &work {
            reaches[*end as usize] = true;
        }
        while let Some(at) = work.pop() {
            for earlier in &self.before[at as usize] {
                if !std::mem::replace(&mut reaches[*earlier as usize], true) {
                    work.push(*earlier);
                }
            }
        }
        reaches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_break_leads_to_an_end_and_never_to_two_owners() {
        let budget = Budget {
            breaks: 1,
            ..Budget::NONE
        };
        let found = Handover::new(budget, None).explore(2);
        assert!(found.violations.is_empty(), "{:#?}", found.violations);
        assert!(found.states > 10_000, "{}", found.states);
    }

    #[test]
    fn a_clock_that_decides_is_found() {
        let planted = Planted::TimerDecides;
        let found = Handover::new(planted.budget(), Some(planted)).explore(2);
        assert!(!found.violations.is_empty());
    }

    #[test]
    fn a_switchover_that_goes_back_leads_to_an_end_and_too_late_is_found() {
        let budget = Budget {
            overruns: 1,
            ..Budget::NONE
        };
        let found = Handover::new(budget, None).explore(2);
        assert!(found.violations.is_empty(), "{:#?}", found.violations);
        assert!(found.states > 5000, "{}", found.states);
        let late = Planted::GoesBackLate;
        let found = Handover::new(late.budget(), Some(late)).explore(2);
        assert!(!found.violations.is_empty());
    }

    #[test]
    fn a_grant_that_ends_leads_to_an_end_and_one_that_decides_is_found() {
        let budget = Budget {
            expiries: 1,
            ..Budget::NONE
        };
        let found = Handover::new(budget, None).explore(2);
        assert!(found.violations.is_empty(), "{:#?}", found.violations);
        assert!(found.states > 5000, "{}", found.states);
        for fault in [Planted::ExpiryEndsReady, Planted::ExpiryTakesBack] {
            let found = Handover::new(fault.budget(), Some(fault)).explore(2);
            assert!(!found.violations.is_empty(), "{}", fault.name());
            // The fault shows by the end of a grant, and by nothing else.
            let ends = |steps: &Vec<String>| steps.iter().any(|step| step.ends_with("GrantEnds"));
            assert!(found.violations.iter().all(|(_, steps)| ends(steps)));
        }
    }

    #[test]
    fn a_state_without_an_end_is_found() {
        let mut graph = Graph::default();
        for print in 0..4 {
            graph.meet(print);
        }
        // 0 -> 1 -> end 2; 3 leads to itself.
        graph.before[1].push(0);
        graph.before[2].push(1);
        graph.before[3].push(3);
        graph.ends.push(2);
        assert_eq!(graph.reaches_an_end(), [true, true, true, false]);
    }
}
