//! The control messages of a long queue: their size depends on what changes, not on the length of
//! the queue.

use std::thread;

use crate::support::daemon::{Hub, Site};
use crate::support::{Scratch, data, limit, secs, wait_for};

const ARTIFACTS: usize = 300;
/// The control messages of one transfer over its life, both ways together.
const BYTES_PER_TRANSFER_MAX: u64 = 2 << 10;

#[test]
fn the_control_messages_of_a_queue_are_bounded_per_transfer() {
    let _limit = limit(secs(280));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (_line, mut site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    let names: Vec<String> = (0..ARTIFACTS)
        .map(|n| format!("operator/o{n}:v1"))
        .collect();
    for (n, name) in names.iter().enumerate() {
        let source = scratch.join(name.as_str().rsplit('/').next().unwrap());
        data::write(&source.join("main.py"), format!("x = {n}\n").as_bytes());
    }
    thread::scope(|scope| {
        for some in names.chunks(ARTIFACTS / 4) {
            let (hub, scratch) = (&hub, &scratch);
            scope.spawn(move || {
                for name in some {
                    let source = scratch.join(name.rsplit('/').next().unwrap());
                    hub.publish(&source, name, &[]);
                }
            });
        }
    });
    let control = || {
        let of = |to: &str| hub.metric(&format!("packhorse_control_bytes{{to=\"{to}\"}}"));
        of("sites") + of("hub")
    };
    // A queue that waits for the site, then one that grows while the site works on it.
    site.stop();
    let (waiting, rest) = names.split_at(ARTIFACTS / 2);
    let deliver = |some: &[String]| {
        let some: Vec<&str> = some.iter().map(String::as_str).collect();
        hub.deliver(&some, "chengdu")
    };
    let before = control();
    let mut ids = deliver(waiting);
    site.start();
    for some in rest.chunks(rest.len() / 3) {
        ids.extend(deliver(some));
    }
    assert_eq!(ids.len(), ARTIFACTS);
    wait_for("all transfers are done", secs(200), || {
        let all = hub.transfers(&["--limit", "1000"]);
        all.iter().all(|one| one.state == "done").then_some(())
    });
    let each = (control() - before) / ARTIFACTS as u64;
    println!("{each} bytes of control messages for each of {ARTIFACTS} transfers");
    assert!(
        each <= BYTES_PER_TRANSFER_MAX,
        "{each} bytes for each transfer"
    );
}
