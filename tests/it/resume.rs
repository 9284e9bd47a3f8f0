//! Properties of the data plane other than speed: the cost of a kill, memory that does not grow
//! with the number of entries, and local sources that are always verified.

use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs};

/// The size of the artifact: much more than a kill may cost.
const SIZE: usize = 136 << 20;
/// Bytes per second of the connection: fast enough that the bytes in flight reach their limit, slow
/// enough to kill a daemon in the middle.
const RATE: u64 = 48 << 20;
/// The bytes that a kill may cost on the connection.
const AGAIN: u64 = 64 << 20;
/// The smallest budget that a daemon accepts.
const MEMORY: &str = "[limits]\nmemory = \"32MiB\"\n";
/// The number of files, and also of links, in the memory test. The links take 3.5 KB each in the
/// manifest, 40 MiB together.
const MANY: usize = 12_000;
/// The number of entries in the transfer before the measurement: it fills buffers, caches and
/// thread pools.
const FEW: usize = 400;
/// The memory that many entries may need more than few: space for bytes in flight and caches, and
/// far less than a manifest.
const GROWTH: u64 = 24 << 20;

/// Kills a daemon during a transfer, and waits for its end: the content must be right, and no more
/// bytes than the bound are sent again.
fn kill_in_the_middle(kill: impl Fn(&mut Hub, &mut Site)) {
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let (line, mut site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    let source = scratch.join("model");
    data::write(
        &source.join("weights.bin"),
        &data::noise(&mut data::rng("resume"), SIZE),
    );
    hub.publish(&source, "model/big:v1", &[]);
    line.throttle(RATE);
    let before = line.down();
    let transfer = hub.deliver(&["model/big:v1"], "chengdu").remove(0);
    // Late enough that a start from zero would exceed the bound.
    hub.wait_transfer(&transfer, "on its way", secs(60), |t| {
        t.bytes.received >= 90 << 20
    });
    kill(&mut hub, &mut site);
    let done = hub.wait_done(&transfer, secs(120));
    assert_same(&source, &site.folder("model/big:v1"));
    assert_eq!(done.bytes.committed, done.bytes.total, "{:?}", done.bytes);
    // 3 % for the headers of the datagrams, and acknowledgements.
    let most = SIZE as u64 + SIZE as u64 * 3 / 100 + AGAIN;
    let sent = line.down() - before;
    assert!(
        sent <= most,
        "{sent} bytes were transmitted, the limit is {most}: {:?}",
        done.bytes
    );
    // The chunks that arrived before the kill are in the chunk index too: another artifact reuses
    // all of them.
    data::write(&source.join("one more"), b"so that it is another");
    hub.publish(&source, "model/again:v1", &[]);
    let again = hub.deliver(&["model/again:v1"], "chengdu").remove(0);
    let again = hub.wait_done(&again, secs(60)).bytes;
    assert!(again.wire < 2 << 20, "{again:?}");
    // Reuse by chunks, because a file that is shared as a whole needs only one chunk lookup.
    let mut grown = std::fs::read(source.join("weights.bin")).unwrap();
    grown.extend_from_slice(b"more");
    data::write(&source.join("weights.bin"), &grown);
    hub.publish(&source, "model/again:v2", &[]);
    let grown = hub.deliver(&["model/again:v2"], "chengdu").remove(0);
    let grown = hub.wait_done(&grown, secs(60)).bytes;
    assert!(grown.wire < 2 << 20, "{grown:?}");
}

#[test]
fn after_a_kill_of_the_site_only_uncommitted_content_is_sent_again() {
    let _limit = limit(secs(240));
    kill_in_the_middle(|_, site| {
        site.kill();
        site.start();
    });
}

#[test]
fn after_a_kill_of_the_hub_only_uncommitted_content_is_sent_again() {
    let _limit = limit(secs(240));
    kill_in_the_middle(|hub, _| {
        hub.kill();
        hub.start();
    });
}

/// Creates a folder of so many small files, which no other such folder has, and as many links with
/// targets of nearly the maximum length.
fn many(root: &Path, count: usize) {
    for number in 0..count {
        let (files, links) = (
            root.join(format!("files/{:02}", number / 1000)),
            root.join("links"),
        );
        if number % 1000 == 0 {
            std::fs::create_dir_all(&files).unwrap();
            std::fs::create_dir_all(&links).unwrap();
        }
        let content = format!("sample {number} of {count}\n").repeat(1 + number % 40);
        std::fs::write(files.join(format!("{number:06}.txt")), content).unwrap();
        symlink(
            format!("{number:06}/").repeat(500),
            links.join(format!("{number:06}")),
        )
        .unwrap();
    }
}

#[test]
fn many_entries_need_hardly_more_memory_than_few() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    hub.edit_config("[listen]", &format!("{MEMORY}[listen]"));
    hub.start();
    let site = Site::start_new(
        scratch.path(),
        &hub,
        "chengdu",
        &SiteSpec {
            more: MEMORY,
            ..SiteSpec::default()
        },
    );
    let carry = |name: &str, count: usize| {
        let (source, reference) = (scratch.join(name), format!("dataset/{name}:v1"));
        many(&source, count);
        hub.publish(&source, &reference, &[]);
        hub.deliver_and_wait(&reference, "chengdu", secs(120));
        assert_same(&source, &site.folder(&reference));
        [&*hub, &*site].map(|daemon| (daemon.name.clone(), daemon.memory("VmHWM")))
    };
    let few = carry("few", FEW);
    let many = carry("many", MANY);
    for ((name, few), (_, many)) in few.into_iter().zip(many) {
        println!("{name}: {few} bytes at its peak with {FEW} files, {many} with {MANY}");
        assert!(
            many.saturating_sub(few) <= GROWTH,
            "{name} took {few} bytes at its peak with {FEW} files and {many} with {MANY}"
        );
    }
}

