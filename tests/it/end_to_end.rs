//! The complete path: a hub delivers all five kinds, and then the next version of each, to three
//! sites.
//!
//! Site `chengdu` has PostgreSQL and a registry with passwords, `wuhan` has PostgreSQL and a
//! registry with tokens, `hefei` has the embedded sinks: SQLite and an OCI layout. Each site
//! connects through its own test proxy, which counts the transmitted bytes.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::command::tool;
use crate::support::daemon::{Hub, Site, SiteSpec, Transfer, ids};
use crate::support::data::{self, Dataset, Photo};
use crate::support::images::{self, blob};
use crate::support::labels::{self, Mark, Reader, Row, coco_rows};
use crate::support::line::Line;
use crate::support::postgres::Postgres;
use crate::support::registry::Registry;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs};

const SITES: [&str; 3] = ["chengdu", "wuhan", "hefei"];
const SERIES: [&str; 5] = [
    "dataset/line3",
    "labels/line3-defects",
    "operator/detect",
    "image/detect",
    "model/yolo",
];

/// One version of all five kinds: the sources and the expected content.
struct Edition {
    version: &'static str,
    dataset: Dataset,
    coco: PathBuf,
    rows: Vec<Row>,
    operator: PathBuf,
    model: PathBuf,
    image: PathBuf,
    /// The expected content of `/app` in the image.
    app: PathBuf,
}

/// The bytes of a version that the version before does not have, in the order of [`SERIES`].
type NewBytes = [u64; 5];

impl Edition {
    fn source(&self, series: &str) -> &Path {
        match series.split('/').next().unwrap() {
            "dataset" => &self.dataset.root,
            "labels" => &self.coco,
            "operator" => &self.operator,
            "image" => &self.image,
            _ => &self.model,
        }
    }

    fn first(scratch: &Scratch) -> Self {
        let dataset = data::dataset(&scratch.join("source/dataset-1"), 300);
        let marks = labels::marks(&dataset.photos, 60);
        let document = coco(&dataset.photos, &marks);
        let coco = scratch.join("source/coco-1.json");
        labels::write_json(&coco, &document);
        let rows = coco_rows(&document, &marks, &dataset.root, "line3-defects:v1");
        // Incompressible data besides the code, in one large file and in many small ones.
        let operator = scratch.join("source/operator-1");
        data::operator(&operator);
        let mut rng = data::rng("operator assets");
        data::write(
            &operator.join("assets/lookup.bin"),
            &data::noise(&mut rng, 1 << 20),
        );
        for i in 0..64 {
            data::write(
                &operator.join(format!("assets/tables/{i:02}.bin")),
                &data::noise(&mut rng, 8 << 10),
            );
        }
        let model = scratch.join("source/model-1");
        data::model(&model, 24 << 20);
        let image = images::large();
        Self {
            version: "v1",
            dataset,
            coco,
            rows,
            operator,
            model,
            image: image.join("v1.tar"),
            app: image.join("app1"),
        }
    }

    fn second(scratch: &Scratch, v1: &Edition) -> (Self, NewBytes) {
        let (dataset, new_in_dataset) =
            data::next_dataset(&v1.dataset, &scratch.join("source/dataset-2"));

        // The same dataset with changed labels: one box corrected, one added at the end.
        let mut marks = labels::marks(&v1.dataset.photos, 60);
        let middle = marks.len() / 2;
        marks[middle].w += 1.0;
        marks.push(Mark {
            polygon: false,
            ..marks[middle].clone()
        });
        let document = coco(&v1.dataset.photos, &marks);
        let coco = scratch.join("source/coco-2.json");
        labels::write_json(&coco, &document);
        let rows = coco_rows(&document, &marks, &v1.dataset.root, "line3-defects:v2");

        let operator = scratch.join("source/operator-2");
        data::copy_tree(&v1.operator, &operator);
        let changed = b"def step(image):\n    return image\n";
        data::write(&operator.join("src/detect/module_3.py"), changed);

        // One byte string is inserted at the front, and another is overwritten in the middle. No
        // other byte changes.
        let model = scratch.join("source/model-2");
        data::copy_tree(&v1.model, &model);
        let mut weights = std::fs::read(model.join("model.safetensors")).unwrap();
        weights[12 << 20..][..65_536].fill(7);
        weights.splice(0..0, *b"header");
        data::write(&model.join("model.safetensors"), &weights);

        let image = images::large();
        let new_in_image = new_layer_bytes(&image.join("layout"));
        let edition = Self {
            version: "v2",
            dataset,
            coco,
            rows,
            operator,
            model,
            image: image.join("v2.tar"),
            app: image.join("app2"),
        };
        (
            edition,
            [
                new_in_dataset,
                0,
                changed.len() as u64,
                new_in_image,
                65_536,
            ],
        )
    }
}

