//! Damage in the hub's store: nothing wrong is ever given out, it is said what is hit, and publishing the same content again
//! mends it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, find, limit, secs};

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
        data::write(&source.join("weights.bin"), &data::noise(&mut data::rng("damage"), SIZE));
        hub.publish(&source, REFERENCE, &[]);
        Self { hub, site, source, _scratch: scratch }
    }

    /// Does something to the only pack while the hub is down.
    fn damage(&mut self, how: impl FnOnce(&Path)) {
        self.hub.stop();
        let packs = find(&self.hub.data_dir.join("store/packs"), &|path| path.extension().is_some_and(|e| e == "pack"));
        assert_eq!(packs.len(), 1, "{packs:?}");
        how(&packs[0]);
        self.hub.start();
        self.hub.wait_online("chengdu", true, secs(75));
    }

    /// Delivers what must not arrive: it fails, says why and what to do, and nothing of it is visible. The transfer.
    fn refused(&self) -> String {
        let id = self.hub.deliver(&[REFERENCE], "chengdu").remove(0);
        let failed = self.hub.wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
        assert_eq!(failed.reason.as_deref(), Some("integrity"), "{failed:#?}");
        assert!(failed.message.as_deref().is_some_and(|message| !message.is_empty()), "{failed:#?}");
        assert!(failed.next.as_deref().is_some_and(|next| next.contains("packhorse verify")), "{failed:#?}");
        assert_eq!(failed.location, None, "{failed:#?}");
        let root = &self.site.root;
        let hidden = root.join(".packhorse");
        let visible = find(root, &|path| path.is_file() && !path.starts_with(&hidden));
        assert_eq!(visible, Vec::<PathBuf>::new(), "something lies at the site");
        id
    }

    /// `verify` at the hub finds it and names the artifact. What it said of it.
    fn found(&self) -> String {
        let found = self.hub.cli(&["verify", REFERENCE]).expect(8).says(&[REFERENCE]);
        assert!(!found.out.is_empty() && found.out.lines().all(|line| line.contains(REFERENCE)), "{}", found.out);
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

/// Where some bytes of a file lie in a pack: noise is stored as it is. A few places are tried, since one may lie on a cut.
fn place_in(pack: &Path, of: &Path) -> u64 {
    let (pack, content) = (std::fs::read(pack).unwrap(), std::fs::read(of).unwrap());
    let look_for = |needle: &[u8]| pack.windows(needle.len()).position(|window| window == needle);
    let found = [3, 5, 7].into_iter().find_map(|part| look_for(&content[content.len() / part..][..16]));
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
    assert!(found.lines().count() == 1 && found.contains("weights.bin"), "one chunk of one file: {found}");
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
    // What nobody has read since is not known to be gone, and so not stored anew: the list of the chunks first, then they.
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
    assert!(found.contains(REFERENCE) && found.contains("model/twin:v1"), "{found}");
}

#[test]
fn a_hub_that_lost_its_store_does_not_start_and_lost_packs_are_told() {
    let _limit = limit(secs(120));
    let mut world = World::start();
    world.damage(|pack| std::fs::remove_file(pack).unwrap());
    assert!(world.hub.cli(&["doctor"]).expect(1).out.contains("fault store"));
    world.hub.stop();
    std::fs::remove_dir_all(world.hub.data_dir.join("store")).unwrap();
    world.hub.cli(&["serve"]).expect(3).says(&["index.redb", "backup"]);
    assert!(!world.hub.data_dir.join("store").exists(), "nothing is begun beside what is left");
}
