//! Messages of the largest size that consist of as many small values as fit: what they cost is the
//! share of the peer that sent them, although each value costs more in memory than on the wire.

use std::time::{Duration, Instant};

use base::limits::CONTROL_FRAME_BYTES_MAX;
use packhorse::config::Transport;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, Hub};
use crate::support::hostile::{Identity, framed, over};
use crate::support::{Scratch, limit, secs, wait_for};

/// The memory that a peer may cost: its share of the budget, and 8 MiB.
const MEMORY_MAX: u64 = (12 + 8) << 20;
/// How long another peer may wait for an answer, on a machine that runs other tests.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Puts this entry in the place of `HERE` in `message`, so many times.
fn with(message: &Value, entry: &Value, times: usize) -> String {
    let entry = entry.to_string();
    let entries = vec![entry.as_str(); times].join(",");
    message
        .to_string()
        .replace("\"HERE\"", &format!("[{entries}]"))
}

/// Puts as many of these entries in the place of `HERE` in `message` as it has room for.
fn full(message: &Value, entry: &Value) -> Vec<u8> {
    let room = CONTROL_FRAME_BYTES_MAX - message.to_string().len();
    let text = with(message, entry, room / (entry.to_string().len() + 1));
    assert!(text.len() > CONTROL_FRAME_BYTES_MAX - 1_000 && text.len() <= CONTROL_FRAME_BYTES_MAX);
    framed(text.as_bytes())
}

#[track_caller]
fn answers(daemon: &Daemon, after: &str) {
    let began = Instant::now();
    assert_eq!(daemon.get("/v1/sites").0, 200);
    let waited = began.elapsed();
    assert!(
        waited < ANSWER_MAX,
        "another client waited {waited:?} after {after}"
    );
}

#[track_caller]
fn costs_its_share(daemon: &Daemon, before: u64, what: &str) {
    let cost = daemon.memory("VmHWM").saturating_sub(before);
    assert!(cost <= MEMORY_MAX, "{what} cost {} MiB", cost >> 20);
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[test]
fn the_largest_messages_of_a_site_cost_its_share() {
    let _limit = limit(secs(180));
    let report = json!({"id": "t-1", "generation": 0, "state": "done", "body": {"receipt": {"certificate": "", "signature": "", "statement": ""}}});
    let run = |list: &str| {
        let mut run = json!({
            "name": "r1", "id": "r-1", "phase": "training", "by_platform": false, "by_command": true, "starts": 1, "started_ms": 5, "ended": null,
            "has_output": false, "model": null, "message": null, "removed": [], "left": [], "released": false,
        });
        run[list] = json!("HERE");
        json!({"runs": [run]})
    };
    let certificate = "A".repeat(8_190);
    for (what, message, entry) in [
        (
            "whom it shares with",
            json!({"hello": {"version": "1", "share": "HERE"}}),
            json!("a"),
        ),
        (
            "reports",
            json!({"report": "HERE"}),
            json!({"id": "t-1", "generation": 0, "state": "done", "body": {}}),
        ),
        (
            "receipts with one certificate",
            json!({"reports": {"number": 1, "certificate": certificate, "reports": "HERE"}}),
            report,
        ),
        (
            "what changed",
            json!({"changed": "HERE"}),
            json!(["dataset/a:1", ""]),
        ),
        ("what a run removed", run("removed"), json!("t-1")),
        ("what a run left", run("left"), json!("t-1: busy")),
    ] {
        let scratch = Scratch::new();
        let mut hub = Hub::start_new(scratch.path());
        let site = Identity::site(&hub, "mal", over(Transport::Tcp));
        let before = hub.memory("VmRSS");
        let connection = site.dial();
        let mut stream = connection.open(b"C");
        // The hub has taken a message when it knows the version that was sent after it, or has
        // ended the stream or the connection because of it.
        let mut is_taken = |bytes: &[u8], version: &str| {
            let _ = stream.write(bytes);
            let after = framed(
                json!({"hello": {"version": version}})
                    .to_string()
                    .as_bytes(),
            );
            wait_for(&format!("the hub has read {what}"), secs(60), || {
                answers(&hub, what);
                let is_ended = stream.write(&after).is_err() || connection.is_closed();
                let is_taken = hub.cli(&["sites"]).out.contains(version);
                (is_taken || is_ended).then_some(is_taken)
            })
        };
        let small = framed(with(&message, &entry, 2).as_bytes());
        assert!(
            is_taken(&small, "small"),
            "a small message is valid: {what}"
        );
        is_taken(&full(&message, &entry), "large");
        costs_its_share(&hub, before, what);
        hub.stop();
    }
}
