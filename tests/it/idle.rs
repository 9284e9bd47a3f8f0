//! The memory and processor time of two idle daemons.

use std::path::PathBuf;
use std::time::Instant;

use crate::support::daemon::{Daemon, Hub, PACKHORSE, Site, SiteSpec};
use crate::support::{Scratch, data, limit, secs, wait_for};

/// The measured time in seconds. `PACKHORSE_IDLE_SECONDS=600` runs the full test.
const SECONDS: u64 = 20;
/// Resident memory of an idle daemon, of a build that is optimised.
const RESIDENT_MAX: u64 = 40 << 20;
/// The part of it that is no file: heap and stacks. The rest is code, of which an optimised build
/// has 23 MiB resident and an unoptimised one 40, which says nothing of the program that people
/// run.
const ANONYMOUS_MAX: u64 = 16 << 20;

/// An optimised program to be measured instead of the one under test: `PACKHORSE_IDLE_PROGRAM`.
fn optimised() -> Option<PathBuf> {
    match std::env::var_os("PACKHORSE_IDLE_PROGRAM") {
        Some(path) => Some(path.into()),
        None => (!cfg!(debug_assertions)).then(|| PACKHORSE.into()),
    }
}

/// The clock ticks of processor time that all threads of a daemon have used.
fn ticks(daemon: &Daemon) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    // The name in brackets may contain spaces. User and system time are fields 14 and 15; field 3
    // is the first after the name.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn two_idle_daemons_use_little_memory_and_processor_time() {
    let seconds = std::env::var("PACKHORSE_IDLE_SECONDS").map_or(SECONDS, |s| {
        s.parse().expect("PACKHORSE_IDLE_SECONDS is a number")
    });
    let _limit = limit(secs(seconds + 90));
    let optimised = optimised();
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    if let Some(program) = &optimised {
        for daemon in [&mut *hub, &mut *site] {
            daemon.stop();
            daemon.run_program(program);
            daemon.start();
        }
    }
    // The daemons first do some work: they must release the memory that they used for it.
    data::model(&scratch.join("model"), 8 << 20);
    hub.publish(
        &scratch.join("model"),
        "model/m:v1",
        &["--to", "all", "--wait"],
    );

    let ticks_a_second: u64 = crate::support::command::tool("getconf", &["CLK_TCK"])
        .trim()
        .parse()
        .unwrap();
    let began = Instant::now();
    let before = [ticks(&hub), ticks(&site)];
    wait_for("the measured time is over", secs(seconds + 5), || {
        (began.elapsed() >= secs(seconds)).then_some(())
    });
    let after = [ticks(&hub), ticks(&site)];
    for (i, daemon) in [&*hub, &*site].into_iter().enumerate() {
        let used =
            (after[i] - before[i]) as f64 / ticks_a_second as f64 / began.elapsed().as_secs_f64()
                * 100.0;
        let (resident, anonymous) = (daemon.memory("VmRSS"), daemon.memory("RssAnon"));
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        println!(
            "{}: {used:.2} % of a core, {:.1} MiB resident, {:.1} MiB of it no file",
            daemon.name,
            mib(resident),
            mib(anonymous)
        );
        assert!(
            used <= 1.0,
            "{} used {used:.2} % of a core while idle",
            daemon.name
        );
        assert!(
            anonymous <= ANONYMOUS_MAX,
            "{} has {anonymous} bytes of heap and stacks while idle",
            daemon.name
        );
        assert!(
            optimised.is_none() || resident <= RESIDENT_MAX,
            "{} has {resident} bytes resident while idle",
            daemon.name
        );
    }
}
