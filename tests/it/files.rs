//! Directories of files from the source to a site: what is selected and followed, what is kept
//! beside the content, and how content that is at the site already is found again.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{XattrFlags, lgetxattr, lsetxattr};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs};

fn set_time(path: &Path, seconds: u64, nanoseconds: u32) -> SystemTime {
    let time = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
    time
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

#[test]
fn times_attributes_holes_and_hard_links_arrive() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let set = scratch.join("set");
    data::write(&set.join("m.py"), b"x = 1\n");
    let time = set_time(&set.join("m.py"), 1_000_000_000, 123_456_789);
    lsetxattr(set.join("m.py"), "user.k", b"v", XattrFlags::empty())
        .expect("the scratch folder has user attributes");
    data::write(&set.join("h1"), &data::noise(&mut data::rng("h"), 300_000));
    fs::hard_link(set.join("h1"), set.join("h2")).unwrap();
    let disk = fs::File::create(set.join("disk.img")).unwrap();
    disk.set_len(64 << 20).unwrap();
    let island = data::noise(&mut data::rng("island"), 1 << 20);
    disk.write_all_at(&island, 30 << 20).unwrap();
    let published = hub.publish(
        &set,
        "model/m:v1",
        &["--xattrs", "--hard-links", "--strict"],
    );
    assert_eq!(published["omitted"].as_array().map(Vec::len), Some(0));
    let plan = hub.json(&["plan", "model/m:v1", "--to", "a"]);
    let needs = plan[0]["needs"].as_u64().expect("plan has needs");
    assert!(needs < 3 << 20, "holes need no room: {plan}");
    hub.deliver_and_wait("model/m:v1", "a", secs(40));
    let there = site.folder("model/m:v1");
    assert_same(&set, &there);
    assert_eq!(modified(&there.join("m.py")), time);
    let mut value = [0; 8];
    let len = lgetxattr(there.join("m.py"), "user.k", &mut value).unwrap();
    assert_eq!(&value[..len], b"v");
    let inode = |name: &str| fs::metadata(there.join(name)).unwrap().ino();
    assert_eq!(inode("h1"), inode("h2"));
    let blocks = fs::metadata(there.join("disk.img")).unwrap().blocks() * 512;
    assert!(blocks < 3 << 20, "{blocks} bytes are allocated");
    let verify = || site.cli(&["verify", "model/m:v1"]).expect(0).out;
    assert_eq!(verify(), "model/m:v1 is intact\n");

    // A version with other times shares content, not the file whose time differs.
    let later = set_time(&set.join("m.py"), 1_500_000_000, 0);
    hub.publish(&set, "model/m:v2", &["--xattrs", "--hard-links"]);
    let done = hub.deliver_and_wait("model/m:v2", "a", secs(40));
    assert_eq!(done.bytes.received, 0, "{done:#?}");
    let second = site.folder("model/m:v2");
    assert_eq!(modified(&second.join("m.py")), later);
    assert_eq!(
        modified(&there.join("m.py")),
        time,
        "the first version stays as it was"
    );
    let blocks = fs::metadata(second.join("disk.img")).unwrap().blocks() * 512;
    assert!(blocks < 3 << 20, "{blocks} bytes are allocated");

    // A time that changed at the site is a note, and no damage.
    set_time(&there.join("m.py"), 1_700_000_000, 0);
    let said = verify();
    assert!(said.contains("m.py: its modification time"), "{said}");

    // The same content with other times is the artifact that exists.
    set_time(&set.join("m.py"), 1_600_000_000, 0);
    let again = hub.publish(&set, "model/m:v2", &["--xattrs", "--hard-links"]);
    assert_eq!(again["unchanged"], true);
    assert!(
        again["note"]
            .as_str()
            .is_some_and(|note| note.contains("times differ")),
        "{again}"
    );
    let plain = hub.publish(&set, "model/plain:v1", &["--no-times"]);
    set_time(&set.join("m.py"), 1_650_000_000, 0);
    let same = hub.publish(&set, "model/plain:v1", &["--no-times"]);
    assert_eq!(
        (&same["digest"], &same["unchanged"]),
        (&plain["digest"], &true.into())
    );
}