/// Labels whose rows are all different, so that they do not compress well together.
fn coco(photos: &[Photo], marks: &[Mark]) -> Value {
    let mut document = labels::coco(photos, marks);
    for (i, annotation) in document["annotations"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .enumerate()
    {
        annotation["reviewed_in"] = blake3::hash(&i.to_le_bytes()).to_hex().to_string().into();
    }
    document
}

/// The size of the blobs that version 2 of the image has and version 1 does not have.
fn new_layer_bytes(layout: &Path) -> u64 {
    let parts = |tag: &str| -> Vec<String> {
        let raw = tool(
            "skopeo",
            &[
                "inspect",
                "--raw",
                &format!("oci:{}:{tag}", layout.display()),
            ],
        );
        let manifest: Value = serde_json::from_str(&raw).unwrap();
        let layers = manifest["layers"].as_array().unwrap().iter();
        layers
            .chain([&manifest["config"]])
            .map(|d| d["digest"].as_str().unwrap().to_owned())
            .collect()
    };
    let old = parts("v1");
    parts("v2")
        .iter()
        .filter(|d| !old.contains(d))
        .map(|d| blob(layout, d).metadata().unwrap().len())
        .sum()
}

struct World {
    hub: Hub,
    lines: Vec<Line>,
    sites: Vec<Site>,
    postgres: Postgres,
    basic: Registry,
    bearer: Registry,
    scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let postgres = Postgres::start_new(&scratch);
        postgres.create_database("labels_wuhan");
        let basic = Registry::basic(&scratch, "basic");
        let bearer = Registry::bearer(&scratch, "bearer");
        let hub = Hub::start_new(scratch.path());
        let specs = [
            SiteSpec {
                labels_sink: Some(postgres.sink(&scratch, "labels")),
                images_sink: Some(basic.sink(&scratch)),
                ..SiteSpec::default()
            },
            SiteSpec {
                labels_sink: Some(postgres.sink(&scratch, "labels_wuhan")),
                images_sink: Some(bearer.sink(&scratch)),
                ..SiteSpec::default()
            },
            SiteSpec::default(),
        ];
        let mut lines = Vec::new();
        let mut sites = Vec::new();
        for (name, spec) in SITES.into_iter().zip(specs) {
            let line = Line::to(hub.quic);
            let spec = SiteSpec {
                through: Some(line.address()),
                ..spec
            };
            sites.push(Site::start_new(scratch.path(), &hub, name, &spec));
            lines.push(line);
        }
        Self {
            hub,
            lines,
            sites,
            postgres,
            basic,
            bearer,
            scratch,
        }
    }

    fn registry(&self, site: &str) -> Option<&Registry> {
        match site {
            "chengdu" => Some(&self.basic),
            "wuhan" => Some(&self.bearer),
            _ => None,
        }
    }

    fn reader<'a>(&'a self, site: &'a Site) -> Reader<'a> {
        match site.name.as_str() {
            "chengdu" => Reader::Postgres(&self.postgres, "labels"),
            "wuhan" => Reader::Postgres(&self.postgres, "labels_wuhan"),
            _ => Reader::Sqlite(&site.labels_db),
        }
    }

    /// Publishes all five kinds.
    fn publish(&self, edition: &Edition) {
        for series in SERIES {
            let reference = format!("{series}:{}", edition.version);
            // Both versions of the labels belong to the first version of the dataset.
            let more: &[&str] = if series.starts_with("labels/") {
                &["--for", "dataset/line3:v1"]
            } else {
                &[]
            };
            let published = self.hub.publish(edition.source(series), &reference, more);
            assert_eq!(published["artifact"], reference.as_str());
            assert_eq!(
                published["digest"].as_str().map(str::len),
                Some(64),
                "a hexadecimal BLAKE3 hash: {published}"
            );
        }
    }

    /// Delivers all five kinds to all sites with one command that waits. Returns the transfers.
    fn deliver(&self, version: &str) -> Vec<Transfer> {
        let references: Vec<String> = SERIES.iter().map(|s| format!("{s}:{version}")).collect();
        let mut args = vec!["deliver"];
        args.extend(references.iter().map(String::as_str));
        args.extend(["--to", "all", "--wait", "-o", "json"]);
        let answer = self.hub.cli_within(&args, secs(240)).expect(0).json();
        let transfers: Vec<Transfer> = ids(&answer)
            .iter()
            .map(|id| self.hub.transfer(id))
            .collect();
        assert_eq!(transfers.len(), SERIES.len() * SITES.len());
        for t in &transfers {
            assert_eq!(t.state, "done", "{t:#?}");
            assert_eq!(t.bytes.committed, t.bytes.total, "{t:#?}");
            assert_eq!(
                t.bytes.reused + t.bytes.resumed + t.bytes.received,
                t.bytes.total,
                "each byte is counted once: {t:#?}"
            );
            assert!(t.attempts >= 1 && t.location.is_some(), "{t:#?}");
        }
        transfers
    }

    /// Checks that every site has the published content of a version.
    fn check(&self, edition: &Edition) {
        self.check_content(edition);
        // A digest determines the files of an image, so one site stands for all of them: for the
        // first version one with a registry, for the second the one with an OCI layout.
        let name = if edition.version == "v1" {
            "chengdu"
        } else {
            "hefei"
        };
        self.check_image_files(name, edition);
    }

    /// The same, without the unpacked files of the image.
    fn check_content(&self, edition: &Edition) {
        let version = edition.version;
        for site in &self.sites {
            for series in ["dataset/line3", "operator/detect", "model/yolo"] {
                assert_same(
                    edition.source(series),
                    &site.folder(&format!("{series}:{version}")),
                );
            }
            let found = self.reader(site).version("line3-defects", version);
            assert_rows(&site.name, &found, &edition.rows);
            self.check_image(site, edition);
        }
    }

    /// Checks that the registry (or layout) of a site has the image with the digest that the hub
    /// recorded, and every blob of it.
    fn check_image(&self, site: &Site, edition: &Edition) {
        let version = edition.version;
        let recorded =
            self.hub.json(&["show", &format!("image/detect:{version}")])["info"]["digest"]
                .as_str()
                .unwrap()
                .to_owned();
        let at_site =
            site.json(&["show", &format!("image/detect:{version}")])["info"]["digest"].clone();
        assert_eq!(at_site, recorded.as_str(), "the digest that the site shows");

        // skopeo verifies the digest of each blob that it copies.
        let copy = self.copy_of_image(&site.name, version);
        if copy.exists() {
            std::fs::remove_dir_all(&copy).unwrap();
        }
        let target = format!("oci:{}:{version}", copy.display());
        match self.registry(&site.name) {
            Some(registry) => {
                assert_eq!(
                    registry.digest(&format!("operators/detect:{version}")),
                    recorded,
                    "the digest in the registry"
                );
                registry.skopeo(
                    "copy",
                    &[
                        "--preserve-digests",
                        &format!("{{}}/operators/detect:{version}"),
                        &target,
                    ],
                );
            }
            None => {
                let source = format!("oci:{}/detect:{version}", site.layout.display());
                let raw = tool("skopeo", &["inspect", "--raw", &source]);
                assert_eq!(
                    images::sha256(raw.as_bytes()),
                    recorded,
                    "the digest in the layout"
                );
                tool("skopeo", &["copy", "--preserve-digests", &source, &target]);
            }
        }
        assert_eq!(
            images::top(&copy)["digest"],
            recorded.as_str(),
            "the digest of a copy"
        );
    }

    /// The layout into which [`World::check_image`] copies the image of a site.
    fn copy_of_image(&self, site: &str, version: &str) -> PathBuf {
        self.scratch.join(&format!("copy-{site}-{version}"))
    }

    /// Checks the files that umoci finds in the copied image of a site.
    fn check_image_files(&self, site: &str, edition: &Edition) {
        let version = edition.version;
        let unpack =
            |layout: &Path, name: &str| images::unpack(layout, version, &self.scratch.join(name));
        let root = unpack(
            &self.copy_of_image(site, version),
            &format!("{site}-{version}"),
        );
        assert_same(&edition.app, &root.join("app"));
        if version == "v1" {
            let original = unpack(&images::large().join("layout"), "original");
            assert_same(&original, &root);
        }
    }

    /// Checks that a version is the active one at every site.
    fn check_current(&self, edition: &Edition) {
        for site in &self.sites {
            for series in ["dataset/line3", "operator/detect", "model/yolo"] {
                assert_eq!(
                    site.current(series),
                    edition.version,
                    "CURRENT of {series} at {}",
                    site.name
                );
                let link = std::fs::read_link(site.root.join(series).join("current")).unwrap();
                assert_eq!(
                    link.file_name().unwrap().to_str(),
                    Some(edition.version),
                    "the current link of {series}"
                );
            }
            assert_rows(
                &site.name,
                &self.reader(site).current("line3-defects"),
                &edition.rows,
            );
            assert_eq!(
                site.leftovers(),
                Vec::<PathBuf>::new(),
                "staging at {} is not clean",
                site.name
            );
        }
    }
}

