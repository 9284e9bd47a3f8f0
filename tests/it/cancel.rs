//! The state of a transfer that is cancelled while its site makes it visible.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::support::command::bound;
use crate::support::daemon::{Hub, Site, SiteSpec, ids};
use crate::support::labels as marks;
use crate::support::{Scratch, data, limit, secs, wait_for};

/// Another program that holds the writer's lock of a SQLite file until it is dropped.
struct Writer(Child);

impl Writer {
    fn lock(file: &std::path::Path) -> Self {
        const SCRIPT: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('BEGIN IMMEDIATE')
print('locked', flush=True)
sys.stdin.read()
";
        let mut command: Command = bound("python3");
        let command = command
            .args(["-c", SCRIPT])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3 runs");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped"))
            .read_line(&mut line)
            .expect("it says that it has the lock");
        assert_eq!(line, "locked\n");
        Self(child)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_transfer_whose_version_became_active_is_never_cancelled() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let set = data::dataset(&scratch.join("set"), 4);
    let file = scratch.join("labels.csv");
    data::write(&file, marks::csv(&marks::marks(&set.photos, 2)).as_bytes());
    hub.publish(&file, "labels/x:v1", &[]);
    hub.deliver_and_wait("labels/x:v1", "chengdu", secs(60));

    hub.publish(&file, "labels/x:v2", &[]);
    let writer = Writer::lock(&site.labels_db);
    let id = ids(&hub.json(&["deliver", "labels/x:v2", "--to", "chengdu"])).remove(0);
    hub.wait_transfer(&id, "committing", secs(30), |t| t.state == "committing");
    hub.cli(&["cancel", &id]).expect(0);
    drop(writer);

    // Whether the commit or the cancellation came first, both daemons must report the same state in
    // the end.
    let there = site.wait_transfer(&id, "ended at the site", secs(60), |t| t.is_final());
    hub.wait_transfer(
        &id,
        &format!("{} at the hub too", there.state),
        secs(30),
        |t| t.state == there.state,
    );
    assert_eq!(
        there.state, "done",
        "the commit had started, so it was not cancelled"
    );
    hub.cli(&["cancel", &id]).expect(6);
    assert!(hub.json(&["status", &id])[0]["receipt"].is_object());

    // A cancellation while the site verifies a committed version: the version is unchanged, so the
    // transfer is done.
    site.stop();
    for (command, state) in [("retry", "queued"), ("cancel", "cancelled")] {
        hub.cli(&[command, &id]).expect(0);
        assert_eq!(hub.transfer(&id).state, state);
    }
    site.start();
    // Until the site has verified it, the hub shows the requested state.
    wait_for("the transfer is done again", secs(30), || {
        (hub.transfer(&id).state == "done").then_some(())
    });
    assert_eq!(site.transfer(&id).state, "done");
}
