//! Random bytes and malformed messages on any stream. The daemon that receives them from an
//! enrolled site, a publisher or a hub stays within that peer's share of memory, writes nothing
//! outside its folders, and answers all other peers within [`ANSWER_MAX`].
//!
//! A busy machine may delay a single answer, so one in fifty may take up to [`ANSWER_DELAYED_MAX`].
//!
//! The messages are real ones that a seeded generator changed: a value is replaced by an extreme
//! one, or bytes are flipped, cut or repeated.

use std::path::Path;
use std::time::{Duration, Instant};

use content::chunk::Hash;
use model::protocol::{FetchRequest, Wanted};
use packhorse::config::Transport;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, Hub, Site, SiteSpec};
use crate::support::data::rng;
use crate::support::hostile::{
    Connection, FalseHub, Identity, TRANSPORTS, desired, framed, over, wanted,
};
use crate::support::{Scratch, limit, secs, tree};

/// The number of messages that each peer sends over each transport.
const MESSAGES: usize = 150;
/// The number of connections that a hostile hub accepts from its site.
const HUB_CONNECTIONS: usize = 6;
/// The memory that a peer may cost: its share of the budget, and 8 MiB.
const MEMORY_MAX: u64 = (12 + 8) << 20;
/// How long another peer may wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// The same for the few answers that the machine itself may have delayed.
const ANSWER_DELAYED_MAX: Duration = Duration::from_secs(10);

/// A value that no honest peer sends.
fn extreme(rng: &mut StdRng, victim: &Path) -> Value {
    let deep = (0..100).fold(json!([]), |inner, _| json!([inner]));
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("."),
        json!(".."),
        json!("../../../victim"),
        json!(victim.to_str().expect("UTF-8")),
        json!("a\0b"),
        json!("\u{202e}gnp.\u{1b}[2J"),
        json!("x".repeat(60_000)),
        json!([]),
        json!({}),
        json!(vec![0; 10_000]),
        deep,
    ];
    values.choose(rng).expect("the list is not empty").clone()
}

/// Replaces one random value inside `value`.
fn spoil(value: &mut Value, rng: &mut StdRng, victim: &Path) {
    let inner: Option<&mut Value> = match value {
        Value::Array(list) if !list.is_empty() && rng.random_ratio(9, 10) => {
            let at = rng.random_range(0..list.len());
            list.get_mut(at)
        }
        Value::Object(map) if !map.is_empty() && rng.random_ratio(9, 10) => {
            let at = rng.random_range(0..map.len());
            map.values_mut().nth(at)
        }
        _ => None,
    };
    match inner {
        Some(inner) => spoil(inner, rng, victim),
        None => *value = extreme(rng, victim),
    }
}

/// Flips, cuts or repeats.
fn garble(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.random_range(0..bytes.len());
    match rng.random_range(0..3) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes.truncate(at),
        _ => bytes.extend_from_within(at..),
    }
}

/// One message with a random defect, with a correct or a wrong length in front.
fn message(templates: &[Value], rng: &mut StdRng, victim: &Path) -> Vec<u8> {
    let mut value = templates.choose(rng).expect("there are templates").clone();
    (0..rng.random_range(0..3)).for_each(|_| spoil(&mut value, rng, victim));
    let mut text = serde_json::to_vec(&value).expect("JSON");
    if rng.random_ratio(1, 4) {
        garble(&mut text, rng);
    }
    let mut bytes = framed(&text);
    if rng.random_ratio(1, 20) {
        bytes[..4].copy_from_slice(&rng.random::<u32>().to_le_bytes());
    }
    bytes
}

fn fetch_request(rng: &mut StdRng) -> Vec<u8> {
    let mut range = || (rng.random_range(0..1 << 20), rng.random_range(0..u32::MAX));
    let ranges = vec![range(), range(), range()];
    let hash = Hash::of(b"anything");
    let wants = [
        vec![Wanted::Root; 5_000],
        vec![Wanted::RootAndPages(u64::MAX)],
        vec![Wanted::TopPages(ranges.clone())],
        vec![
            Wanted::Children {
                page: hash,
                ranges: ranges.clone()
            };
            100
        ],
        vec![Wanted::Delta {
            ranges,
            base: hash,
            against: (0, u32::MAX),
        }],
    ];
    let wants = wants.choose(rng).expect("the list is not empty").clone();
    let mut bytes = postcard::to_stdvec(&FetchRequest {
        digest: hash,
        priority: rng.random(),
        wants,
    })
    .expect("postcard");
    if rng.random_ratio(1, 2) {
        garble(&mut bytes, rng);
    }
    framed(&bytes)
}

