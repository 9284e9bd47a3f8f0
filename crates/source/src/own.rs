//! Identifies the files of the daemon itself: its state and its secrets, which are never published
//! and never overwritten by an export.
//!
//! Directories and files are compared by device and inode, so a link, a bind mount or another path
//! makes no difference. The identities are read again for each publish, import and export
//! ([`Own::of`]), because state files change.
//!
//! The private keys of other daemons and of publishers on this machine are recognised by their
//! names only (`IDENTITY`): this process does not know where they are.

use std::collections::HashSet;
use std::fs::{self, File, Metadata, ReadDir};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base::fault::{Fault, IoContext};

/// A file or directory, independent of its path.
type Id = (u64, u64);

/// The reason for a rejection.
const WHY: &str = "it is part of the state or configuration of a packhorse daemon";
/// The advice after a rejection.
pub const NEXT: &str =
    "use a path that contains no part of a daemon's data_dir, configuration or password files";
/// The directory of a NAS root that holds the state of the daemons which use it.
const SINK_STATE: &str = ".packhorse";
/// The directory of a hub, a site or a publisher that holds its private keys, in these files.
const IDENTITY: (&str, [&str; 5]) = (
    "identity",
    ["ca.pem", "hub.pem", "site.pem", "joining.pem", "reset.key"],
);
/// Opening a pipe without a writer must not block the daemon.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

/// The directories and files of the daemon.
#[derive(Debug, Clone, Default)]
pub struct Own {
    folders: HashSet<Id>,
    files: HashSet<Id>,
    /// Directories in the state that hold artifacts: they may be published.
    open: HashSet<Id>,
    /// The directory of the training runs: what a trainer writes into directories below that of its
    /// run may be published.
    runs: Option<Id>,
    /// The devices of all these files.
    devices: HashSet<u64>,
    /// The directories that a source may be in; `None`: any.
    within: Option<Within>,
}

/// The directories that a source may be in.
#[derive(Debug, Clone, Default)]
struct Within {
    /// As they are configured.
    named: Vec<PathBuf>,
    /// Without links; only those that exist.
    resolved: Vec<PathBuf>,
}

impl Within {
    fn holds(roots: &[PathBuf], path: &Path) -> bool {
        let is_plain = path
            .components()
            .all(|part| !matches!(part, std::path::Component::ParentDir));
        is_plain && roots.iter().any(|root| path.starts_with(root))
    }
}

/// Marks a path outside the directories that a source may be in.
#[derive(Debug, thiserror::Error)]
#[error("it is outside the directories of [publish] roots")]
struct IsOutside;

/// Marks this rejection among other errors of a walk.
#[derive(Debug, thiserror::Error)]
#[error("{WHY}")]
struct IsOwn;

fn id(meta: &Metadata) -> Id {
    (meta.dev(), meta.ino())
}

fn of_path(path: &Path) -> Option<Id> {
    fs::metadata(path).ok().map(|meta| id(&meta))
}

/// The error for a file of the daemon.
fn is_own() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, IsOwn)
}

/// Whether an error of this module is this rejection.
pub fn is_refusal(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<IsOwn>())
}

/// The rejection of a path outside the directories that a source may be in. It does not say whether
/// there is anything.
fn outside(path: &Path) -> Fault {
    Fault::not_allowed(format!("{}: {IsOutside}", path.display())).with_next(
        "use a path below [publish] roots of this daemon, without links that leave it, or run the command with the API token of the machine",
    )
}

/// The rejection as users see it.
pub fn refusal(path: &Path) -> Fault {
    Fault::not_allowed(format!("{}: {WHY}", path.display())).with_next(NEXT)
}

impl Own {
    /// Nothing: for a process that is not a daemon and may read what its user may read.
    pub fn none() -> Self {
        Self::default()
    }

