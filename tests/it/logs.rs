//! The logs of hub and site can be joined: the fields of their spans are the same.

use crate::support::daemon::{Daemon, Hub, Site, SiteSpec};
use crate::support::{Scratch, data, limit, secs, wait_for};

/// The line of a daemon's log that has this message; it must have each of these fields once.
#[track_caller]
fn line_with(daemon: &Daemon, message: &str, fields: &[&str]) {
    let line = wait_for(message, secs(10), || {
        let log = daemon.log();
        log.lines()
            .find(|line| line.contains(message))
            .map(str::to_owned)
    });
    for field in fields {
        assert_eq!(line.matches(field).count(), 1, "{field} in {line}");
    }
}

#[test]
fn a_transfer_is_in_the_logs_of_hub_and_site_under_one_name() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    data::model(&scratch.join("model"), 1 << 20);
    hub.publish(&scratch.join("model"), "model/m:v1", &[]);
    let id = hub.deliver(&["model/m:v1"], "chengdu").remove(0);
    hub.wait_done(&id, secs(60));
    let transfer = format!(" transfer{{transfer={id} artifact=model/m:v1 site=chengdu}}: ");
    line_with(&site, "a transfer is done", &[&transfer]);
    line_with(&hub, "state=\"done\"", &[&transfer]);
    line_with(&hub, "published", &[" job{job=\"j-", "artifact=model/m:v1"]);
    let connection = [
        " connection{connection=",
        "peer=127.0.0.1:",
        "transport=\"quic\"",
    ];
    line_with(
        &hub,
        "a site is online",
        &[&connection[..], &[" site=chengdu"]].concat(),
    );
    line_with(
        &site,
        "connected to the hub",
        &[&connection[..], &[" hub="]].concat(),
    );
}
