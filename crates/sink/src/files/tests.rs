//! The files sink alone, and two sites with one root.

use std::fs::File;

use super::root::Root as DaemonRoot;
use super::versions::is_same_entry;
use super::*;
use base::fault::{Reason, Retry};
use base::limits::ROOT_USE_ENDS_AFTER;
use base::names::Kind;
use content::chunk::{DEFAULT_CHUNKING, Hash};
use content::manifest::{KindInfo, Root, Totals};

fn incoming(version: &str) -> Incoming {
    let root = Root {
        format: 1,
        kind: Kind::Dataset,
        info: KindInfo::Files,
        chunking: DEFAULT_CHUNKING,
        totals: Totals::default(),
        depth: 0,
        pages: Vec::new(),
    };
    let artifact = ArtifactRef::new(Kind::Dataset, "d", version).unwrap();
    Incoming {
        artifact,
        digest: Hash::of(version.as_bytes()),
        root,
        transfer: format!("t-{version}").parse().unwrap(),
        waits: Default::default(),
    }
}

#[test]
fn names_that_windows_rejects_are_rejected_if_the_nas_rejects_them() {
    let dir = tempfile::tempdir().unwrap();
    let linux = FilesSink::open(None, dir.path()).unwrap();
    let smb = linux.clone().assuming(Mount {
        windows_names: true,
        ..Mount::default()
    });
    let refused = |sink: &FilesSink, name: &str| sink.refuse_path(&name.parse().unwrap()).is_some();
    for bad in [
        ["CON", "con.txt", "sub/Aux", "nul.tar.gz", "prn/b.png"],
        ["COM1", "lpt9.log", "a.", "a ", "folder./x.png"],
        [
            "folder /x.png",
            "a\u{1}b",
            "tab\there",
            "new\nline",
            "del\u{7f}",
        ],
        ["a<b", "a>b", "a:b", "a\"b", "a|b"],
        ["a?b", "a*b", "a\\b", "a/b/c?", "..."],
    ]
    .into_iter()
    .flatten()
    {
        assert!(refused(&smb, bad), "{bad:?}");
        assert!(!refused(&linux, bad), "{bad:?}");
    }
    let mapped = linux.clone().assuming(Mount {
        no_backslash: true,
        renames_reserved: true,
        ..Mount::default()
    });
    for bad in ["CON", "sub/aux.txt", "a\\b"] {
        assert!(refused(&mapped, bad), "{bad:?}");
    }
    for good in ["a:b", "a.", "tab\there", "CONSOLE"] {
        assert!(!refused(&mapped, good), "{good:?}");
    }
    for good in [
        "CONSOLE.png",
        "COM10",
        "COM",
        "lpt",
        "a.b",
        ".hidden",
        "a b",
        "图像/缺陷 1.png",
    ] {
        assert!(!refused(&smb, good), "{good:?}");
    }
}

#[test]
fn a_name_has_at_most_255_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let smb = FilesSink::open(None, dir.path()).unwrap().assuming(Mount {
        windows_names: true,
        ..Mount::default()
    });
    for (letter, longest) in [("a", 255), ("图", 85)] {
        assert_eq!(
            smb.refuse_path(&format!("a/{}", letter.repeat(longest)).parse().unwrap()),
            None
        );
        assert!(
            format!("a/{}", letter.repeat(longest + 1))
                .parse::<RelPath>()
                .is_err(),
            "no sink receives such a path"
        );
    }
}

