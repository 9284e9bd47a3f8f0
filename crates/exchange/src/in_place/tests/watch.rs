//! The check: what it finds, and what it reads for that.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use super::*;
use base::clock;

/// A folder that was published in place.
struct Watched {
    f: Fixture,
    folder: PathBuf,
    published: InPlace,
}

fn watched() -> Watched {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(
        &folder,
        Some(&StorageLocation::Folder {
            path: folder.clone(),
        }),
    );
    Watched {
        f,
        folder,
        published,
    }
}

/// As if it was published now: its files are newer than what may be the difference of two clocks.
fn fresh() -> Mark {
    Mark::new(clock::now_ms())
}

/// As if its files were old when it was published.
fn old() -> Mark {
    Mark::new(clock::now_ms() + 600_000)
}

impl Watched {
    fn stopped_check(&self, mark: &mut Mark, stop: &CancellationToken) -> Option<ContentCheck> {
        let InPlace { ingested, place } = &self.published;
        self.f
            .origin
            .check(ingested.digest, &ingested.root, place, mark, false, stop)
            .unwrap()
    }

    fn check(&self, mark: &mut Mark) -> Option<ContentCheck> {
        self.stopped_check(mark, &CancellationToken::new())
    }

    #[track_caller]
    fn sound(&self, mark: &mut Mark, read: u64) {
        assert_eq!(
            self.check(mark),
            Some(ContentCheck {
                changed: 0,
                first: None,
                read
            })
        );
    }

    /// One file changed: the path that is told, and why.
    #[track_caller]
    fn wrong(&self, mark: &mut Mark, path: &str, why: &str) {
        let check = self.check(mark).unwrap();
        assert_eq!(check.changed, 1, "{check:?}");
        let expected = format!(
            "{} changed after it was published: {why}",
            self.folder.join(path).display()
        );
        assert_eq!(check.message(), Some(expected));
    }
}

/// Later than the last check by more than the step of any filesystem's clock.
fn later(mark: &mut Mark) {
    mark.age();
    base::testing::wait_for_file_clock();
}

#[test]
fn an_unchanged_file_is_read_again_only_while_its_time_may_be_too_new() {
    let w = watched();
    w.sound(&mut old(), 0);
    let mut mark = fresh();
    w.sound(&mut mark, 305_000);
    w.sound(&mut mark, 305_000);
    later(&mut mark);
    w.sound(&mut mark, 305_000);
    w.sound(&mut mark, 0);
    // Another mode, and nothing else: it has to be read to know that.
    fs::set_permissions(w.folder.join("a.bin"), fs::Permissions::from_mode(0o600)).unwrap();
    w.sound(&mut mark, 300_000);
}

#[test]
fn other_content_under_the_same_size_and_time_is_found() {
    let w = watched();
    let mut mark = fresh();
    w.sound(&mut mark, 305_000);
    later(&mut mark);
    w.sound(&mut mark, 305_000);
    w.sound(&mut mark, 0);
    let path = w.folder.join("sub/b.bin");
    let good = fs::read(&path).unwrap();
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, random(5_000, 9)).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(time)
        .unwrap();
    for _ in 0..2 {
        w.wrong(
            &mut mark,
            "sub/b.bin",
            "the content does not match the recorded hash",
        );
    }
    assert_eq!(
        w.check(&mut mark).unwrap().read,
        5_000,
        "and nothing but that file is read"
    );
    fs::write(&path, good).unwrap();
    w.sound(&mut mark, 5_000);
}

#[test]
fn a_different_size_and_a_missing_file_are_found_without_reading() {
    let w = watched();
    let (a, b, empty) = (
        w.folder.join("a.bin"),
        w.folder.join("sub/b.bin"),
        w.folder.join("sub/empty"),
    );
    let good = fs::read(&a).unwrap();
    fs::write(&a, &good[..100]).unwrap();
    w.wrong(&mut old(), "a.bin", "it has 100 bytes now, and had 300000");
    fs::remove_file(&a).unwrap();
    w.wrong(&mut old(), "a.bin", "it is gone");
    symlink(&b, &a).unwrap();
    w.wrong(&mut old(), "a.bin", "it is not a regular file any more");
    fs::remove_file(&a).unwrap();
    fs::write(&empty, b"not any more").unwrap();
    let check = w.check(&mut old()).unwrap();
    assert_eq!((check.changed, check.read), (2, 0));
    assert!(
        check
            .message()
            .unwrap()
            .ends_with("a.bin changed after it was published: it is gone; so did another file")
    );
    fs::remove_dir_all(w.folder.join("sub")).unwrap();
    fs::write(w.folder.join("sub"), b"a file where a folder was").unwrap();
    assert_eq!(w.check(&mut old()).unwrap().changed, 3);
    fs::remove_file(w.folder.join("sub")).unwrap();
    fs::create_dir(w.folder.join("sub")).unwrap();
    for (path, bytes) in [(a, good), (b, random(5_000, 2)), (empty, Vec::new())] {
        fs::write(path, bytes).unwrap();
    }
    w.sound(&mut old(), 0);
    w.sound(&mut fresh(), 305_000);
}

#[test]
fn the_check_of_an_unavailable_folder_has_no_result() {
    let w = watched();
    let away = w.f.dir.path().join("away");
    durable::rename_noreplace(&w.folder, &away).unwrap();
    assert_eq!(w.check(&mut fresh()), None);
    fs::create_dir(&w.folder).unwrap();
    assert_eq!(w.check(&mut fresh()), None, "an empty mount point");
    fs::write(w.folder.join("other.txt"), b"in use").unwrap();
    assert_eq!(
        w.check(&mut fresh()).unwrap().changed,
        3,
        "a folder with something in it is no mount point"
    );
    fs::remove_dir_all(&w.folder).unwrap();
    durable::rename_noreplace(&away, &w.folder).unwrap();
    w.sound(&mut fresh(), 305_000);
}

#[test]
fn a_check_ends_when_the_daemon_stops() {
    let w = watched();
    let stop = CancellationToken::new();
    stop.cancel();
    assert_eq!(w.stopped_check(&mut fresh(), &stop), None);
}

#[test]
fn written_content_is_checked_too() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(&folder, None);
    fs::remove_dir_all(&folder).unwrap();
    let kept = kept(&f, &published);
    assert_eq!(
        published.place,
        StorageLocation::Folder { path: kept.clone() }
    );
    let w = Watched {
        f,
        folder: kept.clone(),
        published,
    };
    w.sound(&mut fresh(), 305_000);
    fs::remove_file(kept.join("a.bin")).unwrap();
    w.wrong(&mut old(), "a.bin", "it is gone");
}

fn kept(f: &Fixture, published: &InPlace) -> PathBuf {
    f.dir
        .path()
        .join("data/published")
        .join(published.ingested.digest.hex())
}

#[test]
fn written_content_next_to_a_published_folder_is_checked_by_its_size() {
    let w = watched();
    let kept = kept(&w.f, &w.published);
    fs::create_dir_all(&kept).unwrap();
    durable::rename_noreplace(&w.folder.join("a.bin"), &kept.join("a.bin")).unwrap();
    // That disk has a clock of its own.
    w.sound(&mut fresh(), 5_000);
    fs::remove_file(kept.join("a.bin")).unwrap();
    fs::write(kept.join("other"), b"").unwrap();
    w.wrong(&mut fresh(), "a.bin", "it is gone");
}
