//! Full disks: the hub's, the relay's, a site's NAS; and what happens when there is space again.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data::{self, noise, rng, write};
use crate::support::disk::SmallDisk;
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, disk_usage, find, limit, secs, wait_for};

#[test]
fn a_publish_at_a_full_hub_waits_for_space() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    let Some(disk) = SmallDisk::mount_tmpfs(&hub.data_dir, "64m") else {
        return;
    };
    hub.start();
    let small = scratch.join("small");
    write(&small.join("model.bin"), &noise(&mut rng("small"), 4 << 20));
    hub.publish(&small, "model/small:v1", &[]);
    // With many smaller files, the hub detects the full disk while it reads them.
    let in_parts = |name: &str| {
        let folder = scratch.join(name);
        for part in ["a", "b", "c"] {
            write(
                &folder.join(part),
                &noise(&mut rng(&format!("{name} {part}")), 40 << 20),
            );
        }
        folder
    };
    let big = in_parts("big");
    let publish = ["publish", big.to_str().unwrap(), "--as", "model/big:v1"];
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| hub.cli(&publish));
        wait_for("the log reports the wait", secs(60), || {
            hub.log().contains("waits for room").then_some(())
        });
        // The rest of the hub continues. The waiting publish blocks nothing: the chunks that it
        // stored can be collected.
        hub.cli(&["verify", "model/small:v1"]).expect(0);
        hub.cli(&["gc"]).expect(0);
        assert!(!waiting.is_finished(), "120 MiB do not fit here");
        hub.cli(&["show", "model/big:v1"]).expect(5);
        disk.grow("300m");
        waiting.join().unwrap().expect(0);
    });
    hub.cli(&["verify", "model/big:v1"]).expect(0);
    assert!(
        disk_usage(&hub.data_dir) < 180 << 20,
        "content that was stored before is stored once: {} bytes",
        disk_usage(&hub.data_dir)
    );

    // The command reports what it waits for, and where. A publish that ends with the hub leaves
    // nothing that cannot be collected.
    disk.grow("200m");
    let other = in_parts("other");
    let publish = [
        "publish",
        other.to_str().unwrap(),
        "--as",
        "model/other:v1",
        "--timeout",
        "15s",
    ];
    let told = format!(
        "waiting for room on a full disk: publish model/other:v1: the pack {}",
        hub.data_dir.display()
    );
    hub.cli(&publish).expect(11).says(&[&told]);
    hub.kill();
    hub.start();
    hub.cli(&["gc"]).expect(0);
    assert!(
        disk_usage(&hub.data_dir) < 160 << 20,
        "the failed publish still takes {} bytes",
        disk_usage(&hub.data_dir)
    );
    hub.publish(&small, "model/small:v2", &[]);
    hub.stop();
}

#[test]
fn a_file_that_does_not_fit_at_the_hub_is_refused_before_any_of_it_is_stored() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    let Some(disk) = SmallDisk::mount_tmpfs(&hub.data_dir, "100m") else {
        return;
    };
    hub.start();
    let big = scratch.join("big");
    write(&big.join("model.bin"), &noise(&mut rng("big"), 120 << 20));
    let used = disk.used();
    let publish = [
        "publish",
        big.to_str().unwrap(),
        "--as",
        "model/big:v1",
        "--timeout",
        "8s",
    ];
    hub.cli(&publish).expect(11).says(&[
        "waiting for room",
        "model.bin",
        "do not fit in",
        hub.data_dir.to_str().unwrap(),
    ]);
    assert!(
        disk.used() < used + (4 << 20),
        "{} bytes of it were stored",
        disk.used() - used
    );
    disk.grow("300m");
    hub.publish(&big, "model/big:v1", &[]);
    // Content that the hub has already, and compressible content, counts with the space that it
    // takes.
    let more = scratch.join("more");
    let mut model = std::fs::read(big.join("model.bin")).unwrap();
    model.resize(400 << 20, 0);
    write(&more.join("model.bin"), &model);
    hub.publish(&more, "model/big:v2", &[]);
    hub.cli(&["verify", "model/big:v2"]).expect(0);
    hub.stop();
}

