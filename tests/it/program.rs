//! Information about the program itself: its version, its shell completions and its man pages.

use super::support::command::tool_in;
use super::support::daemon::{PACKHORSE, packhorse};
use super::support::{Scratch, limit, secs};

#[path = "../../build.rs"]
#[expect(dead_code, reason = "only cargo runs its main")]
mod build;

#[test]
fn the_version_names_the_commit_and_the_build() {
    let _limit = limit(secs(60));
    let said = packhorse(&["--version"]).expect(0).out;
    let rest = said
        .strip_prefix(concat!(
            "packhorse ",
            env!("CARGO_PKG_VERSION"),
            " (commit "
        ))
        .unwrap_or_else(|| panic!("{said}"));
    let (commit, build) = rest.split_once(", ").unwrap();
    assert!(
        ["debug build)\n", "release build)\n"].contains(&build),
        "{said}"
    );
    let word = commit.strip_suffix(" with local changes").unwrap_or(commit);
    assert!(
        word == "unknown" || build::given_commit(Some(word.to_owned())).is_some(),
        "{said}"
    );
}

#[test]
fn the_version_has_the_commit_of_the_sources() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let root = scratch.folder("tree");
    assert_eq!(build::commit(&root), None, "a source archive");
    let git = |args: &[&str]| {
        let who = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@example.com",
            "-c",
            "commit.gpgsign=false",
            "-c",
            "init.defaultBranch=main",
        ];
        tool_in(&root, "git", &[who.as_slice(), args].concat())
    };
    git(&["init", "--quiet"]);
    assert_eq!(build::commit(&root), None, "no commit yet");
    std::fs::create_dir(root.join("src")).unwrap();
    std::fs::write(root.join("src/main.rs"), "fn main() {}\n").unwrap();
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "first"]);
    let commit = build::commit(&root).unwrap();
    assert!(
        commit.len() == 7 && git(&["rev-parse", "HEAD"]).starts_with(&commit),
        "{commit}"
    );
    std::fs::write(root.join("notes.txt"), "not a source\n").unwrap();
    assert_eq!(build::commit(&root).as_deref(), Some(commit.as_str()));
    std::fs::write(root.join("src/main.rs"), "fn main() { }\n").unwrap();
    assert_eq!(
        build::commit(&root),
        Some(format!("{commit} with local changes"))
    );
    // Sources that were unpacked inside another repository do not report that repository's commit.
    std::fs::create_dir_all(root.join("vendor/packhorse/src")).unwrap();
    assert_eq!(build::commit(&root.join("vendor/packhorse")), None);
    assert_eq!(
        build::given_commit(Some("v1.2-3".into())).as_deref(),
        Some("v1.2-3")
    );
    for bad in ["", "two words", "a\nb", &"a".repeat(41)] {
        assert_eq!(build::given_commit(Some(bad.to_owned())), None, "{bad:?}");
    }
}

#[test]
fn a_shell_can_use_the_completions() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let script = packhorse(&["completions", "bash"]).expect(0).out;
    let file = scratch.join("packhorse.bash");
    std::fs::write(&file, script).unwrap();
    let complete = format!(
        ". {}; COMP_WORDS=(packhorse train st) COMP_CWORD=2; _packhorse packhorse st train; echo \"${{COMPREPLY[*]}}\"",
        file.display()
    );
    assert_eq!(
        tool_in(scratch.path(), "bash", &["-c", &complete]).trim(),
        "start"
    );
    packhorse(&["completions", "tcl"])
        .expect(2)
        .says(&["tcl", "bash", "zsh", "fish"]);
    packhorse(&["completions"]).expect(2);
}

#[test]
fn man_pages_are_written_into_a_directory() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let dir = scratch.join("share/man/man1");
    let dir = dir.to_str().unwrap();
    for _ in 0..2 {
        let written = packhorse(&["man", dir, "-o", "json"]).expect(0).json();
        let files: Vec<&str> = written["files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|file| file.as_str().unwrap())
            .collect();
        assert!(
            files.contains(&"packhorse.1") && files.contains(&"packhorse-token-create.1"),
            "{files:?}"
        );
        for file in &files {
            let page = std::fs::read_to_string(scratch.join("share/man/man1").join(file)).unwrap();
            assert!(
                page.contains(".SH NAME") && page.contains(".SH EXAMPLE"),
                "{file}: {page}"
            );
        }
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), files.len());
    }
    let file = format!("{dir}/packhorse.1");
    for wrong in [file.clone(), format!("{file}/man1")] {
        packhorse(&["man", &wrong])
            .expect(6)
            .says(&[&file, "name a directory that you can write to"]);
    }
    packhorse(&["man"]).expect(2);
}

#[test]
fn a_closed_stderr_does_not_change_the_exit_code() {
    let _limit = limit(secs(60));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = std::process::Command::new(PACKHORSE)
        .args(["status", "--api", "http://127.0.0.1:1"])
        .env("PACKHORSE_LOG", "no=such=filter")
        .stderr(writer)
        .status()
        .unwrap();
    assert!(
        matches!(status.code(), Some(code) if code != 0 && code < 100),
        "{status}"
    );
}
