//! Interruptions: a site stopped, killed or cut off, a hub killed, each in the middle of a transfer
//! that a slow line makes last. It ends well without a hand, and never begins again from zero.

use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::command::run;
use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data::{self, noise, rng, write};
use crate::support::disk::SmallDisk;
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, disk_usage, limit, secs, wait_for};

/// What is carried: noise, so that no byte is saved by compressing.
const SIZE: usize = 40 << 20;
/// Bytes a second on the slow line: the transfer lasts some eight seconds.
const RATE: u64 = 5 << 20;
/// What must be durable at the site before it is interrupted: to begin at zero then costs more than
/// all allowances together.
const ENOUGH: u64 = 12 << 20;
/// What the line brings beside that before it holds the rest back: parts of what was asked for come
/// before any of it is whole.
const SLACK: u64 = 10 << 20;
/// Headers, acknowledgements, manifests, handshakes: a part in this many, beside the payload.
const OVERHEAD: u64 = 10;
/// What the line may carry beside that after an interruption: packets on their way to whoever is
/// dead, the handshake, control.
const UNDERWAY: u64 = 4 << 20;

const _: () = assert!(
    ENOUGH > (SIZE as u64 - ENOUGH) / OVERHEAD + UNDERWAY,
    "a start from zero would pass for a resumption"
);

/// A transfer when it was interrupted.
struct Moment {
    /// What was durable at the site, at the least: reports come late.
    committed: u64,
    /// What the line had carried towards the site.
    down: u64,
}

