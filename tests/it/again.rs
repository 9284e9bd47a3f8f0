//! Content that a site lost, or that was damaged there, is restored by `retry`, `deliver` and
//! `verify --repair`. Intact content is kept, and only missing content is transmitted.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::images;
use crate::support::labels as marks;
use crate::support::postgres::Postgres;
use crate::support::registry::Registry;
use crate::support::tree::assert_same;
use crate::support::{Scratch, find, limit, secs};

const REFERENCE: &str = "dataset/panels:v1";

#[test]
fn damaged_or_deleted_files_of_a_site_are_restored() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (line, site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    let set = scratch.join("set");
    data::dataset(&set, 200);
    data::write(
        &set.join("weights.bin"),
        &data::noise(&mut data::rng("again"), 8 << 20),
    );
    hub.publish(&set, REFERENCE, &[]);
    let transfer = hub.deliver_and_wait(REFERENCE, "chengdu", secs(60)).id;
    let folder = site.folder(REFERENCE);
    let inode = |name: &str| fs::metadata(folder.join(name)).unwrap().ino();

    // Intact content is verified and kept.
    let (before, was) = (inode("weights.bin"), line.down());
    hub.cli(&["retry", &transfer]).expect(0);
    hub.wait_done(&transfer, secs(60));
    assert_eq!(inode("weights.bin"), before);
    assert!(line.down() - was < 100_000, "{}", line.down() - was);

    // Additional entries and changed permission bits are reported as notes; the artifact is still
    // intact.
    let photo = find(&folder, &|path| {
        path.extension().is_some_and(|e| e == "png")
    })
    .remove(0);
    let mode = fs::metadata(&photo).unwrap().permissions();
    data::write(&folder.join("@eaDir/thumbnail"), b"x");
    fs::set_permissions(&photo, fs::Permissions::from_mode(0o640)).unwrap();
    let said = site.cli(&["verify", REFERENCE]).expect(0).out;
    assert!(
        said.starts_with(&format!("{REFERENCE} is intact\n")) && said.lines().count() == 3,
        "{said}"
    );
    assert!(
        said.contains("additional entries (1): @eaDir\n") && said.contains(" is 640 and was "),
        "{said}"
    );
    let said = site.json(&["verify", REFERENCE, "--repair"]);
    let count = |what: &str| said[what].as_array().map(Vec::len);
    assert_eq!(
        (said["sound"].as_bool(), count("findings"), count("notes")),
        (Some(true), Some(0), Some(2)),
        "no repair is requested: {said}"
    );
    fs::remove_dir_all(folder.join("@eaDir")).unwrap();
    fs::set_permissions(&photo, mode).unwrap();

    // One flipped bit in a file, and one deleted file.
    let mut bytes = fs::read(folder.join("weights.bin")).unwrap();
    bytes[5 << 20] ^= 1;
    fs::write(folder.join("weights.bin"), &bytes).unwrap();
    fs::remove_file(&photo).unwrap();
    let found = site
        .cli(&["verify", REFERENCE])
        .expect(8)
        .says(&["--repair"]);
    assert!(
        found.out.lines().count() == 2 && found.out.contains("weights.bin"),
        "{}",
        found.out
    );
    let was = line.down();
    let asked = site.cli(&["verify", REFERENCE, "--repair"]).expect(8);
    assert!(asked.out.contains(&transfer), "{}", asked.out);
    let done = hub.wait_done(&transfer, secs(60));
    assert_same(&set, &folder);
    site.cli(&["verify", REFERENCE]).expect(0);
    assert!(
        line.down() - was < 2 << 20,
        "{} bytes were transmitted for one chunk and one photo",
        line.down() - was
    );
    assert!(
        done.bytes.reused > 7 << 20 && done.bytes.committed == done.bytes.total,
        "{:?}",
        done.bytes
    );
    assert_eq!(site.leftovers(), Vec::<std::path::PathBuf>::new());

    // The whole folder is deleted, and the daemon is killed during the repeated delivery.
    fs::remove_dir_all(&folder).unwrap();
    let gone = site.cli(&["verify", REFERENCE]).expect(8);
    assert!(
        gone.out.lines().count() == 1 && gone.out.contains("is missing"),
        "{}",
        gone.out
    );
    let plan = hub.json(&["plan", REFERENCE, "--to", "chengdu"]);
    assert!(plan[0]["needs"].as_u64().unwrap() > 8 << 20, "{plan}");
    line.throttle(4 << 20);
    assert_eq!(
        hub.deliver(&[REFERENCE], "chengdu"),
        std::slice::from_ref(&transfer),
        "the existing transfer starts again"
    );
    hub.wait_transfer(&transfer, "on its way", secs(60), |t| {
        t.bytes.received > 1 << 20
    });
    let mut site = site;
    site.kill();
    site.start();
    hub.wait_done(&transfer, secs(60));
    assert_same(&set, &site.folder(REFERENCE));
    assert_eq!(site.current("dataset/panels"), "v1");
}

