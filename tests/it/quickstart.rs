//! The newcomer's first command.

use std::path::Path;

use serde_json::Value;

use crate::support::command::{bound, run};
use crate::support::daemon::PACKHORSE;
use crate::support::postgres::sqlite_rows;
use crate::support::{Scratch, limit, secs};

/// The cells of the row of a table that begins with this word, as words.
#[track_caller]
fn row<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let mut rows = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.find(|words| words.first() == Some(&first))
        .unwrap_or_else(|| panic!("no row {first} in:\n{table}"))
}

/// What of an artifact crossed the line, in percent of its size.
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

/// Little of the second versions crossed the line, as the table says. The labels and the project
/// are so small that their manifests are a part of them.
fn check_second_version(said: &str) {
    let (_, table) = said
        .split_once("How little of version 2 crossed the line")
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
            "{part} % of {artifact} crossed the line, {most} % is too much:\n{table}"
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
            "{artifact} is compared at both sites: {words:?}"
        );
        assert!(percent(table, artifact) < 50.0, "{words:?}");
    }
}

/// The model came home, it is good for something, and what it was made of is said and given back.
fn check_training(said: &str, dir: &Path) {
    let (_, act) = said
        .split_once("The model model/east-judge:first came home to ")
        .expect("the model came home");
    let home = dir.join("east/nas/model/east-judge/first/model.json");
    let (path, rest) = act
        .split_once("; of ")
        .expect("where it came to, and what it tells");
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
        "it tells {right} of {tried}"
    );
    assert!(
        rest.starts_with(&format!(
            "{tried} boxes that it never saw it tells {right} right"
        )),
        "{rest}"
    );
    for (input, now) in [
        ("dataset/east-line:v1", "given"),
        ("labels/east-line:v1", "given"),
        ("operator/adc:v2", "stays:"),
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
        "what was borrowed is given back"
    );
    assert!(
        dir.join("west/nas/operator/adc/v2").is_dir(),
        "what was there before stays"
    );
    let rows = |set: &str| {
        let sql = format!("SELECT count(*) AS n FROM annotations WHERE label_set = '{set}'");
        sqlite_rows(&dir.join("west/labels.db"), &sql)[0]["n"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(
        rows("east-line"),
        0,
        "rows that were borrowed are given back"
    );
    assert!(rows("panels") > 0, "rows that were there before stay");
}

#[test]
fn quickstart_shows_every_kind_arrive_and_ends() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let dir = scratch.join("quickstart");
    let quickstart = || {
        // Nothing but the program: an empty environment, no home.
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
            "{word:?} is not in what quickstart said:\n{said}"
        );
    }
    assert!(
        !output.out.contains('\u{1b}'),
        "no colours where there is no terminal"
    );
    check_second_version(&output.out);
    check_training(&output.out, &dir);

    // Re-running is safe, and finds the same.
    check_training(&quickstart().out, &dir);
}
