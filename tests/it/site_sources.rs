//! The sources of a site besides files: rows of its label database, images of its registry,
//! archives.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::disk::SmallDisk;
use crate::support::images;
use crate::support::labels as marks;
use crate::support::postgres::Postgres;
use crate::support::registry::Registry;
use crate::support::tree::assert_same;
use crate::support::{Scratch, disk_usage, find, limit, secs};

/// The folder with the content that a site had to write to publish an artifact.
fn kept(site: &Site, digest: &str) -> PathBuf {
    site.data_dir.join("published").join(digest)
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Publishes at a site, and checks that the hub lists the artifact with this site as its origin.
/// Returns the digest.
fn publish_at(site: &Site, hub: &Hub, source: &str, reference: &str) -> String {
    let answer = site.json(&["publish", source, "--as", reference]);
    let digest = answer["digest"].as_str().unwrap().to_owned();
    let shown = hub.json(&["show", reference]);
    assert_eq!(
        (shown["digest"].as_str(), shown["origin"].as_str()),
        (Some(&*digest), Some(&*site.name)),
        "{shown}"
    );
    site.cli(&["verify", reference]).expect(0);
    digest
}

fn labels_out_of_a_database(site: &Site, hub: &Hub, view: &str, scratch: &Scratch) {
    let set = data::dataset(&scratch.join(&format!("{}-set", site.name)), 40);
    let made = marks::marks(&set.photos, 4);
    let file = scratch.join(&format!("{}.csv", site.name));
    data::write(&file, marks::csv(&made).as_bytes());
    let (name, site_name) = (format!("panels-{}", site.name), site.name.clone());
    let reference = format!("labels/{name}:v1");
    hub.publish(&file, &reference, &[]);
    hub.deliver_and_wait(&reference, &site_name, secs(60));

    // A version: its files equal the delivered files, byte for byte.
    let digest = publish_at(
        site,
        hub,
        &format!("db:{name}:v1"),
        &format!("labels/{name}-out:v1"),
    );
    let delivered = site.data_dir.join("labels").join(&name).join("v1");
    for file in ["annotations.jsonl", "classes.jsonl", "samples.jsonl"] {
        assert_eq!(
            text(&kept(site, &digest).join(file)),
            text(&delivered.join(file)),
            "{file}"
        );
    }
    assert_eq!(
        hub.json(&["show", &format!("labels/{name}-out:v1")])["info"]["format"],
        "database"
    );
    assert_eq!(
        publish_at(
            site,
            hub,
            &format!("db:{name}"),
            &format!("labels/{name}-out:v2")
        ),
        digest,
        "the active version is that one"
    );

    // The same rows in two orders.
    let class = marks::CLASSES[made[0].class].1;
    let query = format!(
        "db:SELECT * FROM {view} WHERE label_set = '{name}' AND class = '{class}' ORDER BY"
    );
    let one = publish_at(
        site,
        hub,
        &format!("{query} sample_path, x"),
        &format!("labels/{name}-some:v1"),
    );
    assert_eq!(
        publish_at(
            site,
            hub,
            &format!("{query} y DESC"),
            &format!("labels/{name}-some:v2")
        ),
        one
    );
    let rows = text(&kept(site, &one).join("annotations.jsonl"))
        .lines()
        .count();
    assert_eq!(
        rows,
        made.iter()
            .filter(|m| marks::CLASSES[m.class].1 == class)
            .count()
    );

    let refused = ["publish", "db:nothing:v1", "--as", "labels/x:v1"];
    site.cli(&refused).expect(5).says(&["does not contain"]);
    site.cli(&["publish", "db:SELECT 1 AS one", "--as", "labels/x:v1"])
        .expect(2)
        .says(&["sample_path"]);
    hub.cli(&["publish", &format!("db:{name}:v1"), "--as", "labels/x:v1"])
        .expect(2)
        .says(&["site"]);
    hub.cli(&["show", "labels/x:v1"]).expect(5);
}

#[test]
fn labels_are_published_from_postgres_and_sqlite() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let postgres = Postgres::start_new(&scratch);
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        labels_sink: Some(postgres.sink(&scratch, "labels")),
        ..SiteSpec::default()
    };
    let chengdu = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let hefei = Site::start_new(scratch.path(), &hub, "hefei", &SiteSpec::default());
    labels_out_of_a_database(&chengdu, &hub, "packhorse.annotations", &scratch);
    labels_out_of_a_database(&hefei, &hub, "annotations", &scratch);
}

