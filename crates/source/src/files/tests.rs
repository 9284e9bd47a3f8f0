use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::walk::{NAME_OVERHEAD_BYTES, read_names};
use super::*;
use base::fault::Code;

fn put(path: &Path, bytes: &[u8]) {
    use std::io::Write;
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

fn entries(path: &Path) -> Vec<SourceEntry> {
    let mut source = FilesSource::open(path).unwrap();
    std::iter::from_fn(|| source.next().unwrap()).collect()
}

#[test]
fn a_directory_is_read_in_manifest_order_with_modes_links_and_empty_directories() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("set");
    put(&root.join("a/x.png"), b"12345");
    put(&root.join("a.txt"), b"");
    put(&root.join("线体3/面板_0001.png"), b"1");
    fs::create_dir(root.join("empty")).unwrap();
    put(&root.join("run.sh"), b"#!/bin/sh\n");
    fs::set_permissions(root.join("run.sh"), fs::Permissions::from_mode(0o4755)).unwrap();
    symlink("../run.sh", root.join("a/run")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    let got = entries(&root);
    let paths: Vec<&str> = got.iter().map(|e| e.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "a",
            "a/run",
            "a/x.png",
            "a.txt",
            "dangling",
            "empty",
            "run.sh",
            "线体3",
            "线体3/面板_0001.png"
        ]
    );
    assert!(
        got.windows(2).all(|w| w[0].path < w[1].path),
        "the order of RelPath"
    );
    assert!(matches!(&got[1].body, SourceBody::Symlink(t) if t == "../run.sh"));
    assert!(
        matches!(&got[2].body, SourceBody::File { size: 5, content: Content::File(p) } if p.ends_with("a/x.png"))
    );
    assert_eq!(got[6].mode, 0o755, "not set-user-id");
    assert!(matches!(got[5].body, SourceBody::Dir));
}

#[test]
fn a_file_is_one_entry_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("model.safetensors"), b"abc");
    let got = entries(&dir.path().join("model.safetensors"));
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].path.as_str(), "model.safetensors");
    assert_eq!(
        FilesSource::open(&dir.path().join("none"))
            .unwrap_err()
            .code,
        Code::NotFound
    );
}

#[test]
fn all_offenders_are_reported_together() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(&root.join(OsStr::from_bytes(b"bad\xff.png")), b"");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("pipe"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let _socket = UnixListener::bind(root.join("socket")).unwrap();
    fs::create_dir_all(root.join("sub/deep")).unwrap();
    symlink("/etc/passwd", root.join("sub/absolute")).unwrap();
    symlink("../../out", root.join("sub/escapes")).unwrap();
    symlink("deep/../../fine", root.join("sub/fine")).unwrap();
    // Inside according to the text but outside in reality: `up` is a link, so a `..` after it
    // leads elsewhere.
    symlink("../..", root.join("sub/deep/up")).unwrap();
    symlink("deep/up/../x", root.join("sub/through")).unwrap();
    let fault = FilesSource::open(root).unwrap_err();
    assert_eq!(fault.code, Code::Integrity);
    for part in [
        "6 entries",
        "bad\u{fffd}.png (bad\\xff.png): its name is not UTF-8",
        "pipe: it is a named pipe",
        "socket: it is a socket",
        "sub/absolute: its link target /etc/passwd is an absolute path",
        "sub/escapes: its link target ../../out leaves the directory",
        "sub/through: its link target deep/up/../x uses '..' after something that is not a directory",
    ] {
        assert!(
            fault.message.contains(part),
            "{part:?} not in {}",
            fault.message
        );
    }
    assert!(!fault.message.contains("sub/fine"), "{}", fault.message);
}

#[test]
fn the_list_of_offenders_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..50 {
        symlink("/", dir.path().join(format!("l{i:02}"))).unwrap();
    }
    let fault = FilesSource::open(dir.path()).unwrap_err();
    assert!(
        fault.message.contains("50 entries") && fault.message.ends_with("and 30 more"),
        "{}",
        fault.message
    );
}

