//! Damage in the hub's store. The hub never sends damaged content, names the affected artifacts,
//! and stores the content again when it is published again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, find, limit, secs, wait_for};

const REFERENCE: &str = "model/yolo:v1";
/// The length of several requests, so that some of them have no damage.
const SIZE: usize = 6 << 20;

/// A hub with one artifact in one pack, and an empty site.
struct World {
    hub: Hub,
    site: Site,
    source: PathBuf,
    _scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let hub = Hub::start_new(scratch.path());
        let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
        let source = scratch.join("model");
        data::write(&source.join("net.json"), b"{}");
        data::write(
            &source.join("weights.bin"),
            &data::noise(&mut data::rng("damage"), SIZE),
        );
        hub.publish(&source, REFERENCE, &[]);
        Self {
            hub,
            site,
            source,
            _scratch: scratch,
        }
    }

    /// Changes the only pack while the hub is stopped.
    fn damage(&mut self, how: impl FnOnce(&Path)) {
        self.hub.stop();
        let packs = find(&self.hub.data_dir.join("store/packs"), &|path| {
            path.extension().is_some_and(|e| e == "pack")
        });
        assert_eq!(packs.len(), 1, "{packs:?}");
        how(&packs[0]);
        self.hub.start();
        self.hub.wait_online("chengdu", true, secs(75));
    }

    /// Delivers a damaged artifact. The transfer fails with a reason and a next step, and the site
    /// shows none of the content. Returns the transfer.
    fn refused(&self) -> String {
        let id = self.hub.deliver(&[REFERENCE], "chengdu").remove(0);
        let failed = self
            .hub
            .wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
        assert_eq!(failed.reason.as_deref(), Some("integrity"), "{failed:#?}");
        assert!(
            failed
                .message
                .as_deref()
                .is_some_and(|message| !message.is_empty()),
            "{failed:#?}"
        );
        assert!(
            failed
                .next
                .as_deref()
                .is_some_and(|next| next.contains("packhorse verify")),
            "{failed:#?}"
        );
        assert_eq!(failed.location, None, "{failed:#?}");
        let root = &self.site.root;
        let hidden = root.join(".packhorse");
        let visible = find(root, &|path| path.is_file() && !path.starts_with(&hidden));
        assert_eq!(visible, Vec::<PathBuf>::new(), "the site has visible files");
        id
    }

    /// `verify` at the hub finds the damage and names the artifact. Returns the output.
    fn found(&self) -> String {
        let found = self
            .hub
            .cli(&["verify", REFERENCE])
            .expect(8)
            .says(&[REFERENCE]);
        assert!(
            !found.out.is_empty() && found.out.lines().all(|line| line.contains(REFERENCE)),
            "{}",
            found.out
        );
        found.out
    }

    /// Publishes the same content again until `verify` finds no damage, at most `rounds` times.
    fn mend(&self, rounds: usize) {
        for _ in 0..rounds {
            let again = self.hub.publish(&self.source, REFERENCE, &[]);
            assert_eq!(again["unchanged"], true, "it is the same artifact: {again}");
            if self.hub.cli(&["verify", REFERENCE]).code == 0 {
                return;
            }
        }
        panic!("still damaged after {rounds} repeated publishes");
    }

    /// Retries the transfer, which must now succeed.
    fn arrives(&self, transfer: &str) {
        self.hub.cli(&["retry", transfer]).expect(0);
        self.hub.wait_done(transfer, secs(60));
        assert_same(&self.source, &self.site.folder(REFERENCE));
        self.site.cli(&["verify", REFERENCE]).expect(0);
        assert_eq!(self.site.leftovers(), Vec::<PathBuf>::new());
    }
}

/// The offset of some bytes of a file in a pack. The pack stores noise uncompressed. Several
/// positions are tried, because one may be on a chunk boundary.
fn place_in(pack: &Path, of: &Path) -> u64 {
    let (pack, content) = (std::fs::read(pack).unwrap(), std::fs::read(of).unwrap());
    let look_for = |needle: &[u8]| {
        pack.windows(needle.len())
            .position(|window| window == needle)
    };
    let found = [3, 5, 7]
        .into_iter()
        .find_map(|part| look_for(&content[content.len() / part..][..16]));
    found.expect("the pack has the content") as u64
}

