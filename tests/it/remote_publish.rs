//! Publishing from another machine than the hub: a separate state folder and process, and a proxy
//! that counts, throttles and cuts.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::support::command::{Output, bound, run, tool, wait};
use crate::support::daemon::{Hub, PACKHORSE, Site, SiteSpec};
use crate::support::data;
use crate::support::disk::SmallDisk;
use crate::support::images::{self, sha256};
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, free_port, limit, secs, wait_for};

/// The size of the artifact: noise, so that compression saves nothing.
const SIZE: usize = 40 << 20;
/// Bytes per second of the slow connection: the upload takes about eight seconds.
const RATE: u64 = 5 << 20;
/// The bytes that this machine must have sent before a process is killed.
const SENT: u64 = 28 << 20;
/// The bytes that may be sent again after the kill: requests whose answers were incomplete (at most
/// 12 of 1 MiB, the publisher's share of the hub's budget), and bytes in flight. The hub stores
/// each answer as it arrives, and after a kill finds it in its packs.
const AGAIN: u64 = 15 << 20;
/// Headers, acknowledgements, manifests and handshakes: one part in this many, in addition to the
/// payload.
const OVERHEAD: u64 = 10;

/// The most bytes that an upload may send after the interruption.
const LEFT_MAX: u64 = (SIZE as u64 - SENT) + (SIZE as u64 - SENT) / OVERHEAD + AGAIN;

const _: () = assert!(
    LEFT_MAX + (8 << 20) < SIZE as u64,
    "a restarted upload would look like a resumed one"
);

/// The bytes of a connection without payload: handshake, questions, and the search for the largest
/// packet.
const QUIET: u64 = 192 << 10;

/// A hub behind a proxy, and a machine without a daemon.
struct World {
    hub: Hub,
    line: Line,
    state: PathBuf,
    scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let hub = Hub::start_new(scratch.path());
        let line = Line::to(hub.quic);
        let state = scratch.join("state");
        Self {
            hub,
            line,
            state,
            scratch,
        }
    }

    fn token(&self, name: &str) -> String {
        self.hub
            .cli(&["token", "create", "--publisher", name])
            .expect(0)
            .out
            .trim()
            .to_owned()
    }

    fn command(&self, source: &Path, reference: &str, more: &[&str]) -> std::process::Command {
        let mut command = bound(PACKHORSE);
        command
            .env("NO_COLOR", "1")
            .env_remove("PACKHORSE_CONFIG")
            .env_remove("PACKHORSE_JOIN_TOKEN");
        command.arg("publish").arg(source).args([
            "--as",
            reference,
            "--hub",
            &self.line.address().to_string(),
            "-o",
            "json",
        ]);
        command.arg("--state").arg(&self.state).args(more);
        command
    }

    fn publish(&self, source: &Path, reference: &str, more: &[&str]) -> Output {
        run(&mut self.command(source, reference, more), secs(120))
    }

    /// Starts a publish, and waits until this machine has sent about this many bytes.
    fn begin(&self, source: &Path, reference: &str, more: &[&str], bytes: u64) -> Child {
        let mut command = self.command(source, reference, more);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the upload is running", secs(60), || {
            assert!(
                child.try_wait().unwrap().is_none(),
                "it ended before it could be interrupted"
            );
            (self.line.up() >= bytes).then_some(())
        });
        child
    }

    fn model(&self, name: &str) -> PathBuf {
        let source = self.scratch.join(name);
        data::model(&source, SIZE);
        source
    }

    /// Delivers to a site, and compares the content with the source.
    fn check_arrives(&self, reference: &str, source: &Path) {
        let site = Site::start_new(self.scratch.path(), &self.hub, "west", &SiteSpec::default());
        self.hub.deliver_and_wait(reference, "west", secs(60));
        assert_same(source, &site.folder(reference));
        self.hub.cli(&["verify", reference]).expect(0);
    }
}

fn wire(answer: &Value) -> u64 {
    answer["wire"]
        .as_u64()
        .expect("the answer has the number of transmitted bytes")
}

