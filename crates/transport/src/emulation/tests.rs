//! The congestion control on emulated paths.
//!
//! `PACKHORSE_EMULATION=1 cargo test -p transport emulation -- --nocapture` prints the complete
//! matrix of links and all bulk transfers.

use std::time::Duration;

use super::{Emulation, Line, Settings};
use crate::Congestion;
use crate::congestion::Choice;
use crate::path::Path;
use base::limits::{CONNECTION_WINDOW_BYTES, CONNECTION_WINDOW_WANTED_BYTES_MAX};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The settings of a hub that remembers this path, and of a site.
fn settings(path: &Path) -> (Settings, Settings) {
    let of = |path, window| Settings::new(&Choice::new(Congestion::Auto), path, window);
    (
        of(path, CONNECTION_WINDOW_WANTED_BYTES_MAX),
        of(&Path::default(), CONNECTION_WINDOW_BYTES.into()),
    )
}

fn connected(down: &Line, up: &Line) -> Emulation {
    let mut path = Emulation::new(down.clone(), up.clone());
    connect(&mut path, &Path::default());
    path
}

fn connect(path: &mut Emulation, remembered: &Path) -> usize {
    let (hub, site) = settings(remembered);
    let pair = path.connect(hub, site);
    path.run_for(Duration::from_secs(2));
    pair
}

/// One delivery: the share of packets from the hub that were dropped, and its time as a part of
/// the time allowed: 1.25 times its bytes by the rate and three round trips.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Delivery {
    dropped: f64,
    time: f64,
}

/// Artifacts of 900 KiB, one after another on one connection, and one more over a new connection.
fn deliveries(line: &Line, count: usize) -> Vec<Delivery> {
    const BYTES: u64 = 900 * KIB;
    let mut path = Emulation::new(line.clone(), line.clone());
    let remembered = Path::default();
    let mut pair = connect(&mut path, &remembered);
    let ideal = BYTES as f64 * 8.0 / line.rate as f64 + 6.0 * line.delay.as_secs_f64();
    (0..=count)
        .map(|number| {
            if number == count {
                pair = connect(&mut path, &remembered);
            }
            let before = path.seen(0);
            let took = path.deliver(pair, BYTES, Duration::from_secs(300)).unwrap();
            path.run_for(Duration::from_secs(2));
            Delivery {
                dropped: (path.seen(0) - before).dropped_share(),
                time: took.as_secs_f64() / ideal / 1.25,
            }
        })
        .collect()
}

/// Fetches many answers of 1 MiB for this time after a warm-up. Returns the used part of the rate,
/// and the share of packets that the queue or the policer dropped.
fn bulk(path: &mut Emulation, pair: usize, rate: u64, warm_up: u64, seconds: u64) -> (f64, f64) {
    path.fetch(pair, 10_000, MIB, 60);
    path.run_for(Duration::from_secs(warm_up));
    let (before, fetched) = (path.seen(0), path.fetched(pair));
    path.run_for(Duration::from_secs(seconds));
    let bytes = path.fetched(pair) - fetched;
    (
        bytes as f64 * 8.0 / seconds as f64 / rate as f64,
        (path.seen(0) - before).dropped_share(),
    )
}

#[test]
fn an_emulation_has_the_same_result_each_time() {
    let line = Line::new(10_000, 100, 100).lossy(0.01);
    let first = deliveries(&line, 2);
    assert_eq!(deliveries(&line, 2), first);
    assert!(first.iter().all(|d| d.time > 0.3), "{first:?}");
}

#[test]
fn a_long_connection_is_used() {
    for (line, least) in [
        (Line::new(200_000, 100, 100), 0.9),
        (Line::new(200_000, 100, 100).lossy(0.01), 0.88),
        (Line::new(200_000, 100, 100).lossy(0.1), 0.83),
        (Line::new(20_000, 40, 100).lossy(0.1), 0.88),
        (Line::new(64, 200, 2000), 0.8),
    ] {
        let mut path = connected(&line, &line);
        let seconds = if line.rate < 1_000_000 { 100 } else { 10 };
        let (used, _) = bulk(&mut path, 0, line.rate, 0, seconds);
        assert!(used >= least, "{line:?}: {used}");
    }
}

