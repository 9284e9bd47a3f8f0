//! A NAS that fails, hangs, is full, is mounted late or is used by others. A transfer is `done`
//! only if its content is stored, and nothing else waits for the NAS.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fuser::Errno;

use crate::support::daemon::{Hub, Site, SiteSpec, Transfer};
use crate::support::disk::SmallDisk;
use crate::support::faulty::{Faults, Faulty, Op};
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, data, is_root, limit, secs, wait_for};

/// A hub, and a site whose NAS has faults. The NAS is dropped first and then answers all calls: a
/// process that waits for it cannot be killed.
struct Lab {
    nas: Faulty,
    site: Site,
    hub: Hub,
    scratch: Scratch,
}

/// Creates a source with this number of files of this size.
fn source(scratch: &Scratch, name: &str, files: usize, bytes: usize) -> PathBuf {
    let root = scratch.join(name);
    for number in 0..files {
        data::write(
            &root.join(format!("part-{number:03}")),
            &data::noise(&mut data::rng(&format!("{name}{number}")), bytes),
        );
    }
    root
}

impl Lab {
    fn new() -> Option<Self> {
        let scratch = Scratch::new();
        let root = scratch.join("nas");
        let nas = Faulty::mount(&root, &scratch.join("behind"))?;
        let hub = Hub::start_new(scratch.path());
        let site = Site::start_new(
            scratch.path(),
            &hub,
            "chengdu",
            &SiteSpec {
                root: Some(root),
                ..SiteSpec::default()
            },
        );
        Some(Self {
            site,
            hub,
            nas,
            scratch,
        })
    }

    /// Creates a source with this number of files of this size.
    fn source(&self, name: &str, files: usize, bytes: usize) -> PathBuf {
        source(&self.scratch, name, files, bytes)
    }

    fn deliver(&self, source: &Path, reference: &str) -> String {
        self.hub.publish(source, reference, &[]);
        self.hub.deliver(&[reference], "chengdu").remove(0)
    }

    fn waits(&self, id: &str, reason: &str) -> Transfer {
        self.hub.wait_transfer(id, reason, secs(20), |t| {
            t.reason.as_deref() == Some(reason)
        })
    }

    fn behind(&self, reference: &str) -> PathBuf {
        self.scratch
            .join("behind")
            .join(reference.replace(':', "/"))
    }
}