#[test]
fn unreadable_entries_are_not_allowed() {
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped: root reads everything");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("secret.png"), b"x");
    fs::set_permissions(
        dir.path().join("secret.png"),
        fs::Permissions::from_mode(0o000),
    )
    .unwrap();
    let fault = FilesSource::open(dir.path()).unwrap_err();
    assert_eq!(fault.code, Code::NotAllowed);
    assert!(
        fault.message.contains("secret.png: it cannot be read"),
        "{}",
        fault.message
    );
}

#[test]
fn changes_between_the_walks_are_detected() {
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("a"), b"x");
    put(&dir.path().join("b"), b"x");
    let mut source = FilesSource::open(dir.path()).unwrap();
    fs::remove_file(dir.path().join("a")).unwrap();
    let fault = source.next().unwrap_err();
    assert!(
        fault
            .message
            .contains("a cannot be published: it disappeared"),
        "{}",
        fault.message
    );
    fs::remove_file(dir.path().join("b")).unwrap();
    symlink("/etc", dir.path().join("b")).unwrap();
    assert!(source.next().unwrap_err().message.contains("absolute path"));
}

#[test]
fn the_state_of_the_daemon_is_rejected_anywhere_in_the_tree() {
    let dir = tempfile::tempdir().unwrap();
    let (state, above) = (dir.path().join("above/state"), dir.path().join("above"));
    put(&state.join("keys/ca.pem"), b"key");
    put(&state.join("api-token"), b"token");
    put(&above.join("mine"), b"x");
    let own = Arc::new(Own::of_state(&state));
    let options = FilesOptions {
        own: own.clone(),
        ..FilesOptions::default()
    };
    let refused = |path: &Path| FilesSource::open_for(path, &options).unwrap_err();
    for path in [
        &above,
        &state,
        &state.join("keys"),
        &state.join("api-token"),
    ] {
        let fault = refused(path);
        assert_eq!(fault.code, Code::NotAllowed, "{}", path.display());
        assert!(
            fault
                .message
                .contains("the state or configuration of a packhorse daemon"),
            "{fault}"
        );
    }
    fs::create_dir(dir.path().join("other")).unwrap();
    fs::hard_link(state.join("api-token"), dir.path().join("other/innocent")).unwrap();
    assert!(
        refused(&dir.path().join("other"))
            .message
            .contains("innocent: it is part of the state or configuration of a packhorse daemon")
    );
    // The second walk checks again.
    let mut source = FilesSource::open(&dir.path().join("other/..")).unwrap();
    let Input::Folder(walk) = &mut source.input else {
        unreachable!("a folder")
    };
    walk.options.own = own;
    let fault = std::iter::from_fn(|| source.next().transpose())
        .find_map(Result::err)
        .unwrap();
    assert_eq!(fault.code, Code::NotAllowed, "{fault}");
    FilesSource::open_for(&above.join("mine"), &options).unwrap();
}

#[test]
fn a_directory_larger_than_the_budget_is_read_in_batches() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..500 {
        put(&dir.path().join(format!("{:03}", (i * 7) % 500)), b"");
    }
    let (mut got, mut after, mut batches) = (Vec::new(), None::<Vec<u8>>, 0);
    loop {
        let (names, _) = read_names(
            dir.path(),
            after.as_deref(),
            100 * (3 + NAME_OVERHEAD_BYTES),
            &WalkOptions::default(),
        )
        .unwrap();
        assert!(names.list.len() <= 100);
        after = names.last().map(<[u8]>::to_vec);
        got.extend(
            names
                .list
                .iter()
                .map(|n| String::from_utf8(names.get(n).to_vec()).unwrap()),
        );
        batches += 1;
        if !names.more {
            break;
        }
    }
    assert_eq!(got, (0..500).map(|i| format!("{i:03}")).collect::<Vec<_>>());
    assert!(batches > 4);
}

