//! The defaults that protect users: a daemon never publishes its own files, only its user can read
//! its state, and every omission from an artifact is reported.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data::write;
use crate::support::{Scratch, find, limit, secs};

#[test]
fn a_daemon_does_not_publish_its_own_files_and_its_state_is_private() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let link = scratch.join("link");
    std::os::unix::fs::symlink(hub.data_dir.join("identity"), &link).unwrap();
    let refused = |daemon: &crate::support::daemon::Daemon, source: &Path, reference: &str| {
        daemon
            .cli(&["publish", source.to_str().unwrap(), "--as", reference])
            .expect(4)
            .says(&["part of the state or configuration of a packhorse daemon"]);
        daemon.cli(&["show", reference]).expect(5);
    };
    for source in [
        &hub.data_dir,
        &hub.data_dir.join("identity"),
        &hub.data_dir.join("api-token"),
        &hub.config,
        &link,
    ] {
        refused(&hub, source, "dataset/leak:1");
    }
    refused(&hub, scratch.path(), "model/all:1");
    refused(&hub, &hub.data_dir.join("identity/ca.pem"), "labels/leak:1");
    refused(&site, &site.data_dir.join("identity"), "dataset/leak:1");
    let mine = scratch.join("mine");
    write(&mine.join("a"), b"mine");
    hub.publish(&mine, "dataset/mine:1", &[]);
    for out in [hub.data_dir.join("out"), link.join("out")] {
        hub.cli(&["export", "dataset/mine:1", "--out", out.to_str().unwrap()])
            .expect(4);
    }
    hub.cli(&[
        "import",
        hub.data_dir.join("catalogue.db").to_str().unwrap(),
    ])
    .expect(4);
    for data_dir in [&hub.data_dir, &site.data_dir] {
        let open = find(data_dir, &|path| {
            path.symlink_metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o077 != 0)
        });
        let own = |path: &&std::path::PathBuf| {
            !path.starts_with(data_dir.join("artifacts"))
                && !path.starts_with(data_dir.join("images"))
        };
        assert_eq!(open.iter().find(own), None, "files that others may read");
        assert_eq!(
            std::fs::metadata(data_dir).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }
}

#[test]
fn omissions_are_reported_recorded_and_refused_by_strict() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let csv = scratch.join("via.csv");
    write(&csv, "filename,等级\na.png,A\n".as_bytes());
    let path = csv.to_str().unwrap();
    for (daemon, reference) in [(&*hub, "labels/hub:1"), (&*site, "labels/site:1")] {
        daemon
            .cli(&["publish", path, "--as", reference, "--strict"])
            .expect(8)
            .says(&["--strict", "等级"]);
        daemon.cli(&["show", reference]).expect(5);
        let answer = daemon.json(&["publish", path, "--as", reference]);
        let kinds: Vec<&str> = answer["omitted"]
            .as_array()
            .unwrap()
            .iter()
            .map(|o| o["what"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["unknown_columns", "no_annotations"], "{answer:#}");
        daemon
            .cli(&["publish", path, "--as", reference])
            .expect(0)
            .says(&["left out of", "等级"]);
        assert_eq!(
            daemon.json(&["show", reference])["omitted"],
            answer["omitted"]
        );
        assert_eq!(
            hub.json(&["show", reference])["omitted"],
            answer["omitted"],
            "the hub has the omissions of an artifact of a site too"
        );
        assert!(hub.cli(&["show", reference]).expect(0).out.contains("等级"));
    }
    let good = scratch.join("good.csv");
    write(&good, b"image,class\na.png,dent\n");
    let answer = hub.publish(&good, "labels/good:1", &["--strict"]);
    assert_eq!(answer["omitted"], serde_json::json!([]));
}