#[test]
fn a_publish_selects_follows_and_decodes() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let snapshot = scratch.join("models--x/snapshots/c0");
    data::write(&scratch.join("models--x/blobs/aa"), b"weights");
    fs::create_dir_all(&snapshot).unwrap();
    symlink("../../blobs/aa", snapshot.join("model.safetensors")).unwrap();
    for junk in [".DS_Store", "@eaDir/x", "a.tmp", "run/.nfs001"] {
        data::write(&snapshot.join(junk), b"junk");
    }
    data::write(&snapshot.join("run/keep"), b"1");
    hub.refuses(&snapshot, "model/hf:v1", &[], 8, &["--copy-links"]);
    for (daemon, reference) in [(&*hub, "model/hf:v1"), (&*site, "model/site:v1")] {
        let published = daemon.publish(
            &snapshot,
            reference,
            &["--copy-links", "--exclude", "*.tmp", "--strict"],
        );
        let omitted = &published["omitted"][0];
        assert_eq!(
            (omitted["what"].as_str(), omitted["count"].as_u64()),
            (Some("excluded"), Some(4))
        );
    }
    hub.deliver_and_wait("model/hf:v1", "a", secs(40));
    let there = site.folder("model/hf:v1");
    let mut names: Vec<_> = fs::read_dir(&there)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["model.safetensors", "run"]);
    assert_eq!(
        fs::read(there.join("model.safetensors")).unwrap(),
        b"weights"
    );
    assert!(!there.join("model.safetensors").is_symlink());
    hub.cli(&["publish", "/x", "--as", "image/x:v1", "--exclude", "a"])
        .expect(2)
        .says(&["--exclude is for datasets"]);

    // 线缺陷 in GBK, as the name of a directory and of a file in it.
    let name = OsStr::from_bytes(b"\xcf\xdf\xc8\xb1\xcf\xdd");
    let gbk = scratch.path().join(name);
    data::write(&gbk.join(name), b"x");
    let publish = |daemon: &crate::support::daemon::Daemon, reference: &str, more: &[&str]| {
        let mut command = daemon.command(&["publish", "--as", reference, "-o", "json"]);
        command.arg(&gbk).args(more);
        crate::support::command::run(&mut command, secs(30))
    };
    publish(&hub, "dataset/gbk:v1", &[])
        .expect(2)
        .says(&["not UTF-8", "--name-encoding"]);
    for (daemon, reference) in [(&*hub, "dataset/gbk:v1"), (&*site, "dataset/gbk-site:v1")] {
        publish(daemon, reference, &["--name-encoding", "gbk"]).expect(0);
    }
    hub.deliver_and_wait("dataset/gbk:v1", "a", secs(40));
    let there = site.folder("dataset/gbk:v1");
    assert_eq!(fs::read(there.join("线缺陷")).unwrap(), b"x");
}

#[test]
fn content_of_a_removed_version_is_found_in_the_versions_that_share_it() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let set = scratch.join("set");
    for number in 0..40 {
        data::write(
            &set.join(format!("p{number:02}")),
            &data::noise(&mut data::rng(&format!("removed{number}")), 50_000),
        );
    }
    for version in ["v1", "v2", "v3"] {
        data::write(&set.join("changes"), version.as_bytes());
        hub.publish(&set, &format!("dataset/x:{version}"), &[]);
    }
    hub.deliver_and_wait("dataset/x:v1", "a", secs(40));
    hub.deliver_and_wait("dataset/x:v2", "a", secs(40));
    fs::remove_dir_all(site.folder("dataset/x:v1")).unwrap();
    let plan = hub.json(&["plan", "dataset/x:v3", "--to", "a"]);
    assert_eq!(plan[0]["missing"], 2, "a plan finds it too: {plan}");
    let done = hub.deliver_and_wait("dataset/x:v3", "a", secs(40));
    assert_eq!(done.bytes.received, 2, "only what is new: {done:#?}");
    assert_same(&set, &site.folder("dataset/x:v3"));
}