#[test]
fn deliveries_do_not_flood_a_slow_link() {
    for (line, first, later) in [
        (Line::new(250, 10, 100), 0.1, 0.03),
        (Line::new(2_000, 10, 20), 0.05, 0.01),
        (Line::new(2_000, 100, 20), 0.05, 0.02),
        (Line::new(2_000, 100, 100), 0.05, 0.01),
        (Line::new(10_000, 10, 20), 0.05, 0.01),
        (Line::new(10_000, 100, 20), 0.05, 0.05),
        (Line::new(10_000, 100, 100), 0.05, 0.01),
        (Line::new(50_000, 100, 20), 0.05, 0.01),
    ] {
        let all = deliveries(&line, 3);
        // The last one is over a new connection.
        for (number, delivery) in all.iter().enumerate() {
            let most = if matches!(number, 1 | 2) {
                later
            } else {
                first
            };
            assert!(delivery.dropped <= most, "{line:?}: {all:?}");
            assert!(number == 0 || delivery.time <= 0.95, "{line:?}: {all:?}");
        }
    }
}

fn policed(bits: u64, packets: u64) -> Line {
    Line {
        police: Some((bits, packets)),
        ..Line::new(40_000, 30, 150)
    }
}

/// The rate above which the hub finds that the path drops, after a transfer.
fn limited_after_bulk(line: &Line) -> Option<u64> {
    let (hub, site) = (Choice::new(Congestion::Auto), Choice::new(Congestion::Auto));
    let wanted = CONNECTION_WINDOW_WANTED_BYTES_MAX;
    let mut path = Emulation::new(line.clone(), Line::new(200_000, 100, 100));
    let pair = path.connect(
        Settings::new(&hub, &Path::default(), wanted),
        Settings::new(&site, &Path::default(), CONNECTION_WINDOW_BYTES.into()),
    );
    path.run_for(Duration::from_secs(2));
    bulk(&mut path, pair, line.rate, 10, 20);
    hub.limited(path.now)
}

#[test]
fn only_a_path_that_drops_without_a_queue_is_limited() {
    for rate in [256_000, 512_000, 1_000_000, 5_000_000] {
        let found = limited_after_bulk(&policed(rate, 20)).map(|bytes| bytes * 8);
        let about = rate / 10 * 8..rate / 10 * 13;
        assert!(
            found.is_some_and(|found| about.contains(&found)),
            "{rate}: {found:?}"
        );
    }
    for line in [
        Line::new(2_000, 100, 100),
        Line::new(10_000, 30, 100),
        Line::new(200_000, 100, 100),
        Line::new(200_000, 100, 100).lossy(0.01),
        Line::new(20_000, 40, 100).lossy(0.1),
        Line::new(50_000, 40, 100).lossy(0.05),
        Line::new(20_000, 100, 100).lossy(0.1),
        Line::new(2_000, 40, 100).lossy(0.1),
    ] {
        assert_eq!(limited_after_bulk(&line), None, "{line:?}");
    }
}

#[test]
fn a_policer_is_found() {
    for rate in [256_000, 512_000, 1_000_000] {
        let mut path = connected(&policed(rate, 20), &Line::new(200_000, 100, 100));
        let (used, dropped) = bulk(&mut path, 0, rate, 10, 20);
        assert!(
            used > 0.9 && dropped < 0.1,
            "{rate} bit/s: {used} used, {dropped} dropped"
        );
    }
}

#[test]
fn a_new_connection_starts_from_the_rate_of_the_last_one() {
    for line in [Line::new(200_000, 100, 20), Line::new(1_000_000, 300, 100)] {
        let all = deliveries(&line, 2);
        assert!(all.iter().all(|d| d.dropped == 0.0), "{line:?}: {all:?}");
        // The first one starts from a standard window.
        assert!(all[0].time > 1.2, "{line:?}: {all:?}");
        assert!(all[1..].iter().all(|d| d.time < 1.0), "{line:?}: {all:?}");
    }
}

