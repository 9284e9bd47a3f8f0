//! `packhorse quickstart`.

use std::path::Path;

use serde_json::Value;

use crate::support::command::{bound, run};
use crate::support::daemon::PACKHORSE;
use crate::support::postgres::sqlite_rows;
use crate::support::{Scratch, limit, secs};

/// The words of the table row that begins with this word.
#[track_caller]
fn row<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let mut rows = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.find(|words| words.first() == Some(&first))
        .unwrap_or_else(|| panic!("no row {first} in:\n{table}"))
}

/// The transmitted bytes of an artifact, in percent of its size.
#[track_caller]
fn percent(table: &str, artifact: &str) -> f64 {
    let words = row(table, artifact);
    let sign = words
        .iter()
        .position(|word| *word == "%")
        .unwrap_or_else(|| panic!("no percentage in {words:?}"));
    words[sign - 1]
        .parse()
        .unwrap_or_else(|_| panic!("no number of percents in {words:?}"))
}

/// Few bytes were transmitted for the second versions. The manifests are a large part of the labels
/// and of the project, because both are small.
fn check_second_version(said: &str) {
    let (_, table) = said
        .split_once("Bytes transmitted for version 2")
        .expect("the table of the second version");
    for (artifact, most) in [
        ("dataset/panels:v2", 10.0),
        ("image/adc:v2", 10.0),
        ("model/adc:v2", 5.0),
        ("all", 5.0),
    ] {
        let part = percent(table, artifact);
        assert!(
            part > 0.0 && part < most,
            "{part} % of {artifact} were transmitted, the limit is {most} %:\n{table}"
        );
    }
    for artifact in [
        "dataset/panels:v2",
        "labels/panels:v2",
        "operator/adc:v2",
        "image/adc:v2",
        "model/adc:v2",
    ] {
        let words = row(table, artifact);
        assert!(
            words.contains(&"both:"),
            "{artifact} was compared at both sites: {words:?}"
        );
        assert!(percent(table, artifact) < 50.0, "{words:?}");
    }
}

/// East received the model, the model classifies correctly, and the output lists the run's inputs
/// and whether west removed them.
fn check_training(said: &str, dir: &Path) {
    let (_, act) = said
        .split_once("The model model/east-judge:first was delivered to ")
        .expect("the output names the model's path");
    let home = dir.join("east/nas/model/east-judge/first/model.json");
    let (path, rest) = act
        .split_once(". Of ")
        .expect("the output has a path and a test result");
    assert!(
        path.ends_with("east/nas/model/east-judge/first/model.json"),
        "{path}"
    );
    let model: Value = serde_json::from_slice(&std::fs::read(&home).unwrap()).unwrap();
    let (tried, right) = (
        model["tried_on"].as_u64().unwrap(),
        model["right"].as_u64().unwrap(),
    );
    assert!(
        tried >= 20 && right * 100 >= tried * 80,
        "{right} of {tried} are correct"
    );
    assert!(
        rest.starts_with(&format!(
            "{tried} test boxes that were not used for training, it classifies {right} correctly"
        )),
        "{rest}"
    );
    for (input, now) in [
        ("dataset/east-line:v1", "removed"),
        ("labels/east-line:v1", "removed"),
        ("operator/adc:v2", "kept:"),
    ] {
        let words = row(rest, input);
        assert!(
            words[1].len() == 16 && words[1].bytes().all(|b| b.is_ascii_hexdigit()),
            "a digest: {words:?}"
        );
        assert_eq!(words[2], now, "{words:?}");
    }
    assert!(
        !dir.join("west/nas/dataset/east-line/v1").exists(),
        "the borrowed files are removed"
    );
    assert!(
        dir.join("west/nas/operator/adc/v2").is_dir(),
        "artifacts that were there before the run are kept"
    );
    let rows = |set: &str| {
        let sql = format!("SELECT count(*) AS n FROM annotations WHERE label_set = '{set}'");
        sqlite_rows(&dir.join("west/labels.db"), &sql)[0]["n"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(rows("east-line"), 0, "the borrowed rows are removed");
    assert!(
        rows("panels") > 0,
        "rows that were there before the run are kept"
    );
}

#[test]
fn quickstart_delivers_every_kind_and_ends() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let dir = scratch.join("quickstart");
    let quickstart = || {
        // Nothing but the program: an empty environment, no home directory.
        let mut command = bound("/usr/bin/env");
        command
            .args([
                "-i",
                PACKHORSE,
                "quickstart",
                "--once",
                "--dir",
                dir.to_str().unwrap(),
            ])
            .current_dir("/");
        run(&mut command, secs(200)).expect(0)
    };
    let output = quickstart();
    let said = format!("{}\n{}", output.out, output.err);
    for word in [
        "dataset/",
        "labels/",
        "operator/",
        "image/",
        "model/",
        ":v1",
        ":v2",
    ] {
        assert!(
            said.contains(word),
            "{word:?} is not in the output of quickstart:\n{said}"
        );
    }
    assert!(
        !output.out.contains('\u{1b}'),
        "no colours without a terminal"
    );
    check_second_version(&output.out);
    check_training(&output.out, &dir);

    // A second run in the same folder has the same result.
    check_training(&quickstart().out, &dir);
}