#[tokio::test]
async fn an_empty_mount_point_is_not_filled() {
    let dir = tempfile::tempdir().unwrap();
    let [nas, away, data] = ["nas", "away", "data"].map(|name| dir.path().join(name));
    std::fs::create_dir(&nas).unwrap();
    std::fs::create_dir(&data).unwrap();
    let config = settings::FilesSink { root: nas.clone() };
    let sink = FilesSink::open(Some(&config), &data).unwrap();
    let (one, two) = (incoming("v1"), incoming("v2"));
    sink.check(&one).await.unwrap();
    let staged = sink.staging_root().join("t-v1");
    durable::create_dir_all(&staged).unwrap();
    sink.commit(&one, &staged).await.unwrap();

    // Unmounted while a daemon runs, and before one starts.
    durable::rename_noreplace(&nas, &away).unwrap();
    std::fs::create_dir(&nas).unwrap();
    let started = FilesSink::open(Some(&config), &data).unwrap();
    for sink in [&sink, &started] {
        let staged = sink.staging_root().join("t-v2");
        let faults = [
            sink.check(&two).await.unwrap_err(),
            sink.commit(&two, &staged).await.unwrap_err(),
            sink.exists_at_target(&one).await.unwrap_err(),
            sink.verify(
                &one,
                &sink.landed(&one.artifact).place,
                &Verification::default(),
            )
            .await
            .unwrap_err(),
            sink.trial().await.unwrap_err(),
            sink.remove(&one.artifact, Some(&one.root.info))
                .await
                .unwrap_err(),
            sink.probe().await.unwrap_err(),
        ];
        for fault in faults {
            assert_eq!(
                (fault.reason, fault.retry),
                (Reason::SinkUnavailable, Retry::Backoff),
                "{fault}"
            );
            assert!(fault.next.contains("mount the NAS there"), "{}", fault.next);
        }
    }
    assert_eq!(
        std::fs::read_dir(&nas).unwrap().count(),
        0,
        "nothing was created on the disk below the mount"
    );
    assert_eq!(
        started.mount.get(),
        None,
        "a missing root gives no properties of the NAS"
    );

    // Mounted again.
    std::fs::remove_dir(&nas).unwrap();
    durable::rename_noreplace(&away, &nas).unwrap();
    for sink in [&sink, &started] {
        sink.check(&two).await.unwrap();
        assert!(sink.exists_at_target(&one).await.unwrap());
    }
    assert_eq!(started.mount.get(), Some(&Mount::default()));

    // A different NAS at the same path.
    durable::replace(&nas.join(HIDDEN).join("id"), b"another\n").unwrap();
    assert_eq!(
        sink.check(&two).await.unwrap_err().reason,
        Reason::SinkUnavailable
    );
}

#[tokio::test]
async fn a_current_that_is_a_link_is_ignored_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let sink = FilesSink::open(None, dir.path()).unwrap();
    let commit = async |version: &str, sink: &FilesSink| {
        let incoming = incoming(version);
        sink.check(&incoming).await.unwrap();
        let staged = sink.staging_root().join(incoming.transfer.as_str());
        durable::create_dir_all(&staged).unwrap();
        sink.commit(&incoming, &staged).await.unwrap();
        incoming
    };
    let one = commit("v1", &sink).await;
    let (file, link) = (
        sink.series(&one.artifact).join("CURRENT"),
        sink.series(&one.artifact).join("current"),
    );
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("v1"));
    // As an earlier version left it if names fold case.
    for broken in ["link", "nothing"] {
        std::fs::remove_file(&file).unwrap();
        if broken == "link" {
            std::os::unix::fs::symlink("v1", &file).unwrap();
        }
        assert_eq!(sink.active(&one.artifact).await.unwrap(), None);
        sink.commit(&one, &sink.staging_root().join("gone"))
            .await
            .unwrap();
        assert!(std::fs::symlink_metadata(&file).unwrap().is_file());
        assert_eq!(
            sink.active(&one.artifact).await.unwrap().as_deref(),
            Some("v1")
        );
    }
    // A filesystem on which both names refer to one entry.
    let folds = sink.clone().assuming(Mount {
        folding: Folding {
            case: true,
            ..Folding::default()
        },
        ..Mount::default()
    });
    std::fs::remove_file(&link).unwrap();
    let two = commit("v2", &folds).await;
    assert_eq!(
        folds.active(&two.artifact).await.unwrap().as_deref(),
        Some("v2")
    );
    assert!(!link.exists(), "the link would replace CURRENT");
    std::fs::hard_link(&file, &link).unwrap();
    commit("v3", &sink).await;
    assert!(
        std::fs::symlink_metadata(&link).unwrap().is_symlink(),
        "CURRENT is a new file, so the link is a different entry"
    );
    assert!(
        is_same_entry(&file, &file).unwrap()
            && !is_same_entry(&file, &dir.path().join("none")).unwrap()
    );
}

#[tokio::test]
async fn a_commit_without_staged_content_is_delivered_again() {
    let dir = tempfile::tempdir().unwrap();
    let sink = FilesSink::open(None, dir.path()).unwrap();
    let one = incoming("v1");
    sink.check(&one).await.unwrap();
    let fault = sink
        .commit(&one, &sink.staging_root().join("t-v1"))
        .await
        .unwrap_err();
    assert!(
        fault.retry == Retry::Backoff && crate::needs_new_delivery(&fault),
        "{fault:?}"
    );
    assert!(
        sink.note(&one.artifact).unwrap().is_none(),
        "no note is created"
    );
    assert!(!crate::needs_new_delivery(
        &Fault::not_allowed("the NAS is read-only").of_sink()
    ));
}

