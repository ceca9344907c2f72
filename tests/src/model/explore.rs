//! The exploration: every state is visited, every rule checked in each, and from each an end must be
//! reachable once nothing more goes wrong.
//!
//! The first search is stateright's breadth-first search over all steps, faults among them. It collects
//! each state with its budget of faults taken away. The second search explores what can follow from
//! those without a fault and looks backwards from the ends: a state that no end can be reached from is
//! a violation.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::BuildHasher as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use stateright::{Checker, Model, Property};

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

    /// Explores it. With a planted fault the second search is left out and the first violation ends it.
    #[must_use]
    pub fn explore(self, threads: usize) -> Found {
        let begin = Instant::now();
        let checker = self.checker().threads(threads).spawn_bfs().join();
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
            let calm = std::mem::take(
                &mut *model.calm.lock().unwrap_or_else(PoisonError::into_inner),
            );
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
        world.steps(steps);
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
    let mut number: HashMap<u64, u32> = HashMap::new();
    let mut before: Vec<Vec<u32>> = Vec::new();
    let mut ends: Vec<u32> = Vec::new();
    let mut queue: VecDeque<World> = VecDeque::new();
    let meet = |world: World,
                    number: &mut HashMap<u64, u32>,
                    before: &mut Vec<Vec<u32>>,
                    queue: &mut VecDeque<World>| {
        let next = number.len() as u32;
        *number.entry(print(&world)).or_insert_with(|| {
            before.push(Vec::new());
            queue.push_back(world);
            next
        })
    };
    for world in roots {
        meet(world, &mut number, &mut before, &mut queue);
    }
    let mut steps = Vec::new();
    let mut seen = 0_u32;
    while let Some(world) = queue.pop_front() {
        // States are met in the order of their numbers.
        let at = seen;
        seen += 1;
        if world.has_ended() {
            ends.push(at);
        }
        steps.clear();
        world.steps(&mut steps);
        for step in &steps {
            let mut next = world.clone();
            next.take_step(*step, None);
            next.budget = Budget::NONE;
            let next = meet(next, &mut number, &mut before, &mut queue);
            before[next as usize].push(at);
        }
    }
    let mut reaches = vec![false; before.len()];
    let mut work = ends;
    for end in &work {
        reaches[*end as usize] = true;
    }
    while let Some(at) = work.pop() {
        for earlier in &before[at as usize] {
            if !std::mem::replace(&mut reaches[*earlier as usize], true) {
                work.push(*earlier);
            }
        }
    }
    let stuck = reaches.iter().position(|reaches| !reaches);
    (before.len(), stuck.map(|at| at as u32).and_then(|at| find(&number, at)))
}

/// Worlds are not kept, only their prints: the one that is stuck is told by its number.
fn find(_number: &HashMap<u64, u32>, _at: u32) -> Option<World> {
    None
}
