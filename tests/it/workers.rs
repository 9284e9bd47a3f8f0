//! The background workers of a hub and of a site, as the API and `doctor` list them.

use serde_json::Value;

use crate::support::daemon::{Daemon, Hub, Site, SiteSpec};
use crate::support::{Scratch, limit, secs, wait_for};

/// The workers of a daemon by name.
fn workers(daemon: &Daemon) -> Vec<(String, Value)> {
    let (status, text) = daemon.get("/v1/workers");
    assert_eq!(status, 200, "{text}");
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    rows.into_iter()
        .map(|row| (row["name"].as_str().unwrap().to_owned(), row))
        .collect()
}

/// Checks which workers a daemon has, and that each of them works.
#[track_caller]
fn check(daemon: &Daemon, expected: &[&str]) {
    let all = workers(daemon);
    let mut names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, expected, "{}", daemon.name);
    for (name, row) in &all {
        let state = row["state"].as_str().unwrap();
        assert!(
            ["running", "idle", "busy", "ended"].contains(&state)
                && row["problem"].is_null()
                && row["restarts"] == 0,
            "{name}: {row}"
        );
    }
    let doctor = daemon.cli(&["doctor"]).expect(0).out;
    let line = format!("ok workers: {} background workers", expected.len());
    assert!(doctor.contains(&line), "{doctor}");
}

fn worker(daemon: &Daemon, name: &str) -> Value {
    let found = workers(daemon).into_iter().find(|(of, _)| of == name);
    found.unwrap().1
}

#[test]
fn a_hub_and_a_site_list_their_background_workers() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    hub.wait_online("chengdu", true, secs(60));
    check(
        &hub,
        &[
            "accept-quic",
            "accept-tcp",
            "api",
            "connections",
            "event-trim",
            "hub-certificate",
            "idle-release",
            "last-seen",
            "prefetch",
            "relay-cache",
            "relay-evict",
            "relay-flush",
            "reload",
            "runs",
            "token-use",
        ],
    );
    check(
        &site,
        &[
            "api",
            "cleanup-files",
            "cleanup-images",
            "cleanup-labels",
            "connection",
            "event-trim",
            "idle-release",
            "index-rebuild",
            "index-sweep",
            "reload",
            "reload-certificate",
            "runs",
            "scrub",
            "sink-tend",
            "token-use",
            "watch",
            "watch-requests",
        ],
    );
    let iterations = |row: &Value| row["iterations"].as_u64().unwrap();
    let before = iterations(&worker(&hub, "relay-flush"));
    let flushed = wait_for("another iteration of a worker ends", secs(30), || {
        Some(worker(&hub, "relay-flush")).filter(|row| iterations(row) > before)
    });
    let last = flushed["last_iteration"].as_str().unwrap();
    assert!(last.ends_with('Z') && last.contains('T'), "{last}");
    assert!(flushed["last_error"].is_null(), "{flushed}");

    // An error of a worker that continues.
    assert_eq!(worker(&site, "connection")["state"], "running");
    hub.stop();
    let connection = wait_for("the site cannot connect", secs(60), || {
        Some(worker(&site, "connection")).filter(|row| row["errors"] != 0)
    });
    let error = &connection["last_error"];
    assert!(
        !error["message"].as_str().unwrap().is_empty()
            && error["at"].as_str().unwrap().ends_with('Z'),
        "{connection}"
    );
    assert_eq!(connection["state"], "running");
}