    /// The files of the daemon with this state directory: the directory, except its sinks, its own
    /// directory in each sink, and its secret files.
    pub fn of<'a>(
        data_dir: &Path,
        sinks: &[PathBuf],
        secrets: impl Iterator<Item = &'a Path>,
    ) -> Self {
        let open = sinks.iter().filter_map(|sink| of_path(sink)).collect();
        let mut own = Self {
            open,
            ..Self::default()
        };
        own.take_folder(data_dir, 2);
        // What the daemon itself keeps in a sink is no artifact.
        own.folders.extend(
            sinks
                .iter()
                .filter_map(|sink| of_path(&sink.join(SINK_STATE))),
        );
        own.files.extend(secrets.filter_map(of_path));
        own.runs = of_path(&data_dir.join("runs"));
        own.devices = own
            .folders
            .iter()
            .chain(&own.files)
            .map(|(device, _)| *device)
            .collect();
        own
    }

    /// The files in a state directory: the directory, its subdirectories and those of its store,
    /// and the files directly in these.
    pub fn of_state(data_dir: &Path) -> Self {
        let mut own = Self::default();
        own.take_folder(data_dir, 2);
        own.devices = own
            .folders
            .iter()
            .chain(&own.files)
            .map(|(device, _)| *device)
            .collect();
        own
    }

    fn take_folder(&mut self, folder: &Path, depth: u32) {
        let Some(itself) = of_path(folder).filter(|itself| !self.open.contains(itself)) else {
            return;
        };
        self.folders.insert(itself);
        // These directories may contain millions of names, and no secret files.
        if ["packs", "runs", "labels", "published", "staging", "scratch"]
            .iter()
            .any(|name| folder.ends_with(name))
        {
            return;
        }
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let (Ok(kind), path) = (entry.file_type(), entry.path()) else {
                continue;
            };
            if kind.is_file() {
                self.files.extend(of_path(&path));
            } else if kind.is_dir() && depth > 0 {
                self.take_folder(&path, depth - 1);
            }
        }
    }

    /// The same, and only what is below these directories is read.
    #[must_use]
    pub fn within(self, roots: &[PathBuf]) -> Self {
        let resolved = roots.iter().filter_map(|root| fs::canonicalize(root).ok());
        Self {
            within: Some(Within {
                resolved: resolved.collect(),
                named: roots.to_vec(),
            }),
            ..self
        }
    }

    /// Rejects an open file or directory outside the directories that a source may be in, by where
    /// it is: by which links it was reached makes no difference.
    pub fn check_place(&self, opened: &impl AsRawFd) -> io::Result<()> {
        let Some(within) = &self.within else {
            return Ok(());
        };
        let place = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))?;
        if Within::holds(&within.resolved, &place) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, IsOutside))
    }

    /// Rejects a path outside the directories that a source may be in by its name only: of a path
    /// elsewhere not even its existence is reported.
    pub fn check_named(&self, path: &Path) -> Result<(), Fault> {
        match &self.within {
            Some(within)
                if !Within::holds(&within.named, path)
                    && !Within::holds(&within.resolved, path) =>
            {
                Err(outside(path))
            }
            _ => Ok(()),
        }
    }

    /// Rejects a path that belongs to the daemon, or is inside a directory of the daemon.
    /// [`Own::read_dir`] and [`Own::check`] check the content below it.
    pub fn check_path(&self, path: &Path) -> Result<(), Fault> {
        if let Some(within) = &self.within {
            self.check_named(path)?;
            let resolved = fs::canonicalize(path).at(format_args!("open {}", path.display()))?;
            if !Within::holds(&within.resolved, &resolved) {
                return Err(outside(path));
            }
        }
        if is_key(path) || fs::canonicalize(path).is_ok_and(|resolved| is_key(&resolved)) {
            return Err(refusal(path));
        }
        if self.folders.is_empty() && self.files.is_empty() {
            return Ok(());
        }
        let resolved = fs::canonicalize(path).at(format_args!("open {}", path.display()))?;
        let meta = fs::metadata(&resolved).at(format_args!("open {}", path.display()))?;
        if self.check(&meta).is_err() {
            return Err(refusal(path));
        }
        // From the innermost directory outwards: the first known one decides.
        let above: Vec<PathBuf> = resolved.ancestors().map(Path::to_owned).collect();
        for (depth, folder) in above.iter().enumerate() {
            let Some(folder) = of_path(folder) else {
                continue;
            };
            let in_a_run =
                || depth >= 2 && above.get(depth - 2).is_some_and(|below| below.is_dir());
            if self.open.contains(&folder) || Some(folder) == self.runs && in_a_run() {
                return Ok(());
            }
            if self.folders.contains(&folder) {
                return Err(refusal(path));
            }
        }
        Ok(())
    }

    /// Rejects a file or directory that belongs to the daemon.
    pub fn check(&self, meta: &Metadata) -> io::Result<()> {
        let own = if meta.is_dir() {
            &self.folders
        } else {
            &self.files
        };
        if own.contains(&id(meta)) {
            Err(is_own())
        } else {
            Ok(())
        }
    }

    /// Whether a file on this device may belong to the daemon; otherwise no check is needed.
    pub fn may_be_on(&self, device: u64) -> bool {
        self.devices.contains(&device)
    }

    /// Lists a directory, which must not belong to the daemon. The opened directory is checked, not
    /// its path. The listing is valid while the handle exists. Also returns the device of the
    /// directory.
    pub fn read_dir(&self, folder: &Path) -> io::Result<(ReadDir, File, u64)> {
        let flags = rustix::fs::OFlags::DIRECTORY.bits() as i32;
        let opened = File::options()
            .read(true)
            .custom_flags(flags)
            .open(folder)?;
        let meta = opened.metadata()?;
        self.check(&meta)?;
        self.check_place(&opened)?;
        if folder.ends_with(IDENTITY.0) && holds_keys(&opened) {
            return Err(is_own());
        }
        // By the handle, because the path may name a different directory now.
        Ok((
            fs::read_dir(format!("/proc/self/fd/{}", opened.as_raw_fd()))?,
            opened,
            meta.dev(),
        ))
    }

    /// Opens a regular file that does not belong to the daemon.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        let file = File::options()
            .read(true)
            .custom_flags(NONBLOCK)
            .open(path)?;
        self.check_opened(&file)?;
        Ok(file)
    }

    /// Rejects an open file outside the directories that a source may be in. Its path is not known.
    pub fn allow_opened(&self, file: &File) -> Result<(), Fault> {
        if self.within.is_none() {
            // The walk has checked it.
            return Ok(());
        }
        self.check_opened(file).map_err(|error| {
            let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
            fault(&path.unwrap_or_default(), &error)
        })
    }

    /// Rejects an open file that is not a regular file or belongs to the daemon.
    pub fn check_opened(&self, file: &File) -> io::Result<()> {
        let meta = file.metadata()?;
        self.check(&meta)?;
        self.check_place(file)?;
        if meta.is_file() {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ))
        }
    }
}