/// The questions of a site or a publisher to a hub.
fn questions() -> Vec<Value> {
    let digest = Hash::of(b"anything").hex();
    vec![
        json!({"act": {"id": "t-1", "action": "retry"}}),
        json!({"deliver": {"artifacts": ["dataset/x:1"], "to": "all"}}),
        json!({"renew": {"request": "3000"}}),
        json!({"start_run": {
            "name": "r", "from": "mal", "on": "east", "inputs": ["dataset/x:1"], "expect": "model/x:1", "ttl_seconds": 60,
        }}),
        json!({"act_on_run": {"name": "r", "action": "cancel"}}),
        json!({"show_run": "r"}),
        json!({"list_runs": {"limit": 100}}),
        json!({"publish": {"artifact": "dataset/x:1", "digest": digest, "to": "all", "run": "r"}}),
        json!({"upload": {"artifact": "dataset/x:1", "digest": digest, "to": "all"}}),
        json!({"delivery": "d-1"}),
        json!({"transfers": {"id": "t-1,t-2", "since": 1, "wait": 0}}),
    ]
}

/// The messages of a site on its control stream.
fn tellings() -> Vec<Value> {
    vec![
        json!({"hello": {"version": "0.1.0", "share": ["all"], "congestion": "auto"}}),
        json!({"report": [{"id": "t-1", "generation": 1, "state": "done", "body": {"receipt": {"statement": "x"}, "message": "m"}}]}),
        json!({"runs": [{
            "name": "r", "id": "r-1", "phase": "training", "by_platform": false, "starts": 1, "started_ms": 1, "has_output": true,
            "ended": {"exit_code": 0, "signal": null, "message": "m", "tail": "t", "ended_ms": 1},
            "model": {"artifact": "model/x:1", "digest": Hash::of(b"anything").hex()}, "message": "m", "removed": ["t-1"], "left": ["t-1"],
        }]}),
        json!({"changed": [["dataset/x:1", "a file changed"]]}),
    ]
}

/// Sends all messages, and measures after each how long another peer waits for an answer.
fn bombard(
    connection: &Connection,
    rng: &mut StdRng,
    tells: &[Value],
    asks: &[Value],
    victim: &Path,
    mut others: impl FnMut(),
) {
    for _ in 0..MESSAGES {
        let (kind, bytes) = match rng.random_range(0..10) {
            0 => (rng.random(), message(asks, rng, victim)),
            1..3 => (
                b'C',
                (0..rng.random_range(1..4))
                    .flat_map(|_| message(tells, rng, victim))
                    .collect(),
            ),
            3..5 => (b'F', fetch_request(rng)),
            _ => (b'Q', message(asks, rng, victim)),
        };
        // A daemon may close the connection of a peer that breaks the protocol.
        let Some(mut stream) = connection.try_open(&[kind]) else {
            return;
        };
        let _ = stream.write(&bytes);
        if rng.random_ratio(3, 4) {
            stream.finish();
        }
        others();
    }
}

/// How long another peer waited for each answer of a daemon.
#[derive(Default)]
struct Answers(Vec<Duration>);

impl Answers {
    #[track_caller]
    fn ask(&mut self, daemon: &Daemon) {
        let began = Instant::now();
        let (code, _) = daemon.get("/v1/sites");
        assert_eq!(code, 200);
        let waited = began.elapsed();
        assert!(
            waited < ANSWER_DELAYED_MAX,
            "another peer waited {waited:?}"
        );
        self.0.push(waited);
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let late: Vec<_> = self
            .0
            .iter()
            .filter(|waited| **waited >= ANSWER_MAX)
            .collect();
        assert!(
            self.0.len() >= 50 && late.len() * 50 <= self.0.len(),
            "{} of {} answers took too long: {late:?}",
            late.len(),
            self.0.len()
        );
    }
}

