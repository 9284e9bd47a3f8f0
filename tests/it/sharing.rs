//! A later restriction by `[share] allow`: a site keeps the artifacts that it has, with their
//! records, and `doctor` reports mistakes in the hub's list.

use crate::support::daemon::{Daemon, Hub, Site, SiteSpec};
use crate::support::{Scratch, data, limit, secs, tree};

const REFERENCE: &str = "model/line:v1";

/// Restarts the hub with another list.
fn restart_with(hub: &mut Hub, from: &str, to: &str) {
    hub.stop();
    hub.edit_config(from, to);
    hub.start();
    for site in ["a", "b"] {
        hub.wait_online(site, true, secs(60));
    }
}

#[test]
fn an_artifact_that_may_not_be_delivered_again_keeps_its_record() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let a = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let b = Site::start_new(scratch.path(), &hub, "b", &SiteSpec::default());
    let source = scratch.join("model");
    data::model(&source, 1 << 20);
    a.publish(&source, REFERENCE, &[]);
    let id = hub.deliver_and_wait(REFERENCE, "b", secs(60)).id;

    // A mistake: no site has this name, and the intended site B is excluded.
    restart_with(&mut hub, "[listen]", "[share]\nallow = [\"bb\"]\n[listen]");
    let doctor = hub.cli(&["doctor"]).expect(1).out;
    assert!(
        doctor.contains("fault [share] allow: no site is called bb"),
        "{doctor}"
    );

    let file = b.folder(REFERENCE).join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let refused = b.cli(&["verify", REFERENCE, "--repair"]).expect(5);
    let refused = refused.says(&[
        "1 found",
        "model.safetensors",
        "the hub has no such artifact for this site",
        "the content at the site is kept",
    ]);
    assert!(!refused.err.contains("share"), "{}", refused.err);
    hub.cli(&["retry", &id])
        .expect(4)
        .says(&["not shared with b: not in the hub's [share] allow"]);
    let daemons: [&Daemon; 2] = [&hub, &b];
    for daemon in daemons {
        let shown = daemon.json(&["status", &id]);
        assert!(
            shown[0]["state"] == "done" && shown[0]["receipt"].is_object(),
            "{}: {shown}",
            daemon.name
        );
    }
    assert_eq!(
        std::fs::read(&file).unwrap(),
        bytes,
        "the delivered files are kept"
    );

    restart_with(&mut hub, "\"bb\"", "\"b\"");
    hub.cli(&["doctor"]).expect(0);
    let asked = b.cli(&["verify", REFERENCE, "--repair"]).expect(8).out;
    assert!(asked.contains(&id), "{asked}");
    hub.wait_done(&id, secs(60));
    tree::assert_same(&source, &b.folder(REFERENCE));
}