/// Whether a path is a private key of a daemon or a publisher.
fn is_key(path: &Path) -> bool {
    path.parent()
        .is_some_and(|folder| folder.ends_with(IDENTITY.0))
        && IDENTITY.1.iter().any(|name| path.ends_with(name))
}

/// Whether an open directory holds private keys of a daemon or a publisher.
fn holds_keys(folder: &File) -> bool {
    let is_there = |name: &&str| {
        rustix::fs::statat(folder, *name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    };
    IDENTITY.1.iter().any(is_there)
}

/// The fault of an error from this module.
pub fn fault(path: &Path, error: &io::Error) -> Fault {
    if is_refusal(error) {
        refusal(path)
    } else if error.get_ref().is_some_and(|inner| inner.is::<IsOutside>()) {
        outside(path)
    } else {
        Fault::io(format_args!("read {}", path.display()), error)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use base::durable;
    use base::fault::Code;

    fn put(path: &Path) {
        durable::create_dir_all(path.parent().unwrap()).unwrap();
        durable::replace(path, b"x").unwrap();
    }

    #[test]
    fn state_and_secrets_are_recognised_by_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let secret = dir.path().join("secret");
        for file in [
            "identity/ca.pem",
            "api-token",
            "store/packs/1.pack",
            "runs/r1/run.json",
            "runs/r1/output/m",
            "artifacts/dataset/x/1/a",
            "artifacts/.packhorse/id",
        ] {
            put(&data.join(file));
        }
        put(&secret);
        put(&dir.path().join("mine/a"));
        let own = Own::of(
            &data,
            &[data.join("artifacts")],
            [secret.as_path()].into_iter(),
        );
        symlink(data.join("identity"), dir.path().join("link")).unwrap();
        fs::hard_link(data.join("api-token"), dir.path().join("hard")).unwrap();
        let check = |path: &str| {
            own.check_path(&dir.path().join(path))
                .map_err(|fault| fault.code)
        };
        for path in [
            "data",
            "data/identity",
            "data/identity/ca.pem",
            "data/store/packs/1.pack",
            "data/runs",
            "data/runs/r1",
            "data/runs/r1/run.json",
            "link",
            "link/ca.pem",
            "hard",
            "secret",
            "mine/../data/api-token",
            "data/artifacts/.packhorse",
            "data/artifacts/.packhorse/id",
        ] {
            assert_eq!(check(path), Err(Code::NotAllowed), "{path}");
        }
        for path in [
            "mine",
            "mine/a",
            "data/runs/r1/output",
            "data/runs/r1/output/m",
            "data/artifacts/dataset/x/1",
        ] {
            assert_eq!(check(path), Ok(()), "{path}");
        }
        assert!(own.check_path(&dir.path().join("none")).is_err());
        Own::none().check_path(&data).unwrap();
        // A walk that starts above finds them.
        own.read_dir(dir.path()).unwrap();
        assert!(
            is_refusal(&own.read_dir(&data).unwrap_err())
                && is_refusal(&own.read_dir(&dir.path().join("link")).unwrap_err())
        );
        assert!(is_refusal(&own.open(&dir.path().join("hard")).unwrap_err()));
    }

    #[test]
    fn what_was_opened_counts_and_not_the_path_that_led_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        put(&at("root/in/a"));
        put(&at("elsewhere/in/a"));
        let own = Own::none().within(&[at("root"), at("missing")]);
        own.check_path(&at("root/in/a")).unwrap();
        own.open(&at("root/in/a")).unwrap();
        own.read_dir(&at("root/in")).unwrap();
        // The directory is replaced by a link after it was checked.
        durable::rename_noreplace(&at("root/in"), &at("root/old")).unwrap();
        symlink(at("elsewhere/in"), at("root/in")).unwrap();
        let refused = |error: io::Error| {
            let fault = fault(&at("root/in"), &error);
            assert_eq!(fault.code, Code::NotAllowed);
            assert!(fault.message.contains("[publish] roots"), "{fault}");
        };
        refused(own.open(&at("root/in/a")).unwrap_err());
        refused(own.read_dir(&at("root/in")).unwrap_err());
        let opened = File::open(at("root/in/a")).unwrap();
        refused(own.check_opened(&opened).unwrap_err());
        own.allow_opened(&opened).unwrap_err();
        own.check_path(&at("root/in/a")).unwrap_err();
        // A root may be a link, and a name that begins like a root is none.
        symlink(at("root"), at("alias")).unwrap();
        put(&at("rooted/a"));
        let own = Own::none().within(&[at("alias")]);
        own.check_path(&at("alias/old/a")).unwrap();
        own.open(&at("alias/old/a")).unwrap();
        for path in [
            "rooted/a",
            "root/../rooted/a",
            "elsewhere/none",
            "alias/../rooted",
        ] {
            let fault = own.check_path(&at(path)).unwrap_err();
            assert_eq!(fault.code, Code::NotAllowed, "{path}: {fault}");
        }
        let nothing = Own::none().within(&[]);
        nothing.check_path(&at("root/old/a")).unwrap_err();
        nothing.open(&at("root/old/a")).unwrap_err();
    }

    #[test]
    fn private_keys_of_other_daemons_are_recognised_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "site/identity/site.pem",
            "mine/identity/face.jpg",
            "pem/ca.pem",
        ] {
            put(&dir.path().join(file));
        }
        symlink(dir.path().join("site/identity"), dir.path().join("link")).unwrap();
        let own = Own::none();
        let key = dir.path().join("site/identity/site.pem");
        for path in [key, dir.path().join("link/site.pem")] {
            let fault = own.check_path(&path).unwrap_err();
            assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        }
        let refused = own.read_dir(&dir.path().join("site/identity"));
        assert!(is_refusal(&refused.unwrap_err()));
        // Other files with these names.
        own.read_dir(&dir.path().join("mine/identity")).unwrap();
        own.read_dir(&dir.path().join("pem")).unwrap();
        own.check_path(&dir.path().join("pem/ca.pem")).unwrap();
    }

    #[test]
    fn a_pipe_is_rejected_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        assert_eq!(
            Own::none().open(&pipe).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