/// Calls a function when it is dropped.
struct AtEnd<F: FnMut()>(F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Creates a label set of one line.
fn labels(scratch: &Scratch, name: &str) -> PathBuf {
    let path = scratch.join(&format!("{name}.csv"));
    std::fs::write(&path, "sample_path,class,x,y,w,h\na.png,dent,1,1,5,5\n").unwrap();
    path
}

#[test]
fn a_hanging_nas_delays_nothing_else() {
    let _limit = limit(secs(120));
    let Some(lab) = Lab::new() else { return };
    lab.nas.set(|faults| faults.hangs = true);
    let id = lab.deliver(&lab.source("big", 40, 100_000), "dataset/big:v1");
    let waiting = lab.waits(&id, "sink_unavailable");
    assert!(
        waiting
            .message
            .as_deref()
            .is_some_and(|m| m.contains("has not answered for")),
        "{waiting:#?}"
    );

    let doctor = lab.site.cli_within(&["doctor"], secs(15));
    assert!(
        (doctor.out + &doctor.err).contains("has not answered for"),
        "doctor reports it and does not hang"
    );
    lab.hub.cli(&["cancel", &id]).expect(0);
    lab.hub
        .publish(&labels(&lab.scratch, "l"), "labels/l:v1", &[]);
    lab.hub.deliver_and_wait("labels/l:v1", "chengdu", secs(20));
    lab.hub
        .wait_transfer(&id, "cancelled", secs(20), |t| t.state == "cancelled");

    lab.nas.heal();
    lab.hub.cli(&["retry", &id]).expect(0);
    lab.hub.wait_done(&id, secs(40));
    assert_same(&lab.scratch.join("big"), &lab.behind("dataset/big:v1"));
    wait_for("staging is empty", secs(20), || {
        lab.site.leftovers().is_empty().then_some(())
    });
}

#[test]
fn a_write_error_at_close_prevents_done() {
    let _limit = limit(secs(120));
    let Some(lab) = Lab::new() else { return };
    lab.nas.set(|faults| {
        faults.loses = Some("part-00".into());
        faults.fail.insert(Op::Flush, Errno::EIO);
        faults.only = "part-00".into();
    });
    let source = lab.source("many", 67, 3_000);
    let id = lab.deliver(&source, "dataset/many:v1");
    let waiting = lab.waits(&id, "sink_unavailable");
    assert!(
        !lab.behind("dataset/many:v1").exists() && !waiting.is_final(),
        "{waiting:#?}"
    );
    lab.nas.heal();
    lab.hub.wait_done(&id, secs(60));
    assert_same(&source, &lab.behind("dataset/many:v1"));
    assert!(
        lab.nas.calls(Op::Fsync) >= 67,
        "each file is synced if the filesystem cannot be synced as a whole"
    );
}

#[test]
fn after_a_failed_sync_the_file_is_written_again_and_little_is_transmitted_again() {
    let _limit = limit(secs(150));
    let Some(lab) = Lab::new() else { return };
    let source = lab.source("films", 10, 2 << 20);
    lab.nas.set(|faults| {
        faults.fail.insert(Op::Fsync, Errno::ENOSPC);
        faults.only = "part-00".into();
        faults.sync_fails_again = true;
    });
    let id = lab.deliver(&source, "dataset/films:v1");
    let waiting = lab.waits(&id, "no_space");
    assert!(
        waiting
            .message
            .as_deref()
            .is_some_and(|m| m.contains("sync")),
        "the first error is reported: {waiting:#?}"
    );
    let tries = lab.hub.wait_transfer(&id, "tried again", secs(60), |t| {
        t.attempts >= waiting.attempts + 3
    });
    let sent = tries.bytes.wire - waiting.bytes.wire;
    assert!(
        sent <= 4 * (3 << 20),
        "{sent} bytes were transmitted for three attempts that could store nothing"
    );
    // Files whose sync failed once would fail at each later sync, as on SMB.
    lab.nas.set(|faults| faults.fail.clear());
    lab.hub.wait_done(&id, secs(60));
    assert_same(&source, &lab.behind("dataset/films:v1"));
}

#[test]
fn nothing_is_transmitted_again_while_every_write_fails() {
    let _limit = limit(secs(120));
    let Some(lab) = Lab::new() else { return };
    lab.nas.set(|faults| {
        faults.fail.insert(Op::Write, Errno::EIO);
    });
    let source = lab.source("thirty", 30, 1 << 20);
    let id = lab.deliver(&source, "dataset/thirty:v1");
    let waiting = lab.waits(&id, "sink_unavailable");
    let tries = lab.hub.wait_transfer(&id, "tried again", secs(60), |t| {
        t.attempts >= waiting.attempts + 3
    });
    assert_eq!(
        tries.bytes.received, waiting.bytes.received,
        "an attempt that cannot write requests nothing"
    );
    lab.nas.heal();
    lab.hub.wait_done(&id, secs(60));
    assert_same(&source, &lab.behind("dataset/thirty:v1"));
}

#[test]
fn a_transfer_waits_for_a_read_only_nas() {
    let _limit = limit(secs(90));
    let Some(lab) = Lab::new() else { return };
    lab.nas.set(|faults| faults.read_only = true);
    let source = lab.source("little", 3, 1000);
    let id = lab.deliver(&source, "dataset/little:v1");
    lab.waits(&id, "sink_unavailable");
    lab.nas.heal();
    lab.hub.wait_done(&id, secs(40));
    assert_same(&source, &lab.behind("dataset/little:v1"));
}

#[test]
fn a_file_that_cannot_be_stored_does_not_block_the_others() {
    let _limit = limit(secs(150));
    for op in [Op::Write, Op::Flush, Op::Fsync] {
        let Some(lab) = Lab::new() else { return };
        lab.nas.set(|faults| {
            faults.fail.insert(op, Errno::EIO);
            faults.only = "part-007".into();
        });
        let source = lab.source("many", 50, 20_000);
        let id = lab.deliver(&source, "dataset/many:v1");
        let rest = lab
            .hub
            .wait_transfer(&id, "all but one file stored", secs(40), |t| {
                t.bytes.committed == 49 * 20_000
            });
        let again = lab.hub.wait_transfer(&id, "tried again", secs(60), |t| {
            t.attempts > rest.attempts + 1
        });
        assert!(
            again.bytes.received <= 51 * 20_000,
            "{op:?}: that file is tried before it is transmitted again: {again:#?}"
        );
        assert_eq!(again.bytes.committed, 49 * 20_000, "{op:?}: {again:#?}");
        lab.nas.heal();
        lab.hub.cli(&["retry", &id]);
        lab.hub.wait_done(&id, secs(90));
        assert_same(&source, &lab.behind("dataset/many:v1"));
    }
}

#[test]
fn a_nas_that_cannot_be_read_is_not_reported_as_damage() {
    let _limit = limit(secs(120));
    let Some(lab) = Lab::new() else { return };
    let source = lab.source("one", 12, 20_000);
    let id = lab.deliver(&source, "dataset/x:v1");
    lab.hub.wait_done(&id, secs(30));
    let fail = |errno, only: &str| {
        lab.nas.set(|faults| {
            faults.fail.insert(Op::Read, errno);
            faults.only = only.into();
        });
    };
    fail(Errno::EHOSTDOWN, "part-");
    let verified = lab.site.cli(&["verify", "dataset/x:v1"]);
    assert!(verified.code != 0 && verified.code != 8, "{}", verified.err);
    assert!(
        !(verified.out + &verified.err).contains("--repair"),
        "no damage is reported"
    );
    lab.hub.cli(&["retry", &id]).expect(0);
    lab.waits(&id, "sink_unavailable");
    lab.nas.heal();
    let again = lab.hub.wait_done(&id, secs(40));
    assert_eq!(
        again.bytes.received, 0,
        "nothing was transmitted again: {again:#?}"
    );

    // A file is damaged if the disk cannot read it but works otherwise.
    fail(Errno::EIO, "v1/part-003");
    let verified = lab.site.cli(&["verify", "dataset/x:v1"]).expect(8);
    assert!((verified.out + &verified.err).contains("part-003"));
    lab.nas.heal();
}

#[test]
fn a_temporary_failure_of_the_nas_loses_no_content_of_earlier_versions() {
    let _limit = limit(secs(120));
    let Some(lab) = Lab::new() else { return };
    let source = lab.source("one", 12, 20_000);
    let first = lab.deliver(&source, "dataset/x:v1");
    lab.hub.wait_done(&first, secs(30));
    // The content of v1 cannot be read, and no replacement can be stored.
    lab.nas.set(|faults| {
        for op in [Op::Read, Op::Open, Op::Write] {
            faults.fail.insert(op, Errno::EHOSTDOWN);
        }
    });
    std::fs::write(source.join("part-new"), "new").unwrap();
    let second = lab.deliver(&source, "dataset/x:v2");
    lab.waits(&second, "sink_unavailable");
    lab.nas.heal();
    let done = lab.hub.wait_done(&second, secs(60));
    assert!(
        done.bytes.reused >= 12 * 20_000,
        "the content of v1 is reused: {done:#?}"
    );
    assert_same(&source, &lab.behind("dataset/x:v2"));
}

#[test]
fn a_linked_file_is_not_opened_again() {
    let _limit = limit(secs(60));
    let Some(lab) = Lab::new() else { return };
    // Small whole files, so that the next version links them.
    let source = lab.source("one", 12, 20_000);
    let first = lab.deliver(&source, "dataset/x:v1");
    lab.hub.wait_done(&first, secs(30));
    // Simulates an SMB server that refuses the second name of a file that is open by its first
    // name.
    lab.nas.set(|faults| {
        faults.fail.insert(Op::Open, Errno::EINVAL);
        faults.only = "/t-".into();
    });
    std::fs::remove_file(source.join("part-011")).unwrap();
    let second = lab.deliver(&source, "dataset/x:v2");
    let done = lab.hub.wait_done(&second, secs(30));
    assert_eq!((done.attempts, done.bytes.received), (1, 0), "{done:#?}");
    assert_same(&source, &lab.behind("dataset/x:v2"));
}

#[test]
fn a_transfer_waits_for_permissions_that_the_nas_removed_temporarily() {
    let _limit = limit(secs(150));
    let Some(lab) = Lab::new() else { return };
    for (number, op) in [Op::Create, Op::Write, Op::Fsync, Op::Mkdir, Op::Rename]
        .into_iter()
        .enumerate()
    {
        let artifact = format!("dataset/n{number}:v1");
        let source = lab.source(&format!("n{number}"), 4, 3_000);
        data::write(&source.join("sub/part"), b"p");
        // Only in the staging folder: the checks before the transfer must not fail.
        lab.nas.set(|faults| {
            faults.fail.insert(
                op,
                if op == Op::Mkdir {
                    Errno::ENOENT
                } else {
                    Errno::EACCES
                },
            );
            faults.only = if op == Op::Rename {
                artifact.replace(':', "/")
            } else {
                "/t-".into()
            };
        });
        let id = lab.deliver(&source, &artifact);
        let waiting = lab.waits(
            &id,
            if op == Op::Mkdir {
                "sink_unavailable"
            } else {
                "sink_denied"
            },
        );
        assert!(!waiting.is_final(), "{op:?}: {waiting:#?}");
        lab.nas.heal();
        let done = lab.hub.wait_done(&id, secs(40));
        assert_eq!(done.state, "done", "{op:?}");
        assert_same(&source, &lab.behind(&artifact));
    }
}

#[test]
fn a_transfer_waits_for_a_nas_that_was_unmounted() {
    let _limit = limit(secs(90));
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let (root, behind) = (scratch.folder("nas"), scratch.folder("behind"));
    // A bind mount, so that the same content can be mounted again.
    let bind = || rustix::mount::mount_bind(&behind, &root);
    let unbind = || rustix::mount::unmount(&root, rustix::mount::UnmountFlags::DETACH);
    if bind().is_err() {
        return;
    }
    let _unbound = AtEnd(|| _ = unbind());
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    let spec = SiteSpec {
        root: Some(root.clone()),
        through: Some(line.address()),
        ..SiteSpec::default()
    };
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let source = source(&scratch, "films", 8, 1 << 20);
    hub.publish(&source, "dataset/films:v1", &[]);
    line.hold_at(line.down() + (4 << 20));
    let id = hub.deliver(&["dataset/films:v1"], "chengdu").remove(0);
    hub.wait_transfer(&id, "on its way", secs(60), |t| t.bytes.received >= 1 << 20);
    unbind().unwrap();
    line.hold_at(0);
    let waiting = hub.wait_transfer(&id, "waiting", secs(30), |t| {
        t.reason.as_deref() == Some("sink_unavailable") || t.is_final()
    });
    assert!(!waiting.is_final(), "{waiting:#?}");
    assert_eq!(
        std::fs::read_dir(&root).unwrap().count(),
        0,
        "nothing is created below the mount point"
    );
    bind().unwrap();
    hub.wait_done(&id, secs(40));
    assert_same(&source, &site.folder("dataset/films:v1"));
    unbind().unwrap();
    let verified = site.cli(&["verify", "dataset/films:v1"]).expect(10);
    let said = verified.out.clone() + &verified.err;
    assert!(
        said.contains("the NAS is not mounted at") && !said.contains("--repair"),
        "{said}"
    );
}

#[test]
fn on_a_case_insensitive_filesystem_current_is_a_file_and_names_the_version() {
    let _limit = limit(secs(90));
    let Some(lab) = Lab::new() else { return };
    lab.nas.set(|faults| faults.folds = true);
    let source = lab.source("one", 3, 5_000);
    for version in ["v1", "v2", "v3"] {
        if version == "v3" {
            // The state that an earlier revision left.
            let current = lab.scratch.join("behind/dataset/x/CURRENT");
            std::fs::remove_file(&current).unwrap();
            std::os::unix::fs::symlink("v2", &current).unwrap();
        }
        data::write(&source.join("new"), version.as_bytes());
        let id = lab.deliver(&source, &format!("dataset/x:{version}"));
        let done = lab.hub.wait_done(&id, secs(30));
        assert_eq!(
            (lab.site.current("dataset/x").as_str(), done.attempts),
            (version, 1),
            "{done:#?}"
        );
        assert!(
            lab.scratch
                .join("behind/dataset/x/CURRENT")
                .symlink_metadata()
                .unwrap()
                .is_file()
        );
    }
}

#[test]
fn a_version_is_done_only_when_current_names_it() {
    let _limit = limit(secs(90));
    let Some(lab) = Lab::new() else { return };
    let first = lab.deliver(&lab.source("one", 3, 1000), "dataset/x:v1");
    lab.hub.wait_done(&first, secs(30));
    lab.nas.set(|faults| {
        faults.fail.insert(Op::Rename, Errno::ENOSPC);
        faults.only = "CURRENT".into();
    });
    let second = lab.deliver(&lab.source("two", 3, 1000), "dataset/x:v2");
    let waiting = lab.waits(&second, "no_space");
    assert!(!waiting.is_final(), "{waiting:#?}");
    let again = lab
        .hub
        .wait_transfer(&second, "tried again", secs(30), |t| {
            t.attempts > waiting.attempts
        });
    assert!(
        !again.is_final() && lab.site.current("dataset/x") == "v1",
        "{again:#?}"
    );
    for (errno, reason) in [(Errno::EBUSY, "internal"), (Errno::EACCES, "sink_denied")] {
        lab.nas.set(|faults| {
            faults.fail.insert(Op::Rename, errno);
        });
        let other = lab.waits(&second, reason);
        let later = lab
            .hub
            .wait_transfer(&second, "tried again", secs(30), |t| {
                t.attempts > other.attempts + 1
            });
        assert!(
            !later.is_final() && later.bytes.received == again.bytes.received,
            "nothing is transmitted again: {later:#?}"
        );
    }
    lab.nas.heal();
    lab.hub.wait_done(&second, secs(40));
    assert_eq!(lab.site.current("dataset/x"), "v2");
}

#[test]
fn on_a_filesystem_with_fixed_modes_files_are_shared_and_nothing_fails() {
    let _limit = limit(secs(90));
    let check = |faults: fn(&mut Faults)| {
        let Some(lab) = Lab::new() else { return };
        // From the first access on, because the site detects this only once.
        lab.nas.set(faults);
        let source = lab.source("one", 20, 40_000);
        std::fs::set_permissions(
            source.join("part-001"),
            std::os::unix::fs::PermissionsExt::from_mode(0o664),
        )
        .unwrap();
        let first = lab.deliver(&source, "dataset/x:v1");
        lab.hub.wait_done(&first, secs(30));
        data::write(&source.join("new"), b"n");
        let second = lab.deliver(&source, "dataset/x:v2");
        let done = lab.hub.wait_done(&second, secs(30));
        assert!(
            done.bytes.received < 100,
            "all files except the new one are reused: {:?}",
            done.bytes
        );
        let inode = |version: &str| {
            std::fs::metadata(lab.behind(&format!("dataset/x:{version}")).join("part-002"))
                .unwrap()
                .ino()
        };
        assert_eq!(inode("v1"), inode("v2"), "it takes no additional space");
    };
    check(|faults| faults.mode = Some(0o777));
    check(|faults| {
        faults.fail.insert(Op::Chmod, Errno::EPERM);
    });
    check(|faults| faults.no_size = true);
}

#[test]
fn a_daemon_starts_although_old_staging_cannot_be_removed() {
    let _limit = limit(secs(90));
    let Some(mut lab) = Lab::new() else { return };
    let left = lab.scratch.join("behind/.packhorse/staging/removed-v1-123");
    std::fs::create_dir_all(&left).unwrap();
    data::write(&left.join("held-open"), b"x");
    lab.nas.set(|faults| {
        faults.fail.insert(Op::Unlink, Errno::EBUSY);
        faults.only = "held-open".into();
    });
    lab.site.stop();
    lab.site.start();
    let id = lab.deliver(&lab.source("one", 3, 1000), "dataset/x:v1");
    lab.hub.wait_done(&id, secs(30));
    assert!(
        lab.site
            .log()
            .contains("unused staged content could not be removed")
    );
    lab.nas.heal();
    // The removal is tried again when a transfer is cancelled, and each minute.
    lab.nas.set(|faults| faults.hangs = true);
    let id = lab.deliver(&lab.source("two", 3, 1000), "dataset/x:v2");
    lab.hub.cli(&["cancel", &id]).expect(0);
    lab.hub
        .wait_transfer(&id, "cancelled", secs(20), |t| t.state == "cancelled");
    lab.nas.heal();
    wait_for("the leftover is removed", secs(20), || {
        (!left.exists()).then_some(())
    });
}

#[test]
fn a_transfer_waits_for_a_nas_that_is_mounted_late() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let root = scratch.join("mnt/artifacts");
    let mut site = Site::new(
        scratch.path(),
        &hub,
        "chengdu",
        &SiteSpec {
            root: Some(root.clone()),
            ..SiteSpec::default()
        },
    );
    site.join(&hub, &[]);
    std::fs::remove_dir(&root).unwrap();
    site.start();
    hub.wait_online("chengdu", true, secs(20));
    hub.publish(&labels(&scratch, "l"), "labels/l:v1", &[]);
    hub.deliver_and_wait("labels/l:v1", "chengdu", secs(20));
    let source = scratch.join("one");
    data::write(&source.join("a"), b"a");
    hub.publish(&source, "dataset/x:v1", &[]);
    let id = hub.deliver(&["dataset/x:v1"], "chengdu").remove(0);
    let waiting = hub.wait_transfer(&id, "waiting", secs(20), |t| {
        t.reason.as_deref() == Some("sink_unavailable")
    });
    assert!(
        waiting
            .message
            .as_deref()
            .is_some_and(|m| m.contains("is not a directory")),
        "{waiting:#?}"
    );
    assert!(
        !root.exists(),
        "nothing is created on the disk below the mount point"
    );
    std::fs::create_dir_all(&root).unwrap();
    hub.wait_done(&id, secs(30));
    assert_same(&source, &site.folder("dataset/x:v1"));
}