/// Two sites of different hubs with one root.
fn two_sites(dir: &Path) -> [FilesSink; 2] {
    let nas = dir.join("nas");
    std::fs::create_dir(&nas).unwrap();
    let config = settings::FilesSink { root: nas };
    ["one", "two"].map(|name| {
        let data = dir.join(name);
        std::fs::create_dir(&data).unwrap();
        FilesSink::open(Some(&config), &data).unwrap()
    })
}

/// Stages content of the same version with one file.
fn staged(sink: &FilesSink, text: &str) -> (Incoming, PathBuf) {
    let incoming = Incoming {
        digest: Hash::of(text.as_bytes()),
        transfer: format!("t-{text}").parse().unwrap(),
        ..incoming("v1")
    };
    let folder = sink.staging.join(incoming.transfer.as_str());
    durable::create_dir_all(&folder).unwrap();
    durable::replace(&folder.join("file"), text.as_bytes()).unwrap();
    (incoming, folder)
}

#[tokio::test]
async fn the_later_of_two_sites_with_different_content_creates_no_note() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = two_sites(dir.path());
    let ((a, a_staged), (b, b_staged)) = (staged(&one, "one"), staged(&two, "two"));
    let file = one.folder(&a.artifact).join("file");
    // The first site is between its note and its rename.
    one.claim(&a).unwrap();
    let fault = two.commit(&b, &b_staged).await.unwrap_err();
    assert_eq!(
        (fault.code, fault.retry),
        (Code::Conflict, Retry::Backoff),
        "{fault}"
    );
    assert!(!file.exists() && b_staged.exists());
    one.commit(&a, &a_staged).await.unwrap();
    for _ in 0..2 {
        let fault = two.commit(&b, &b_staged).await.unwrap_err();
        assert_eq!(
            (fault.code, fault.retry),
            (Code::Conflict, Retry::Never),
            "{fault}"
        );
        assert!(two.exists_at_target(&b).await.is_err());
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one");
    assert!(
        one.exists_at_target(&a).await.unwrap()
            && one
                .verify(&a, &one.landed(&a.artifact).place, &Verification::default())
                .await
                .unwrap()
                .is_empty()
    );
}

#[tokio::test]
async fn a_site_that_no_longer_registers_does_not_prevent_removal() {
    use std::time::Duration;
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = two_sites(dir.path());
    let (a, a_staged) = staged(&one, "one");
    one.commit(&a, &a_staged).await.unwrap();
    two.renew().unwrap();
    let file = one.root.sites().join(two.root.owner());
    let said = |ago: Duration| {
        let time = std::time::SystemTime::from(base::clock::now()) - ago;
        File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_modified(time)
            .unwrap();
    };
    assert_eq!(one.root.others().unwrap().len(), 1);
    said(ROOT_USE_ENDS_AFTER - Duration::from_secs(3_600));
    assert!(
        one.remove(&a.artifact, None).await.unwrap().is_some(),
        "it may be offline temporarily"
    );
    // A daemon of an earlier version registers once, at any time.
    let text = std::fs::read_to_string(&file).unwrap();
    durable::replace(&file, text.lines().next().unwrap().as_bytes()).unwrap();
    said(ROOT_USE_ENDS_AFTER * 9);
    assert_eq!(one.root.others().unwrap().len(), 1);
    durable::replace(&file, text.as_bytes()).unwrap();
    said(ROOT_USE_ENDS_AFTER + Duration::from_secs(3_600));
    assert_eq!(one.remove(&a.artifact, None).await.unwrap(), None);
    assert!(!one.folder(&a.artifact).exists());
}

#[tokio::test]
async fn the_note_of_an_abandoned_commit_blocks_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = two_sites(dir.path());
    let ((a, a_staged), (b, b_staged)) = (staged(&one, "one"), staged(&two, "two"));
    one.claim(&a).unwrap();
    durable::remove_all(&a_staged).unwrap();
    two.commit(&b, &b_staged).await.unwrap();
    assert_eq!(
        std::fs::read_to_string(two.folder(&b.artifact).join("file")).unwrap(),
        "two"
    );
    assert!(two.exists_at_target(&b).await.unwrap());
}

#[test]
fn leftovers_of_other_sites_and_of_older_versions_are_distinguished() {
    let dir = tempfile::tempdir().unwrap();
    let sink = FilesSink::open(None, dir.path()).unwrap();
    let own = format!("removed-{}-v1-0123abcd", sink.root.owner());
    for name in [
        own.as_str(),
        "removed-v1-0123abcd",
        "removed-2026-11-30-0123abcd",
        "removed-exactly-16-chars-0123abcd",
        "removed-sixteen.letters.-0123abcd",
        "removed-0123456789abcdef-0123abcd",
    ] {
        assert!(sink.may_remove(name), "{name}");
    }
    for name in ["removed-0123456789abcdef-v1-0123abcd", "t-1", "something"] {
        assert!(!sink.may_remove(name), "{name}");
    }
}

