//! Rules of the source code that the compiler does not enforce: which crate may use which, and how
//! paths are made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The crates, from the lowest layer to the highest. A crate uses only crates of lower layers.
const LAYERS: [&[&str]; 7] = [
    &["base"],
    &["content", "registry", "transport"],
    &["model", "sink", "source"],
    &["state"],
    &["exchange"],
    &["packhorse"],
    &["fuzz-targets"],
];

/// Crates that perform I/O: `model` uses none of them.
const IO_CRATES: [&str; 12] = [
    "axum",
    "cap-std",
    "hyper",
    "quinn",
    "quinn-proto",
    "redb",
    "reqwest",
    "rustix",
    "sqlx",
    "tokio",
    "tokio-rustls",
    "tokio-util",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The dependencies of each crate of the workspace, without dev-dependencies.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    let name = |of: &Value| of["name"].as_str().unwrap().to_owned();
    let used = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        all.filter(|dependency| dependency["kind"] != "dev")
            .map(name)
            .collect()
    };
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (name(package), used(package)))
        .collect()
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

#[test]
fn a_crate_uses_only_crates_of_lower_layers() {
    let all = dependencies();
    for (name, used) in &all {
        let own =
            layer(name).unwrap_or_else(|| panic!("crate {name} has no layer: name it in LAYERS"));
        for other in used {
            assert!(
                layer(other).is_none_or(|layer| layer < own),
                "{name} uses {other}, which is in no lower layer"
            );
        }
    }
    assert_eq!(
        all.len(),
        LAYERS.iter().map(|layer| layer.len()).sum::<usize>()
    );
}

#[test]
fn the_crate_model_performs_no_io() {
    let used = &dependencies()["model"];
    let io: Vec<&str> = IO_CRATES
        .into_iter()
        .filter(|name| used.contains(*name))
        .collect();
    assert!(io.is_empty(), "model uses {io:?}");
    assert!(!used.contains("transport") && !used.contains("registry"));
    for (path, text) in all_sources()
        .iter()
        .filter(|(path, _)| path.starts_with(root().join("crates/model")))
    {
        for word in [
            "std::fs",
            "std::net",
            "std::process",
            "std::thread",
            "clock::now",
            "SystemTime::now",
            "Instant::now",
            "Timestamp::now",
        ] {
            assert!(!text.contains(word), "{} uses {word}", path.display());
        }
    }
}

/// All sources of the program, as [`sources`].
fn all_sources() -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    sources(&root().join("src"), &mut all);
    sources(&root().join("crates"), &mut all);
    assert!(all.len() > 150);
    all
}

/// All sources of the program, each with its path, without the code after `#[cfg(test)]`.
fn sources(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|ext| ext == "rs")
            && !path.to_string_lossy().contains("tests")
        {
            let text = std::fs::read_to_string(&path).unwrap();
            out.push((
                path,
                text.split("#[cfg(test)]\nmod tests")
                    .next()
                    .unwrap()
                    .to_owned(),
            ));
        }
    }
}

/// The argument of each `.join(` in a source.
fn joined(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices(".join(").map(|(at, word)| {
        let rest = &text[at + word.len()..];
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += match c {
                '(' => 1,
                ')' => -1,
                _ => 0,
            };
            depth == 0
        });
        &rest[..end.unwrap_or(rest.len())]
    })
}

#[test]
fn no_path_is_joined_with_unparsed_text() {
    let all = all_sources();
    let names = root().join("crates/base/src/names");
    // `in_dir` makes a path of a parsed name. A text that was taken out of its type, or a field
    // that has one, must not be joined to a path.
    let forbidden = [
        "as_str()",
        "to_string()",
        "as_ref()",
        "deref()",
        "&*",
        ".id",
        ".transfer",
        ".delivery",
        ".0",
    ];
    // Exceptions: the words of `Kind`, a number, and a table of the sample data, which are all
    // defined by this program.
    let allowed = [
        "artifact.kind.as_str()",
        "kind.as_str()",
        "number.to_string()",
        "path.0",
    ];
    let mut bad = Vec::new();
    // `names` defines the types themselves.
    for (path, text) in all
        .iter()
        .filter(|(path, _)| !path.starts_with(&names) && *path != names.with_extension("rs"))
    {
        for argument in joined(text)
            .filter(|argument| !argument.starts_with('"') && !allowed.contains(argument))
        {
            if forbidden.iter().any(|word| argument.contains(word)) {
                bad.push(format!("{}: join({argument})", path.display()));
            }
        }
    }
    assert!(bad.is_empty(), "join a parsed name by its in_dir: {bad:#?}");
}

#[test]
fn no_wire_message_has_an_unparsed_id() {
    let protocol = root().join("crates/model/src/protocol");
    let mut messages = Vec::new();
    sources(&protocol, &mut messages);
    assert!(messages.len() >= 3);
    let field = |line: &str| {
        line.trim()
            .trim_start_matches("pub ")
            .split_once(": ")
            .map(|(name, of)| (name.to_owned(), of.to_owned()))
    };
    for (name, of) in messages
        .iter()
        .flat_map(|(_, text)| text.lines().filter_map(field))
    {
        let is_id = [
            "id",
            "delivery",
            "transfer",
            "after",
            "run",
            "site",
            "to",
            "artifact",
            "artifacts",
            "name",
        ]
        .contains(&name.as_str());
        assert!(
            !(is_id && of.contains("String")),
            "{name}: {of} of a message is unparsed text"
        );
    }
}
