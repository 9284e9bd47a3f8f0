//! Publishing from another machine than the hub: another state folder, another process, a line that
//! is counted and cut.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::command::{Output, bound, run, tool, wait};
use crate::support::daemon::{Hub, PACKHORSE, Site, SiteSpec};
use crate::support::data;
use crate::support::disk::SmallDisk;
use crate::support::images::{self, sha256};
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, free_port, limit, secs, wait_for};

/// What is carried: noise, so that no byte is saved by compressing.
const SIZE: usize = 40 << 20;
/// Bytes a second on the slow line: the upload lasts some eight seconds.
const RATE: u64 = 5 << 20;
/// What must have left this machine before something is killed.
const SENT: u64 = 28 << 20;
/// What may be sent again after that: requests whose answers were not whole yet (12 of 1 MiB at the
/// most, the publisher's share of the hub's budget) and what was in flight. The hub keeps each
/// request as it comes, and finds it in its packs when it was killed.
const AGAIN: u64 = 15 << 20;
/// Headers, acknowledgements, manifests, handshakes: a part in this many, beside the payload.
const OVERHEAD: u64 = 10;

/// The most that an upload may send after it was interrupted.
const LEFT_MAX: u64 = (SIZE as u64 - SENT) + (SIZE as u64 - SENT) / OVERHEAD + AGAIN;

const _: () = assert!(
    LEFT_MAX + (8 << 20) < SIZE as u64,
    "an upload from the beginning would pass for one that went on"
);

/// What a line costs that carries nothing: handshake, questions, and the search for the largest
/// packet.
const QUIET: u64 = 192 << 10;

/// A hub behind a line, and a machine without any daemon.
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

    /// Begins a publish and waits until about this much has left this machine.
    fn begin(&self, source: &Path, reference: &str, more: &[&str], bytes: u64) -> Child {
        let mut command = self.command(source, reference, more);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the upload is on its way", secs(60), || {
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

    /// Delivers to a site beside the hub, and compares.
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
        .expect("the answer counts what crossed the line")
}

#[test]
fn a_folder_arrives_and_a_changed_version_sends_what_changed() {
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

    // Again: nothing but a handshake and a question. The token was used; it is not asked for any
    // more.
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
    // The proxy counts datagrams; the answer what this end sent and received, which includes what a
    // busy machine dropped.
    let said = wire(&second);
    assert!(
        said + (64 << 10) >= both && said <= both + both / 4 + (64 << 10),
        "{said} was said and {both} counted"
    );
    assert!(
        sent < new_bytes + new_bytes / OVERHEAD + QUIET,
        "{sent} bytes were sent for {new_bytes} new ones: {second}"
    );

    // Other content under a name that is taken.
    world
        .publish(&v2.root, "dataset/panels:v1", &[])
        .expect(6)
        .says(&["other content"]);
    world.check_arrives("dataset/panels:v2", &v2.root);
    let sites = world.hub.json(&["sites"]);
    assert_eq!(
        sites.as_array().unwrap().len(),
        1,
        "a publisher is no site: {sites}"
    );
    world
        .hub
        .cli(&["deliver", "dataset/panels:v1", "--to", "office"])
        .expect(5);
}

#[test]
fn a_publish_that_is_killed_goes_on_where_it_stood() {
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
        "half of an artifact is none"
    );
    let so_far = world.line.up();
    let done = world
        .publish(&source, "model/yolo:v1", &["--join-token", &token])
        .expect(0)
        .json();
    let more = world.line.up() - so_far;
    assert!(
        more <= LEFT_MAX,
        "{more} bytes were sent after the kill, {LEFT_MAX} would do: {done}"
    );
    assert!(wire(&done) < SIZE as u64, "{done}");
    // The hub counts what it did not have.
    let stored = done["stored"].as_u64().unwrap();
    assert!(
        stored > 0 && stored <= LEFT_MAX,
        "the hub stored {stored} bytes anew: {done}"
    );
    world.line.throttle_up(0);
    world.check_arrives("model/yolo:v1", &source);
}

