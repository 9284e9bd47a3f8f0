//! A directory below the root of the files sink that is on another filesystem: its space counts.

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::disk::SmallDisk;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs};

#[test]
fn the_space_of_the_filesystem_of_the_target_is_planned() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let (root, inner) = (scratch.folder("nas"), scratch.join("inner"));
    let Some(disk) = SmallDisk::mount("tmpfs", &inner, &scratch.join("image")) else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        root: Some(root.clone()),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    std::fs::create_dir(root.join("model")).unwrap();
    std::os::unix::fs::symlink(&inner, root.join("model/lnk")).unwrap();
    let plan = |reference: &str| {
        let row = hub.json(&["plan", reference, "--to", "chengdu"])[0].clone();
        let number = |key: &str| row[key].as_u64().unwrap_or_else(|| panic!("{key}: {row}"));
        (
            number("free") < number("needs"),
            number("free_inodes") < number("inodes"),
        )
    };
    let few = scratch.join("few");
    for (name, bytes) in [("a", 20 << 20), ("b", 10 << 20)] {
        data::write(&few.join(name), &data::noise(&mut data::rng(name), bytes));
    }
    hub.publish(&few, "model/lnk:v1", &[]);
    assert_eq!(plan("model/lnk:v1"), (false, false));
    hub.deliver_and_wait("model/lnk:v1", "chengdu", secs(40));
    assert_same(&few, &site.folder("model/lnk:v1"));

    // Larger than what is free there, smaller than what is free in the root.
    let large = scratch.join("large");
    data::write(
        &large.join("c"),
        &data::noise(&mut data::rng("c"), 40 << 20),
    );
    hub.publish(&large, "model/lnk:v2", &[]);
    let id = hub.deliver(&["model/lnk:v2"], "chengdu").remove(0);
    let waiting = hub.wait_transfer(&id, "full", secs(30), |t| {
        t.reason.as_deref() == Some("no_space") || t.is_final()
    });
    assert_eq!(waiting.bytes.received, 0, "{waiting:#?}");
    assert_eq!(plan("model/lnk:v2"), (true, false));

    // The disk has fewer inodes than this has files.
    let many = scratch.join("many");
    for number in 0..300 {
        data::write(&many.join(format!("{number:03}")), b"x");
    }
    hub.publish(&many, "model/lnk:v3", &[]);
    assert_eq!(plan("model/lnk:v3"), (false, true));
    let shown = hub
        .cli(&["plan", "model/lnk:v3", "--to", "chengdu"])
        .expect(0);
    assert!(shown.out.contains("too few inodes"), "{}", shown.out);

    // The copy that a crash left takes the room that the next attempt needs.
    let owner = std::fs::read_to_string(site.data_dir.join("sink-files-owner")).unwrap();
    let left = disk.fill(&format!(".packhorse-{}-0badcafe", owner.trim()), 0);
    std::fs::remove_dir_all(site.folder("model/lnk:v1")).unwrap();
    hub.wait_done(&id, secs(60));
    assert_same(&large, &site.folder("model/lnk:v2"));
    assert!(!left.exists());
}