#[test]
fn the_hub_forwards_content_that_it_has_no_space_to_store() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    // Too small for one pack.
    let Some(_disk) = SmallDisk::mount_tmpfs(&hub.data_dir.join("relay"), "16m") else {
        return;
    };
    hub.start();
    let origin = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let target = Site::start_new(scratch.path(), &hub, "wuhan", &SiteSpec::default());
    let source = scratch.join("model");
    data::model(&source, 40 << 20);
    origin.publish(&source, "model/big:v1", &[]);
    hub.deliver_and_wait("model/big:v1", "wuhan", secs(60));
    assert_same(&source, &target.folder("model/big:v1"));
    assert_eq!(
        disk_usage(&hub.data_dir.join("relay/packs")),
        0,
        "the disk must be too small to store any of it"
    );
    assert!(
        hub.log().contains("passed on without being kept"),
        "the log reports the problem of the disk"
    );
}

#[test]
fn a_full_nas_stops_the_transfer_until_there_is_space() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let root = scratch.folder("nas");
    let Some(disk) = SmallDisk::mount_tmpfs(&root, "40m") else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        root: Some(root),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = scratch.join("model");
    data::model(&source, 80 << 20);
    hub.publish(&source, "model/big:v1", &[]);
    let id = hub.deliver(&["model/big:v1"], "chengdu").remove(0);
    let stuck = hub.wait_transfer(&id, "out of space", secs(60), |t| {
        t.has_reason(&["no_space"])
    });
    assert!(
        stuck.message.is_some() && stuck.next.is_some(),
        "{stuck:#?}"
    );
    // The required size and the free space are both known.
    assert_eq!(
        (stuck.bytes.received, stuck.bytes.committed),
        (0, 0),
        "a transfer that does not fit does not start: {:?}",
        stuck.bytes
    );
    assert!(
        disk.used() < 1 << 20,
        "{} bytes were written of an artifact that does not fit",
        disk.used()
    );
    assert!(
        !site.folder("model/big:v1").exists(),
        "nothing is visible before it is complete"
    );

    // Other artifacts that fit are not delayed.
    write(&scratch.join("tiny").join("m.bin"), b"tiny");
    hub.publish(
        &scratch.join("tiny"),
        "model/tiny:v1",
        &["--to", "chengdu", "--wait"],
    );

    disk.grow("300m");
    hub.wait_done(&id, secs(120));
    assert_same(&source, &site.folder("model/big:v1"));
    assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_transfer_with_reserved_space_on_a_nearly_full_nas_resumes_after_a_kill() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let root = scratch.folder("nas");
    // The space of the whole model is reserved from the first byte on. The free space, without the
    // reserve of a site, is then 35 MiB: less than the model still needs when the site is killed.
    let Some(_disk) = SmallDisk::mount_ext4(&root, &scratch.join("ext4.img"), 160 << 20) else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    let spec = SiteSpec {
        through: Some(line.address()),
        root: Some(root),
        ..SiteSpec::default()
    };
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = scratch.join("model");
    data::model(&source, 90 << 20);
    hub.publish(&source, "model/big:v1", &[]);
    line.hold_at(line.down() + (36 << 20));
    let id = hub.deliver(&["model/big:v1"], "chengdu").remove(0);
    let seen = hub.wait_transfer(&id, "on its way", secs(60), |t| {
        t.bytes.committed >= 16 << 20
    });
    site.kill();
    let large = find(&site.root, &|path| {
        path.metadata().is_ok_and(|m| m.len() >= 80 << 20)
    });
    let room: Vec<u64> = large
        .iter()
        .map(|path| path.metadata().unwrap().blocks() * 512)
        .collect();
    assert!(
        room.len() == 1 && room[0] >= 80 << 20,
        "the whole space of a large file is reserved from its first byte on: {large:?} {room:?}"
    );
    line.hold_at(0);
    site.start();
    let done = hub.wait_done(&id, secs(60));
    assert!(
        done.bytes.resumed >= seen.bytes.committed,
        "the transfer resumes with the staged content: {:?}",
        done.bytes
    );
    assert_same(&source, &site.folder("model/big:v1"));
    assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_site_continues_after_its_data_directory_was_full() {
    let _limit = limit(secs(280));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let mut site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let Some(disk) = SmallDisk::mount_tmpfs(&site.data_dir, "80m") else {
        return;
    };
    site.join(&hub, &[]);
    site.start();
    let set = data::dataset(&scratch.join("set"), 400).root;
    hub.publish(&set, "dataset/d:v1", &[]);
    hub.publish(&set, "dataset/d:v2", &[]);
    hub.deliver_and_wait("dataset/d:v1", "chengdu", secs(60));

    // There is space for the site's records, but none for the manifest of a new artifact: after a
    // start, the store begins a new pack and requires the space of a whole pack. The transfer
    // reports this, and names the disk.
    site.stop();
    let filler = disk.fill("filler", 12 << 20);
    site.start();
    hub.wait_online("chengdu", true, secs(20));
    let other = data::dataset(&scratch.join("other"), 400).root;
    write(&other.join("more.bin"), &noise(&mut rng("more"), 48 << 20));
    hub.publish(&other, "dataset/other:v1", &[]);
    let ids = hub.deliver(&["dataset/other:v1", "dataset/d:v2"], "chengdu");
    let stuck = hub.wait_transfer(&ids[0], "out of space", secs(60), |t| {
        t.has_reason(&["no_space"])
    });
    assert_eq!(stuck.artifact, "dataset/other:v1");
    assert!(
        stuck
            .message
            .as_deref()
            .is_some_and(|m| m.contains(site.data_dir.to_str().unwrap())),
        "the message names the disk: {stuck:#?}"
    );
    assert!(
        stuck
            .next
            .as_deref()
            .is_some_and(|next| next.contains("that disk")),
        "{stuck:#?}"
    );

    // Then there is no free byte during the work: the site cannot even record that, and must
    // survive it.
    let rest = disk.fill("rest", 0);
    wait_for("the catalogue cannot be written", secs(90), || {
        site.log()
            .contains("the catalogue cannot be written")
            .then_some(())
    });
    assert!(site.is_running(), "the site ended");

    // With free space it continues without a command.
    std::fs::remove_file(&rest).unwrap();
    std::fs::remove_file(&filler).unwrap();
    disk.grow("300m");
    for id in &ids {
        hub.wait_done(id, secs(120));
    }
    assert_same(&other, &site.folder("dataset/other:v1"));
    assert_same(&set, &site.folder("dataset/d:v2"));
}