#[test]
fn a_hub_that_is_killed_is_called_again() {
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
        "{more} bytes were sent after the kill, {LEFT_MAX} would do"
    );
    world.line.throttle_up(0);
    world.check_arrives("model/yolo:v1", &source);
}

#[test]
fn two_at_once_by_one_publisher() {
    let _limit = limit(secs(150));
    let world = World::start();
    let token = world.token("office");
    let first = world.model("first");
    let second = world.scratch.join("second");
    data::write(
        &second.join("weights.bin"),
        &data::noise(&mut data::rng("second"), 8 << 20),
    );
    // Slow enough that the first is still under way when the second begins.
    world.line.throttle_up(RATE);
    let mut child = world.begin(&first, "model/first:v1", &["--join-token", &token], 4 << 20);
    let first = Pid::from_child(&child);
    kill_process(first, Signal::STOP).unwrap();
    let other = world
        .publish(&second, "model/second:v1", &[])
        .expect(0)
        .json();
    assert_eq!(other["unchanged"], false);
    assert!(
        child.try_wait().unwrap().is_none(),
        "the first ended too early to say anything"
    );
    kill_process(first, Signal::CONT).unwrap();
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
fn who_may_not_publish_is_told() {
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
    // A site's token makes no publisher, and a publisher's no site; neither is used up by that.
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
    // A token of another hub is no use here, and not needed.
    let (id, rest) = token.split_once('.').unwrap();
    let (secret, _) = rest.split_once('.').unwrap();
    let of_another = format!("{id}.{secret}.{secret}");
    world
        .publish(&source, "model/a:v1", &["--join-token", &of_another])
        .expect(4)
        .says(&["the hash of its CA differs", "omit the token"]);
    // Another address: it is not called, and the one that is known is named.
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
        "nothing is made for a mistyped address"
    );
    at("127.0.0.1").expect(2).says(&["HOST:PORT"]);
    // One that is known and does not answer.
    data::write(
        &folder(&mistyped).join("identity/site.pem"),
        &std::fs::read(folder(&known).join("identity/site.pem")).unwrap(),
    );
    at(&mistyped)
        .expect(10)
        .says(&[&mistyped, "does not answer", "then run this again"]);
    // Once used, it is good for nobody else.
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
fn where_udp_is_blocked_a_publish_goes_over_tcp() {
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
fn what_a_full_hub_cannot_hold_is_told_before_half_of_it_came() {
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
        wait_for("the upload is on its way", secs(60), || {
            (world.line.up() > 12 << 20).then_some(())
        });
        // It asks again and again until there is room, and each time brings nothing more.
        world.line.wait_quiet_up(secs(30));
        let (came, since) = (world.line.up(), Instant::now());
        wait_for("it has asked some times more", secs(20), || {
            (since.elapsed() > secs(8)).then_some(())
        });
        assert!(
            world.line.up() - came < 1 << 20,
            "{} bytes came while it waited",
            world.line.up() - came
        );
        assert!(
            !publish.is_finished() && world.line.up() < 50 << 20,
            "{} bytes came",
            world.line.up()
        );
        assert!(disk.used() < 50 << 20, "{} bytes were kept", disk.used());
        disk.grow("300m");
        publish.join().unwrap().expect(0);
    });
    world.hub.cli(&["verify", "model/big:v1"]).expect(0);
    assert!(
        world.line.up() < 130 << 20,
        "nothing came twice: {} bytes",
        world.line.up()
    );
    let World { mut hub, .. } = world;
    hub.stop();
}

/// A file that changes between the reading and the hub's fetch is noticed: nothing wrong arrives.
#[test]
fn a_source_that_changes_meanwhile_is_noticed() {
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
    wait_for("the upload is on its way", secs(60), || {
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
    // What is there now is another artifact, and most of it is at the hub already.
    world.line.throttle_up(0);
    world.publish(&source, "model/yolo:v1", &[]).expect(0);
    world.check_arrives("model/yolo:v1", &source);
}
