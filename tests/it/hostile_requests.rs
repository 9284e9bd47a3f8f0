//! Peers that ask for too much, send what nobody can hold, or begin and say nothing: a hub goes on
//! serving the others.

use std::time::{Duration, Instant};

use model::protocol::Wanted;
use packhorse::config::Transport;
use serde_json::json;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::hostile::{Artifact, Connection, EntryPage, Identity, TRANSPORTS, over};
use crate::support::{Scratch, limit, secs, wait_for};

/// What an honest client waits for at most.
const SOON: Duration = Duration::from_secs(10);

/// What the hub may take beside what it took before, whatever one peer does: its share of the
/// memory, and a little.
const GROWN_MAX: u64 = 64 << 20;

fn offer(reference: &str, artifact: &Artifact) -> serde_json::Value {
    json!({"publish": {"artifact": reference, "digest": artifact.digest().hex(), "to": null, "run": null}})
}

#[track_caller]
fn answers_soon(hub: &Hub) {
    let begun = Instant::now();
    assert_eq!(hub.get("/healthz").0, 200);
    hub.artifacts();
    assert!(begun.elapsed() < SOON, "the hub took {:?}", begun.elapsed());
}

#[test]
fn many_roots_in_one_request_cost_the_hub_nothing() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    for (transport, name) in TRANSPORTS.into_iter().zip(["quic", "tcp"]) {
        let site = Identity::site(&hub, &format!("mal-{name}"), over(transport)).dial();
        let _control = site.control();
        hub.wait_online(&format!("mal-{name}"), true, secs(20));
        // A root manifest as large as may be: many pages of one file each.
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
        // Whether the hub takes such a manifest is not what this is about.
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
                "a refusal and no root: {} bytes",
                answer.len()
            );
        }
        assert!(
            site.fetch(digest, vec![Wanted::Root])
                .read_to_end(secs(20))
                .unwrap()
                .len()
                > 32,
            "one root is given"
        );
    }
}

/// Begins so many questions of this length, each without its last byte.
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
fn questions_that_never_end_take_no_more_than_a_share() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let honest = Identity::site(&hub, "east", over(Transport::Quic)).dial();
    let before = hub.memory("VmHWM");
    for (transport, name) in TRANSPORTS.into_iter().zip(["quic", "tcp"]) {
        let site = Identity::site(&hub, &format!("mal-{name}"), over(transport)).dial();
        // A question that is too long ends at once.
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
        // A first control stream ends when there is a second.
        let mut first = site.control();
        first.receive(secs(20)).unwrap();
        let mut second = site.control();
        second.receive(secs(20)).unwrap();
        first.read(1, secs(20)).unwrap_err();
        assert!(!site.is_closed());
    }
    let grown = hub.memory("VmHWM").saturating_sub(before);
    assert!(grown < GROWN_MAX, "the hub took {} MiB more", grown >> 20);
}

#[test]
fn gc_and_publishes_wait_for_no_silent_peer_and_no_pipe() {
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
    asked
        .write(&crate::support::hostile::framed(&question))
        .unwrap();
    let (kind, _root_wanted) = silent.accept(secs(20));
    assert_eq!(kind, b'F', "the hub fetches the manifest, and gets nothing");
    // A pipe is no bundle, and the job that would read it ends.
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