#[test]
fn a_transfer_cancelled_on_a_full_disk_leaves_no_files() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    let root = scratch.folder("nas");
    let Some(disk) = SmallDisk::mount_tmpfs(&root, "100m") else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    let spec = SiteSpec {
        through: Some(line.address()),
        root: Some(root),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = data::dataset(&scratch.join("dataset"), 20).root;
    write(
        &source.join("large.bin"),
        &noise(&mut rng("large"), 60 << 20),
    );
    hub.publish(&source, "dataset/d:v1", &[]);
    line.hold_at(line.down() + (28 << 20));
    let id = hub.deliver(&["dataset/d:v1"], "chengdu").remove(0);
    // There was enough space at the start: another program uses it.
    hub.wait_transfer(&id, "on its way", secs(60), |t| {
        t.bytes.committed >= 8 << 20
    });
    let filler = disk.fill("filler", 0);
    line.hold_at(0);
    hub.wait_transfer(&id, "out of space", secs(60), |t| {
        t.has_reason(&["no_space"])
    });
    assert!(
        !site.leftovers().is_empty(),
        "the staged content is kept until there is space"
    );
    hub.cli(&["cancel", &id]).expect(0);
    wait_for("staging is cleaned", secs(30), || {
        site.leftovers().is_empty().then_some(())
    });
    std::fs::remove_file(filler).unwrap();
    wait_for("all space on the NAS is free again", secs(10), || {
        (disk.used() < 1 << 20).then_some(())
    });
    assert!(!site.root.join("dataset/d/CURRENT").exists());
}

