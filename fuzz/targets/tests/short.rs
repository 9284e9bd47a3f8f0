//! The short form of each target: its first inputs and some changed ones, the same in each run.

#![expect(clippy::unwrap_used, reason = "tests only")]

use fuzz_targets::{Search, all, target};

/// Decides the changes.
const SEED: u64 = 7;

fn short(name: &str) {
    let target = target(name).unwrap();
    let mut search = Search::new(target, SEED);
    for number in 0..u64::from(target.short) {
        let input = search.next_input();
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| search.run(input.clone())));
        let (shown, len) = (
            String::from_utf8_lossy(&input[..input.len().min(400)]),
            input.len(),
        );
        assert!(
            result.is_ok(),
            "{name}: input {number} of seed {SEED}, {len} bytes: {shown:?}"
        );
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                short(stringify!($name));
            }
        )*

        #[test]
        fn every_target_runs_here_and_has_a_shim() {
            let here = [$(stringify!($name)),*];
            let names: Vec<&str> = all().iter().map(|target| target.name).collect();
            assert_eq!(here.to_vec(), names);
            let manifest = include_str!("../../Cargo.toml");
            for name in names {
                assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name} has no shim in fuzz/Cargo.toml");
                let shim = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz_targets").to_owned() + "/" + name + ".rs";
                assert!(std::fs::read_to_string(shim).unwrap().contains(&format!("\"{name}\"")), "{name}");
            }
        }
    };
}

targets! {
    names
    image_reference
    root_manifest
    manifest_page
    manifest_delta
    frame
    mux_frame
    control_message
    question
    fetch_request
    join
    bundle
    image
    labels_coco
    labels_csv
    labels_jsonl
    labels_label_studio
    labels_voc
    labels_yolo
    labels_cvat
    labels_datumaro
    labels_klarf
    labels_labelme
    labels_masks
    labels_via
    labels_canonical
    registry_answer
    api_body
    config
}