fn read_with(path: &Path, options: &FilesOptions) -> (Vec<String>, Omitted) {
    let mut source = FilesSource::open_for(path, options).unwrap();
    let names = std::iter::from_fn(|| source.next().unwrap())
        .map(|entry| entry.path.to_string())
        .collect();
    (names, source.omitted())
}

#[test]
fn a_file_of_patterns_is_utf8_text_with_or_without_a_byte_order_mark() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(&root.join("a.tmp"), b"x");
    put(
        &root.join(".packhorseignore"),
        b"\xef\xbb\xbf*.tmp\r\n.packhorseignore\r\n",
    );
    let (names, omitted) = read_with(root, &FilesOptions::default());
    assert_eq!(names, [""; 0]);
    assert_eq!(omitted.count(base::omitted::Category::Excluded), 2);
    put(&root.join(".packhorseignore"), b"*.bak\n\xd6\xd0*\n");
    let fault = FilesSource::open(root).unwrap_err();
    assert_eq!(fault.code, Code::Integrity, "{fault}");
    assert!(
        fault
            .message
            .contains("its .packhorseignore is not UTF-8 text in line 2"),
        "{fault}"
    );
}

#[test]
fn the_total_is_known_before_the_first_entry() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for (name, bytes) in [("a", 3), ("sub/b", 70_000), ("sub/.nfs1", 9), ("z", 0)] {
        put(&root.join(name), &vec![1; bytes]);
    }
    fs::hard_link(root.join("a"), root.join("b")).unwrap();
    symlink("a", root.join("link")).unwrap();
    let total = |path: &Path| FilesSource::open(path).unwrap().total();
    assert_eq!(total(root), Some(70_006), "each name of a file is read");
    assert_eq!(total(&root.join("sub/b")), Some(70_000));
}

#[test]
fn junk_and_patterns_are_excluded_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for name in [
        ".DS_Store",
        "@eaDir/a.png@SynoEAStream",
        "a.png",
        "build/out.o",
        "keep/.nfs0000001",
        "keep/Thumbs.db",
        "keep/b.tmp",
        "keep/c.tmp",
        "keep/d.txt",
        "sub/only/here",
        "sub/only.txt",
    ] {
        put(&root.join(name), b"x");
    }
    put(
        &root.join(".packhorseignore"),
        b"# generated\n/build/\n*.tmp\n",
    );
    put(&root.join("sub/.packhorseignore"), b"/only/\r\n");
    put(&root.join("keep/.packhorseignore"), b"!c.tmp\n");
    let (names, omitted) = read_with(root, &FilesOptions::default());
    assert_eq!(
        names,
        [
            ".packhorseignore",
            "a.png",
            "keep",
            "keep/.packhorseignore",
            "keep/c.tmp",
            "keep/d.txt",
            "sub",
            "sub/.packhorseignore",
            "sub/only.txt"
        ]
    );
    let excluded = |omitted: &Omitted| omitted.count(base::omitted::Category::Excluded);
    assert_eq!(excluded(&omitted), 7);
    let list = omitted.list();
    let examples = &list
        .iter()
        .find(|omission| omission.what == base::omitted::Category::Excluded)
        .unwrap()
        .examples;
    assert_eq!(examples[0], ".DS_Store (by default)");
    assert_eq!(examples[1], "@eaDir/ (by default)");
    assert_eq!(examples[2], "build/ (.packhorseignore)");
    let (names, omitted) = read_with(
        root,
        &FilesOptions {
            exclude: ["!.DS_Store", "*.txt", "/sub", "c.tmp"]
                .map(String::from)
                .into(),
            count_first: true,
            ..FilesOptions::default()
        },
    );
    assert_eq!(
        names,
        [
            ".DS_Store",
            ".packhorseignore",
            "a.png",
            "keep",
            "keep/.packhorseignore"
        ]
    );
    assert_eq!(excluded(&omitted), 8);
    // What is excluded need not be readable, and is never part of the daemon's state.
    symlink("/etc/passwd", root.join("leaves.tmp")).unwrap();
    FilesSource::open(root).unwrap();
    let options = |exclude: Vec<String>| FilesOptions {
        exclude,
        ..FilesOptions::default()
    };
    let wrong = FilesSource::open_for(root, &options(vec!["[z-a]".into()])).unwrap_err();
    assert_eq!(wrong.code, Code::Usage, "{wrong}");
    assert!(wrong.message.contains("[z-a]"), "{wrong}");
    let many = FilesSource::open_for(root, &options(vec!["a".into(); 100_000])).unwrap_err();
    assert_eq!(many.code, Code::Usage);
    let empty = FilesSource::open_for(root, &options(vec![" ".into()])).unwrap_err();
    assert_eq!(empty.code, Code::Usage, "{empty}");
    put(&root.join("sub/.packhorseignore"), b"fine\n[z-a]\n");
    let wrong = FilesSource::open(root).unwrap_err();
    assert!(wrong.message.contains("no pattern in line 2"), "{wrong}");
}