/// One site behind a line, with a transfer that has begun.
struct World {
    site: Site,
    line: Line,
    hub: Hub,
    source: PathBuf,
    transfer: String,
    /// The disk that the site lives on, where it has one of its own.
    disk: Option<SmallDisk>,
    _scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let path = scratch.path().to_owned();
        Self::start_in(scratch, &path, None)
    }

    /// All that the site has lies in this folder, and so on this disk.
    fn start_in(scratch: Scratch, of_site: &Path, disk: Option<SmallDisk>) -> Self {
        let hub = Hub::start_new(scratch.path());
        let (line, site) = Site::start_behind(of_site, &hub, "chengdu");
        if let Some(disk) = &disk {
            // Whoever wrote its config did so long ago.
            disk.sync();
        }
        let source = scratch.join("model");
        data::model(&source, SIZE);
        hub.publish(&source, "model/yolo:v1", &[]);
        line.throttle(RATE);
        line.hold_at(line.down() + ENOUGH + SLACK);
        let transfer = hub.deliver(&["model/yolo:v1"], "chengdu").remove(0);
        Self {
            site,
            line,
            hub,
            source,
            transfer,
            disk,
            _scratch: scratch,
        }
    }

    /// Waits until so many bytes are durable at the site, and interrupts. The line brings enough
    /// for that and not much more, so that no machine is too slow for it.
    fn interrupt(&mut self, committed: u64, how: impl FnOnce(&mut Self)) -> Moment {
        let so_far = self.hub.transfer(&self.transfer).bytes.committed;
        self.line
            .hold_at(self.line.down() + committed.saturating_sub(so_far) + SLACK);
        let seen = self
            .hub
            .wait_transfer(&self.transfer, "on its way", secs(60), |t| {
                t.bytes.committed >= committed
            });
        how(self);
        self.line.hold_at(0);
        Moment {
            committed: seen.bytes.committed,
            down: self.line.down(),
        }
    }

    /// Cuts the power of the site's machine, and switches it on again.
    fn cut_power(&mut self) {
        let disk = self.disk.as_ref().expect("a disk of its own");
        // A machine without power notices nothing of its disk.
        self.site.freeze();
        disk.cut_power();
        self.site.kill();
        disk.power_on();
    }

    /// Lets the transfer end by itself, and checks that it went on with all that was durable.
    fn check_end(&self, last: &Moment) {
        let done = self.hub.wait_done(&self.transfer, secs(90));
        assert_same(&self.source, &self.site.folder("model/yolo:v1"));
        assert_eq!(done.bytes.committed, done.bytes.total, "{:?}", done.bytes);
        assert!(
            done.attempts >= 2,
            "an interruption is a new attempt: {done:#?}"
        );
        // The transfer says so, and the line has to agree: only what was not durable crossed it
        // again.
        let bytes = done.bytes;
        assert!(
            bytes.resumed >= last.committed,
            "{} bytes were durable, and not all were taken up again: {bytes:?}",
            last.committed
        );
        let left = SIZE as u64 - last.committed;
        let (more, most) = (
            self.line.down() - last.down,
            left + left / OVERHEAD + UNDERWAY,
        );
        assert!(
            more <= most,
            "{more} bytes crossed the line after the interruption, {most} would do for {left}: {bytes:?}"
        );
        let same = self.site.transfer(&self.transfer);
        assert_eq!(
            (same.state.as_str(), same.bytes.committed),
            ("done", done.bytes.committed),
            "the site tells the same"
        );
        assert_eq!(self.site.leftovers(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_site_stopped_in_the_middle_goes_on() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let stopped = world.interrupt(ENOUGH, |w| w.site.stop());
    world.hub.wait_online("chengdu", false, secs(20));
    let waiting = world.hub.transfer(&world.transfer);
    assert!(
        !waiting.is_final() && waiting.has_reason(&["site_offline"]),
        "{waiting:#?}"
    );
    world.site.start();
    world.check_end(&stopped);
}

#[test]
fn a_site_killed_in_the_middle_goes_on() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let killed = world.interrupt(ENOUGH, |w| w.site.kill());
    world.site.start();
    world.check_end(&killed);
}

#[test]
fn a_site_killed_again_and_again_goes_on() {
    let _limit = limit(secs(240));
    let mut world = World::start();
    // Slower, so that three kills find their place.
    world.line.throttle(RATE / 2);
    let mut killed = world.interrupt(ENOUGH / 2, |w| w.site.kill());
    for _ in 0..2 {
        world.site.start();
        let again = world
            .hub
            .wait_transfer(&world.transfer, "taken up again", secs(60), |t| {
                t.bytes.resumed >= killed.committed
            });
        // Each life brings something to lose.
        killed = world.interrupt((again.bytes.resumed + 1).max(ENOUGH), |w| w.site.kill());
    }
    world.line.throttle(RATE);
    world.site.start();
    world.check_end(&killed);
}

#[test]
fn a_site_whose_power_is_cut_goes_on_from_what_it_had_committed() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let machine = scratch.join("machine");
    let Some(disk) = SmallDisk::mount_xfs(&machine, &scratch.join("machine.img")) else {
        return;
    };
    let mut world = World::start_in(scratch, &machine, Some(disk));
    world.line.throttle(RATE / 2);
    let first = world.interrupt(ENOUGH / 2, World::cut_power);
    world.site.start();
    let again = world
        .hub
        .wait_transfer(&world.transfer, "taken up again", secs(60), |t| {
            t.bytes.resumed >= first.committed
        });
    let second = world.interrupt((again.bytes.resumed + 1).max(ENOUGH), World::cut_power);
    world.line.throttle(RATE);
    world.site.start();
    world.check_end(&second);
    // And what is done stays, though no one had the time to sync it once more.
    world.cut_power();
    world.site.start();
    assert_same(&world.source, &world.site.folder("model/yolo:v1"));
    assert_eq!(world.site.transfer(&world.transfer).state, "done");
    world.site.cli(&["verify", "model/yolo:v1"]).expect(0);
    world.site.stop();
}

