//! Runs the fuzz targets on stable Rust: `scripts/fuzz` calls it.
//!
//! Each target runs in a process of its own, whose memory and whose time for one input are limited.
//! The process writes each input to a file before it runs it, so that the input that ended the
//! process is known whatever the end was: a panic, an abort, no memory, or no time. That input is
//! saved under `fuzz/artifacts/TARGET`, and `--repro` runs it again.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fuzz_targets::{Search, Target, all, artifacts_dir, first_inputs, target};
use rustix::process::{Resource, Rlimit, setrlimit};

/// The longest time for one input.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);
/// What a target may take of memory beyond what it has after its first inputs.
const MEMORY_BYTES_MAX: u64 = 512 << 20;
/// The exit code of a process whose input took too long.
const EXIT_TIME: i32 = 99;

const USAGE: &str =
    "usage: fuzz [--seed N] [TARGET|all] [SECONDS]   search each target for so many seconds (10)
       fuzz --repro TARGET FILE...         run saved inputs
       fuzz --list                         list the targets
       fuzz --write-corpus DIR             write the first inputs, for cargo-fuzz";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["--worker", name, seconds, seed, current] => {
            worker(name, seconds, seed, Path::new(current))
        }
        ["--repro", name, files @ ..] if !files.is_empty() => repro(name, files),
        ["--list"] => list(),
        ["--write-corpus", dir] => write_corpus(Path::new(dir)),
        ["--seed", seed, rest @ ..] => search(rest, seed),
        rest if rest.first().is_none_or(|word| !word.starts_with('-')) => search(rest, "1"),
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("fuzz: {why}");
            ExitCode::from(2)
        }
    }
}

type Outcome = Result<bool, String>;

fn named(name: &str) -> Result<&'static Target, String> {
    target(name).ok_or_else(|| format!("there is no target {name:?}; see fuzz --list"))
}

fn number(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not a whole number"))
}

fn list() -> Outcome {
    for target in all() {
        println!("{:<20} {}", target.name, target.about);
    }
    Ok(true)
}

/// Searches one target or all of them, one after the other. `false`: something was found.
fn search(words: &[&str], seed: &str) -> Outcome {
    let (which, seconds) = match words {
        [] => ("all", "10"),
        [which] => (*which, "10"),
        [which, seconds] => (*which, *seconds),
        _ => return Err(USAGE.into()),
    };
    number(seconds)?;
    number(seed)?;
    let chosen = if which == "all" {
        all().iter().collect()
    } else {
        vec![named(which)?]
    };
    let mut found = 0;
    for target in chosen {
        found += u32::from(!search_one(target, seconds, seed)?);
    }
    println!("{found} of the targets found a fault");
    Ok(found == 0)
}

fn search_one(target: &Target, seconds: &str, seed: &str) -> Outcome {
    let dir = tempfile::tempdir().map_err(|e| format!("make a temporary directory: {e}"))?;
    let current = dir.path().join("current");
    let program = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
    let status = Command::new(program)
        .args(["--worker", target.name, seconds, seed])
        .arg(&current)
        .env("TMPDIR", dir.path())
        .status()
        .map_err(|e| format!("start a worker: {e}"))?;
    if status.success() {
        return Ok(true);
    }
    let input = read_current(&current)?;
    let file = artifacts_dir(target).join(format!("found-{}", blake3::hash(&input).to_hex()));
    save(&file, &input)?;
    let why = if status.code() == Some(EXIT_TIME) {
        "no end in time".to_owned()
    } else {
        status.to_string()
    };
    println!(
        "{}: FAULT ({why}); the input is saved: fuzz --repro {} {}",
        target.name,
        target.name,
        file.display()
    );
    Ok(false)
}

fn save(file: &Path, bytes: &[u8]) -> Result<(), String> {
    let write = || {
        std::fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
        File::create(file)?.write_all(bytes)
    };
    write().map_err(|e| format!("write {}: {e}", file.display()))
}

