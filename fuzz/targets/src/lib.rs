//! Fuzzing: one function for each parser that input from a peer, a file or a client reaches.
//!
//! Owns the targets, their first inputs, and the changes of inputs. Three callers use it: the
//! program `fuzz` of this crate (`scripts/fuzz`, stable Rust), the tests of this crate (a short
//! form, the same inputs in each run), and the shims in `fuzz/fuzz_targets` for cargo-fuzz. A
//! target panics where a property does not hold. It keeps nothing but files in a temporary
//! directory, so nothing has to survive a crash.

mod corpus;
mod mutate;
mod outcome;
mod search;
mod targets;

pub use corpus::{artifacts_dir, first_inputs};
pub use search::Search;

/// A parser, and what is checked of it.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: of the shim, of the folder with its inputs, and on the command line.
    pub name: &'static str,
    /// What it parses.
    pub about: &'static str,
    /// Parses one input, and checks the properties.
    pub run: fn(&[u8]),
    /// Valid inputs, made by code.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the format, which are put into inputs.
    pub words: &'static [&'static str],
    /// How many inputs the tests of this crate run.
    pub short: u32,
}

/// All targets.
pub fn all() -> &'static [Target] {
    targets::ALL
}

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    all().iter().find(|target| target.name == name)
}

/// Runs one input: what a shim of cargo-fuzz calls.
pub fn run(name: &str, input: &[u8]) {
    let target = target(name);
    assert!(target.is_some(), "there is no target {name:?}");
    if let Some(target) = target {
        (target.run)(input);
    }
}