#[test]
fn a_hub_whose_power_is_cut_has_all_that_it_said_it_had() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let machine = scratch.join("machine");
    let Some(disk) = SmallDisk::mount_xfs(&machine, &scratch.join("machine.img")) else {
        return;
    };
    let mut hub = Hub::start_new(&machine);
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    disk.sync();
    let first = scratch.join("first");
    data::model(&first, 24 << 20);
    hub.publish(&first, "model/first:v1", &[]);
    let transfer = hub.deliver(&["model/first:v1"], "chengdu").remove(0);
    let cut_power = |hub: &mut Hub| {
        hub.freeze();
        disk.cut_power();
        hub.kill();
        disk.power_on();
        hub.start();
    };
    cut_power(&mut hub);
    hub.cli(&["verify", "model/first:v1"]).expect(0);
    hub.wait_done(&transfer, secs(60));
    assert_same(&first, &site.folder("model/first:v1"));

    // In the middle of a publish: that one never was, and what is there of it harms nobody.
    let large = scratch.join("large");
    write(
        &large.join("model.bin"),
        &noise(&mut rng("large"), 160 << 20),
    );
    let mut publish = hub.command(&["publish", large.to_str().unwrap(), "--as", "model/large:v1"]);
    std::thread::scope(|scope| {
        let publish = scope.spawn(|| run(&mut publish, secs(60)));
        wait_for("a pack of it is full", secs(60), || {
            (disk_usage(&hub.data_dir.join("store/packs")) > 64 << 20).then_some(())
        });
        cut_power(&mut hub);
        assert_ne!(publish.join().unwrap().code, 0, "the publish was cut short");
    });
    assert_eq!(hub.artifacts(), ["model/first:v1"]);
    hub.cli(&["verify", "model/first:v1"]).expect(0);
    hub.publish(&large, "model/large:v1", &["--to", "chengdu", "--wait"]);
    assert_same(&large, &site.folder("model/large:v1"));
    hub.cli(&["verify", "model/large:v1"]).expect(0);
    hub.stop();
}

#[test]
fn a_hub_killed_in_the_middle_goes_on() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let killed = world.interrupt(ENOUGH, |w| w.hub.kill());
    world.hub.start();
    world.check_end(&killed);
}

#[test]
fn a_hub_stopped_in_the_middle_goes_on() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let stopped = world.interrupt(ENOUGH, |w| w.hub.stop());
    let alone = world.site.transfer(&world.transfer);
    assert!(
        !alone.is_final(),
        "a site without its hub waits: {alone:#?}"
    );
    world.hub.start();
    world.check_end(&stopped);
}

/// All wait for a minute to pass, and do next to nothing meanwhile: together they cost one.
#[test]
fn a_minute_without_a_line_or_without_quic_ends_well() {
    let _limit = limit(secs(280));
    std::thread::scope(|scope| {
        scope.spawn(a_line_cut_for_a_minute_goes_on);
        scope.spawn(where_udp_is_blocked_tcp_carries_until_quic_works_again);
        scope.spawn(where_udp_is_blocked_in_the_middle_tcp_goes_on);
    });
}

fn a_line_cut_for_a_minute_goes_on() {
    let mut world = World::start();
    let cut = world.interrupt(ENOUGH, |w| w.line.cut());
    let cut_at = std::time::Instant::now();
    world.hub.wait_online("chengdu", false, secs(60));
    let waiting = world.hub.transfer(&world.transfer);
    assert!(
        waiting.has_reason(&["site_offline"]),
        "the hub says why nothing moves: {waiting:#?}"
    );
    let alone = world
        .site
        .wait_transfer(&world.transfer, "waiting for the hub", secs(60), |t| {
            t.has_reason(&["hub_unreachable"])
        });
    assert!(!alone.is_final(), "{alone:#?}");
    wait_for("the minute is over", secs(70), || {
        (cut_at.elapsed() > secs(60)).then_some(())
    });
    world.line.mend();
    world.hub.wait_online("chengdu", true, secs(75));
    world.check_end(&cut);
}

fn where_udp_is_blocked_in_the_middle_tcp_goes_on() {
    let mut world = World::start();
    assert_eq!(transport(&world.hub).as_deref(), Some("quic"));
    let blocked = world.interrupt(ENOUGH, |w| w.line.block_udp(true));
    world.check_end(&blocked);
    assert_eq!(transport(&world.hub).as_deref(), Some("tcp"));
}