#[test]
fn images_are_published_from_a_registry_and_from_archives() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let (own, other) = (
        Registry::bearer(&scratch, "own"),
        Registry::basic(&scratch, "other"),
    );
    let hub = Hub::start_new(scratch.path());
    let file = scratch.join("other-password");
    data::write(&file, crate::support::registry::PASSWORD.as_bytes());
    let user = crate::support::registry::USER;
    let more = format!(
        "[registry.\"{}\"]\nusername = \"{user}\"\npassword_file = \"{}\"\n",
        other.host(),
        file.display()
    );
    let spec = SiteSpec {
        images_sink: Some(own.sink(&scratch)),
        more: &more,
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let layout = images::small().join("layout");
    let original = images::top(&layout)["digest"].clone();
    let source = format!("oci:{}:v1", layout.display());
    own.push(&source, "operators/adc:v7");
    other.push(&source, "tools/adc:v7");

    // The site's own registry is read with the site's own credentials, and the blobs stay there:
    // only the layout's two small files are written.
    let digest = publish_at(
        &site,
        &hub,
        &format!("registry://{}/operators/adc:v7", own.host()),
        "image/adc:v1",
    );
    assert_eq!(
        hub.json(&["show", "image/adc:v1"])["info"]["digest"],
        original
    );
    let written = find(&kept(&site, &digest), &|p| p.is_file());
    assert_eq!(written.len(), 2, "{written:?}");
    assert!(disk_usage(&kept(&site, &digest)) < 4096, "{written:?}");
    let scratch_left = find(&site.data_dir.join("scratch"), &|p| p.is_file());
    assert_eq!(scratch_left, Vec::<PathBuf>::new());

    // The content of another registry and of archives is stored: the same image is the same
    // artifact.
    let elsewhere = format!("registry://{}/tools/adc:v7", other.host());
    let args = ["publish", &elsewhere, "--as", "image/adc:v2"];
    // The daemon does not send a file as credentials to a registry because a client names that
    // file.
    let named: Vec<&str> = args
        .into_iter()
        .chain([
            "--username",
            user,
            "--password-file",
            file.to_str().unwrap(),
        ])
        .collect();
    site.cli(&named)
        .expect(2)
        .says(&["[registry.", other.host().as_str(), "configuration"]);
    let answer = site.json(&args);
    assert_eq!(answer["digest"], *digest);
    assert!(
        disk_usage(&kept(&site, &digest)) > 4096,
        "the content of another registry is stored at the site"
    );
    let saved = publish_at(
        &site,
        &hub,
        images::small().join("docker.tar").to_str().unwrap(),
        "image/saved:v1",
    );
    assert!(find(&kept(&site, &saved), &|p| p.is_file()).len() > 4);
    site.cli(&[
        "publish",
        &format!("registry://{}/operators/none:v1", own.host()),
        "--as",
        "image/x:v1",
    ])
    .expect(5);
}

