//! A hub that sends paths as transfer ids: the site refuses its messages, and still works with an
//! honest hub.

use std::path::Path;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::hostile::{Artifact, FalseHub, desired, wanted};
use crate::support::{Scratch, limit, secs};

/// The files below a directory with their content.
fn contents(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let files = crate::support::find(dir, &|path| path.is_file());
    files
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
        .collect()
}

#[test]
fn no_transfer_id_reaches_a_path() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(scratch.path(), &hub, "east", &SiteSpec::default());
    let victim = scratch.folder("victim");
    std::fs::create_dir(victim.join("sub")).unwrap();
    std::fs::write(victim.join("sub/data.txt"), b"keep me").unwrap();
    std::fs::write(victim.join("id_rsa"), b"old key").unwrap();
    let before = contents(&victim);
    let absolute = victim.to_str().unwrap();
    // A path that leads out of any possible staging directory, whatever its depth.
    let relative = format!("{}{}", "../".repeat(30), &absolute[1..]);

    let false_hub = FalseHub::take_over(&mut hub);
    let artifact = Artifact::of_files("dataset", &[("authorized_keys", b"evil")]);
    for (id, want) in [(absolute, "cancel"), (relative.as_str(), "run")] {
        let (connection, mut control) = false_hub.site(secs(30));
        connection.serve(vec![artifact.clone()]);
        let good = wanted("t-1", "dataset/x:1", artifact.digest(), "run");
        control
            .message(&desired(
                1,
                &[good, wanted(id, "dataset/y:1", artifact.digest(), want)],
            ))
            .unwrap();
        // The site closes the connection and executes no part of the message. Then it connects
        // again.
        while control.receive(secs(30)).is_ok() {}
        assert!(site.is_running());
        assert_eq!(contents(&victim), before, "{id}");
        assert!(
            site.transfers(&[]).is_empty(),
            "no part of the message was executed"
        );
    }
    let (connection, mut control) = false_hub.site(secs(30));
    connection.serve(vec![artifact.clone()]);
    control
        .message(&desired(
            1,
            &[wanted("t-1", "dataset/x:1", artifact.digest(), "run")],
        ))
        .unwrap();
    site.wait_done("t-1", secs(30));
    assert_eq!(
        std::fs::read(site.folder("dataset/x:1").join("authorized_keys")).unwrap(),
        b"evil"
    );
    assert_eq!(contents(&victim), before);
}
