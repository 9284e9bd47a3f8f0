//! The properties of the data plane that are not a speed: what a kill may cost, that memory does
//! not grow with what an artifact holds, and that a local source is never believed.

use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs};

/// What is carried: much more than a kill may cost.
const SIZE: usize = 192 << 20;
/// Bytes a second on the line: fast enough that what is on the way fills its limit, slow enough to
/// be hit in the middle.
const RATE: u64 = 48 << 20;
/// What a kill may cost on the line.
const AGAIN: u64 = 64 << 20;
/// The smallest budget that a daemon takes.
const MEMORY: &str = "[limits]\nmemory = \"32MiB\"\n";
/// Files and links of the memory test, of each so many. The links make a manifest of 3.5 KB each,
/// 40 MiB together.
const MANY: usize = 12_000;
/// What goes before: it warms up what is kept for later (buffers, caches, threads).
const FEW: usize = 400;
/// What many may take more than few: room for what is on its way and for caches, and far less than
/// a manifest.
const GROWTH: u64 = 24 << 20;

/// Kills a daemon in the middle of a transfer, and lets it end: content right, and no more sent
/// again than the bound.
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
    // Late enough that a start from nothing would cost more than the bound.
    hub.wait_transfer(&transfer, "on its way", secs(60), |t| {
        t.bytes.received >= 90 << 20
    });
    kill(&mut hub, &mut site);
    let done = hub.wait_done(&transfer, secs(120));
    assert_same(&source, &site.folder("model/big:v1"));
    assert_eq!(done.bytes.committed, done.bytes.total, "{:?}", done.bytes);
    // Headers and acknowledgements of the datagrams are no payload: 3 %.
    let most = SIZE as u64 + SIZE as u64 * 3 / 100 + AGAIN;
    let sent = line.down() - before;
    assert!(
        sent <= most,
        "{sent} bytes crossed the line, {most} would do: {:?}",
        done.bytes
    );
    // Where the chunks lie that came before the kill is known as well: another artifact finds all
    // of them here.
    data::write(&source.join("one more"), b"so that it is another");
    hub.publish(&source, "model/again:v1", &[]);
    let again = hub.deliver(&["model/again:v1"], "chengdu").remove(0);
    let again = hub.wait_done(&again, secs(60)).bytes;
    assert!(again.wire < 2 << 20, "{again:?}");
    // By chunks, for what is shared whole asks for one chunk of each file only.
    let mut grown = std::fs::read(source.join("weights.bin")).unwrap();
    grown.extend_from_slice(b"more");
    data::write(&source.join("weights.bin"), &grown);
    hub.publish(&source, "model/again:v2", &[]);
    let grown = hub.deliver(&["model/again:v2"], "chengdu").remove(0);
    let grown = hub.wait_done(&grown, secs(60)).bytes;
    assert!(grown.wire < 2 << 20, "{grown:?}");
}

#[test]
fn a_killed_site_is_sent_again_no_more_than_was_not_committed() {
    let _limit = limit(secs(240));
    kill_in_the_middle(|_, site| {
        site.kill();
        site.start();
    });
}

#[test]
fn a_killed_hub_sends_again_no_more_than_was_not_committed() {
    let _limit = limit(secs(240));
    kill_in_the_middle(|hub, _| {
        hub.kill();
        hub.start();
    });
}

/// A folder of so many small files, none of which is in another such folder, and behind them as
/// many links whose targets are as long as they may be, about.
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
fn many_entries_take_hardly_more_memory_than_few() {
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

/// Flips a byte in the middle of a file, and leaves its size and time as they were.
fn damage(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let meta = file.metadata().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, meta.len() / 2).unwrap();
    file.write_all_at(&[byte[0] ^ 1], meta.len() / 2).unwrap();
    file.set_modified(meta.modified().unwrap()).unwrap();
}

#[test]
fn a_local_source_that_changed_unseen_or_cannot_be_read_is_fetched_instead() {
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
    // Of one chunk and of several. A folder can be opened, and some filesystems say that it has the
    // size of a page.
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
    // A file that is in parts what it was: its chunks are taken one by one.
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
        "what is sound is taken from here: {:?}",
        done.bytes
    );
    assert!(
        done.bytes.received >= 800 << 10,
        "what was changed, or is not there, is fetched: {:?}",
        done.bytes
    );
    assert!(
        done.bytes.received < 4 << 20,
        "and not everything is: {:?}",
        done.bytes
    );
}
