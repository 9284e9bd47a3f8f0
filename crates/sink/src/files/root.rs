//! The root of the files sink: whether it is mounted, and which daemons use it.
//!
//! [`super::FilesSink`] asks [`Root`] before each call that writes to the root. The id of the root
//! is in `<root>/.packhorse/id` and in `sink-files-id` in the daemon's data directory: an empty
//! mount point has none, and is never filled. Each daemon registers in `.packhorse/sites/<owner>`.
//! All of these files survive a crash; each is written by one rename.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{ROOT_USE_ENDS_AFTER, ROOT_USE_SAID_EVERY};
use base::text;

use super::HIDDEN;

/// The directory in [`HIDDEN`] with one file for each daemon that uses the root.
const SITES: &str = "sites";
/// The second line of such a file, which states that the daemon rewrites the file each day. The
/// text is part of the on-disk format and must not change.
const REWRITTEN_DAILY: &str = "written anew each day";
/// The directory in [`HIDDEN`] for incoming files.
pub(super) const STAGING: &str = "staging";
/// The number of other daemons that a message names, and the size limit of the file of each.
const SITES_LISTED_MAX: usize = 16;
const SITE_BYTES_MAX: u64 = 256;
/// The digits of the name of a daemon in a root.
const OWNER_DIGITS: usize = 16;

/// The root of a files sink. Cheap to clone.
#[derive(Clone)]
pub(super) struct Root {
    path: PathBuf,
    /// Whether the configuration names the root. Then it may be a mount, and other daemons may use
    /// it.
    configured: bool,
    /// The file with the id of the root.
    id_file: PathBuf,
    /// Identifies this daemon among those that use the root.
    owner: String,
    /// The expected content of `<root>/.packhorse/id`, after the root was seen once.
    id: Arc<Mutex<Option<String>>>,
    /// When this daemon last registered in the root.
    registered: Arc<Mutex<Option<Instant>>>,
}