#[test]
fn deleted_rows_and_a_damaged_image_of_a_site_are_restored() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let postgres = Postgres::start_new(&scratch);
    let registry = Registry::basic(&scratch, "registry");
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        labels_sink: Some(postgres.sink(&scratch, "labels")),
        images_sink: Some(registry.sink(&scratch)),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let plain = Site::start_new(scratch.path(), &hub, "hefei", &SiteSpec::default());
    let set = data::dataset(&scratch.join("set"), 30);
    let made = marks::marks(&set.photos, 4);
    let file = scratch.join("marks.csv");
    data::write(&file, marks::csv(&made).as_bytes());
    let (labels, image) = ("labels/panels:v1", "image/tool:v1");
    hub.publish(&file, labels, &[]);
    hub.publish(&images::small().join("docker.tar"), image, &[]);
    for (reference, name) in [(labels, "chengdu"), (image, "chengdu"), (image, "hefei")] {
        hub.deliver_and_wait(reference, name, secs(90));
    }
    let count = || {
        postgres.query(
            "labels",
            "SELECT count(*) FROM packhorse.annotations WHERE label_set = 'panels'",
        )
    };
    let all = count();

    // Deleted rows: `verify` finds them, and `--repair` requests them.
    postgres.query("labels", "DELETE FROM packhorse.annotation WHERE true");
    assert_ne!(count(), all);
    site.cli(&["verify", labels]).expect(8);
    site.cli(&["verify", labels, "--repair"]).expect(8);
    hub.deliver_and_wait(labels, "chengdu", secs(60));
    assert_eq!(count(), all);
    site.cli(&["verify", labels]).expect(0);

    // A flipped bit in a blob of an image in an OCI layout.
    let blobs = find(&scratch.join("hefei-images"), &|path| {
        path.parent().is_some_and(|p| p.ends_with("sha256"))
    });
    let largest = blobs
        .into_iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&largest, &bytes).unwrap();
    plain.cli(&["verify", image, "--repair"]).expect(8);
    hub.deliver_and_wait(image, "hefei", secs(60));
    plain.cli(&["verify", image]).expect(0);

    // A flipped bit in the registry's storage.
    let stored = find(&scratch.join("registry"), &|path| {
        path.is_file() && path.ends_with("data")
    });
    let blob = stored
        .into_iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let flip = || {
        let mut bytes = fs::read(&blob).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&blob, &bytes).unwrap();
    };
    flip();
    let digest = blob
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    assert!(site.cli(&["verify", image]).expect(8).out.contains(digest));
    assert!(
        site.cli(&["verify", image, "--quick"])
            .expect(0)
            .out
            .contains("no blob was read")
    );
    flip();
    site.cli(&["verify", image]).expect(0);

    // A tag that was deleted in the registry: the next delivery restores it.
    registry.skopeo("delete", &["{}/operators/tool:v1"]);
    hub.deliver_and_wait(image, "chengdu", secs(60));
    site.cli(&["verify", image]).expect(0);
}