#[test]
fn the_default_patterns_are_valid() {
    for pattern in select::DEFAULTS {
        Selection::new(&[pattern.to_owned()]).unwrap();
    }
}

#[test]
fn a_pattern_that_excludes_nothing_by_a_mistake_is_refused() {
    for wrong in ["", " ", "[", "*.[ab", "a\nb"] {
        let fault = Selection::new(&[wrong.to_owned()]).unwrap_err();
        assert_eq!(fault.code, Code::Usage, "{wrong:?}");
    }
    Selection::new(&["*.[ab]".to_owned(), "\\[".to_owned()]).unwrap();
}

#[test]
fn copied_links_are_what_they_lead_to_and_loops_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (root, blobs) = (dir.path().join("snapshots/c0"), dir.path().join("blobs"));
    put(&blobs.join("aa"), b"weights");
    put(&dir.path().join("extra/deep/x"), b"1");
    fs::create_dir_all(&root).unwrap();
    symlink("../../blobs/aa", root.join("model.safetensors")).unwrap();
    symlink("../../extra", root.join("extra")).unwrap();
    symlink("model.safetensors", root.join("again")).unwrap();
    let options = FilesOptions {
        copy_links: true,
        ..FilesOptions::default()
    };
    assert!(
        FilesSource::open(&root)
            .unwrap_err()
            .message
            .contains("2 entries")
    );
    let mut source = FilesSource::open_for(&root, &options).unwrap();
    let got: Vec<_> = std::iter::from_fn(|| source.next().unwrap()).collect();
    let paths: Vec<&str> = got.iter().map(|e| e.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "again",
            "extra",
            "extra/deep",
            "extra/deep/x",
            "model.safetensors"
        ]
    );
    let blob = fs::canonicalize(blobs.join("aa")).unwrap();
    for number in [0, 4] {
        assert!(
            matches!(&got[number].body, SourceBody::File { size: 7, content: Content::File(file) } if *file == blob),
            "{:?}",
            got[number]
        );
    }
    symlink("..", dir.path().join("extra/deep/loop")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    let fault = FilesSource::open_for(&root, &options).unwrap_err();
    assert!(
        fault.message.contains("2 entries")
            && fault
                .message
                .contains("dangling: the link cannot be followed")
            && fault.message.contains("extra/deep/loop: it links to"),
        "{fault}"
    );
    // A link does not lead to the state of the daemon.
    let state = dir.path().join("state");
    put(&state.join("api-token"), b"token");
    fs::remove_file(root.join("dangling")).unwrap();
    fs::remove_file(dir.path().join("extra/deep/loop")).unwrap();
    symlink(state.join("api-token"), root.join("innocent")).unwrap();
    let options = FilesOptions {
        own: Arc::new(Own::of_state(&state)),
        ..options
    };
    let fault = FilesSource::open_for(&root, &options).unwrap_err();
    assert!(
        fault.message.contains("innocent: ") && fault.message.contains("packhorse daemon"),
        "{fault}"
    );
}

