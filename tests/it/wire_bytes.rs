//! The bytes that are transmitted for a version with small changes: the changes, and little more.
//! Two counts are compared: that of the transfer, and that of the proxy.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rand::Rng;

use crate::support::daemon::{Hub, Site};
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, data, images, limit, secs};

/// The bytes of a connection besides a running transfer: state in both directions, and keep-alive.
const CHATTER: u64 = 96 << 10;

struct World {
    hub: Hub,
    line: Line,
    site: Site,
    scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let hub = Hub::start_new(scratch.path());
        let (line, site) = Site::start_behind(scratch.path(), &hub, "chengdu");
        Self {
            hub,
            line,
            site,
            scratch,
        }
    }

    /// Publishes and delivers. Returns the bytes on the wire.
    fn carry(&self, source: &Path, reference: &str) -> u64 {
        self.hub.publish(source, reference, &[]);
        self.line.wait_quiet(secs(30));
        let before = self.line.carried();
        let done = self.hub.deliver_and_wait(reference, "chengdu", secs(120));
        let carried = self.line.carried() - before;
        // The difference may only be packet headers and acknowledgements.
        let most = done.bytes.wire + done.bytes.wire / 8 + CHATTER;
        assert!(
            carried <= most,
            "{reference}: the proxy counted {carried} bytes, the transfer counted {}",
            done.bytes.wire
        );
        assert!(
            carried >= done.bytes.wire,
            "{reference}: the proxy counted {carried} bytes, the transfer counted {}",
            done.bytes.wire
        );
        println!("{reference}: {} bytes on the wire", done.bytes.wire);
        done.bytes.wire
    }
}

#[test]
fn only_the_changes_of_a_file_are_transmitted() {
    let _limit = limit(secs(240));
    let world = World::start();
    let mut rng = data::rng("a changed file");
    let len = 64 << 20;
    let old = data::noise(&mut rng, len);
    let percent = |part: u64| part as f64 * 100.0 / len as f64;
    let carry = |bytes: &[u8], version: &str| {
        let source = world.scratch.join(version);
        data::write(&source.join("model.bin"), bytes);
        let wire = world.carry(&source, &format!("model/w3:{version}"));
        assert_same(&source, &world.site.folder(&format!("model/w3:{version}")));
        wire
    };
    assert!(percent(carry(&old, "v1")) < 101.0);

    let mut run = old.clone();
    let fresh = data::noise(&mut rng, len / 100);
    run[len / 3..][..fresh.len()].copy_from_slice(&fresh);
    let wire = percent(carry(&run, "run"));
    assert!(
        wire <= 1.15,
        "1 % in one run took {wire:.3} % (two chunks of it are the run's ends)"
    );

    let mut scattered = old.clone();
    for _ in 0..len / (2 << 20) {
        let at = rng.random_range(0..len - 4096);
        let fresh = data::noise(&mut rng, 4096);
        scattered[at..at + 4096].copy_from_slice(&fresh);
    }
    let wire = percent(carry(&scattered, "scattered"));
    assert!(wire <= 2.4, "4 KiB in each 2 MiB took {wire:.3} %");

    let front: Vec<u8> = std::iter::once(7).chain(old.iter().copied()).collect();
    let wire = percent(carry(&front, "front"));
    assert!(wire <= 0.15, "one byte in front took {wire:.3} %");
}