/// The same for a new connection over a path that is known.
fn bulk_again(line: &Line, seconds: u64) -> (f64, f64) {
    let mut path = Emulation::new(line.clone(), line.clone());
    let remembered = Path::default();
    let first = connect(&mut path, &remembered);
    path.fetch(first, 100, MIB, 60);
    path.run_until(Duration::from_secs(60), |path| {
        path.fetched(first) == 100 * MIB
    })
    .unwrap();
    let second = connect(&mut path, &remembered);
    bulk(&mut path, second, line.rate, 0, seconds)
}

#[test]
fn a_known_path_is_used_at_once() {
    let (used, dropped) = bulk_again(&Line::new(200_000, 100, 100), 10);
    assert!(used > 0.93 && dropped == 0.0, "{used}, {dropped}");
}

#[test]
fn the_complete_matrix_is_printed_on_request() {
    if std::env::var_os("PACKHORSE_EMULATION").is_none() {
        return;
    }
    for kbit in [250, 2_000, 10_000, 50_000, 200_000, 1_000_000] {
        for round_trip in [10, 100, 300] {
            for queue in [20, 100] {
                let all = deliveries(&Line::new(kbit, round_trip, queue), 4);
                let later = all[1..4].iter().map(|d| d.dropped).fold(0.0, f64::max);
                let times: Vec<u64> = all.iter().map(|d| (d.time * 100.0) as u64).collect();
                println!(
                    "{:>5} Mbit/s {round_trip:>3} ms queue {queue:>3} ms: dropped {:>5.1} %, then {:>5.1} %, new connection {:>5.1} %; time of allowed {times:?} %",
                    kbit as f64 / 1000.0,
                    all[0].dropped * 100.0,
                    later * 100.0,
                    all[4].dropped * 100.0,
                );
            }
        }
    }
    let reordered = Line {
        loss: 0.03,
        duplicates: 0.05,
        reorder: 0.1,
        reorder_by: Duration::from_millis(15),
        ..Line::new(20_000, 40, 100)
    };
    let w9 = Line::new(200_000, 100, 100);
    let (lossy, very_lossy) = (w9.clone().lossy(0.01), w9.clone().lossy(0.1));
    for line in [&w9, &lossy, &very_lossy] {
        let (used, dropped) = bulk_again(line, 10);
        println!(
            "{:>28}: {:>5.1} % used, {:>5.1} % dropped",
            format!("W9, {} % loss, known", line.loss * 100.0),
            used * 100.0,
            dropped * 100.0
        );
    }
    let thin = Line::new(20_000, 40, 100).lossy(0.1);
    let satellite = Line::new(2000, 800, 500).lossy(0.01);
    let (down, up) = (Line::new(8_000, 60, 500), Line::new(64, 60, 500));
    for (name, down, up, warm_up, seconds) in [
        ("200 Mbit/s 100 ms", &w9, &w9, 0, 10),
        ("the same, 1 % loss", &lossy, &lossy, 0, 10),
        ("the same, 10 % loss", &very_lossy, &very_lossy, 0, 10),
        ("the same, after 10 s", &very_lossy, &very_lossy, 10, 30),
        ("20 Mbit/s 40 ms, 10 % loss", &thin, &thin, 0, 10),
        ("8 Mbit/s down, 64 kbit/s up", &down, &up, 0, 20),
        ("satellite", &satellite, &satellite, 0, 40),
        (
            "reordering, loss, duplicates",
            &reordered,
            &reordered,
            0,
            10,
        ),
        ("policer 1 Mbit/s", &policed(1_000_000, 20), &w9, 10, 30),
        ("policer 512 kbit/s", &policed(512_000, 20), &w9, 10, 30),
        ("policer 256 kbit/s", &policed(256_000, 10), &w9, 10, 30),
    ] {
        let mut path = connected(down, up);
        let rate = down.police.map_or(down.rate, |(rate, _)| rate);
        let (used, dropped) = bulk(&mut path, 0, rate, warm_up, seconds);
        println!(
            "{name:>28}: {:>5.1} % used, {:>5.1} % dropped",
            used * 100.0,
            dropped * 100.0
        );
    }
}