#[test]
fn a_folder_is_published_and_a_changed_version_sends_only_the_changes() {
    let _limit = limit(secs(150));
    let world = World::start();
    let token = world.token("office");
    let v1 = data::dataset(&world.scratch.join("v1"), 60);
    let first = world
        .publish(&v1.root, "dataset/panels:v1", &["--join-token", &token])
        .expect(0)
        .json();
    assert_eq!(
        (first["artifact"].as_str(), first["unchanged"].as_bool()),
        (Some("dataset/panels:v1"), Some(false))
    );
    assert!(first["stored"].as_u64().unwrap() > 0);

    // A repeated publish sends only a handshake and a question. The token was used; it is no longer
    // needed.
    let again = world
        .publish(&v1.root, "dataset/panels:v1", &["--join-token", &token])
        .expect(0)
        .json();
    assert_eq!(
        (again["digest"].as_str(), again["unchanged"].as_bool()),
        (first["digest"].as_str(), Some(true))
    );
    assert_eq!(again["stored"], 0);
    assert!(wire(&again) < QUIET, "{again}");

    let (v2, new_bytes) = data::next_dataset(&v1, &world.scratch.join("v2"));
    let (before, before_both) = (world.line.up(), world.line.carried());
    let second = world
        .publish(&v2.root, "dataset/panels:v2", &[])
        .expect(0)
        .json();
    let (sent, both) = (world.line.up() - before, world.line.carried() - before_both);
    // The proxy counts datagrams. The answer counts the bytes that this side sent and received,
    // including those that a busy machine dropped.
    let said = wire(&second);
    assert!(
        said + (64 << 10) >= both && said <= both + both / 4 + (64 << 10),
        "the answer says {said}, the proxy counted {both}"
    );
    assert!(
        sent < new_bytes + new_bytes / OVERHEAD + QUIET,
        "{sent} bytes were sent for {new_bytes} new ones: {second}"
    );

    // Other content under a name that is already used.
    world
        .publish(&v2.root, "dataset/panels:v1", &[])
        .expect(6)
        .says(&["other content"]);
    world.check_arrives("dataset/panels:v2", &v2.root);
    let sites = world.hub.json(&["sites"]);
    assert_eq!(
        sites.as_array().unwrap().len(),
        1,
        "a publisher is not a site: {sites}"
    );
    world
        .hub
        .cli(&["deliver", "dataset/panels:v1", "--to", "office"])
        .expect(5);
}

#[test]
fn a_publish_resumes_after_it_was_killed() {
    let _limit = limit(secs(200));
    let world = World::start();
    let token = world.token("office");
    let source = world.model("model");
    world.line.throttle_up(RATE);
    let mut child = world.begin(&source, "model/yolo:v1", &["--join-token", &token], SENT);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        !world.hub.artifacts().contains(&"model/yolo:v1".to_owned()),
        "an incomplete artifact does not exist"
    );
    let so_far = world.line.up();
    let done = world
        .publish(&source, "model/yolo:v1", &["--join-token", &token])
        .expect(0)
        .json();
    let more = world.line.up() - so_far;
    assert!(
        more <= LEFT_MAX,
        "{more} bytes were sent after the kill, the limit is {LEFT_MAX}: {done}"
    );
    assert!(wire(&done) < SIZE as u64, "{done}");
    // The hub counts the bytes that it did not have.
    let stored = done["stored"].as_u64().unwrap();
    assert!(
        stored > 0 && stored <= LEFT_MAX,
        "the hub stored {stored} new bytes: {done}"
    );
    world.line.throttle_up(0);
    world.check_arrives("model/yolo:v1", &source);
}

#[test]
fn a_publish_reconnects_after_the_hub_was_killed() {
    let _limit = limit(secs(200));
    let mut world = World::start();
    let token = world.token("office");
    let source = world.model("model");
    world.line.throttle_up(RATE);
    let mut child = world.begin(&source, "model/yolo:v1", &["--join-token", &token], SENT);
    world.hub.kill();
    let so_far = world.line.up();
    world.hub.start();
    let status = wait(&mut child, secs(90)).expect("the publish ends");
    assert!(status.success(), "the publish ended with {status}");
    let more = world.line.up() - so_far;
    assert!(
        more <= LEFT_MAX,
        "{more} bytes were sent after the kill, the limit is {LEFT_MAX}"
    );
    world.line.throttle_up(0);
    world.check_arrives("model/yolo:v1", &source);
}

#[test]
fn one_publisher_can_run_two_publishes_at_once() {
    let _limit = limit(secs(150));
    let world = World::start();
    let token = world.token("office");
    let first = world.model("first");
    let second = world.scratch.join("second");
    data::write(
        &second.join("weights.bin"),
        &data::noise(&mut data::rng("second"), 256 << 10),
    );
    // At this rate the first lasts for more than half a minute, and the second for a few seconds.
    world.line.throttle_up(1 << 20);
    let mut child = world.begin(&first, "model/first:v1", &["--join-token", &token], 2 << 20);
    let other = world
        .publish(&second, "model/second:v1", &[])
        .expect(0)
        .json();
    assert_eq!(other["unchanged"], false);
    assert!(
        child.try_wait().unwrap().is_none(),
        "the first publish ended too early, the test proves nothing"
    );
    world.line.throttle_up(0);
    assert!(
        wait(&mut child, secs(60))
            .expect("the first ends")
            .success()
    );
    let mut artifacts = world.hub.artifacts();
    artifacts.sort();
    assert_eq!(artifacts, ["model/first:v1", "model/second:v1"]);
    let left = std::fs::read_dir(&world.state)
        .unwrap()
        .flatten()
        .map(|e| e.path().join("work"));
    let left: Vec<PathBuf> = left
        .flat_map(|work| std::fs::read_dir(work).unwrap().flatten().map(|e| e.path()))
        .collect();
    assert!(
        left.iter()
            .all(|p| p.extension().is_some_and(|e| e == "lock")),
        "{left:?}"
    );
}

