//! A site checks the files that it published in place. The site and the hub report each change, and
//! no other work waits for these checks.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::daemon::{Daemon, Hub, Site, SiteSpec};
use crate::support::{Scratch, data, limit, secs, tree, wait_for};

const REFERENCE: &str = "dataset/line:v1";

/// Another that is published beside it.
const BESIDE: &str = "dataset/beside:v1";

/// The change of the artifact, as this daemon reports it.
fn changed(daemon: &Daemon) -> Value {
    changed_of(daemon, REFERENCE)
}

fn changed_of(daemon: &Daemon, reference: &str) -> Value {
    daemon.json(&["show", reference])["changed"].clone()
}

/// Waits until both daemons report that this file changed.
fn wait_changed(daemons: [&Daemon; 2], path: &Path) {
    let path = path.to_str().unwrap();
    for daemon in daemons {
        let what = format!("{} reports that {path} changed", daemon.name);
        wait_for(&what, secs(30), || {
            changed(daemon)
                .as_str()
                .is_some_and(|how| how.starts_with(path))
                .then_some(())
        });
    }
}

fn wait_sound(daemons: [&Daemon; 2]) {
    for daemon in daemons {
        wait_for(
            &format!("{} reports no change", daemon.name),
            secs(30),
            || changed(daemon).is_null().then_some(()),
        );
    }
}

/// Publishes a dataset in place. Returns it, and one of its files.
fn published(site: &Site, scratch: &Scratch) -> (data::Dataset, PathBuf) {
    let set = data::dataset(&scratch.folder("set").canonicalize().unwrap(), 20);
    site.publish(&set.root, REFERENCE, &[]);
    let file = set.root.join(&set.photos[7].path);
    (set, file)
}

#[test]
fn site_and_hub_report_a_changed_file_until_it_is_restored() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        more: "[share]\ncheck_every = \"1s\"",
        ..SiteSpec::default()
    };
    let mut a = Site::start_new(scratch.path(), &hub, "a", &spec);
    let (set, file) = published(&a, &scratch);
    wait_sound([&a, &hub]);
    a.cli(&["doctor"]).expect(0);

    // One byte changes, and the modification time stays the same.
    let good = std::fs::read(&file).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    std::fs::write(&file, bad).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_modified(time)
        .unwrap();
    wait_changed([&a, &hub], &file);
    assert!(
        a.log()
            .contains("files that were published in place changed")
    );
    assert!(
        hub.cli(&["show", REFERENCE])
            .expect(0)
            .out
            .contains("changed at a")
    );
    let told = format!("{REFERENCE} at a: {}", file.display());
    assert!(hub.cli(&["artifacts"]).expect(0).out.contains(&told));
    let doctor = hub.cli(&["doctor"]).expect(1).out;
    assert!(doctor.contains(&format!("fault {told}")), "{doctor}");
    let doctor = a.cli(&["doctor"]).expect(1).out;
    assert!(
        doctor.contains(&format!("fault {REFERENCE}: {}", file.display()))
            && doctor.contains("new version"),
        "{doctor}"
    );
    // One solution is to publish the changed files as a new version.
    a.publish(&set.root, "dataset/line:v2", &[]);
    let doctor = a.cli(&["doctor"]).expect(0).out;
    assert!(
        doctor.contains("was published as dataset/line:v2"),
        "{doctor}"
    );
    let doctor = hub.cli(&["doctor"]).expect(0).out;
    assert!(
        doctor.contains(&format!("ok {told}"))
            && doctor.contains("dataset/line:v2 was published there since"),
        "{doctor}"
    );

    // Both daemons keep the report over a restart. A file that is restored while the hub is offline
    // is reported when the site reconnects.
    hub.stop();
    a.stop();
    a.start();
    assert!(changed(&a).is_string());
    std::fs::write(&file, good).unwrap();
    wait_for("the site has detected it", secs(30), || {
        changed(&a).is_null().then_some(())
    });
    hub.start();
    hub.wait_online("a", true, secs(40));
    wait_sound([&a, &hub]);

    // A folder that is away says nothing. It was looked at once what is published beside it was
    // found changed and found whole again.
    let away = scratch.join("away");
    std::fs::rename(&set.root, &away).unwrap();
    let beside = data::dataset(&scratch.folder("beside").canonicalize().unwrap(), 2);
    a.publish(&beside.root, BESIDE, &[]);
    let photo = beside.root.join(&beside.photos[0].path);
    let good = std::fs::read(&photo).unwrap();
    std::fs::write(&photo, b"other").unwrap();
    wait_for("what is beside it changed", secs(30), || {
        changed_of(&a, BESIDE).is_string().then_some(())
    });
    std::fs::write(&photo, good).unwrap();
    wait_for("what is beside it is whole again", secs(30), || {
        changed_of(&a, BESIDE).is_null().then_some(())
    });
    assert!(changed(&a).is_null());
    std::fs::rename(&away, &set.root).unwrap();
    std::fs::remove_file(&file).unwrap();
    wait_changed([&a, &hub], &file);
}

/// The hub never fetches an artifact for the site that published it. So a transfer to that site
/// must not wait for files that are missing there.
#[test]
fn a_delivery_to_the_publishing_site_fails_with_the_path_of_a_missing_file() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    // The site checks its files every five minutes. In this test only the transfer triggers a
    // check.
    let a = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let (set, file) = published(&a, &scratch);
    let good = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let id = hub.deliver(&[REFERENCE], "a").remove(0);
    let failed = hub.wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
    assert_eq!(failed.reason.as_deref(), Some("integrity"));
    assert!(
        failed
            .message
            .as_deref()
            .is_some_and(|m| m.starts_with(file.to_str().unwrap())),
        "{failed:#?}"
    );
    assert!(
        failed
            .next
            .as_deref()
            .is_some_and(|next| next.contains("restore the original content")),
        "{failed:#?}"
    );
    wait_changed([&a, &hub], &file);

    std::fs::write(&file, good).unwrap();
    hub.cli(&["retry", &id]).expect(0);
    hub.wait_done(&id, secs(60));
    tree::assert_same(&set.root, &a.folder(REFERENCE));
    wait_sound([&a, &hub]);
}
