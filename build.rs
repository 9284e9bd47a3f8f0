//! Makes the text that `packhorse --version` prints after the name: version, commit, and kind of
//! build.
//!
//! The commit is the value of `PACKHORSE_COMMIT` (for a build from a source archive), or what git
//! says, or `unknown`. The text contains no time and no path, so that the same sources give the
//! same text.
//!
//! A development build describes the sources as they were when they last changed: this script runs
//! when a source changes, which compiles the program in any case, and not for every commit. A
//! release build also follows every commit.

use std::env;
use std::path::Path;
use std::process::Command;

/// What the program is made from.
const SOURCES: [&str; 6] = [
    "Cargo.lock",
    "Cargo.toml",
    "build.rs",
    "crates",
    "migrations",
    "src",
];

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    for path in SOURCES {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=PACKHORSE_COMMIT");
    if release {
        for path in files_of_the_commit(Path::new(&root)) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let commit = given_commit(env::var("PACKHORSE_COMMIT").ok())
        .or_else(|| commit(Path::new(&root)))
        .unwrap_or_else(|| "unknown".into());
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let kind = if release { "release" } else { "debug" };
    println!("cargo::rustc-env=PACKHORSE_BUILD={version} (commit {commit}, {kind} build)");
}

/// The commit that the environment gives: one short word, since it becomes a part of one line.
pub(crate) fn given_commit(value: Option<String>) -> Option<String> {
    let is_word = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    value.filter(|text| !text.is_empty() && text.len() <= 40 && is_word(text))
}

/// The commit of the sources in this directory, if git manages exactly this directory and not one
/// above it.
pub(crate) fn commit(root: &Path) -> Option<String> {
    if !root.join(".git").exists() {
        return None;
    }
    // Cut here, because the length of git's own short form depends on the repository.
    let commit = git(root, &["rev-parse", "--verify", "HEAD"])?
        .get(..7)?
        .to_owned();
    let changed = git(
        root,
        &[&["status", "--porcelain", "--"], SOURCES.as_slice()].concat(),
    )?;
    Some(if changed.is_empty() {
        commit
    } else {
        commit + " with local changes"
    })
}

/// The files of git that change with the commit.
fn files_of_the_commit(root: &Path) -> Vec<String> {
    if !root.join(".git").exists() {
        return Vec::new();
    }
    let branch = git(root, &["symbolic-ref", "--quiet", "HEAD"]);
    let names = ["HEAD", "logs/HEAD", "packed-refs"]
        .into_iter()
        .map(str::to_owned)
        .chain(branch);
    let paths = names.filter_map(|name| git(root, &["rev-parse", "--git-path", &name]));
    // Cargo runs this script each time for a file that does not exist.
    paths.filter(|path| root.join(path).exists()).collect()
}

/// The output of a git command. `None` if there is no git, or if it fails.
fn git(root: &Path, args: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    // A hook of git, which may run this build, names another repository or index in these.
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(name);
    }
    let output = command
        .arg("--no-optional-locks")
        .args(args)
        .current_dir(root)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