impl Root {
    /// The root at this path, for the daemon with this data directory. Does not access the root.
    pub(super) fn new(path: PathBuf, configured: bool, data_dir: &Path) -> Result<Self, Fault> {
        let owner_file = data_dir.join("sink-files-owner");
        let is_owner = |text: &str| {
            text.len() == OWNER_DIGITS
                && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let owner = match std::fs::read(&owner_file) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).trim().to_owned()),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(Fault::io(format_args!("read {}", owner_file.display()), &e)),
        };
        let owner = match owner {
            Some(owner) if is_owner(&owner) => owner,
            damaged => {
                if damaged.is_some() {
                    tracing::warn!(file = %owner_file.display(), "the name of this daemon in its NAS root was damaged; it has a new one");
                }
                let owner = format!("{:016x}", rand::random::<u64>());
                durable::replace(&owner_file, owner.as_bytes())?;
                owner
            }
        };
        Ok(Self {
            path,
            configured,
            id_file: data_dir.join("sink-files-id"),
            owner,
            id: Arc::default(),
            registered: Arc::default(),
        })
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name of this daemon in the root.
    pub(super) fn owner(&self) -> &str {
        &self.owner
    }

    /// The directory for incoming files.
    pub(super) fn staging(&self) -> PathBuf {
        self.path.join(HIDDEN).join(STAGING)
    }

    /// The file with the id, in the root.
    pub(super) fn id_in_root(&self) -> PathBuf {
        self.path.join(HIDDEN).join("id")
    }

    /// The directory with one file for each daemon.
    pub(super) fn sites(&self) -> PathBuf {
        self.path.join(HIDDEN).join(SITES)
    }

    /// Whether other daemons may use it.
    pub(super) fn is_shared(&self) -> bool {
        self.configured
    }

    /// Whether this daemon has seen the root at an earlier time.
    pub(super) fn is_known(&self) -> bool {
        self.id_file.exists()
    }

    /// A new path in the staging directory for an entry that this daemon removes.
    pub(super) fn removed(&self, label: &str) -> PathBuf {
        self.staging().join(format!(
            "removed-{}-{label}-{:08x}",
            self.owner,
            rand::random::<u32>()
        ))
    }

    /// The path in the staging directory where this daemon tries what the filesystem can do: always
    /// the same, so that a filesystem on which nothing can be removed does not fill up.
    pub(super) fn tried(&self, label: &str) -> PathBuf {
        self.staging()
            .join(format!("removed-{}-{label}-0", self.owner))
    }

    /// Whether this daemon created the entry of this name by [`Root::removed`] or [`Root::tried`].
    pub(super) fn may_remove(&self, name: &str) -> bool {
        // A name without owner, `removed-<version>-<random>`, is from a daemon version that used
        // the root exclusively.
        let is_owned = |rest: &str| {
            let (owner, rest) = rest.split_once('-').unwrap_or((rest, ""));
            owner.len() == self.owner.len()
                && owner
                    .bytes()
                    .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                && rest.contains('-')
        };
        name.strip_prefix("removed-")
            .is_some_and(|rest| rest.starts_with(&format!("{}-", self.owner)) || !is_owned(rest))
    }

    /// The id of the root. Marks the root with a new id if this site sees it for the first time.
    pub(super) fn id(&self) -> Result<String, Fault> {
        let mut known = self.id.lock();
        if let Some(id) = &*known {
            return Ok(id.clone());
        }
        let existing = self.id_in_root();
        let id = match std::fs::read_to_string(&self.id_file) {
            Ok(id) => id,
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Fault::io(
                    format_args!("read {}", self.id_file.display()),
                    &e,
                ));
            }
            Err(_) => {
                if self.configured && !self.path.is_dir() {
                    return Err(self.not_mounted("it is not a directory"));
                }
                let id = match std::fs::read_to_string(&existing) {
                    Ok(id) => id,
                    Err(e) if e.kind() == ErrorKind::NotFound => {
                        durable::create_dir_all(&self.staging())?;
                        // Another site may mark it at the same time; the id in the file is used.
                        durable::create(
                            &existing,
                            format!("{:032x}\n", rand::random::<u128>()).as_bytes(),
                        )?;
                        std::fs::read_to_string(&existing)
                            .at(format_args!("read {}", existing.display()))?
                    }
                    Err(e) => {
                        return Err(Fault::io(format_args!("read {}", existing.display()), &e));
                    }
                };
                durable::replace(&self.id_file, id.as_bytes())?;
                id
            }
        };
        Ok(known.insert(id).clone())
    }

    pub(super) fn not_mounted(&self, why: &str) -> Fault {
        Fault::unreachable(format!("the NAS is not mounted at {}: {why}", self.path.display())).with_next(
            "mount the NAS there; transfers resume automatically. If the NAS was replaced intentionally, remove sink-files-id from data_dir and restart the daemon",
        )
    }

    /// Registers this daemon in the root, at the start and then each day. A failure is retried at a
    /// later call.
    fn register(&self) {
        let mut last = self.registered.lock();
        if !self.configured || last.is_some_and(|last| last.elapsed() < ROOT_USE_SAID_EVERY) {
            return;
        }
        let mine = self.sites().join(&self.owner);
        let (node, data_dir) = (
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            self.id_file.with_file_name(""),
        );
        let text = format!("{node} {}\n{REWRITTEN_DAILY}\n", data_dir.display());
        let result = durable::create_dir_all(mine.parent().unwrap_or(&self.path))
            .and_then(|()| durable::replace(&mine, text.as_bytes()));
        *last = result.is_ok().then(Instant::now);
    }

    /// The other daemons that use this root: the machine and the data directory of each.
    pub(super) fn others(&self) -> Result<Vec<String>, Fault> {
        let folder = self.sites();
        // An unreadable directory does not mean that there are no other daemons.
        let sites: Vec<_> = match std::fs::read_dir(&folder).and_then(Iterator::collect) {
            Ok(sites) => sites,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Fault::io(folder.display(), &error)),
        };
        let others = sites.into_iter().filter(|entry| {
            !entry.file_name().to_string_lossy().starts_with('.')
                && *entry.file_name() != *self.owner
        });
        // Both times are from the clock of the NAS.
        let written = |path: &Path| {
            std::fs::metadata(path)
                .and_then(|meta| meta.modified())
                .ok()
        };
        let now = written(&folder.join(&self.owner));
        let read = |entry: std::fs::DirEntry| {
            let mut text = Vec::new();
            if let Ok(file) = durable::open_regular_nofollow(&entry.path()) {
                let _ = file.take(SITE_BYTES_MAX).read_to_end(&mut text);
            }
            let text = String::from_utf8_lossy(&text);
            let mut lines = text.trim().lines();
            let who = lines.next().unwrap_or_default();
            // A daemon of an earlier version writes its file only once.
            let silent = now
                .zip(written(&entry.path()))
                .and_then(|(now, written_at)| now.duration_since(written_at).ok());
            let has_ended = lines.next() == Some(REWRITTEN_DAILY)
                && silent.is_some_and(|silent| silent >= ROOT_USE_ENDS_AFTER);
            (!has_ended).then(|| text::line(who, SITE_BYTES_MAX as usize))
        };
        Ok(others.filter_map(read).take(SITES_LISTED_MAX).collect())
    }

    /// Checks that the root is the one that this site has always used. An empty mount point must
    /// not be filled.
    pub(super) fn ensure_mounted(&self) -> Result<(), Fault> {
        let id = self.id()?;
        self.check_id(&id, std::fs::read_to_string(self.id_in_root()))?;
        self.register();
        Ok(())
    }

    /// Compares the content of the id file in the root with the known id.
    pub(super) fn check_id(
        &self,
        id: &str,
        existing: std::io::Result<String>,
    ) -> Result<(), Fault> {
        match existing {
            Ok(existing) if existing == id => Ok(()),
            Ok(_) => Err(self.not_mounted(&format!("its {HIDDEN}/id differs"))),
            Err(e) => Err(self.not_mounted(&format!("its {HIDDEN}/id cannot be read: {e}"))),
        }
    }
}
