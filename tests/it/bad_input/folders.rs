//! Folders that cannot be published, and file names that a site's filesystem cannot store.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::command::{bound, run, tool};
use crate::support::daemon::{Hub, PACKHORSE, Site, SiteSpec};
use crate::support::data::{chmod, write};
use crate::support::{Scratch, find, is_root, limit, secs, skipped, tool_user, wait_for};

use super::Refusing;

#[test]
fn special_files_and_links_out_of_the_folder_are_named() {
    let _limit = limit(secs(90));
    let world = Refusing::start();
    let folder = |name: &str| {
        let path = world.scratch.folder(name);
        write(&path.join("good.bin"), b"good");
        path
    };

    let fifo = folder("fifo");
    tool("mkfifo", &[fifo.join("管道").to_str().unwrap()]);
    world
        .hub
        .refuses(&fifo, "dataset/fifo:v1", &[], 8, &["管道"]);

    let socket = folder("socket");
    let _listener = std::os::unix::net::UnixListener::bind(socket.join("s.sock")).unwrap();
    world
        .hub
        .refuses(&socket, "operator/socket:v1", &[], 8, &["s.sock"]);

    for (n, target) in ["../outside", "/etc/passwd", "sub/../../outside"]
        .iter()
        .enumerate()
    {
        let escaping = folder(&format!("escaping-{n}"));
        symlink(target, escaping.join("leaves")).unwrap();
        world.hub.refuses(
            &escaping,
            "dataset/escaping:v1",
            &[],
            8,
            &["leaves", target],
        );
    }
    world.check_clean();
}

#[test]
fn all_names_that_are_not_utf8_are_listed() {
    let _limit = limit(secs(90));
    let world = Refusing::start();
    let folder = world.scratch.folder("names");
    for i in 0..5_u8 {
        write(
            &folder.join(OsStr::from_bytes(&[b'n', b'0' + i, 0xff, 0xfe])),
            b"x",
        );
    }
    world.hub.refuses(
        &folder,
        "dataset/names:v1",
        &[],
        8,
        &["n0", "n1", "n2", "n3", "n4"],
    );
    world.check_clean();
}

#[test]
fn missing_and_empty_sources_are_refused() {
    let _limit = limit(secs(90));
    let world = Refusing::start();
    let missing = world.scratch.join("没有");
    world
        .hub
        .refuses(&missing, "model/none:v1", &[], 5, &["没有"]);
    world.hub.refuses(
        Path::new("/dev/null"),
        "model/none:v1",
        &[],
        8,
        &["/dev/null"],
    );
    world.check_clean();
}

#[test]
fn a_file_that_the_daemon_cannot_read_is_named() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    if is_root() {
        // Root can read everything, so the daemon runs as another user.
        let (user, group) = tool_user("nobody");
        hub.run_as(user);
        std::fs::create_dir(&hub.data_dir).unwrap();
        std::os::unix::fs::chown(&hub.data_dir, Some(user), Some(group)).unwrap();
        chmod(&hub.config, 0o644);
    }
    hub.start();
    let folder = scratch.folder("folder");
    write(&folder.join("a.bin"), b"good");
    write(&folder.join("秘密.bin"), b"secret");
    chmod(&folder.join("秘密.bin"), 0);
    hub.refuses(&folder, "dataset/secret:v1", &[], 4, &["秘密.bin"]);
    assert_eq!(super::leftovers(&hub).len(), 0);
}

#[test]
fn a_file_that_shrinks_or_grows_while_it_is_read_is_named() {
    let _limit = limit(secs(180));
    let world = Refusing::start();
    let hub = &world.hub;
    for (name, len, change) in [
        ("shrinks", 2_u64 << 30, 1 << 20),
        ("grows", 2 << 30, (2 << 30) + 4096),
    ] {
        let folder = world.scratch.folder(name);
        let path = folder.join("big.bin");
        // A sparse file takes no disk space, and reading it takes a while.
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        std::thread::scope(|scope| {
            let publish = scope.spawn(|| {
                let reference = format!("model/{name}:v1");
                let mut command = bound(PACKHORSE);
                command
                    .args([
                        "publish",
                        folder.to_str().unwrap(),
                        "--as",
                        &reference,
                        "--config",
                    ])
                    .arg(&hub.config);
                run(&mut command, secs(120))
            });
            let open_files = format!("/proc/{}/fd", hub.pid());
            wait_for("the hub reads the file", secs(30), || {
                let links = std::fs::read_dir(&open_files).unwrap().flatten();
                links
                    .filter_map(|l| std::fs::read_link(l.path()).ok())
                    .any(|target| target == path)
                    .then_some(())
            });
            std::fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(change)
                .unwrap();
            publish
                .join()
                .unwrap()
                .expect(8)
                .says(&["big.bin", "changed"]);
        });
        hub.cli(&["show", &format!("model/{name}:v1")]).expect(5);
    }
    world.check_clean();
}

/// A mounted filesystem, which is unmounted when dropped.
struct Mount(std::path::PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = run(bound("umount").args(["-l"]).arg(&self.0), secs(20));
    }
}

/// Mounts an exFAT filesystem, which allows few characters and ignores case, like a share of a
/// Windows server.
fn mount_exfat(image: &Path, root: &Path) -> Option<Mount> {
    std::fs::File::create(image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    tool("mkfs.exfat", &[image.to_str().unwrap()]);
    // The loop device is removed with its last user.
    let attached = run(
        bound("losetup").args(["--find", "--show"]).arg(image),
        secs(20),
    );
    let device = (attached.code == 0).then(|| attached.out.trim().to_owned())?;
    let mounted = run(bound("mount.exfat-fuse").arg(&device).arg(root), secs(20)).code == 0;
    let _ = run(bound("losetup").args(["--detach", &device]), secs(20));
    mounted.then(|| Mount(root.into()))
}

#[test]
fn all_names_that_the_nas_cannot_store_are_listed() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let root = scratch.folder("nas");
    let Some(_mount) = mount_exfat(&scratch.join("exfat.img"), &root) else {
        skipped(
            "an exFAT filesystem cannot be mounted here: that needs root, a loop device and /dev/fuse",
        );
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        root: Some(root.clone()),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = scratch.folder("source");
    for name in [
        "a:b.png",
        "what?.png",
        "Same.png",
        "same.png",
        "trailing.",
        "好.png",
    ] {
        write(&source.join(name), name.as_bytes());
    }
    hub.publish(&source, "dataset/names:v1", &[]);
    let id = hub.deliver(&["dataset/names:v1"], "chengdu").remove(0);
    let failed = hub.wait_transfer(&id, "refused", secs(60), |t| t.state == "failed");
    assert!(failed.has_reason(&["sink_refused"]), "{failed:#?}");
    let message = failed.message.unwrap_or_default();
    for name in ["a:b.png", "what?.png", "trailing.", "ame.png"] {
        assert!(message.contains(name), "{name} is not in {message:?}");
    }
    assert!(!message.contains("好.png"), "{message:?}");
    assert!(!site.folder("dataset/names:v1").exists());
    assert_eq!(
        find(&root, &|p| p.to_string_lossy().contains("好")),
        Vec::<std::path::PathBuf>::new(),
        "nothing is left"
    );
}