#[test]
fn a_nas_can_be_mounted_at_another_path() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (old, new) = (scratch.folder("old"), scratch.join("new"));
    let mut site = Site::start_new(
        scratch.path(),
        &hub,
        "chengdu",
        &SiteSpec {
            root: Some(old.clone()),
            ..SiteSpec::default()
        },
    );
    let source = source(&scratch, "one", 8, 30_000);
    hub.publish(&source, "dataset/x:v1", &[]);
    hub.deliver_and_wait("dataset/x:v1", "chengdu", secs(30));
    site.stop();
    std::fs::rename(&old, &new).unwrap();
    site.edit_config(old.to_str().unwrap(), new.to_str().unwrap());
    site.start();
    hub.wait_online("chengdu", true, secs(20));
    site.cli(&["verify", "dataset/x:v1"]).expect(0);
    std::fs::remove_file(source.join("part-000")).unwrap();
    hub.publish(&source, "dataset/x:v2", &[]);
    let id = hub.deliver(&["dataset/x:v2"], "chengdu").remove(0);
    let done = hub.wait_done(&id, secs(30));
    assert_eq!(
        done.bytes.received, 0,
        "all content is at the new path: {done:#?}"
    );
    assert_same(&source, &new.join("dataset/x/v2"));
}

#[test]
fn two_sites_on_one_nas_do_not_remove_each_others_files() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let root = scratch.folder("nas");
    let spec = || SiteSpec {
        root: Some(root.clone()),
        ..SiteSpec::default()
    };
    let sites = ["a", "b"].map(|name| Site::start_new(scratch.path(), &hub, name, &spec()));
    let [a, mut b] = sites;
    let source = scratch.join("one");
    data::write(
        &source.join("p"),
        &data::noise(&mut data::rng("p"), 100_000),
    );
    hub.publish(&source, "dataset/x:v1", &[]);
    for id in hub.deliver(&["dataset/x:v1"], "a,b") {
        hub.wait_done(&id, secs(40));
    }
    assert_same(&source, &a.folder("dataset/x:v1"));
    // The staging folder of the other site looks like this.
    let staged = root.join(".packhorse/staging/t-of-another");
    data::write(&staged.join("half"), b"half");
    b.stop();
    b.start();
    hub.wait_online("b", true, secs(20));
    data::write(&source.join("q"), b"q");
    hub.publish(&source, "dataset/x:v2", &[]);
    for id in hub.deliver(&["dataset/x:v2"], "a,b") {
        hub.wait_done(&id, secs(40));
    }
    assert!(staged.join("half").exists());
    assert!(b.cli(&["doctor"]).out.contains("also used by other sites"));
}