#[test]
fn a_refused_publisher_gets_the_reason() {
    let _limit = limit(secs(120));
    let world = World::start();
    let source = world.scratch.join("model");
    data::model(&source, 1 << 20);
    world
        .publish(&source, "model/a:v1", &[])
        .expect(4)
        .says(&["no publisher", "token create --publisher"]);
    world
        .publish(&source, "model/a:v1", &["--join-token", "nonsense"])
        .expect(4)
        .says(&["incomplete"]);
    let token = world.token("office");
    let wrong = format!("{}A{}", &token[..20], &token[21..]);
    if wrong != token {
        world
            .publish(&source, "model/a:v1", &["--join-token", &wrong])
            .expect(4)
            .says(&["not one of this hub"]);
    }
    // A site's token does not enrol a publisher, and a publisher's token does not enrol a site.
    // Such an attempt does not use up the token.
    let of_a_site = world.hub.token("west", &[]);
    world
        .publish(&source, "model/a:v1", &["--join-token", &of_a_site])
        .expect(4)
        .says(&["for a site"]);
    let site = Site::new(
        world.scratch.path(),
        &world.hub,
        "office",
        &SiteSpec::default(),
    );
    site.join_with(&token).expect(4).says(&["for a publisher"]);
    world
        .publish(&source, "model/a:v1", &["--join-token", &token])
        .expect(0);
    // A token of another hub does not work here, and is not needed.
    let (id, rest) = token.split_once('.').unwrap();
    let (secret, _) = rest.split_once('.').unwrap();
    let of_another = format!("{id}.{secret}.{secret}");
    world
        .publish(&source, "model/a:v1", &["--join-token", &of_another])
        .expect(4)
        .says(&["the hash of its CA differs", "omit the token"]);
    // An unknown address: no connection is opened, and the error names the known hub.
    let at = |address: &str| {
        let mut command = bound(PACKHORSE);
        command
            .env_remove("PACKHORSE_CONFIG")
            .env_remove("PACKHORSE_JOIN_TOKEN")
            .arg("publish")
            .arg(&source);
        command
            .args(["--as", "model/b:v1", "--hub", address, "--state"])
            .arg(&world.state);
        run(&mut command, secs(60))
    };
    let (known, mistyped) = (
        world.line.address().to_string(),
        format!("127.0.0.1:{}", free_port()),
    );
    at(&mistyped).expect(4).says(&[
        &mistyped,
        "did not call it",
        &known,
        "check the address",
        "token create --publisher",
    ]);
    let folder = |address: &str| world.state.join(address.replace(':', "_"));
    assert!(
        !folder(&mistyped).exists(),
        "a mistyped address creates no files"
    );
    at("127.0.0.1").expect(2).says(&["HOST:PORT"]);
    // A known hub that does not answer.
    data::write(
        &folder(&mistyped).join("identity/site.pem"),
        &std::fs::read(folder(&known).join("identity/site.pem")).unwrap(),
    );
    at(&mistyped)
        .expect(10)
        .says(&[&mistyped, "does not answer", "then run this again"]);
    // A used token does not work for another state folder.
    let elsewhere = world.scratch.join("another-state");
    let fresh = World {
        state: elsewhere,
        ..world
    };
    fresh
        .publish(&source, "model/a:v1", &["--join-token", &token])
        .expect(4)
        .says(&["used already"]);
    fresh
        .hub
        .cli(&["token", "create", "--site", "office"])
        .expect(6)
        .says(&["publisher already"]);
    fresh.hub.cli(&["token", "create"]).expect(2);
}