#[test]
fn a_nas_without_inodes_is_full() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let root = scratch.folder("nas");
    let Some(disk) = SmallDisk::mount_tmpfs(&root, "64m,nr_inodes=120") else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        root: Some(root.clone()),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = scratch.join("many");
    for n in 0..150 {
        write(
            &source.join(format!("f{n}")),
            format!("file {n}").as_bytes(),
        );
    }
    hub.publish(&source, "dataset/many:v1", &[]);
    let id = hub.deliver(&["dataset/many:v1"], "chengdu").remove(0);
    let stuck = hub.wait_transfer(&id, "out of inodes", secs(60), |t| {
        t.has_reason(&["no_space"])
    });
    let message = stuck.message.clone().unwrap_or_default();
    assert!(
        message.contains("inodes") && message.contains(root.to_str().unwrap()),
        "{stuck:#?}"
    );
    assert_eq!(
        stuck.bytes.received, 0,
        "a transfer that does not fit does not start"
    );
    disk.grow("64m,nr_inodes=1000");
    hub.wait_done(&id, secs(120));
    assert_same(&source, &site.folder("dataset/many:v1"));
}

#[test]
fn a_report_that_a_full_hub_could_not_store_is_stored_later() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    let Some(disk) = SmallDisk::mount_tmpfs(&hub.data_dir, "100m") else {
        return;
    };
    hub.start();
    let line = Line::to(hub.quic);
    let spec = SiteSpec {
        through: Some(line.address()),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = scratch.join("model");
    data::model(&source, 12 << 20);
    hub.publish(&source, "model/m:v1", &[]);
    line.hold_at(line.down() + (4 << 20));
    let id = hub.deliver(&["model/m:v1"], "chengdu").remove(0);
    hub.wait_transfer(&id, "on its way", secs(60), |t| t.state == "transferring");
    let filler = disk.fill("filler", 0);
    line.hold_at(0);
    wait_for("the site is done", secs(60), || {
        site.folder("model/m:v1").exists().then_some(())
    });
    wait_for("the hub could not store it", secs(60), || {
        hub.log().contains("could not be stored").then_some(())
    });
    // Queries are still answered, and report the problem.
    hub.cli(&["status"]).expect(0);
    assert!(
        hub.cli(&["doctor"])
            .expect(1)
            .out
            .contains("fault data_dir")
    );
    hub.cli(&["token", "create", "--site", "wuhan"])
        .expect(9)
        .says(&["catalogue.db", "disk is full"]);
    let connected = site
        .log()
        .matches("the connection to the hub ended")
        .count();
    std::fs::remove_file(filler).unwrap();
    hub.wait_done(&id, secs(60));
    assert_eq!(
        site.log()
            .matches("the connection to the hub ended")
            .count(),
        connected,
        "it is reported over the same connection"
    );
    assert!(hub.is_running());
}

#[test]
fn a_site_with_a_full_data_directory_reports_that_and_keeps_its_connection() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let mut site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let Some(disk) = SmallDisk::mount_tmpfs(&site.data_dir, "60m") else {
        return;
    };
    site.join(&hub, &[]);
    site.start();
    hub.wait_online("chengdu", true, secs(20));
    let source = scratch.join("model");
    data::model(&source, 1 << 20);
    hub.publish(&source, "model/m:v1", &[]);
    hub.publish(&source, "model/m:v2", &[]);
    hub.deliver_and_wait("model/m:v1", "chengdu", secs(60));
    let filler = disk.fill("filler", 0);
    let id = hub.deliver(&["model/m:v2"], "chengdu").remove(0);
    // The hub receives the report although the site cannot write to its disk.
    let stuck = hub.wait_transfer(&id, "out of space", secs(60), |t| {
        t.has_reason(&["no_space"])
    });
    assert!(
        stuck
            .message
            .as_deref()
            .is_some_and(|m| m.contains(site.data_dir.to_str().unwrap())),
        "the message names the disk: {stuck:#?}"
    );
    assert_eq!(
        site.log()
            .matches("the connection to the hub ended")
            .count(),
        0,
        "{}",
        site.log()
    );
    assert!(
        site.cli(&["doctor"])
            .expect(1)
            .out
            .contains("fault data_dir")
    );

    // The site also starts with the full disk.
    site.kill();
    site.start();
    assert!(
        site.cli(&["doctor"])
            .expect(1)
            .out
            .contains("fault data_dir")
    );
    std::fs::remove_file(filler).unwrap();
    hub.wait_done(&id, secs(90));
    assert_same(&source, &site.folder("model/m:v2"));
}