#[test]
fn a_repair_keeps_the_files_that_users_added() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let source = scratch.join("one");
    for name in ["a", "b", "sub/c"] {
        data::write(
            &source.join(name),
            &data::noise(&mut data::rng(name), 5_000),
        );
    }
    hub.publish(&source, "dataset/x:v1", &[]);
    hub.deliver_and_wait("dataset/x:v1", "chengdu", secs(30));
    let folder = site.folder("dataset/x:v1");
    data::write(&folder.join("results/run1.csv"), b"a user's");
    std::fs::remove_file(folder.join("b")).unwrap();
    data::write(&folder.join("sub/c"), b"damaged");
    let said = site.cli(&["verify", "dataset/x:v1", "--repair"]);
    assert!(
        (said.out.clone() + &said.err).contains("results"),
        "the user's files are named: {} {}",
        said.out,
        said.err
    );
    wait_for("the version is complete again", secs(30), || {
        let same = |name: &str| {
            std::fs::read(source.join(name)).ok() == std::fs::read(folder.join(name)).ok()
        };
        ["a", "b", "sub/c"]
            .iter()
            .all(|name| same(name))
            .then_some(())
    });
    assert_eq!(
        std::fs::read(folder.join("results/run1.csv")).unwrap(),
        b"a user's"
    );
}