#[track_caller]
fn assert_rows(site: &str, found: &[Row], expected: &[Row]) {
    assert_eq!(found.len(), expected.len(), "rows at {site}");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found, expected, "a row at {site}");
    }
}

/// The most bytes that may be transmitted for the next version of a kind, computed from its new
/// bytes.
fn most_wire(kind: &str, new_bytes: u64) -> u64 {
    const MANIFEST_AND_FRAMES: u64 = 192 << 10;
    match kind {
        // Two rows of one image: the chunks that contain them, of at most 64 KiB each, and the
        // chunks up to the next common cut.
        "labels" => 128 << 10,
        // Two positions of one large file: the same.
        "model" => new_bytes + (512 << 10),
        // Small files are whole chunks, so only new files are transmitted. A layer is compressed,
        // and a new layer shares no bytes with the old one.
        _ => new_bytes + new_bytes / 20 + MANIFEST_AND_FRAMES,
    }
}

#[test]
fn all_kinds_reach_three_sites_and_a_new_version_transmits_only_new_content() {
    let _limit = limit(secs(460));
    let world = World::start();
    let v1 = Edition::first(&world.scratch);
    world.publish(&v1);
    let from_nothing = world.deliver("v1");
    world.check(&v1);
    world.check_current(&v1);

    let (v2, new_bytes) = Edition::second(&world.scratch, &v1);
    world.publish(&v2);
    let before: Vec<u64> = world.lines.iter().map(Line::carried).collect();
    let transfers = world.deliver("v2");
    for (i, (site, line)) in SITES.iter().zip(&world.lines).enumerate() {
        let crossed = line.carried() - before[i];
        let wire: u64 = transfers
            .iter()
            .filter(|t| t.site == *site)
            .map(|t| t.bytes.wire)
            .sum();
        // The count of the test proxy includes packet headers, acknowledgements, and traffic that
        // belongs to no transfer.
        assert!(
            crossed >= wire && crossed <= wire + wire / 4 + (1 << 20),
            "{site}: `wire` is {wire} bytes, the proxy counted {crossed}"
        );
    }
    for t in &transfers {
        let series = SERIES
            .iter()
            .position(|s| t.artifact.starts_with(&format!("{s}:")))
            .unwrap();
        let most = most_wire(SERIES[series].split('/').next().unwrap(), new_bytes[series]);
        assert!(
            t.bytes.wire <= most,
            "{} at {}: {} bytes were transmitted, the limit is {most}: {:?}",
            t.artifact,
            t.site,
            t.bytes.wire,
            t.bytes
        );
        // A full transfer of the second version would cost as much as the first. The bound must be
        // far below that to prove anything.
        let before = |o: &&Transfer| {
            o.site == t.site && o.artifact.starts_with(&format!("{}:", SERIES[series]))
        };
        let whole = from_nothing.iter().find(before).unwrap().bytes.wire;
        assert!(
            most <= whole / 2,
            "{}: the bound of {most} bytes is too high, a full transfer takes {whole}",
            t.artifact
        );
    }
    world.check(&v2);
    world.check_content(&v1);
    world.check_current(&v2);

    for series in SERIES {
        let reference = format!("{series}:v2");
        world.hub.cli(&["verify", &reference]).expect(0);
        for site in &world.sites {
            site.cli(&["verify", &reference]).expect(0);
        }
    }
    // A repeated delivery changes nothing and transmits no content.
    let before: u64 = world.lines.iter().map(Line::down).sum();
    world.deliver("v2");
    let crossed = world.lines.iter().map(Line::down).sum::<u64>() - before;
    assert!(
        crossed < 1 << 20,
        "a repeated delivery transmitted {crossed} bytes"
    );
    for daemon in world.sites.iter().map(|site| &**site).chain([&*world.hub]) {
        let peak = daemon.memory("VmHWM");
        assert!(
            peak <= 256 << 20,
            "{} had {peak} bytes resident",
            daemon.name
        );
    }
}

#[test]
fn a_receipt_names_the_artifact_and_its_location() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let _site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    data::model(&scratch.join("model"), 100_000);
    let published = hub.publish(
        &scratch.join("model"),
        "model/yolo:v1",
        &["--to", "chengdu", "--wait"],
    );
    let id = &ids(&published)[0];
    let shown = hub.json(&["status", id]);
    let receipt = &shown[0]["receipt"];
    assert!(
        receipt.is_object(),
        "a completed transfer has a receipt: {shown:#}"
    );
    let text = receipt.to_string();
    for part in [
        "model/yolo:v1",
        "chengdu",
        published["digest"].as_str().unwrap(),
    ] {
        assert!(text.contains(part), "{part} is not in the receipt {text}");
    }
    let site_table = hub.cli(&["sites"]).expect(0).out;
    assert!(site_table.contains("chengdu"), "{site_table}");
    let detail = hub.json(&["show", "model/yolo:v1"]);
    assert_eq!(detail["transfers"][0]["id"], id.as_str());
    assert_eq!(detail["bytes"], 100_000 + 35, "the bytes of both files");
}
