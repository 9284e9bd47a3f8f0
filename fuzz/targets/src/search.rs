//! The search of one target: its first inputs, then changed ones. The same seed gives the same
//! inputs in the same order.

use std::collections::HashSet;
use std::fmt;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::mutate::Mutator;
use crate::{Target, first_inputs, outcome};

/// Inputs that are kept to be changed further, at most.
const INPUTS_KEPT_MAX: usize = 4096;

/// One search.
pub struct Search {
    target: &'static Target,
    rng: StdRng,
    inputs: Vec<Vec<u8>>,
    /// How many of them are the first ones.
    first: u64,
    /// How many inputs were run.
    done: u64,
    outcomes: HashSet<u64>,
}

impl Search {
    /// A search that this seed decides.
    pub fn new(target: &'static Target, seed: u64) -> Self {
        let inputs = first_inputs(target);
        let first = inputs.len() as u64;
        Self {
            target,
            rng: StdRng::seed_from_u64(seed),
            inputs,
            first,
            done: 0,
            outcomes: HashSet::new(),
        }
    }

    /// How many inputs were run.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// The next input: first each of the first inputs as it is.
    pub fn next_input(&mut self) -> Vec<u8> {
        if self.done < self.first {
            return self.inputs[self.done as usize].clone();
        }
        let base = self.rng.random_range(0..self.inputs.len().max(1));
        let mut input = self.inputs.get(base).cloned().unwrap_or_default();
        Mutator {
            rng: &mut self.rng,
            words: self.target.words,
            others: &self.inputs,
        }
        .change(&mut input);
        input
    }

    /// Runs an input. One that leads to something new is kept.
    pub fn run(&mut self, input: Vec<u8>) {
        outcome::take();
        (self.target.run)(&input);
        let is_new = self.outcomes.insert(outcome::take());
        let is_changed = self.done >= self.first;
        self.done += 1;
        if is_new && is_changed && self.inputs.len() < INPUTS_KEPT_MAX {
            self.inputs.push(input);
        }
    }
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} inputs, {} different outcomes",
            self.done,
            self.outcomes.len()
        )
    }
}