#[test]
fn every_filesystem_stores_a_version_and_a_full_one_delays_the_transfer() {
    let _limit = limit(secs(150));
    if !is_root() {
        return;
    }
    // Each waits most of the time, so they wait together.
    std::thread::scope(|scope| {
        for kind in ["ext4", "xfs", "btrfs", "tmpfs"] {
            scope.spawn(move || a_filesystem_stores_a_version_and_a_full_one_delays_it(kind));
        }
    });
}

fn a_filesystem_stores_a_version_and_a_full_one_delays_it(kind: &str) {
    let scratch = Scratch::new();
    let root = scratch.join("nas");
    let Some(disk) = SmallDisk::mount(kind, &root, &scratch.join("image")) else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(
        scratch.path(),
        &hub,
        "chengdu",
        &SiteSpec {
            root: Some(root),
            ..SiteSpec::default()
        },
    );
    let source = source(&scratch, "one", 40, 20_000);
    hub.publish(&source, "dataset/x:v1", &[]);
    let filler = disk.fill("filler", 0);
    let id = hub.deliver(&["dataset/x:v1"], "chengdu").remove(0);
    hub.wait_transfer(&id, "full", secs(30), |t| {
        t.reason.as_deref() == Some("no_space")
    });
    std::fs::remove_file(filler).unwrap();
    hub.wait_done(&id, secs(40));
    assert_same(&source, &site.folder("dataset/x:v1"));
    assert_eq!(site.current("dataset/x"), "v1", "{kind}");
}