#[test]
fn images_labels_and_deliveries_from_another_machine() {
    let _limit = limit(secs(150));
    let world = World::start();
    let token = world.token("office");
    let site = Site::start_new(
        world.scratch.path(),
        &world.hub,
        "west",
        &SiteSpec::default(),
    );
    let image = world.scratch.join("image");
    images::layout(
        &image,
        &[&data::noise(&mut data::rng("a layer"), 3 << 20), b"another"],
    );
    let answer = world
        .publish(&image, "image/inspector:v1", &["--join-token", &token])
        .expect(0)
        .json();
    assert_eq!(answer["unchanged"], false);
    world
        .hub
        .deliver_and_wait("image/inspector:v1", "west", secs(60));
    let arrived = tool(
        "skopeo",
        &[
            "inspect",
            "--raw",
            &format!("oci:{}/inspector:v1", site.layout.display()),
        ],
    );
    assert_eq!(sha256(arrived.as_bytes()), images::top(&image)["digest"]);
    let labels = world.scratch.join("labels.csv");
    data::write(
        &labels,
        "sample_path,class,x,y,w,h\na.png,dent,1,2,3,4\nb.png,dent,5,6,7,8\n".as_bytes(),
    );
    let answer = world
        .publish(&labels, "labels/panels:v1", &["--to", "west"])
        .expect(0)
        .json();
    let transfer = answer["transfers"][0].as_str().unwrap().to_owned();
    world.hub.wait_done(&transfer, secs(60));
    assert!(site.labels_db.exists());
    world
        .publish(&labels, "labels/panels:v2", &["--for", "dataset/x:v1"])
        .expect(2)
        .says(&["--for"]);
    world
        .publish(&labels, "labels/panels:v2", &["--to", "nowhere"])
        .expect(5)
        .says(&["nowhere"]);
    world
        .publish(&labels, "labels/panels:v2", &["--wait"])
        .expect(2);
    let mut artifacts = world.hub.artifacts();
    artifacts.sort();
    assert_eq!(artifacts, ["image/inspector:v1", "labels/panels:v1"]);
}

#[test]
fn a_publish_uses_tcp_if_udp_is_blocked() {
    let _limit = limit(secs(120));
    let world = World::start();
    world.line.block_udp(true);
    let source = world.scratch.join("model");
    data::model(&source, 6 << 20);
    world
        .publish(
            &source,
            "model/tcp:v1",
            &["--join-token", &world.token("office")],
        )
        .expect(0);
    assert!(world.line.up() > 6 << 20);
    world.check_arrives("model/tcp:v1", &source);
}

#[test]
fn a_full_hub_refuses_an_upload_before_it_has_received_half_of_it() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    let Some(disk) = SmallDisk::mount_tmpfs(&hub.data_dir, "120m") else {
        return;
    };
    hub.start();
    let line = Line::to(hub.quic);
    let world = World {
        state: scratch.join("state"),
        hub,
        line,
        scratch,
    };
    let source = world.scratch.join("model");
    data::model(&source, 100 << 20);
    let mut publish = world.command(
        &source,
        "model/big:v1",
        &["--join-token", &world.token("office")],
    );
    std::thread::scope(|scope| {
        let publish = scope.spawn(|| run(&mut publish, secs(150)));
        wait_for("the upload is running", secs(60), || {
            (world.line.up() > 12 << 20).then_some(())
        });
        // The publisher asks repeatedly until there is space, and sends nothing more each time.
        world.line.wait_quiet_up(secs(30));
        let (came, since) = (world.line.up(), Instant::now());
        wait_for("the publisher has asked a few more times", secs(20), || {
            (since.elapsed() > secs(8)).then_some(())
        });
        assert!(
            world.line.up() - came < 1 << 20,
            "{} bytes arrived while it waited",
            world.line.up() - came
        );
        assert!(
            !publish.is_finished() && world.line.up() < 50 << 20,
            "{} bytes arrived",
            world.line.up()
        );
        assert!(disk.used() < 50 << 20, "{} bytes were stored", disk.used());
        disk.grow("300m");
        publish.join().unwrap().expect(0);
    });
    world.hub.cli(&["verify", "model/big:v1"]).expect(0);
    assert!(
        world.line.up() < 130 << 20,
        "no content was sent twice: {} bytes",
        world.line.up()
    );
    let World { mut hub, .. } = world;
    hub.stop();
}

/// A file that changes between the read and the hub's fetch is detected: no wrong content arrives.
#[test]
fn a_source_that_changes_during_the_publish_is_detected() {
    let _limit = limit(secs(150));
    let world = World::start();
    let token = world.token("office");
    let source = world.model("model");
    world.line.throttle_up(RATE);
    let mut command = world.command(&source, "model/yolo:v1", &["--join-token", &token]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the upload is running", secs(60), || {
        (world.line.up() >= 6 << 20).then_some(())
    });
    let file = std::fs::read_dir(&source)
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .max_by_key(|p| p.metadata().unwrap().len())
        .unwrap();
    let len = file.metadata().unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(len - 1)
        .unwrap();
    let status = wait(&mut child, secs(60)).expect("the publish ends");
    assert_eq!(status.code(), Some(8), "integrity");
    assert!(world.hub.artifacts().is_empty());
    // The changed source is another artifact, and the hub has most of it already.
    world.line.throttle_up(0);
    world.publish(&source, "model/yolo:v1", &[]).expect(0);
    world.check_arrives("model/yolo:v1", &source);
}