/// Changes a byte in the middle of a file, and keeps its size and modification time.
fn damage(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let meta = file.metadata().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, meta.len() / 2).unwrap();
    file.write_all_at(&[byte[0] ^ 1], meta.len() / 2).unwrap();
    file.set_modified(meta.modified().unwrap()).unwrap();
}

#[test]
fn a_damaged_or_unreadable_local_source_is_fetched_instead() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let (v1, v2) = (scratch.join("v1"), scratch.join("v2"));
    let mut rng = data::rng("stale");
    for folder in [&v1, &v2] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let changed = [
        ("small.bin", 30 << 10),
        ("middle.bin", 300 << 10),
        ("large.bin", 3 << 20),
    ];
    // One file of one chunk, one of several. A folder can be opened, and some filesystems report
    // the size of a page for it.
    let removed = [("gone-small.bin", 20 << 10), ("gone-large.bin", 400 << 10)];
    let replaced = [
        ("folder-small.bin", 4 << 10),
        ("folder-large.bin", 400 << 10),
    ];
    for (name, size) in [&changed[..], &removed, &replaced, &[("sound.bin", 2 << 20)]].concat() {
        let bytes = data::noise(&mut rng, size);
        data::write(&v1.join(name), &bytes);
        data::write(&v2.join(name), &bytes);
    }
    // A file that is partly unchanged: its chunks are reused one by one.
    let mut grown = std::fs::read(v1.join("large.bin")).unwrap();
    grown.splice(1000..1000, data::noise(&mut rng, 500));
    data::write(&v2.join("grown.bin"), &grown);
    hub.publish(&v1, "model/net:v1", &[]);
    hub.deliver_and_wait("model/net:v1", "chengdu", secs(60));
    let there = site.folder("model/net:v1");
    changed
        .iter()
        .for_each(|(name, _)| damage(&there.join(name)));
    for (name, _) in removed.iter().chain(&replaced) {
        std::fs::remove_file(there.join(name)).unwrap();
    }
    for (name, _) in replaced {
        std::fs::create_dir(there.join(name)).unwrap();
    }
    hub.publish(&v2, "model/net:v2", &[]);
    let done = hub.deliver_and_wait("model/net:v2", "chengdu", secs(60));
    assert_same(&v2, &site.folder("model/net:v2"));
    assert!(
        done.bytes.reused >= 2 << 20,
        "intact content is reused: {:?}",
        done.bytes
    );
    assert!(
        done.bytes.received >= 800 << 10,
        "changed or missing content is fetched: {:?}",
        done.bytes
    );
    assert!(
        done.bytes.received < 4 << 20,
        "the rest is not fetched: {:?}",
        done.bytes
    );
}