#[test]
fn deliver_reports_the_state_of_the_artifact_at_the_site() {
    let _limit = limit(secs(120));
    let Some(lab) = Lab::new() else { return };
    let deliver = |reference: &str| {
        lab.hub.cli(&[
            "deliver",
            reference,
            "--to",
            "chengdu",
            "--wait",
            "--timeout",
            "40s",
        ])
    };
    let source = lab.source("one", 3, 5_000);
    let first = lab.deliver(&source, "dataset/x:v1");
    lab.hub.wait_done(&first, secs(30));
    let sound = deliver("dataset/x:v1").expect(0);
    assert!(!sound.out.contains("note:"), "{}", sound.out);

    let part = lab.behind("dataset/x:v1").join("part-001");
    for damage in ["gone", "another size", "another content", "time put back"] {
        match damage {
            "time put back" => {
                let modified = std::fs::metadata(&part).unwrap().modified().unwrap();
                data::write(&part, &[7; 5_000]);
                let file = std::fs::File::options().write(true).open(&part).unwrap();
                file.set_modified(modified).unwrap();
            }
            "gone" => std::fs::remove_file(&part).unwrap(),
            "another size" => data::write(&part, b"x"),
            _ => data::write(&part, &[7; 5_000]),
        }
        let said = deliver("dataset/x:v1").expect(0);
        assert!(
            said.out.contains("is delivered again"),
            "{damage}: {}",
            said.out
        );
        assert_same(&source, &lab.behind("dataset/x:v1"));
    }

    data::write(&source.join("new"), b"n");
    let second = lab.deliver(&source, "dataset/x:v2");
    lab.hub.wait_done(&second, secs(30));
    let held = deliver("dataset/x:v1").expect(0);
    assert!(
        (held.out.clone() + &held.err).contains("not active: the active version is v2"),
        "{} {}",
        held.out,
        held.err
    );
    assert!(
        lab.hub
            .transfer(&first)
            .message
            .is_some_and(|m| m.contains("not active")),
        "status reports it too"
    );

    lab.nas.set(|faults| faults.hangs = true);
    let unknown = lab
        .hub
        .cli(&[
            "deliver",
            "dataset/x:v2",
            "--to",
            "chengdu",
            "--wait",
            "--timeout",
            "8s",
        ])
        .expect(11);
    assert!(
        !(unknown.out + &unknown.err).contains("arrived"),
        "the copy cannot be checked now"
    );
    lab.waits(&second, "sink_unavailable");
    lab.nas.heal();
    lab.hub.wait_done(&second, secs(40));
}

