//! Interruptions: a site is stopped, killed or disconnected, or a hub is killed, during a transfer
//! over a slow connection. The transfer must complete without an operator, and must not start from
//! zero again.

use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::command::run;
use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data::{self, noise, rng, write};
use crate::support::disk::SmallDisk;
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, disk_usage, limit, secs, wait_for};

/// The size of the artifact: noise, so that compression saves nothing.
const SIZE: usize = 40 << 20;
/// Bytes per second of the slow connection: the transfer takes about eight seconds.
const RATE: u64 = 5 << 20;
/// The bytes that must be durable at the site before the interruption. A start from zero then costs
/// more than all allowances together.
const ENOUGH: u64 = 12 << 20;
/// The bytes that the proxy forwards in addition before it stops: parts of several requests arrive
/// before any request is complete.
const SLACK: u64 = 10 << 20;
/// Headers, acknowledgements, manifests and handshakes: one part in this many, in addition to the
/// payload.
const OVERHEAD: u64 = 10;
/// The further bytes that the proxy may forward after an interruption: packets to the dead daemon,
/// the handshake, and control messages.
const UNDERWAY: u64 = 4 << 20;

const _: () = assert!(
    ENOUGH > (SIZE as u64 - ENOUGH) / OVERHEAD + UNDERWAY,
    "a start from zero would look like a resumption"
);

/// The progress of a transfer at the interruption.
struct Moment {
    /// The durable bytes at the site. There may be more, because reports arrive late.
    committed: u64,
    /// The bytes that the proxy had forwarded to the site.
    down: u64,
}

