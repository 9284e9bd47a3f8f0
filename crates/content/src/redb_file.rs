//! The embedded B-tree (redb) that the store's index and a site's chunk index lie in.
//!
//! After its disk failed once, a full one for example, redb refuses everything until the file is
//! closed and opened again. That is done here, at the next use: a daemon continues when there is
//! room.
//!
//! redb verifies the checksums of its pages only on request, and panics on a page that it does not
//! understand. So a small file is verified when it is opened, and every use of redb runs in
//! `guarded`, which turns a panic into a fault. Nothing but this module calls redb outside of the
//! closures that [`Tree::read`] and [`Tree::write`] take.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{RwLock, RwLockUpgradableReadGuard, RwLockWriteGuard};
use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};

use base::fault::{Code, Fault, Retry};
use base::limits::TREE_CHECKED_BYTES_MAX;

/// A B-tree in a file.
pub struct Tree {
    /// What people call it.
    what: String,
    /// What to do when it is damaged.
    repair: String,
    path: PathBuf,
    cache_bytes: usize,
    /// `None` after it failed and could not be opened again yet.
    database: RwLock<Option<Database>>,
    failed: AtomicBool,
    /// Whether it failed for want of room.
    full: AtomicBool,
    /// Whether the file was found damaged.
    damaged: AtomicBool,
    /// Whether redb went back to an older state of a damaged file when it was opened.
    rolled_back: bool,
}

/// Why a file could not be opened.
pub struct NotOpened {
    /// In words.
    pub fault: Fault,
    /// Whether the file is damaged; else its disk or another process is in the way.
    pub is_damaged: bool,
}

impl From<NotOpened> for Fault {
    fn from(not: NotOpened) -> Self {
        not.fault
    }
}

thread_local! {
    /// Whether a panic of this thread is caught and told as a fault.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, which uses redb, and catches its panics. `None`: it panicked.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| match CAUGHT.try_with(Cell::get) {
            Ok(true) => tracing::debug!(panic = %info, "redb panicked on a damaged file"),
            _ => before(info),
        }));
    });
    let nested = CAUGHT.replace(true);
    // What redb leaves behind is closed and opened again, and what callers hold are locks that no
    // panic poisons.
    let result = catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(nested);
    result.ok()
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    static VERIFIES: Cell<bool> = const { Cell::new(true) };
}

/// Sets whether files that this thread opens are verified; without that they are as large files
/// are.
#[cfg(any(test, feature = "testing"))]
pub fn verified_in_this_thread(verified: bool) {
    VERIFIES.set(verified);
}

/// Opens the file, and verifies it if it is small. Returns whether its pages were as they should
/// be.
fn open(path: &Path, cache_bytes: usize) -> Result<(Database, bool), redb::Error> {
    let new = std::fs::metadata(path).map_or(true, |meta| meta.len() == 0);
    let mut database = Database::builder()
        .set_cache_size(cache_bytes)
        .create(path)?;
    let is_small =
        || std::fs::metadata(path).is_ok_and(|meta| meta.len() <= TREE_CHECKED_BYTES_MAX);
    #[cfg(any(test, feature = "testing"))]
    let is_small = || VERIFIES.get() && is_small();
    let is_sound = new || !is_small() || database.check_integrity()?;
    Ok((database, is_sound))
}

impl Tree {
    /// Opens or makes it. `what` it is for people, `repair` what to do when it is damaged.
    pub fn open(
        path: &Path,
        what: &str,
        repair: String,
        cache_bytes: usize,
    ) -> Result<Self, NotOpened> {
        let mut tree = Self {
            what: format!("{what} {}", path.display()),
            repair,
            path: path.to_owned(),
            cache_bytes,
            database: RwLock::default(),
            failed: AtomicBool::new(false),
            full: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            rolled_back: false,
        };
        match tree.open_file() {
            Ok((database, is_sound)) => {
                *tree.database.get_mut() = Some(database);
                tree.rolled_back = !is_sound;
                Ok(tree)
            }
            Err(fault) => Err(NotOpened {
                fault,
                is_damaged: tree.is_damaged(),
            }),
        }
    }

    fn open_file(&self) -> Result<(Database, bool), Fault> {
        match guarded(|| open(&self.path, self.cache_bytes)) {
            Some(opened) => opened.map_err(|e| self.fault(e)),
            None => Err(self.damage("redb cannot read it")),
        }
    }

