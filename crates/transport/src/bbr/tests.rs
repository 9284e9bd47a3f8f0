//! The model on a path in virtual time.

use super::*;

/// A path in virtual time, whose queue drops what does not fit, and a sender that behaves like
/// quinn.
struct Bench {
    rate: u64,
    trip: Duration,
    queue: u64,
    /// One packet in this number is lost.
    loss: u64,
    /// The round trip in the second half of the run.
    later_trip: Duration,
    /// The number of steps of 200 µs after which the sender processes received
    /// acknowledgements.
    stall: u64,
}

const PACKET: u64 = 1450;

impl Bench {
    /// Sends for this long. Returns the used share of the bandwidth, and the share of packets
    /// that the queue dropped.
    fn run(&self, first_window: u64, time: Duration) -> (f64, f64) {
        let start = Instant::now();
        let mut bbr = Bbr::fresh(start, first_window, PACKET as u16);
        let mut smoothed = self.trip;
        // Time sent, time acknowledged (`None`: lost). In the order of sending.
        let mut flying: VecDeque<(Instant, Option<Instant>)> = VecDeque::new();
        let (mut in_flight, mut sent, mut dropped, mut arrived) = (0u64, 0u64, 0u64, 0u64);
        let mut free_at = start;
        let mut next_send = start;
        let mut now = start;
        let step = Duration::from_micros(200);
        let mut seed = 7u64;
        let mut steps = 0;
        while now < start + time {
            now += step;
            steps += 1;
            let mut acks = Vec::new();
            let mut lost = 0;
            while let Some(&(at, back)) = flying.front().filter(|_| steps % self.stall == 0) {
                let gone = back.is_none()
                    && flying
                        .iter()
                        .skip(3)
                        .find_map(|f| f.1)
                        .is_some_and(|b| b <= now);
                match back {
                    Some(back) if back <= now => acks.push(at),
                    None if gone => lost += PACKET,
                    _ => break,
                }
                in_flight -= PACKET;
                flying.pop_front();
            }
            if lost > 0 {
                bbr.lost(now, lost, false);
            }
            if !acks.is_empty() {
                for at in &acks {
                    arrived += 1;
                    smoothed = smoothed * 7 / 8 + (now - *at) / 8;
                    bbr.acked(now, *at, PACKET, false);
                }
                bbr.smoothed = smoothed;
                bbr.end_acks(now, in_flight, false);
            }
            // quinn's pacer: 1.25 windows per round trip.
            while next_send <= now && in_flight + PACKET <= bbr.window {
                next_send = next_send.max(now - step)
                    + smoothed.mul_f64(PACKET as f64 / (1.25 * bbr.window as f64));
                sent += 1;
                in_flight += PACKET;
                seed = seed
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                free_at = free_at.max(now);
                let waits = (free_at - now).as_secs_f64() * self.rate as f64;
                let trip = if now - start > time / 2 {
                    self.later_trip
                } else {
                    self.trip
                };
                let back = if waits > self.queue as f64 {
                    dropped += 1;
                    None
                } else {
                    free_at += Duration::from_secs_f64(PACKET as f64 / self.rate as f64);
                    (self.loss == 0 || !(seed >> 33).is_multiple_of(self.loss))
                        .then_some(free_at + trip)
                };
                flying.push_back((now, back));
            }
        }
        (
            arrived as f64 * PACKET as f64 / (self.rate as f64 * time.as_secs_f64()),
            dropped as f64 / sent as f64,
        )
    }
}

const PATH: Bench = Bench {
    rate: 25_000_000,
    trip: Duration::from_millis(100),
    queue: 2_500_000,
    loss: 0,
    later_trip: Duration::from_millis(100),
    stall: 1,
};

#[test]
fn a_long_path_is_full_and_its_queue_is_not() {
    for loss in [0, 1000, 100] {
        let (used, dropped) = Bench { loss, ..PATH }.run(1_250_000, Duration::from_secs(9));
        let delivers = if loss == 100 { 0.99 } else { 1.0 };
        assert!(
            used > 0.96 * delivers,
            "one in {loss} lost: {used:.3} of the bandwidth is used"
        );
        assert!(
            dropped < 0.01,
            "one in {loss} lost: {dropped:.3} dropped by the queue"
        );
    }
}

#[test]
fn a_window_holds_several_of_the_largest_packets() {
    let mut bbr = Bbr::fresh(Instant::now(), 12_000, 1200);
    bbr.on_mtu_update(16_250);
    assert!(bbr.window() >= 2 * 16_250, "{}", bbr.window());
    assert!(Bbr::fresh(Instant::now(), 12_000, 16_250).window() >= 2 * 16_250);
}

#[test]
fn a_busy_machine_keeps_the_path_full() {
    for stall in [50, 150, 250] {
        let (used, dropped) = Bench { stall, ..PATH }.run(1_250_000, Duration::from_secs(9));
        assert!(
            used > 0.9 && dropped < 0.03,
            "a look each {} ms: {used:.3} used, {dropped:.3} dropped",
            stall / 5
        );
    }
}

#[test]
fn a_bandwidth_far_from_the_estimate_is_found() {
    let (used, _) = Bench {
        rate: 250_000_000,
        queue: 25_000_000,
        ..PATH
    }
    .run(1_250_000, Duration::from_secs(9));
    assert!(used > 0.9, "a fast path: {used:.3}");
    let (used, dropped) = Bench {
        rate: 1_250_000,
        queue: 125_000,
        ..PATH
    }
    .run(1_250_000, Duration::from_secs(20));
    assert!(
        used > 0.9 && dropped < 0.1,
        "a slow path: {used:.3}, {dropped:.3} dropped"
    );
}

#[test]
fn a_shallow_queue_and_a_longer_path_are_handled() {
    let (used, dropped) = Bench {
        queue: 250_000,
        ..PATH
    }
    .run(1_250_000, Duration::from_secs(20));
    assert!(
        used > 0.85 && dropped < 0.1,
        "a shallow queue: {used:.3}, {dropped:.3} dropped"
    );
    let (used, _) = Bench {
        later_trip: Duration::from_millis(250),
        ..PATH
    }
    .run(1_250_000, Duration::from_secs(60));
    assert!(used > 0.85, "a longer path: {used:.3}");
}