/// One site behind a proxy, with a running transfer.
struct World {
    site: Site,
    line: Line,
    hub: Hub,
    source: PathBuf,
    transfer: String,
    /// The disk with the site's files, if it is a separate disk.
    disk: Option<SmallDisk>,
    _scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let path = scratch.path().to_owned();
        Self::start_in(scratch, &path, None)
    }

    /// Starts the site with all its files in this folder, and so on this disk.
    fn start_in(scratch: Scratch, of_site: &Path, disk: Option<SmallDisk>) -> Self {
        let hub = Hub::start_new(scratch.path());
        let (line, site) = Site::start_behind(of_site, &hub, "chengdu");
        if let Some(disk) = &disk {
            // The configuration must be durable: in reality it was written long before.
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

    /// Waits until so many bytes are durable at the site, and interrupts it. The proxy forwards
    /// enough bytes for that and few more, so that the test works on a slow machine.
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

    /// Simulates a power failure and a restart of the site's machine.
    fn cut_power(&mut self) {
        let disk = self.disk.as_ref().expect("the site has a separate disk");
        // A machine without power does not react to its disk.
        self.site.freeze();
        disk.cut_power();
        self.site.kill();
        disk.power_on();
    }

    /// Waits for the end of the transfer, and checks that it resumed with all durable bytes.
    fn check_end(&self, last: &Moment) {
        let done = self.hub.wait_done(&self.transfer, secs(90));
        assert_same(&self.source, &self.site.folder("model/yolo:v1"));
        assert_eq!(done.bytes.committed, done.bytes.total, "{:?}", done.bytes);
        assert!(
            done.attempts >= 2,
            "an interruption leads to a new attempt: {done:#?}"
        );
        // The counters of the transfer and of the proxy must agree: only bytes that were not
        // durable are transmitted again.
        let bytes = done.bytes;
        assert!(
            bytes.resumed >= last.committed,
            "{} bytes were durable, and not all were reused: {bytes:?}",
            last.committed
        );
        let left = SIZE as u64 - last.committed;
        let (more, most) = (
            self.line.down() - last.down,
            left + left / OVERHEAD + UNDERWAY,
        );
        assert!(
            more <= most,
            "{more} bytes were transmitted after the interruption, the limit for {left} missing bytes is {most}: {bytes:?}"
        );
        let same = self.site.transfer(&self.transfer);
        assert_eq!(
            (same.state.as_str(), same.bytes.committed),
            ("done", done.bytes.committed),
            "the site reports the same"
        );
        assert_eq!(self.site.leftovers(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_transfer_resumes_after_its_site_was_stopped() {
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
fn a_transfer_resumes_after_its_site_was_killed() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let killed = world.interrupt(ENOUGH, |w| w.site.kill());
    world.site.start();
    world.check_end(&killed);
}

#[test]
fn a_transfer_resumes_after_its_site_was_killed_three_times() {
    let _limit = limit(secs(240));
    let mut world = World::start();
    // Slower, so that the transfer lasts long enough for three kills.
    world.line.throttle(RATE / 2);
    let mut killed = world.interrupt(ENOUGH / 2, |w| w.site.kill());
    for _ in 0..2 {
        world.site.start();
        let again = world
            .hub
            .wait_transfer(&world.transfer, "resumed", secs(60), |t| {
                t.bytes.resumed >= killed.committed
            });
        // Each run of the daemon transfers further bytes.
        killed = world.interrupt((again.bytes.resumed + 1).max(ENOUGH), |w| w.site.kill());
    }
    world.line.throttle(RATE);
    world.site.start();
    world.check_end(&killed);
}

#[test]
fn a_transfer_resumes_from_its_commits_after_a_power_failure_of_the_site() {
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
        .wait_transfer(&world.transfer, "resumed", secs(60), |t| {
            t.bytes.resumed >= first.committed
        });
    let second = world.interrupt((again.bytes.resumed + 1).max(ENOUGH), World::cut_power);
    world.line.throttle(RATE);
    world.site.start();
    world.check_end(&second);
    // A completed transfer also survives a power failure, without a later sync.
    world.cut_power();
    world.site.start();
    assert_same(&world.source, &world.site.folder("model/yolo:v1"));
    assert_eq!(world.site.transfer(&world.transfer).state, "done");
    world.site.cli(&["verify", "model/yolo:v1"]).expect(0);
    world.site.stop();
}

#[test]
fn a_hub_keeps_everything_that_it_confirmed_after_a_power_failure() {
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

    // A power failure during a publish: the artifact does not exist, and its partial content has no
    // effect.
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
        assert_ne!(
            publish.join().unwrap().code,
            0,
            "the publish was interrupted"
        );
    });
    assert_eq!(hub.artifacts(), ["model/first:v1"]);
    hub.cli(&["verify", "model/first:v1"]).expect(0);
    hub.publish(&large, "model/large:v1", &["--to", "chengdu", "--wait"]);
    assert_same(&large, &site.folder("model/large:v1"));
    hub.cli(&["verify", "model/large:v1"]).expect(0);
    hub.stop();
}

#[test]
fn a_transfer_resumes_after_the_hub_was_killed() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let killed = world.interrupt(ENOUGH, |w| w.hub.kill());
    world.hub.start();
    world.check_end(&killed);
}

#[test]
fn a_transfer_resumes_after_the_hub_was_stopped() {
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

/// Each of these cases waits for a minute and is almost idle. Together they take one minute.
#[test]
fn a_transfer_survives_a_minute_without_network_or_without_quic() {
    let _limit = limit(secs(280));
    std::thread::scope(|scope| {
        scope.spawn(a_transfer_resumes_after_a_minute_without_network);
        scope.spawn(tcp_is_used_until_quic_works_again);
        scope.spawn(a_transfer_continues_over_tcp_when_udp_is_blocked);
    });
}

fn a_transfer_resumes_after_a_minute_without_network() {
    let mut world = World::start();
    let cut = world.interrupt(ENOUGH, |w| w.line.cut());
    let cut_at = std::time::Instant::now();
    world.hub.wait_online("chengdu", false, secs(60));
    let waiting = world.hub.transfer(&world.transfer);
    assert!(
        waiting.has_reason(&["site_offline"]),
        "the hub reports why the transfer makes no progress: {waiting:#?}"
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

fn a_transfer_continues_over_tcp_when_udp_is_blocked() {
    let mut world = World::start();
    assert_eq!(transport(&world.hub).as_deref(), Some("quic"));
    let blocked = world.interrupt(ENOUGH, |w| w.line.block_udp(true));
    world.check_end(&blocked);
    assert_eq!(transport(&world.hub).as_deref(), Some("tcp"));
}

/// The transport of the site's connection, as the hub reports it.
fn transport(hub: &Hub) -> Option<String> {
    let sites = hub.json(&["sites"]);
    sites[0]["line"].as_str().map(ToOwned::to_owned)
}

/// The size of an artifact that is transmitted while a site on TCP waits for QUIC…
const LONG: usize = 80 << 20;
/// …and the bytes per second: the transfer lasts for two of the attempts that the site makes each
/// minute.
const TRICKLE: u64 = 640 << 10;

/// What a network lets pass of UDP, in bytes per second: the artifact would need over a minute.
const POLICED: u64 = 125_000;

/// On a busy machine the packets of the emulated line are late, which looks like a queue.
#[test]
#[ignore = "it needs an idle machine"]
fn a_site_moves_to_tcp_when_the_network_limits_udp() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    line.police_udp(POLICED);
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
    site.start_alive();
    hub.wait_online("chengdu", true, secs(60));
    assert_eq!(transport(&hub).as_deref(), Some("quic"));
    let source = scratch.join("source");
    write(
        &source.join("weights.bin"),
        &noise(&mut rng("policed"), 12 << 20),
    );
    hub.publish(&source, "model/large:v1", &[]);
    let transfer = hub.deliver(&["model/large:v1"], "chengdu").remove(0);
    wait_for("the site moves to TCP", secs(80), || {
        (transport(&hub).as_deref() == Some("tcp")).then_some(())
    });
    let moved = hub.transfer(&transfer);
    assert!(!moved.is_final(), "it must move during the transfer");
    wait_for("the hub shows the reason", secs(10), || {
        let reason = hub.json(&["sites"])[0]["line_reason"].clone();
        let shown = reason.as_str()?.contains("limits UDP to about");
        (shown && site.cli(&["doctor"]).out.contains("limits UDP to about")).then_some(())
    });
    let done = hub.wait_done(&transfer, secs(30));
    assert_same(&source, &site.folder("model/large:v1"));
    assert!(done.bytes.resumed > 0, "{:?}", done.bytes);
}

fn tcp_is_used_until_quic_works_again() {
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
    wait_for("the hub shows the reason", secs(10), || {
        let reason = hub.json(&["sites"])[0]["line_reason"].clone();
        reason.as_str()?.contains("QUIC").then_some(())
    });
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

    // QUIC works again during a transfer: the site detects it within a minute.
    line.throttle(TRICKLE);
    let before = line.down();
    let transfer = hub.deliver(&["model/large:v1"], "chengdu").remove(0);
    // Enough for each request to deliver the amount that is processed together.
    wait_for("some of the content arrived over TCP", secs(50), || {
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
        "the site must move during the transfer: {moved:#?}"
    );
    line.throttle(0);
    wait_for("the hub reports the transport", secs(10), || {
        (transport(&hub).as_deref() == Some("quic")).then_some(())
    });
    let done = hub.wait_done(&transfer, secs(60));
    assert_same(&large, &site.folder("model/large:v1"));
    assert!(
        done.bytes.resumed >= seen.bytes.committed,
        "the content that arrived over TCP is reused: {:?}",
        done.bytes
    );
    assert_eq!(
        transport(&hub).as_deref(),
        Some("quic"),
        "the site keeps using QUIC"
    );
}

#[test]
fn a_publish_interrupted_by_a_kill_of_the_hub_leaves_no_artifact_and_can_be_repeated() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    write(&scratch.join("big.bin"), &noise(&mut rng("big"), 96 << 20));
    let source = scratch.join("big.bin");
    let before = disk_usage(&hub.data_dir);
    std::thread::scope(|scope| {
        let publish =
            scope.spawn(|| hub.cli(&["publish", source.to_str().unwrap(), "--as", "model/big:v1"]));
        wait_for("the hub has stored a part of the content", secs(60), || {
            (disk_usage(&hub.data_dir) > before + (20 << 20)).then_some(())
        });
        kill_process(
            Pid::from_raw(hub.pid().cast_signed()).unwrap(),
            Signal::KILL,
        )
        .unwrap();
        let output = publish.join().unwrap();
        assert_ne!(output.code, 0, "the publish was interrupted: {output:?}");
    });
    hub.kill();
    hub.start();
    hub.cli(&["show", "model/big:v1"]).expect(5);
    hub.cli(&["gc"]).expect(0);
    let published = hub.publish(&source, "model/big:v1", &[]);
    assert_eq!(published["unchanged"], false);
    hub.cli(&["verify", "model/big:v1"]).expect(0);
}
