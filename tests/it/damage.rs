//! Damage in the hub's store: nothing wrong is ever given out, it is said what is hit, and
//! publishing the same content again mends it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, find, limit, secs, wait_for};

const REFERENCE: &str = "model/yolo:v1";
/// Several requests long, so that some of it is sound.
const SIZE: usize = 6 << 20;

/// A hub with one artifact in one pack, and a site that has nothing.
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

    /// Does something to the only pack while the hub is down.
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

    /// Delivers what must not arrive: it fails, says why and what to do, and nothing of it is
    /// visible. The transfer.
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
        assert_eq!(visible, Vec::<PathBuf>::new(), "something lies at the site");
        id
    }

    /// `verify` at the hub finds it and names the artifact. What it said of it.
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

    /// Publishes the same content again, at most so often, until `verify` finds nothing.
    fn mend(&self, rounds: usize) {
        for _ in 0..rounds {
            let again = self.hub.publish(&self.source, REFERENCE, &[]);
            assert_eq!(again["unchanged"], true, "it is the same artifact: {again}");
            if self.hub.cli(&["verify", REFERENCE]).code == 0 {
                return;
            }
        }
        panic!("still damaged after it was published {rounds} times again");
    }

    /// Takes the transfer up again, which arrives now.
    fn arrives(&self, transfer: &str) {
        self.hub.cli(&["retry", transfer]).expect(0);
        self.hub.wait_done(transfer, secs(60));
        assert_same(&self.source, &self.site.folder(REFERENCE));
        self.site.cli(&["verify", REFERENCE]).expect(0);
        assert_eq!(self.site.leftovers(), Vec::<PathBuf>::new());
    }
}

/// Where some bytes of a file lie in a pack: noise is stored as it is. A few places are tried,
/// since one may lie on a cut.
fn place_in(pack: &Path, of: &Path) -> u64 {
    let (pack, content) = (std::fs::read(pack).unwrap(), std::fs::read(of).unwrap());
    let look_for = |needle: &[u8]| {
        pack.windows(needle.len())
            .position(|window| window == needle)
    };
    let found = [3, 5, 7]
        .into_iter()
        .find_map(|part| look_for(&content[content.len() / part..][..16]));
    found.expect("the content lies in the pack") as u64
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
fn one_flipped_byte_in_a_pack_is_never_given_out() {
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
    // Retrying alone does not help, and does no harm.
    world.hub.cli(&["retry", &transfer]).expect(0);
    assert_eq!(world.refused(), transfer);
    world.mend(1);
    world.arrives(&transfer);
}

#[test]
fn a_pack_cut_in_half_is_never_given_out() {
    let _limit = limit(secs(180));
    let mut world = World::start();
    world.damage(|pack| {
        let file = File::options().write(true).open(pack).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    });
    let transfer = world.refused();
    world.found();
    // What nobody has read since is not known to be gone, and so not stored anew: the list of the
    // chunks first, then they.
    world.mend(4);
    world.arrives(&transfer);
}

#[test]
fn every_artifact_that_damage_hits_is_named() {
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
fn a_hub_that_lost_its_store_does_not_start_and_lost_packs_are_told() {
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
        "nothing is begun beside what is left"
    );
    // No packs, and an identity: an empty catalogue beside it would lock every site out.
    std::fs::remove_file(world.hub.data_dir.join("catalogue.db")).unwrap();
    world
        .hub
        .cli(&["serve"])
        .expect(3)
        .says(&["catalogue.db is missing", "identity"]);
}

/// Replaces a page in the middle of a file by noise.
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
fn a_damaged_or_missing_chunk_index_is_made_again_by_the_command() {
    let _limit = limit(secs(120));
    let mut world = World::start();
    let index = world.hub.data_dir.join("store/index.redb");
    // The daemon uses the store.
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
    assert!(!index.exists(), "no empty one is begun");
    world.hub.cli(&["store", "rebuild-index"]).expect(0);
    world.hub.start();
    world.hub.cli(&["verify", REFERENCE]).expect(0);
    world.hub.cli(&["gc"]).expect(0);
    world.hub.wait_online("chengdu", true, secs(75));
    world.hub.deliver_and_wait(REFERENCE, "chengdu", secs(60));
    assert_same(&world.source, &world.site.folder(REFERENCE));
}

#[test]
fn a_lost_index_of_a_site_comes_back_from_its_folders() {
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
        "what was staged is used: {:?}",
        done.bytes
    );
    assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
    let told = |site: &Site| {
        site.cli(&["doctor"])
            .out
            .lines()
            .find(|line| line.contains("places: made again on"))
            .map(str::to_owned)
    };
    let line = wait_for("the rows are back", secs(30), || told(&site));
    assert!(
        line.starts_with("ok places") && line.contains("places.redb"),
        "{line}"
    );
    assert!(site.log().contains("made again"), "the log says so as well");
    assert!(!site.log().contains("panicked"), "{}", site.log());

    // What is here is a source of chunks again.
    site.stop();
    std::fs::remove_file(&places).unwrap();
    site.start();
    let line = wait_for("the rows are back", secs(30), || {
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
fn a_damaged_catalogue_says_what_to_do() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    hub.stop();
    let catalogue = hub.data_dir.join("catalogue.db");
    let log = hub.data_dir.join("catalogue.db-wal");
    let sound = [&catalogue, &log].map(|file| std::fs::read(file).unwrap());
    // SQLite would read what it needs from its log.
    std::fs::remove_file(&log).unwrap();
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
    data::write(&catalogue, &sound[0]);
    data::write(&log, &sound[1]);
    hub.start();
    hub.stop();
}