#[test]
fn a_version_that_lost_its_note_is_used_if_its_content_is_intact() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let root = scratch.folder("nas");
    let spec = SiteSpec {
        root: Some(root.clone()),
        ..SiteSpec::default()
    };
    let mut site = Site::start_new(scratch.path(), &hub, "a", &spec);
    let set = scratch.join("set");
    for number in 0..10 {
        data::write(
            &set.join(format!("p{number}")),
            &data::noise(&mut data::rng(&format!("note{number}")), 30_000),
        );
    }
    for reference in ["dataset/x:v1", "dataset/y:v1", "dataset/z:v1"] {
        hub.publish(&set, reference, &[]);
    }
    hub.deliver_and_wait("dataset/x:v1", "a", secs(40));
    site.stop();
    fs::remove_dir_all(root.join(".packhorse")).unwrap();
    fs::remove_file(site.data_dir.join("sink-files-id")).unwrap();
    // Somebody copied this version, and this one with other content.
    data::copy_tree(&set, &root.join("dataset/y/v1"));
    data::copy_tree(&set, &root.join("dataset/z/v1"));
    data::write(&root.join("dataset/z/v1/p3"), b"a user's");
    site.start();
    hub.wait_online("a", true, secs(20));
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let files = ["dataset/x/v1/p0", "dataset/y/v1/p0"].map(|file| root.join(file));
    let before = files.each_ref().map(|file| inode(file));
    for reference in ["dataset/x:v1", "dataset/y:v1"] {
        let done = hub.deliver_and_wait(reference, "a", secs(40));
        assert_eq!(done.bytes.received, 0, "{done:#?}");
        site.cli(&["verify", reference]).expect(0);
    }
    assert_eq!(
        files.each_ref().map(|file| inode(file)),
        before,
        "nothing was replaced"
    );
    // A later version finds its content there.
    data::write(&set.join("new"), b"new");
    hub.publish(&set, "dataset/y:v2", &[]);
    let done = hub.deliver_and_wait("dataset/y:v2", "a", secs(40));
    assert_eq!(done.bytes.received, 3, "{done:#?}");
    fs::remove_file(set.join("new")).unwrap();
    let id = hub.deliver(&["dataset/z:v1"], "a").remove(0);
    let refused = hub.wait_transfer(&id, "refused", secs(40), |t| t.state == "failed");
    assert_eq!(
        refused.reason.as_deref(),
        Some("sink_refused"),
        "{refused:#?}"
    );
    assert_eq!(fs::read(root.join("dataset/z/v1/p3")).unwrap(), b"a user's");
}

#[test]
fn adopt_takes_up_what_the_nas_holds() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let root = scratch.folder("nas");
    let spec = SiteSpec {
        root: Some(root.clone()),
        ..SiteSpec::default()
    };
    let mut site = Site::start_new(scratch.path(), &hub, "a", &spec);
    let set = scratch.join("set");
    for number in 0..10 {
        data::write(
            &set.join(format!("p{number}")),
            &data::noise(&mut data::rng(&format!("adopt{number}")), 300_000),
        );
    }
    for reference in ["dataset/x:v1", "dataset/y:v1", "model/copied:v2"] {
        hub.publish(&set, reference, &[]);
    }
    hub.deliver_and_wait("dataset/x:v1", "a", secs(40));
    hub.deliver_and_wait("dataset/y:v1", "a", secs(40));
    site.stop();
    fs::remove_dir_all(root.join(".packhorse")).unwrap();
    fs::remove_file(site.data_dir.join("sink-files-id")).unwrap();
    // As editors replace a file: the other version may have the same file.
    fs::remove_file(root.join("dataset/y/v1/p3")).unwrap();
    data::write(&root.join("dataset/y/v1/p3"), b"a user's");
    // A part of another artifact, which only a user knows.
    for number in 10..14 {
        let more = data::noise(&mut data::rng(&format!("adopt{number}")), 300_000);
        data::write(&root.join(format!("model/copied/v1/{number}")), &more);
        data::write(&set.join(format!("p{number}")), &more);
    }
    site.start();
    hub.wait_online("a", true, secs(20));
    hub.cli(&["adopt"]).expect(2);
    let adopted = site.cli(&["adopt", "-o", "json"]).expect(8).json();
    assert_eq!(adopted["known"], 0);
    for (list, artifact) in [
        ("registered", "dataset/x:v1"),
        ("differs", "dataset/y:v1"),
        ("recorded", "model/copied:v1"),
    ] {
        assert_eq!(
            adopted[list],
            serde_json::json!([artifact]),
            "{list}: {adopted}"
        );
    }
    site.cli(&["verify", "dataset/x:v1"]).expect(0);
    assert_eq!(fs::read(root.join("dataset/y/v1/p3")).unwrap(), b"a user's");
    // Twice the same, and what was recorded is not fetched.
    fs::remove_dir_all(root.join("dataset/y/v1")).unwrap();
    let again = site.cli(&["adopt", "-o", "json"]).expect(0).json();
    assert_eq!(again["known"], 1, "{again}");
    hub.publish(&set, "model/other:v1", &[]);
    let done = hub.deliver_and_wait("model/other:v1", "a", secs(40));
    assert_eq!(done.bytes.received, 0, "{done:#?}");
}