/// How the hub says that the site is connected.
fn transport(hub: &Hub) -> Option<String> {
    let sites = hub.json(&["sites"]);
    sites[0]["line"].as_str().map(ToOwned::to_owned)
}

/// What is carried while a site on TCP waits for QUIC…
const LONG: usize = 80 << 20;
/// …and bytes a second: it lasts for two of the tries that the site makes each minute.
const TRICKLE: u64 = 640 << 10;

fn where_udp_is_blocked_tcp_carries_until_quic_works_again() {
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    let mut site = Site::new(
        scratch.path(),
        &hub,
        "chengdu",
        &SiteSpec {
            through: Some(line.address()),
            ..SiteSpec::default()
        },
    );
    site.join(&hub, &[]);
    line.block_udp(true);
    site.start_alive();
    hub.wait_online("chengdu", true, secs(60));
    assert_eq!(transport(&hub).as_deref(), Some("tcp"));
    let (small, large) = (scratch.join("small"), scratch.join("large"));
    write(
        &small.join("weights.bin"),
        &noise(&mut rng("small"), 4 << 20),
    );
    data::model(&large, LONG);
    hub.publish(&small, "model/small:v1", &[]);
    hub.publish(&large, "model/large:v1", &[]);
    let done = hub.deliver_and_wait("model/small:v1", "chengdu", secs(60));
    assert_same(&small, &site.folder("model/small:v1"));
    assert!(done.bytes.wire >= 4 << 20, "{:?}", done.bytes);

    // QUIC works again in the middle of a transfer: the site finds out by itself, within a minute.
    line.throttle(TRICKLE);
    let before = line.down();
    let transfer = hub.deliver(&["model/large:v1"], "chengdu").remove(0);
    // Enough for each of the requests to bring what is handed on together.
    wait_for("some of it came over TCP", secs(50), || {
        (line.down() - before > 16 << 20).then_some(())
    });
    let seen = hub.transfer(&transfer);
    assert_eq!(transport(&hub).as_deref(), Some("tcp"));
    line.block_udp(false);
    assert!(seen.bytes.committed > 0, "{seen:#?}");
    wait_for("the site moves to QUIC", secs(75), || {
        site.log().contains("moved from TCP to QUIC").then_some(())
    });
    let moved = hub.transfer(&transfer);
    assert!(
        !moved.is_final(),
        "it was to move in the middle: {moved:#?}"
    );
    line.throttle(0);
    wait_for("the hub says so", secs(10), || {
        (transport(&hub).as_deref() == Some("quic")).then_some(())
    });
    let done = hub.wait_done(&transfer, secs(60));
    assert_same(&large, &site.folder("model/large:v1"));
    assert!(
        done.bytes.resumed >= seen.bytes.committed,
        "it goes on with what came over TCP: {:?}",
        done.bytes
    );
    assert_eq!(transport(&hub).as_deref(), Some("quic"), "and stays there");
}

#[test]
fn a_publish_killed_with_the_hub_leaves_nothing_and_can_be_repeated() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    write(&scratch.join("big.bin"), &noise(&mut rng("big"), 200 << 20));
    let source = scratch.join("big.bin");
    let before = disk_usage(&hub.data_dir);
    std::thread::scope(|scope| {
        let publish =
            scope.spawn(|| hub.cli(&["publish", source.to_str().unwrap(), "--as", "model/big:v1"]));
        wait_for("the hub has stored some of it", secs(60), || {
            (disk_usage(&hub.data_dir) > before + (20 << 20)).then_some(())
        });
        kill_process(
            Pid::from_raw(hub.pid().cast_signed()).unwrap(),
            Signal::KILL,
        )
        .unwrap();
        let output = publish.join().unwrap();
        assert_ne!(output.code, 0, "the publish was cut short: {output:?}");
    });
    hub.kill();
    hub.start();
    hub.cli(&["show", "model/big:v1"]).expect(5);
    hub.cli(&["gc"]).expect(0);
    let published = hub.publish(&source, "model/big:v1", &[]);
    assert_eq!(published["unchanged"], false);
    hub.cli(&["verify", "model/big:v1"]).expect(0);
}
