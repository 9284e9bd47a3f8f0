//! A blocked sink: the transfer reports the cause, and no other transfer waits.

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::postgres::{HOLDER, Postgres};
use crate::support::{Scratch, data, labels, limit, secs};

#[test]
fn a_locked_database_delays_nothing_else_and_the_lock_holder_is_named() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let postgres = Postgres::start_new(&scratch);
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        labels_sink: Some(postgres.sink(&scratch, "labels")),
        ..SiteSpec::default()
    };
    let _site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let set = data::dataset(&scratch.join("set"), 10);
    let file = scratch.join("marks.csv");
    let publish = |version: &str, most: usize| {
        let reference = format!("labels/panels:{version}");
        data::write(
            &file,
            labels::csv(&labels::marks(&set.photos, most)).as_bytes(),
        );
        hub.publish(&file, &reference, &[]);
        reference
    };
    hub.deliver_and_wait(&publish("v1", 2), "chengdu", secs(60));

    // A reader that leaves its transaction open delays no delivery.
    let reader = postgres.hold(
        "labels",
        "SELECT count(*) FROM packhorse.current_annotations",
    );
    hub.deliver_and_wait(&publish("v2", 3), "chengdu", secs(60));
    postgres.let_go(reader);

    // A session that prevents changes of the tables delays the labels, and only them.
    let holder = postgres.hold("labels", "LOCK TABLE packhorse.annotation IN SHARE MODE");
    let id = hub.deliver(&[&publish("v3", 4)], "chengdu").remove(0);
    let named = |t: &crate::support::daemon::Transfer| {
        t.has_reason(&["sink_unavailable"])
            && t.message
                .as_ref()
                .is_some_and(|message| message.contains(HOLDER))
    };
    let first = hub.wait_transfer(
        &id,
        "the session that holds the lock is named",
        secs(60),
        named,
    );
    hub.publish(&set.root, "dataset/panels:v1", &[]);
    hub.deliver_and_wait("dataset/panels:v1", "chengdu", secs(60));
    // The reason is shown during an attempt and between two attempts.
    loop {
        let now = hub.transfer(&id);
        assert!(named(&now), "{now:#?}");
        if now.attempts > first.attempts {
            break;
        }
    }
    postgres.let_go(holder);
    hub.wait_done(&id, secs(90));
}