#[test]
fn nothing_is_transmitted_again_while_the_chunk_index_has_no_space() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    // Only the chunk index is on the disk that becomes full.
    let index = scratch.join("index");
    let Some(disk) = Faulty::mount(&index, &scratch.join("behind-index")) else {
        return;
    };
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    let mut site = Site::new(
        scratch.path(),
        &hub,
        "chengdu",
        &SiteSpec {
            through: Some(line.address()),
            ..SiteSpec::default()
        },
    );
    site.join(&hub, &[]);
    std::os::unix::fs::symlink(index.join("places.redb"), site.data_dir.join("places.redb"))
        .unwrap();
    site.start();
    hub.wait_online("chengdu", true, secs(20));
    let source = source(&scratch, "films", 30, 1 << 20);
    hub.publish(&source, "dataset/films:v1", &[]);
    line.hold_at(line.down() + (10 << 20));
    let id = hub.deliver(&["dataset/films:v1"], "chengdu").remove(0);
    hub.wait_transfer(&id, "on its way", secs(60), |t| {
        t.bytes.committed >= 2 << 20
    });
    disk.set(|faults| {
        faults.fail.insert(Op::Write, Errno::ENOSPC);
    });
    line.hold_at(0);
    let waiting = hub.wait_transfer(&id, "out of space", secs(40), |t| {
        t.reason.as_deref() == Some("no_space")
    });
    assert!(
        waiting
            .message
            .as_deref()
            .is_some_and(|m| m.contains("places.redb")),
        "the message names the full disk: {waiting:#?}"
    );
    let tried = disk.calls(Op::Write);
    wait_for("it is tried again", secs(60), || {
        (disk.calls(Op::Write) > tried).then_some(())
    });
    disk.heal();
    let done = hub.wait_done(&id, secs(60));
    assert_eq!(
        done.bytes.received,
        30 << 20,
        "every byte was transmitted once: {:?}",
        done.bytes
    );
    assert_same(&source, &site.folder("dataset/films:v1"));
}
