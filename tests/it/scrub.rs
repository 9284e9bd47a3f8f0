//! Delivered files are read again after some time, and a delivery takes over only intact files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::tree::assert_same;
use crate::support::{Scratch, data, limit, secs, wait_for};

#[test]
fn a_file_that_a_disk_damaged_is_found_and_repaired() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    // Files are due after half of this time.
    let spec = SiteSpec {
        more: "[scrub]\nevery = \"4s\"\n",
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = scratch.join("model");
    data::model(&source, 4 << 20);
    hub.publish(&source, "model/m:v1", &[]);
    hub.deliver_and_wait("model/m:v1", "chengdu", secs(60));
    let worker = || {
        let (status, text) = site.get("/v1/workers");
        assert_eq!(status, 200, "{text}");
        let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
        let row = rows.into_iter().find(|row| row["name"] == "scrub");
        row.unwrap()
    };
    wait_for("a round without a fault", secs(30), || {
        (worker()["iterations"].as_u64().unwrap() > 0).then_some(())
    });
    assert!(worker()["last_error"].is_null(), "{}", worker());

    let weights = site.folder("model/m:v1").join("model.safetensors");
    let (file, before) = (
        File::options()
            .write(true)
            .read(true)
            .open(&weights)
            .unwrap(),
        std::fs::metadata(&weights).unwrap(),
    );
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 1 << 20).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    let found = wait_for("the scrub finds it", secs(60), || {
        Some(worker()).filter(|row| row["errors"] != 0)
    });
    let message = found["last_error"]["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("model/m:v1") && message.contains("model.safetensors"),
        "{message}"
    );
    // Another version gets none of it, although nobody changed size and time of the file.
    data::write(&source.join("notes.txt"), b"another version");
    hub.publish(&source, "model/m:v2", &[]);
    hub.deliver_and_wait("model/m:v2", "chengdu", secs(60));
    assert_same(&source, &site.folder("model/m:v2"));

    site.cli(&["verify", "model/m:v1", "--repair"]);
    wait_for(
        "the repaired file is read without a fault",
        secs(60),
        || {
            site.cli(&["verify", "model/m:v1"])
                .code
                .eq(&0)
                .then_some(())
        },
    );
    let errors = worker()["errors"].as_u64().unwrap();
    let round = worker()["iterations"].as_u64().unwrap();
    wait_for("two more rounds", secs(60), || {
        (worker()["iterations"].as_u64().unwrap() >= round + 3).then_some(())
    });
    assert!(
        worker()["errors"].as_u64().unwrap() <= errors + 1,
        "{}",
        worker()
    );
}
