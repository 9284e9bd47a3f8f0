//! Peers that request too much, send oversized data, or start a request and then send nothing: the
//! hub continues to serve the others.

use std::time::{Duration, Instant};

use base::limits::{CHANGES_AT_ONCE_MAX, CHANGES_PER_SECOND_MAX};
use model::protocol::Wanted;
use packhorse::config::Transport;
use serde_json::json;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::hostile::{
    Artifact, Connection, EntryPage, Identity, TRANSPORTS, framed, over,
};
use crate::support::{Scratch, limit, secs, wait_for};

/// How long an honest client may wait.
const SOON: Duration = Duration::from_secs(10);

/// The allowed growth of the hub's memory, whatever one peer does: the peer's share of the budget,
/// and a reserve.
const GROWN_MAX: u64 = 64 << 20;

fn offer(reference: &str, artifact: &Artifact) -> serde_json::Value {
    json!({"publish": {"artifact": reference, "digest": artifact.digest().hex(), "to": null, "run": null}})
}

#[track_caller]
fn answers_soon(hub: &Hub) {
    let begun = Instant::now();
    assert_eq!(hub.get("/healthz").0, 200);
    hub.artifacts();
    assert!(
        begun.elapsed() < SOON,
        "the hub needed {:?}",
        begun.elapsed()
    );
}

#[test]
fn a_request_for_many_roots_costs_the_hub_nothing() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    for (transport, name) in TRANSPORTS.into_iter().zip(["quic", "tcp"]) {
        let site = Identity::site(&hub, &format!("mal-{name}"), over(transport)).dial();
        let _control = site.control();
        hub.wait_online(&format!("mal-{name}"), true, secs(20));
        // A root manifest of the maximum size: many pages of one file each.
        let mut large = Artifact::new("dataset");
        for n in 0..4_000 {
            large.list(
                &EntryPage::new().file(format!("{name}-{n:05}"), b"", 0o644),
                1,
            );
            large.add("files", 1);
        }
        site.serve(vec![large.clone()]);
        let reference = format!("dataset/large-{name}:1");
        // This test does not depend on whether the hub accepts such a manifest.
        let digest = if site.ask(&offer(&reference, &large)).is_ok() {
            hub.deliver(&[&reference], &format!("mal-{name}"));
            large.digest()
        } else {
            let source = scratch.folder(&format!("source-{name}"));
            std::fs::write(source.join("a"), b"a").unwrap();
            hub.publish(&source, &reference, &[]);
            hub.deliver(&[&reference], &format!("mal-{name}"));
            let shown = hub.json(&["show", &reference]);
            shown["artifact"]["digest"]
                .as_str()
                .or(shown["digest"].as_str())
                .unwrap()
                .parse()
                .unwrap()
        };
        let mut asked: Vec<_> = (0..4)
            .map(|_| site.fetch(digest, vec![Wanted::Root; 60_000]))
            .collect();
        answers_soon(&hub);
        for stream in &mut asked {
            let answer = stream.read_to_end(secs(20)).unwrap_or_default();
            assert!(
                answer.len() < 4 << 10,
                "the answer is a refusal without a root: {} bytes",
                answer.len()
            );
        }
        assert!(
            site.fetch(digest, vec![Wanted::Root])
                .read_to_end(secs(20))
                .unwrap()
                .len()
                > 32,
            "one root is sent"
        );
    }
}

/// Starts `count` questions of this length, each without its last byte.
fn begin_questions(
    peer: &Connection,
    count: usize,
    len: usize,
) -> Vec<crate::support::hostile::Stream> {
    let mut first = vec![b'Q'];
    first.extend_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
    first.resize(5 + (len - 1).min(32 << 10), b' ');
    (0..count).map(|_| peer.open(&first)).collect()
}