/// The owner of a folder that was published in place may write into its files later. So no
/// delivered version may have a hard link to such a file, although its content is copied from it.
#[test]
fn files_published_in_place_are_copied_and_never_linked() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let (own, v1, v2) = (scratch.join("own"), scratch.join("v1"), scratch.join("v2"));
    let mut rng = data::rng("in place");
    let files = [("large.bin", 3 << 20), ("small.bin", 30 << 10)];
    for (name, size) in files {
        let bytes = data::noise(&mut rng, size);
        for folder in [&own, &v1, &v2] {
            data::write(&folder.join(name), &bytes);
            // The mode of staged files: any other mode would already prevent a link.
            data::chmod(&folder.join(name), 0o644);
        }
    }
    data::write(&v1.join("notes.txt"), b"one");
    data::write(&v2.join("notes.txt"), b"two");
    site.publish(&own, "dataset/own:v1", &[]);
    hub.publish(&v1, "dataset/line:v1", &[]);
    let done = hub.deliver_and_wait("dataset/line:v1", "chengdu", secs(60));
    assert!(
        done.bytes.reused >= (3 << 20) + (30 << 10),
        "local content is not fetched: {:?}",
        done.bytes
    );
    let delivered = site.folder("dataset/line:v1");
    for (name, _) in files {
        let (mine, theirs) = (
            own.join(name).metadata().unwrap(),
            delivered.join(name).metadata().unwrap(),
        );
        assert_eq!(
            mine.dev(),
            theirs.dev(),
            "both folders must be on one filesystem, otherwise the test proves nothing"
        );
        assert_ne!(
            mine.ino(),
            theirs.ino(),
            "{name} is one file under two names"
        );
        assert_eq!((mine.nlink(), theirs.nlink()), (1, 1), "{name}");
    }

    // The owner changes the files.
    for (name, _) in files {
        let file = File::options().write(true).open(own.join(name)).unwrap();
        file.write_all_at(b"looked at again", 1000).unwrap();
    }
    assert_same(&v1, &delivered);
    site.cli(&["verify", "dataset/line:v1"]).expect(0);
    // A later version does not use the changed content either, although the chunk index still lists
    // these files.
    hub.publish(&v2, "dataset/line:v2", &[]);
    hub.deliver_and_wait("dataset/line:v2", "chengdu", secs(60));
    assert_same(&v2, &site.folder("dataset/line:v2"));
    assert_same(&v1, &delivered);
}

/// If files can share blocks, content that is reused on the same disk takes no additional space,
/// and yet each file is independent.
#[test]
fn reused_content_takes_no_additional_space_if_files_can_share_blocks() {
    const LARGE: usize = 48 << 20;
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    let machine = scratch.join("machine");
    let Some(disk) = SmallDisk::mount_xfs(&machine, &scratch.join("machine.img")) else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(&machine, &hub, "chengdu", &SiteSpec::default());
    let (own, v1, v2) = (machine.join("own"), scratch.join("v1"), scratch.join("v2"));
    let bytes = data::noise(&mut data::rng("blocks"), LARGE);
    for (folder, note) in [(&own, "own"), (&v1, "one"), (&v2, "two")] {
        data::write(&folder.join("large.bin"), &bytes);
        data::write(&folder.join("notes.txt"), note.as_bytes());
    }
    site.publish(&own, "model/own:v1", &[]);
    disk.sync();
    let before = disk.used();
    for (source, reference) in [(&v1, "model/line:v1"), (&v2, "model/line:v2")] {
        hub.publish(source, reference, &[]);
        let done = hub.deliver_and_wait(reference, "chengdu", secs(60));
        assert!(
            done.bytes.reused >= LARGE as u64 && done.bytes.received < 1 << 20,
            "{:?}",
            done.bytes
        );
    }
    disk.sync();
    let more = disk.used().saturating_sub(before);
    assert!(
        more < LARGE as u64 / 2,
        "{more} bytes for two versions of a file that the site has already"
    );

    // Each file has its own inode: a write to one does not change another.
    let places = [
        own.clone(),
        site.folder("model/line:v1"),
        site.folder("model/line:v2"),
    ];
    let mut inodes = places
        .each_ref()
        .map(|folder| folder.join("large.bin").metadata().unwrap().ino());
    inodes.sort_unstable();
    assert!(inodes.windows(2).all(|two| two[0] != two[1]), "{inodes:?}");
    let file = File::options()
        .write(true)
        .open(own.join("large.bin"))
        .unwrap();
    file.write_all_at(b"looked at again", 1000).unwrap();
    assert_same(&v1, &places[1]);
    assert_same(&v2, &places[2]);
}