    /// Reads in one transaction.
    pub fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, Fault> {
        self.with(|database| work(&database.begin_read()?))
    }

    /// Writes in one transaction, once nobody else does, and commits it.
    pub fn write<T>(
        &self,
        work: impl FnOnce(&mut WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, Fault> {
        self.with(|database| {
            let mut write = database.begin_write()?;
            let result = work(&mut write)?;
            write.commit()?;
            Ok(result)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, Fault> {
        let guard = self.database.upgradable_read();
        let guard = if self.failed.load(Ordering::SeqCst) || guard.is_none() {
            let mut guard = RwLockUpgradableReadGuard::upgrade(guard);
            // Closed first: two cannot have the file open.
            close(guard.take());
            *guard = Some(self.open_file()?.0);
            self.failed.store(false, Ordering::SeqCst);
            tracing::info!(what = self.what, "opened again after its disk failed");
            RwLockWriteGuard::downgrade(guard)
        } else {
            RwLockUpgradableReadGuard::downgrade(guard)
        };
        let Some(database) = &*guard else {
            return Err(Fault::internal(format!("{} is closed", self.what)));
        };
        match guarded(|| work(database)) {
            Some(done) => done.map_err(|e| self.fault(e)),
            None => {
                // A transaction that was cut off by the panic is not ended properly.
                self.failed.store(true, Ordering::SeqCst);
                Err(self.damage("redb cannot read a page of it"))
            }
        }
    }

    /// Whether the file was found damaged since it was opened.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::SeqCst)
    }

    /// Whether the file was damaged when it was opened, and redb went back to an older state of it.
    pub fn is_rolled_back(&self) -> bool {
        self.rolled_back
    }

    fn damage(&self, why: impl std::fmt::Display) -> Fault {
        self.damaged.store(true, Ordering::SeqCst);
        Fault::internal(format!("{} is damaged: {why}", self.what)).with_next(&self.repair)
    }

    /// An error of it. A full disk is told from damage, and both from a defect.
    fn fault(&self, error: impl Into<redb::Error>) -> Fault {
        match error.into() {
            // redb reports a file that ends too early as one of these.
            redb::Error::Io(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::InvalidData
                ) =>
            {
                self.failed.store(true, Ordering::SeqCst);
                self.damage(e)
            }
            redb::Error::Io(e) => {
                let fault = Fault::io(&self.what, &e);
                self.full
                    .store(fault.code == Code::NoSpace, Ordering::SeqCst);
                self.failed.store(true, Ordering::SeqCst);
                fault
            }
            // To the others that use it at that moment it says no more than that.
            redb::Error::PreviousIo if self.full.load(Ordering::SeqCst) => {
                Fault::no_space(format!("{}: its disk is full", self.what))
            }
            redb::Error::PreviousIo
            | redb::Error::DatabaseClosed
            | redb::Error::LockPoisoned(_)
            | redb::Error::TransactionPoisoned => {
                self.failed.store(true, Ordering::SeqCst);
                Fault::unreachable(format!(
                    "{} is opened again after its disk failed",
                    self.what
                ))
                .with_retry(Retry::Backoff)
                .with_next("no action is needed: it continues by itself")
            }
            redb::Error::DatabaseAlreadyOpen if self.failed.load(Ordering::SeqCst) => {
                Fault::unreachable(format!(
                    "{} is still being read after its disk failed",
                    self.what
                ))
                .with_retry(Retry::Backoff)
            }
            redb::Error::DatabaseAlreadyOpen => {
                Fault::conflict(format!("{} is in use by another daemon", self.what))
                    .with_next("stop the other daemon first")
            }
            error @ (redb::Error::Corrupted(_)
            | redb::Error::UpgradeRequired(_)
            | redb::Error::RepairAborted
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TableDoesNotExist(_)
            | redb::Error::TableIsMultimap(_)
            | redb::Error::TableIsNotMultimap(_)
            | redb::Error::TypeDefinitionChanged { .. }) => {
                self.failed.store(true, Ordering::SeqCst);
                self.damage(error)
            }
            other => Fault::internal(format!("{}: {other}", self.what)),
        }
    }
}

/// A database that is closed writes its last state, which may panic where the file is damaged.
fn close(database: Option<Database>) {
    let _ = guarded(|| drop(database));
}

impl Drop for Tree {
    fn drop(&mut self) {
        close(self.database.get_mut().take());
    }
}