#[test]
fn a_hub_withstands_malformed_messages_of_sites_and_publishers() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let victim = scratch.folder("victim");
    std::fs::write(victim.join("precious"), b"precious").unwrap();
    let mut hub = Hub::start_new(scratch.path());
    let mut answers = Answers::default();
    for (transport, name) in TRANSPORTS.into_iter().zip(["mal-quic", "mal-tcp"]) {
        let site = Identity::site(&hub, name, over(transport));
        let publisher = Identity::publisher(&hub, &format!("{name}-publisher"), over(transport));
        for (who, identity) in [("site", site), ("publisher", publisher)] {
            let mut rng = rng(&format!("{who} over {name}"));
            let before = hub.memory("VmRSS");
            for _ in 0..3 {
                let connection = identity.dial();
                bombard(
                    &connection,
                    &mut rng,
                    &tellings(),
                    &questions(),
                    &victim,
                    || answers.ask(&hub),
                );
                connection.close();
            }
            let cost = hub.memory("VmHWM").saturating_sub(before);
            assert!(
                cost <= MEMORY_MAX,
                "{who} over {name} cost {cost} bytes of memory"
            );
        }
    }
    assert!(hub.is_running());
    assert!(!hub.log().contains("panicked"), "{}", hub.log());
    assert_eq!(
        tree::read(&victim).len(),
        1,
        "nothing is written or removed outside of the hub's folders"
    );
    hub.stop();
}

#[test]
fn a_site_withstands_malformed_messages_of_a_hub() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let victim = scratch.folder("victim");
    std::fs::write(victim.join("precious"), b"precious").unwrap();
    let mut hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(
        scratch.path(),
        &hub,
        "east",
        &SiteSpec {
            more: "[line]\ntransport = \"tcp\"\n",
            ..SiteSpec::default()
        },
    );
    let false_hub = FalseHub::take_over(&mut hub);
    let mut rng = rng("a false hub");
    let digest = Hash::of(b"anything");
    let transfers = ["run", "pause", "cancel"]
        .map(|want| wanted(&format!("t-{want}"), "dataset/x:1", digest, want));
    let mut whole = desired(1, &transfers);
    whole["desired"]["manifests"] = json!([{"digest": digest.hex(), "frames": "AAAA"}]);
    let input = json!({"artifact": "dataset/x:1", "digest": digest.hex(), "bytes": 1});
    let run = json!({
        "spec": {
            "name": "r", "id": "r-1", "from": "west", "on": "east", "inputs": [input], "expect": "model/x:1", "delivery": "d-1",
            "created_ms": 1, "deadline_ms": i64::MAX,
        },
        "want": "train", "borrowed": [{"transfer": "t-run", "artifact": "dataset/x:1", "digest": digest.hex()}], "model": null, "ready": true,
    });
    whole["desired"]["runs"] = json!([run]);
    let asks = [
        json!({"plan": {"artifact": "dataset/x:1", "digest": digest.hex()}}),
        json!({"holds": {"artifact": "dataset/x:1", "digest": digest.hex()}}),
    ];
    let before = site.memory("VmRSS");
    let mut answers = Answers::default();
    // An unreadable control message ends the connection, and the site pauses longer before each new
    // connection. So the test uses few connections with many questions each.
    for _ in 0..HUB_CONNECTIONS {
        let (connection, mut control) = false_hub.site(secs(60));
        for _ in 0..MESSAGES / HUB_CONNECTIONS {
            let Some(mut stream) = connection.try_open(b"Q") else {
                break;
            };
            let _ = stream.write(&message(&asks, &mut rng, &victim));
            stream.finish();
            answers.ask(&site);
        }
        for _ in 0..8 {
            if control
                .write(&message(std::slice::from_ref(&whole), &mut rng, &victim))
                .is_err()
            {
                break;
            }
            answers.ask(&site);
        }
        connection.close();
    }
    let cost = site.memory("VmHWM").saturating_sub(before);
    assert!(cost <= MEMORY_MAX, "the hub cost {cost} bytes of memory");
    assert!(site.is_running());
    assert!(!site.log().contains("panicked"), "{}", site.log());
    assert_eq!(
        tree::read(&victim).len(),
        1,
        "nothing is written or removed outside of the site's folders"
    );
    site.stop();
}

#[test]
fn one_connection_has_one_control_stream() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Identity::site(&hub, "mal", over(Transport::Quic)).dial();
    let mut first = site.control();
    first.receive(secs(20)).unwrap();
    let mut second = site.control();
    second.receive(secs(20)).unwrap();
    first.read_to_end(secs(20)).unwrap_err();
}