#[test]
fn names_in_another_encoding_are_decoded_and_sorted_by_their_text() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    // The order of 板 and 在 in GBK is not that of their code points; 一 in GBK is also UTF-8.
    let (panel, at, one) = (&b"\xb0\xe5"[..], &b"\xd4\xda"[..], &b"\xd2\xbb"[..]);
    for name in [panel, at, one] {
        fs::create_dir(root.join(OsStr::from_bytes(name))).unwrap();
        put(&root.join(OsStr::from_bytes(name)).join("1.png"), name);
    }
    put(&root.join("缺陷.txt"), b"in UTF-8");
    symlink(
        OsStr::from_bytes(b"\xd4\xda/../\xb0\xe5"),
        root.join("link"),
    )
    .unwrap();
    assert!(
        FilesSource::open(root)
            .unwrap_err()
            .message
            .contains("3 entries")
    );
    let options = |encoding: &str| FilesOptions {
        name_encoding: Some(encoding.to_owned()),
        ..FilesOptions::default()
    };
    let mut source = FilesSource::open_for(root, &options("gbk")).unwrap();
    let got: Vec<_> = std::iter::from_fn(|| source.next().unwrap()).collect();
    let paths: Vec<&str> = got.iter().map(|e| e.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "link",
            "一",
            "一/1.png",
            "在",
            "在/1.png",
            "板",
            "板/1.png",
            "缺陷.txt"
        ]
    );
    assert!(
        got.windows(2).all(|w| w[0].path < w[1].path),
        "the order of RelPath"
    );
    assert!(matches!(&got[0].body, SourceBody::Symlink(target) if target == "在/../板"));
    assert!(
        matches!(&got[4].body, SourceBody::File { content: Content::File(file), .. } if fs::read(file).unwrap() == at)
    );
    for wrong in ["klingon", "utf-16le"] {
        assert_eq!(
            FilesSource::open_for(root, &options(wrong))
                .unwrap_err()
                .code,
            Code::Usage
        );
    }
    // One name in two encodings is refused, and so is what is not in the encoding.
    put(&root.join("板x"), b"");
    put(&root.join(OsStr::from_bytes(b"\xb0\xe5x")), b"");
    put(&root.join(OsStr::from_bytes(b"bad\xff")), b"");
    let fault = FilesSource::open_for(root, &options("gbk")).unwrap_err();
    assert!(
        fault.message.contains("2 entries")
            && fault.message.contains("板x: another entry has this name")
            && fault.message.contains("its name is not UTF-8"),
        "{fault}"
    );
}

#[test]
fn a_file_that_is_written_to_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("growing");
    put(&file, b"1");
    let options = FilesOptions {
        settle: Some(Duration::from_millis(300)),
        ..FilesOptions::default()
    };
    let time = options.settle.unwrap();
    let mut source = FilesSource::open_for(dir.path(), &options).unwrap();
    // Written to between the walks.
    put(&file, b"12");
    let entry = source.next().unwrap().unwrap();
    let age = fs::metadata(&file)
        .unwrap()
        .modified()
        .unwrap()
        .elapsed()
        .unwrap();
    assert!(age >= time, "{age:?}");
    assert!(
        matches!(entry.body, SourceBody::File { size: 2, .. }),
        "{entry:?}"
    );
    // The clock of a NAS may be ahead.
    let ahead = fs::metadata(&file).unwrap().modified().unwrap() + Duration::from_secs(3600);
    fs::File::open(&file).unwrap().set_modified(ahead).unwrap();
    FilesSource::open_for(dir.path(), &options).unwrap();
    // A job that is cancelled does not wait.
    put(&file, b"3");
    let job = Arc::new(JobProgress::default());
    job.cancel();
    let options = FilesOptions {
        settle: Some(Duration::from_secs(3600)),
        job: Some(job),
        ..options
    };
    FilesSource::open_for(dir.path(), &options).unwrap_err();
    FilesSource::open_for(&file, &options).unwrap_err();
}