/// The input that a worker ran last: its length (u64 LE), then its bytes.
fn read_current(file: &Path) -> Result<Vec<u8>, String> {
    let bytes = std::fs::read(file).map_err(|e| format!("read {}: {e}", file.display()))?;
    let (len, rest) = bytes
        .split_first_chunk::<8>()
        .ok_or("the worker ended before its first input")?;
    let len = u64::from_le_bytes(*len) as usize;
    rest.get(..len)
        .map(<[u8]>::to_vec)
        .ok_or_else(|| "the worker ended while it wrote an input".into())
}

/// Searches one target in this process.
fn worker(name: &str, seconds: &str, seed: &str, current: &Path) -> Outcome {
    let (target, seconds, seed) = (named(name)?, number(seconds)?, number(seed)?);
    let current = File::create(current).map_err(|e| format!("write {}: {e}", current.display()))?;
    let watch = Watch::start();
    let mut search = Search::new(target, seed);
    let first = first_inputs(target).len() as u64;
    let begun = Instant::now();
    let mut bytes = Vec::new();
    while search.done() < first || begun.elapsed().as_secs() < seconds {
        let input = search.next_input();
        bytes.clear();
        bytes.extend_from_slice(&(input.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&input);
        current
            .write_all_at(&bytes, 0)
            .map_err(|e| format!("write the input: {e}"))?;
        if search.done() == first {
            limit_memory()?;
        }
        watch.begin();
        search.run(input);
        watch.end();
    }
    let rate = search.done() as f64 / begun.elapsed().as_secs_f64();
    println!(
        "{:<20} {search}, {rate:.0} a second, {} MiB at most",
        target.name,
        status_kib("VmHWM:").unwrap_or(0) >> 10
    );
    Ok(true)
}

/// Bounds the address space: a parser that asks for much more than it needs for its first inputs
/// ends the process.
fn limit_memory() -> Result<(), String> {
    let now = status_kib("VmSize:").ok_or("/proc/self/status names no VmSize")? << 10;
    let limit = Some(now + MEMORY_BYTES_MAX);
    setrlimit(
        Resource::As,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
    .map_err(|e| format!("limit the memory: {e}"))
}

/// A line of `/proc/self/status`, in KiB.
fn status_kib(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Ends the process when one input takes too long.
struct Watch {
    clock: Instant,
    /// When the input began, in milliseconds from `clock` and one more; 0: none runs.
    begun: Arc<AtomicU64>,
}

impl Watch {
    fn start() -> Self {
        let (clock, begun) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let seen = begun.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(200));
                let begun = seen.load(Ordering::Relaxed);
                let now = clock.elapsed().as_millis() as u64 + 1;
                if begun != 0 && now.saturating_sub(begun) > INPUT_TIME_MAX.as_millis() as u64 {
                    eprintln!("an input took more than {} s", INPUT_TIME_MAX.as_secs());
                    std::process::exit(EXIT_TIME);
                }
            }
        });
        Self { clock, begun }
    }

    fn begin(&self) {
        self.begun.store(
            self.clock.elapsed().as_millis() as u64 + 1,
            Ordering::Relaxed,
        );
    }

    fn end(&self) {
        self.begun.store(0, Ordering::Relaxed);
    }
}

fn repro(name: &str, files: &[&str]) -> Outcome {
    let target = named(name)?;
    for file in files {
        let input = std::fs::read(file).map_err(|e| format!("read {file}: {e}"))?;
        let begun = Instant::now();
        (target.run)(&input);
        println!(
            "{file}: no fault, {} bytes, {} ms",
            input.len(),
            begun.elapsed().as_millis()
        );
    }
    Ok(true)
}

fn write_corpus(dir: &Path) -> Outcome {
    for target in all() {
        for input in first_inputs(target) {
            let name: PathBuf = dir
                .join(target.name)
                .join(blake3::hash(&input).to_hex().as_str());
            save(&name, &input)?;
        }
    }
    Ok(true)
}