#[test]
fn files_are_staged_in_the_checked_root() {
    let dir = tempfile::tempdir().unwrap();
    let [nas, away, data] = ["nas", "away", "data"].map(|name| dir.path().join(name));
    std::fs::create_dir(&nas).unwrap();
    std::fs::create_dir(&data).unwrap();
    let sink = FilesSink::open(Some(&settings::FilesSink { root: nas.clone() }), &data).unwrap();
    let staging = sink.staging().unwrap();
    // Unmounted between the check and the following steps.
    durable::rename_noreplace(&nas, &away).unwrap();
    std::fs::create_dir(&nas).unwrap();
    let transfer = "t-1".parse().unwrap();
    assert!(!staging.has(&transfer).unwrap());
    let stage = staging.stage(&transfer).unwrap();
    stage.write_file(&"a".parse().unwrap(), b"a").unwrap();
    assert!(staging.has(&transfer).unwrap());
    assert_eq!(
        std::fs::read_dir(&nas).unwrap().count(),
        0,
        "nothing was created on the disk below the mount"
    );
    assert_eq!(
        std::fs::read(away.join(".packhorse/staging/t-1/a")).unwrap(),
        b"a"
    );
    assert_eq!(
        sink.staging().map(drop).unwrap_err().reason,
        Reason::SinkUnavailable
    );
    std::fs::remove_dir(&nas).unwrap();
    assert_eq!(
        sink.staging().map(drop).unwrap_err().reason,
        Reason::SinkUnavailable
    );
}

#[test]
fn a_damaged_name_of_the_daemon_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sink-files-owner");
    let owner = || {
        let root = DaemonRoot::new(dir.path().join("nas"), true, dir.path()).unwrap();
        root.owner().to_owned()
    };
    let first = owner();
    assert_eq!(owner(), first);
    for damaged in [
        &b"\xff\xfe\0"[..],
        b"",
        b"../../../etc",
        b"0123456789ABCDEF",
    ] {
        durable::replace(&file, damaged).unwrap();
        let new = owner();
        assert!(new.len() == 16 && new != first, "{new}");
        assert_eq!(owner(), new);
    }
}

/// The sink tries what a filesystem can do, also one on which nothing can be removed.
#[tokio::test]
async fn trying_a_filesystem_leaves_at_most_one_entry() {
    let dir = tempfile::tempdir().unwrap();
    let [nas, data] = ["nas", "data"].map(|name| dir.path().join(name));
    std::fs::create_dir(&nas).unwrap();
    std::fs::create_dir(&data).unwrap();
    let sink = FilesSink::open(Some(&settings::FilesSink { root: nas }), &data).unwrap();
    durable::create_dir_all(&sink.staging).unwrap();
    let left = || {
        std::fs::read_dir(&sink.staging)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect::<Vec<_>>()
    };
    // What an attempt left that could remove nothing.
    for label in ["probe", "trial"] {
        durable::create_dir_all(&sink.root.tried(label).join("Case")).unwrap();
    }
    for name in left() {
        assert!(sink.may_remove(&name), "{name}");
        let other = DaemonRoot::new(dir.path().join("nas"), true, dir.path()).unwrap();
        assert!(!other.may_remove(&name), "{name} is of another site");
    }
    sink.check(&incoming("v1")).await.unwrap();
    sink.trial().await.unwrap();
    assert_eq!(left(), Vec::<String>::new(), "it is used and removed");

    // A folder in which entries can be created and not be removed, where the test may make one.
    let append_only = |on: bool| {
        let folder = File::open(&sink.staging).unwrap();
        let flags = match on {
            true => rustix::fs::IFlags::APPEND,
            false => rustix::fs::IFlags::empty(),
        };
        rustix::fs::ioctl_setflags(&folder, flags)
    };
    if append_only(true).is_err() {
        return;
    }
    let sink = FilesSink {
        mount: Arc::default(),
        ..sink.clone()
    };
    let mut faults = Vec::new();
    for _ in 0..4 {
        faults.push(sink.check(&incoming("v1")).await.err());
        faults.push(sink.trial().await.err());
    }
    let there = left();
    append_only(false).unwrap();
    assert!(faults.iter().all(Option::is_some), "{faults:?}");
    assert!(there.len() <= 2, "{there:?}");
}