/// An image that was published in place in a site's own registry, and a site that does not have it.
struct InRegistry {
    a: Site,
    b: Site,
    hub: Hub,
    registry: Registry,
    /// The hexadecimal digest of its last layer.
    layer: String,
    scratch: Scratch,
}

impl InRegistry {
    fn publish() -> Self {
        let scratch = Scratch::new();
        let registry = Registry::basic(&scratch, "own");
        let hub = Hub::start_new(scratch.path());
        let spec = SiteSpec {
            images_sink: Some(registry.sink(&scratch)),
            ..SiteSpec::default()
        };
        let a = Site::start_new(scratch.path(), &hub, "a", &spec);
        let b = Site::start_new(scratch.path(), &hub, "b", &SiteSpec::default());
        let layout = images::small().join("layout");
        registry.push(&format!("oci:{}:v1", layout.display()), "operators/adc:v7");
        publish_at(
            &a,
            &hub,
            &format!("registry://{}/operators/adc:v7", registry.host()),
            "image/adc:v1",
        );
        let manifest = images::blob(&layout, images::top(&layout)["digest"].as_str().unwrap());
        let manifest: Value = serde_json::from_str(&text(&manifest)).unwrap();
        let layer = manifest["layers"].as_array().unwrap().last().unwrap()["digest"]
            .as_str()
            .unwrap();
        let layer = layer.strip_prefix("sha256:").unwrap().to_owned();
        Self {
            a,
            b,
            hub,
            registry,
            layer,
            scratch,
        }
    }

    /// The folder in which docker-registry stores the layer.
    fn layer_folder(&self) -> PathBuf {
        self.scratch
            .join("own/docker/registry/v2/blobs/sha256")
            .join(&self.layer[..2])
            .join(&self.layer)
    }

    #[track_caller]
    fn fails_with_the_layer(&self, id: &str) {
        let failed = self
            .hub
            .wait_transfer(id, "failed", secs(40), |t| t.state == "failed");
        assert_eq!(failed.reason.as_deref(), Some("integrity"), "{failed:#?}");
        let path = format!("blobs/sha256/{} of operators/adc", self.layer);
        assert!(
            failed
                .message
                .as_deref()
                .is_some_and(|message| message.contains(&path)),
            "{failed:#?}"
        );
        self.a.cli(&["verify", "image/adc:v1"]).expect(8);
    }

    fn arrives(&self, id: &str) {
        self.a.cli(&["verify", "image/adc:v1"]).expect(0);
        self.hub.cli(&["retry", id]).expect(0);
        self.hub.wait_done(id, secs(60));
        self.b.cli(&["verify", "image/adc:v1"]).expect(0);
    }
}

#[test]
fn a_transfer_waits_for_an_offline_registry_and_fails_for_a_damaged_blob() {
    let _limit = limit(secs(150));
    let mut world = InRegistry::publish();
    world.registry.stop();
    let id = world.hub.deliver(&["image/adc:v1"], "b").remove(0);
    world.hub.wait_transfer(&id, "waiting", secs(40), |t| {
        t.has_reason(&["waiting_for_source"])
    });

    let file = world.layer_folder().join("data");
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    data::write(&file, &bad);
    world.registry.start();
    world.fails_with_the_layer(&id);
    data::write(&file, &good);
    world.arrives(&id);
}

#[test]
fn a_blob_missing_in_the_registry_fails_the_transfer_and_is_named() {
    let _limit = limit(secs(150));
    let world = InRegistry::publish();
    let (blob, aside) = (world.layer_folder(), world.scratch.join("aside"));
    data::copy_tree(&blob, &aside);
    std::fs::remove_dir_all(&blob).unwrap();
    let id = world.hub.deliver(&["image/adc:v1"], "b").remove(0);
    world.fails_with_the_layer(&id);
    // The same image is pushed again.
    data::copy_tree(&aside, &blob);
    world.arrives(&id);
}