/// Flips a bit of some bytes of a file in a pack.
fn flip(pack: &Path, of: &Path) {
    let at = place_in(pack, of);
    let file = File::options().read(true).write(true).open(pack).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_flipped_bit_in_a_pack_is_never_sent() {
    let _limit = limit(secs(180));
    let mut world = World::start();
    let weights = world.source.join("weights.bin");
    world.damage(|pack| flip(pack, &weights));
    let transfer = world.refused();
    let found = world.found();
    assert!(
        found.lines().count() == 1 && found.contains("weights.bin"),
        "one chunk of one file: {found}"
    );
    // A retry without a new publish fails again and has no side effect.
    world.hub.cli(&["retry", &transfer]).expect(0);
    assert_eq!(world.refused(), transfer);
    world.mend(1);
    world.arrives(&transfer);
}

/// The receiver finds the damage, the hub checks its copy, and fetches the chunk from a site that
/// holds the artifact.
#[test]
fn a_damaged_chunk_is_repaired_from_another_site() {
    let _limit = limit(secs(180));
    let mut world = World::start();
    world.hub.deliver_and_wait(REFERENCE, "chengdu", secs(60));
    let west = Site::start_new(
        world._scratch.path(),
        &world.hub,
        "west",
        &SiteSpec::default(),
    );
    let weights = world.source.join("weights.bin");
    world.damage(|pack| flip(pack, &weights));
    world.hub.wait_online("west", true, secs(75));
    world.hub.deliver_and_wait(REFERENCE, "west", secs(60));
    assert_same(&world.source, &west.folder(REFERENCE));
    assert!(
        world
            .hub
            .log()
            .contains(&format!("artifacts=\"{REFERENCE}\"")),
        "the hub names what was damaged"
    );
    world.hub.cli(&["verify", REFERENCE]).expect(0);
}

#[test]
fn a_truncated_pack_is_never_sent() {
    let _limit = limit(secs(180));
    let mut world = World::start();
    world.damage(|pack| {
        let file = File::options().write(true).open(pack).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    });
    let transfer = world.refused();
    world.found();
    // The hub detects a lost chunk only when it reads it, and stores it again only then: first the
    // page with the list of chunks, then the chunks.
    world.mend(4);
    world.arrives(&transfer);
}

#[test]
fn verify_names_every_affected_artifact() {
    let _limit = limit(secs(120));
    let mut world = World::start();
    let weights = world.source.join("weights.bin");
    data::write(&world.source.join("more"), b"so that it is another");
    world.hub.publish(&world.source, "model/twin:v1", &[]);
    world.damage(|pack| flip(pack, &weights));
    let found = world.hub.cli(&["verify", REFERENCE]).expect(8).out;
    assert!(
        found.contains(REFERENCE) && found.contains("model/twin:v1"),
        "{found}"
    );
}

#[test]
fn a_hub_without_its_store_does_not_start_and_doctor_reports_lost_packs() {
    let _limit = limit(secs(120));
    let mut world = World::start();
    world.damage(|pack| std::fs::remove_file(pack).unwrap());
    assert!(
        world
            .hub
            .cli(&["doctor"])
            .expect(1)
            .out
            .contains("fault store")
    );
    world.hub.stop();
    std::fs::remove_dir_all(world.hub.data_dir.join("store")).unwrap();
    world
        .hub
        .cli(&["serve"])
        .expect(3)
        .says(&["index.redb", "backup"]);
    assert!(
        !world.hub.data_dir.join("store").exists(),
        "no new store is created"
    );
    // There are no packs, but an identity. A new, empty catalogue would refuse every enrolled site.
    std::fs::remove_file(world.hub.data_dir.join("catalogue.db")).unwrap();
    world
        .hub
        .cli(&["serve"])
        .expect(3)
        .says(&["catalogue.db is missing", "identity"]);
}

/// Overwrites a page in the middle of a file with noise.
fn spoil(file: &Path, page: u64) {
    let length = file.metadata().unwrap().len();
    assert!(
        length > (page + 1) * 4096,
        "{} has {length} bytes",
        file.display()
    );
    let noise = data::noise(&mut data::rng("spoil"), 4096);
    File::options()
        .write(true)
        .open(file)
        .unwrap()
        .write_all_at(&noise, page * 4096)
        .unwrap();
}

#[test]
fn the_command_rebuilds_a_damaged_or_missing_chunk_index() {
    let _limit = limit(secs(120));
    let mut world = World::start();
    let index = world.hub.data_dir.join("store/index.redb");
    // The command is refused while the daemon uses the store.
    world.hub.cli(&["store", "rebuild-index"]).expect(6);
    world.hub.stop();
    File::options()
        .write(true)
        .open(&index)
        .unwrap()
        .set_len(index.metadata().unwrap().len() / 3)
        .unwrap();
    let refused = world.hub.cli(&["serve"]).expect(3).says(&[
        "index.redb",
        "is damaged",
        "packhorse store rebuild-index",
    ]);
    assert!(!refused.err.contains("panicked"), "{}", refused.err);
    let damaged = std::fs::read(&index).unwrap();
    let made = world.hub.json(&["store", "rebuild-index"]);
    assert!(
        made[0]["chunks"].as_u64().unwrap() > 100 && made[0]["damaged_bytes"] == 0,
        "{made}"
    );
    assert_eq!(
        std::fs::read(made[0]["kept"].as_str().unwrap()).unwrap(),
        damaged,
        "the damaged file is kept"
    );
    std::fs::remove_file(&index).unwrap();
    world
        .hub
        .cli(&["serve"])
        .expect(3)
        .says(&["index.redb is missing", "packhorse store rebuild-index"]);
    assert!(!index.exists(), "no empty index is created");
    world.hub.cli(&["store", "rebuild-index"]).expect(0);
    world.hub.start();
    world.hub.cli(&["verify", REFERENCE]).expect(0);
    world.hub.cli(&["gc"]).expect(0);
    world.hub.wait_online("chengdu", true, secs(75));
    world.hub.deliver_and_wait(REFERENCE, "chengdu", secs(60));
    assert_same(&world.source, &world.site.folder(REFERENCE));
}

#[test]
fn a_site_rebuilds_a_lost_index_from_its_folders() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (line, mut site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    let (old, new) = (scratch.join("old"), scratch.join("new"));
    data::model(&old, 8 << 20);
    data::model(&new, 24 << 20);
    data::write(
        &new.join("other.bin"),
        &data::noise(&mut data::rng("other"), 24 << 20),
    );
    hub.publish(&old, "model/old:v1", &[]);
    hub.publish(&new, "model/new:v1", &[]);
    hub.deliver_and_wait("model/old:v1", "chengdu", secs(60));
    line.hold_at(line.down() + (22 << 20));
    let id = hub.deliver(&["model/new:v1"], "chengdu").remove(0);
    let seen = hub.wait_transfer(&id, "on its way", secs(60), |t| {
        t.bytes.committed >= 16 << 20
    });
    site.kill();
    let places = site.data_dir.join("places.redb");
    spoil(&places, places.metadata().unwrap().len() / 4096 / 2);
    File::options()
        .write(true)
        .open(&places)
        .unwrap()
        .set_len(places.metadata().unwrap().len() - 4096)
        .unwrap();
    site.start();
    line.hold_at(0);
    let done = hub.wait_done(&id, secs(90));
    assert_same(&new, &site.folder("model/new:v1"));
    assert!(
        done.bytes.resumed >= seen.bytes.committed,
        "the staged content is used: {:?}",
        done.bytes
    );
    assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
    let told = |site: &Site| {
        site.cli(&["doctor"])
            .out
            .lines()
            .find(|line| line.contains("chunk index: rebuilt on"))
            .map(str::to_owned)
    };
    let line = wait_for("the rows are rebuilt", secs(30), || told(&site));
    assert!(
        line.starts_with("ok chunk index") && line.contains("places.redb"),
        "{line}"
    );
    assert!(
        site.log().contains("is rebuilt from the artifacts"),
        "the log reports it too"
    );
    assert!(!site.log().contains("panicked"), "{}", site.log());

    // The delivered content is a source of chunks again.
    site.stop();
    std::fs::remove_file(&places).unwrap();
    site.start();
    let line = wait_for("the rows are rebuilt", secs(30), || {
        told(&site).filter(|line| line.contains("was missing"))
    });
    assert!(line.contains("2 artifacts"), "{line}");
    data::write(&old.join("more.json"), b"{}");
    hub.publish(&old, "model/old:v2", &[]);
    hub.wait_online("chengdu", true, secs(75));
    let done = hub.deliver_and_wait("model/old:v2", "chengdu", secs(60));
    assert!(done.bytes.received < 1 << 20, "{:?}", done.bytes);
    assert_same(&old, &site.folder("model/old:v2"));
}

#[test]
fn the_error_of_a_damaged_catalogue_has_a_next_step() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    hub.stop();
    let catalogue = hub.data_dir.join("catalogue.db");
    let log = hub.data_dir.join("catalogue.db-wal");
    let sound = std::fs::read(&catalogue).unwrap();
    // SQLite would restore the content from its log, which a clean end of the last connection removes.
    let sound_log = std::fs::read(&log).ok();
    if sound_log.is_some() {
        std::fs::remove_file(&log).unwrap();
    }
    data::write(
        &catalogue,
        "not a database, and longer than the header of one: "
            .repeat(200)
            .as_bytes(),
    );
    let said = hub
        .cli(&["serve"])
        .expect(1)
        .says(&["catalogue.db is damaged", "backup"]);
    assert!(!said.err.contains("panicked"), "{}", said.err);
    data::write(&catalogue, &sound);
    if let Some(bytes) = sound_log {
        data::write(&log, &bytes);
    }
    hub.start();
    hub.stop();
}