#[test]
fn renamed_files_transmit_no_data_and_pages_are_sent_as_deltas() {
    let _limit = limit(secs(240));
    let world = World::start();
    let mut rng = data::rng("moved files");
    let (old, new) = (world.scratch.join("old"), world.scratch.join("new"));
    let name = |i: usize| format!("line{}/day{:02}/img_{i:05}.jpg", i % 8, i % 31);
    for i in 0..1600 {
        let size = rng.random_range(8_000..72_000);
        data::write(&old.join(name(i)), &data::noise(&mut rng, size));
    }
    world.carry(&old, "dataset/w4:v1");
    data::copy_tree(&old, &new);
    let mut fresh = 0;
    let mut put = |path: PathBuf| {
        let bytes = data::noise(&mut rng, 40_000);
        fresh += bytes.len() as u64;
        data::write(&path, &bytes);
    };
    (0..40).for_each(|i| put(new.join(format!("line{}/new/added_{i}.jpg", i % 8))));
    (0..16).for_each(|i| put(new.join(name(i * 97 + 1))));
    for i in (0..80).map(|i| i * 19 + 3) {
        let into = new.join(format!("moved/day{:02}/renamed_{i}.jpg", i % 13));
        std::fs::create_dir_all(into.parent().unwrap()).unwrap();
        std::fs::rename(new.join(name(i)), into).unwrap();
    }
    let wire = world.carry(&new, "dataset/w4:v2");
    assert_same(&new, &world.site.folder("dataset/w4:v2"));
    assert!(wire >= fresh, "{wire} of {fresh}");
    assert!(
        wire as f64 <= fresh as f64 * 1.02,
        "{fresh} bytes are new, {wire} were transmitted: {:+.2} %",
        (wire as f64 / fresh as f64 - 1.0) * 100.0
    );
}

type Files = BTreeMap<String, Vec<u8>>;

/// Bytes that compress like code: letters with an uneven distribution, and repeats of earlier
/// lines. zstd compresses them to about half.
fn code(rng: &mut impl Rng, len: usize) -> Vec<u8> {
    let letters = b"eeeeeeeetttttaaaaaooooiiinnnsssrrrhhldcumfpgwy .,;:(){}=_\n\t01";
    let fresh = (len * 2 / 3).max(1);
    let mut out: Vec<u8> = (0..fresh)
        .map(|_| letters[rng.random_range(0..letters.len())])
        .collect();
    while out.len() < len {
        let at = rng.random_range(0..fresh);
        let line = out[at..fresh.min(at + rng.random_range(20..200))].to_vec();
        out.extend(line);
    }
    out.truncate(len);
    out
}

fn layer(files: &Files) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        tar.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn only_a_new_layer_or_the_changes_of_a_rebuilt_layer_are_transmitted() {
    let _limit = limit(secs(240));
    let world = World::start();
    let mut rng = data::rng("layers");
    let mut files = |folder: &str, count: usize| -> Files {
        let mut file = |i: usize| {
            let len = 20_000 + rng.random_range(0..160_000);
            (
                format!("usr/lib/{folder}/m{:02}/f{i:04}.so", i % 7),
                code(&mut rng, len),
            )
        };
        (0..count).map(&mut file).collect()
    };
    let (lower, large, top) = (
        layer(&files("base", 20)),
        files("app", 150),
        layer(&files("top", 10)),
    );
    let carry = |layers: &[&[u8]], version: &str| {
        let source = world.scratch.join(version);
        images::layout(&source, layers);
        world.carry(&source, &format!("image/w5:{version}"))
    };
    carry(&[&lower, &layer(&large)], "old");

    let wire = carry(&[&lower, &layer(&large), &top], "a");
    assert!(
        wire <= top.len() as u64,
        "a new layer of {} bytes took {wire}",
        top.len()
    );

    let mut rng = data::rng("rebuilt");
    let changed: Files = large
        .iter()
        .step_by(30)
        .map(|(name, bytes)| {
            let mut bytes = bytes.clone();
            let at = rng.random_range(0..bytes.len() - 200);
            bytes.splice(at..at + 100, code(&mut rng, 120));
            (name.clone(), bytes)
        })
        .collect();
    let squeezed = zstd::bulk::compress(&layer(&changed), 3).unwrap().len() as u64;
    let rebuilt: Files = large.into_iter().chain(changed).collect();
    let wire = carry(&[&lower, &layer(&rebuilt)], "b");
    assert!(
        wire as f64 <= squeezed as f64 * 1.3,
        "a rebuilt layer took {wire} bytes, zstd compresses its changed files to {squeezed}"
    );
}