#[test]
fn times_attributes_and_hard_links_are_read_if_they_are_asked_for() {
    use base::omitted::Category;
    use rustix::fs::{XattrFlags, lsetxattr};
    use std::time::{Duration, SystemTime};

    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(&root.join("a"), b"content");
    fs::hard_link(root.join("a"), root.join("sub-b")).unwrap();
    fs::hard_link(root.join("a"), root.join("z")).unwrap();
    fs::create_dir(root.join("sub")).unwrap();
    for (name, value) in [("user.b", "2"), ("user.a", "1"), ("user.empty", "")] {
        lsetxattr(root.join("a"), name, value.as_bytes(), XattrFlags::empty())
            .expect("the temporary folder is on a filesystem with user attributes");
    }
    lsetxattr(root.join("sub"), "user.k", b"v", XattrFlags::empty()).unwrap();
    let time = SystemTime::UNIX_EPOCH - Duration::from_millis(1_500);
    fs::File::options()
        .write(true)
        .open(root.join("a"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    let read = |options: &FilesOptions| {
        let mut source = FilesSource::open_for(root, options).unwrap();
        let entries: Vec<_> = std::iter::from_fn(|| source.next().unwrap()).collect();
        (entries, source.omitted())
    };
    let (plain, omitted) = read(&FilesOptions::default());
    assert!(plain.iter().all(|entry| entry.attributes.is_empty()));
    let counts = [Category::Times, Category::Xattrs, Category::HardLinks].map(|c| omitted.count(c));
    assert_eq!(counts, [3, 10, 2]);
    let options = FilesOptions {
        times: true,
        xattrs: true,
        hard_links: true,
        ..FilesOptions::default()
    };
    let (all, omitted) = read(&options);
    assert!(omitted.is_empty(), "{omitted:?}");
    let [a, sub, b, z] = &all[..] else {
        unreachable!("{all:?}")
    };
    for file in [a, b, z] {
        let attributes = &file.attributes;
        assert_eq!(attributes.modified.unwrap().parts(), (-2, 500_000_000));
        assert_eq!(attributes.modified.unwrap().system_time(), time);
        let xattrs: Vec<_> = attributes
            .xattrs
            .iter()
            .map(|x| (x.name(), x.value()))
            .collect();
        assert_eq!(
            xattrs,
            [("user.a", &b"1"[..]), ("user.b", b"2"), ("user.empty", b"")]
        );
    }
    assert_eq!(
        sub.attributes.modified, None,
        "a directory has the time of its arrival"
    );
    assert_eq!(sub.attributes.xattrs.len(), 1);
    assert_eq!(a.attributes.hard_link, None);
    for name in [b, z] {
        assert_eq!(name.attributes.hard_link.as_ref(), Some(&a.path));
    }
    // A file that was written to between its names is two files.
    let mut source = FilesSource::open_for(root, &options).unwrap();
    source.next().unwrap();
    put(&root.join("z"), b"longer content");
    let rest: Vec<_> = std::iter::from_fn(|| source.next().unwrap()).collect();
    assert!(
        rest.iter()
            .all(|entry| entry.attributes.hard_link.is_none()),
        "{rest:?}"
    );
    let large = vec![b'x'; 40_000];
    if lsetxattr(root.join("a"), "user.large", &large, XattrFlags::empty()).is_ok() {
        let mut source = FilesSource::open_for(root, &options).unwrap();
        assert!(source.next().unwrap_err().message.contains("user.large"));
    }
}