#[test]
fn unfinished_questions_take_no_more_than_their_peers_share() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let honest = Identity::site(&hub, "east", over(Transport::Quic)).dial();
    let before = hub.memory("VmHWM");
    for (transport, name) in TRANSPORTS.into_iter().zip(["quic", "tcp"]) {
        let site = Identity::site(&hub, &format!("mal-{name}"), over(transport)).dial();
        // A question that is too long is refused at once.
        let mut long = site.open(b"");
        long.write(&[&[b'Q'][..], &(4_u32 << 20).to_le_bytes()].concat())
            .unwrap();
        long.read(1, secs(20)).unwrap_err();
        let _held = begin_questions(&site, 200, 64 << 10);
        let begun = Instant::now();
        honest.ask(&json!({"list_runs": {"limit": 1}})).unwrap();
        assert!(
            begun.elapsed() < SOON,
            "another peer waited {:?}",
            begun.elapsed()
        );
        answers_soon(&hub);
        // A second control stream ends the first.
        let mut first = site.control();
        first.receive(secs(20)).unwrap();
        let mut second = site.control();
        second.receive(secs(20)).unwrap();
        first.read(1, secs(20)).unwrap_err();
        assert!(!site.is_closed());
    }
    let grown = hub.memory("VmHWM").saturating_sub(before);
    assert!(
        grown < GROWN_MAX,
        "the hub's memory grew by {} MiB",
        grown >> 20
    );
}

#[test]
fn gc_and_publish_do_not_wait_for_a_silent_peer_or_a_pipe() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let east = Site::start_new(scratch.path(), &hub, "east", &SiteSpec::default());
    let silent = Identity::site(&hub, "mal", over(Transport::Tcp)).dial();
    let question = serde_json::to_vec(&offer(
        "dataset/silent:1",
        &Artifact::of_files("dataset", &[("a", b"a")]),
    ))
    .unwrap();
    let mut asked = silent.open(b"Q");
    asked.write(&framed(&question)).unwrap();
    let (kind, _root_wanted) = silent.accept(secs(20));
    assert_eq!(
        kind, b'F',
        "the hub requests the manifest and receives nothing"
    );
    // A pipe is not a bundle: the job that should read it fails.
    let pipe = scratch.path().join("pipe");
    crate::support::command::tool("mkfifo", &[&pipe.display().to_string()]);
    hub.cli_within(&["import", &pipe.display().to_string()], secs(20))
        .expect(2)
        .says(&["not a regular file"]);
    let source = scratch.folder("source");
    for n in 0..3 {
        std::fs::write(source.join("a"), format!("{n}")).unwrap();
        hub.cli_within(&["gc"], secs(20)).expect(0);
        hub.publish(&source, &format!("dataset/a:{n}"), &[]);
        let at_site = scratch.folder(&format!("at-site-{n}"));
        std::fs::write(at_site.join("b"), format!("{n}")).unwrap();
        east.publish(&at_site, &format!("dataset/b:{n}"), &[]);
    }
    assert!(hub.artifacts().len() >= 6);
    wait_for("no job runs", secs(20), || {
        hub.json(&["jobs"])
            .as_array()?
            .iter()
            .all(|job| job["state"] != "running")
            .then_some(())
    });
}

#[test]
fn first_messages_and_lists_of_changes_have_a_rate() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Identity::site(&hub, "mal", over(Transport::Tcp)).dial();
    let mut control = site.control();
    hub.wait_online("mal", true, secs(20));
    let received = || hub.metric("packhorse_control_bytes{to=\"hub\"}");
    let before = received();
    let message = framed(json!({"changed": []}).to_string().as_bytes());
    // The metric counts a message without its length.
    let each = message.len() as u64 - 4;
    let count = CHANGES_AT_ONCE_MAX + 4 * CHANGES_PER_SECOND_MAX;
    let begun = Instant::now();
    control.write(&message.repeat(count as usize)).unwrap();
    let handled = wait_for("the burst is handled", secs(60), || {
        let handled = (received() - before) / each;
        (handled >= CHANGES_AT_ONCE_MAX.into()).then_some(handled)
    });
    // One message is received before it waits.
    let allowed = f64::from(CHANGES_AT_ONCE_MAX)
        + begun.elapsed().as_secs_f64() * f64::from(CHANGES_PER_SECOND_MAX)
        + 2.0;
    assert!(
        (handled as f64) <= allowed,
        "{handled} messages, {allowed} are allowed"
    );
    answers_soon(&hub);
}
