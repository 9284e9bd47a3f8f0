//! The embedded B-tree (redb) of the store's index and of a site's chunk index.
//!
//! After an error of the disk, for example a full disk, redb rejects every operation until the file
//! is closed and opened again. This module reopens the file at the next use, so that a daemon
//! continues when there is space.
//!
//! redb verifies the checksums of its pages only on request, and panics on a page that it cannot
//! parse. Therefore a small file is verified when it is opened, and every use of redb runs in
//! `guarded`, which converts a panic to a fault. Only this module calls redb outside the closures
//! that [`Tree::read`] and [`Tree::write`] take.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{RwLock, RwLockUpgradableReadGuard, RwLockWriteGuard};
use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};

use base::blocking;
use base::fault::{Code, Fault, Retry};
use base::limits::TREE_CHECKED_BYTES_MAX;

/// A B-tree in a file.
pub struct Tree {
    /// The name of the file in messages.
    what: String,
    /// What to do if the file is damaged.
    repair: String,
    path: PathBuf,
    cache_bytes: usize,
    /// `None` after a failure, until the file is open again.
    database: RwLock<Option<Database>>,
    failed: AtomicBool,
    /// Whether the last failure was a full disk.
    full: AtomicBool,
    /// Whether damage was detected.
    damaged: AtomicBool,
    /// Whether redb restored an older state of a damaged file when it was opened.
    rolled_back: bool,
}

/// Why a file could not be opened.
pub struct NotOpened {
    pub fault: Fault,
    /// Whether the file is damaged. Otherwise its disk failed or another process has it open.
    pub is_damaged: bool,
}

impl From<NotOpened> for Fault {
    fn from(not_opened: NotOpened) -> Self {
        not_opened.fault
    }
}

thread_local! {
    /// Whether a panic of this thread is caught and converted to a fault.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, which uses redb, and catches its panics. Returns `None` after a panic.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| match CAUGHT.try_with(Cell::get) {
            Ok(true) => tracing::debug!(panic = %info, "redb panicked on a damaged file"),
            _ => previous(info),
        }));
    });
    let was_caught = CAUGHT.replace(true);
    // Unwind safety: the database is closed and opened again after a panic, and the locks of
    // callers cannot be poisoned.
    let result = catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(was_caught);
    result.ok()
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    static VERIFIES: Cell<bool> = const { Cell::new(true) };
}

/// Sets whether this thread verifies the files that it opens. Without verification, a small file
/// behaves like a large one.
#[cfg(any(test, feature = "testing"))]
pub fn verified_in_this_thread(verified: bool) {
    VERIFIES.set(verified);
}

/// Opens the file, and verifies it if it is small. Returns whether it was intact.
fn open(path: &Path, cache_bytes: usize) -> Result<(Database, bool), redb::Error> {
    let new = std::fs::metadata(path).map_or(true, |meta| meta.len() == 0);
    let mut database = Database::builder()
        .set_cache_size(cache_bytes)
        .create(path)?;
    let is_small =
        || std::fs::metadata(path).is_ok_and(|meta| meta.len() <= TREE_CHECKED_BYTES_MAX);
    #[cfg(any(test, feature = "testing"))]
    let is_small = || VERIFIES.get() && is_small();
    let is_intact = new || !is_small() || database.check_integrity()?;
    Ok((database, is_intact))
}

impl Tree {
    /// Opens or creates the file. `what` is its name in messages; `repair` states what to do if it
    /// is damaged.
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
            Ok((database, is_intact)) => {
                *tree.database.get_mut() = Some(database);
                tree.rolled_back = !is_intact;
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

    /// Runs `work` in a read transaction.
    pub fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, Fault> {
        blocking::check("redb");
        self.with(|database| work(&database.begin_read()?))
    }

    /// Runs `work` in a write transaction, after all other writers, and commits it.
    pub fn write<T>(
        &self,
        work: impl FnOnce(&mut WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, Fault> {
        blocking::check("redb");
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
            // Close it first: the file can be open only once.
            close(guard.take());
            *guard = Some(self.open_file()?.0);
            self.failed.store(false, Ordering::SeqCst);
            tracing::info!(what = self.what, "reopened after an error of its disk");
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
                // A transaction that a panic interrupted is not ended properly, so the file must be
                // reopened.
                self.failed.store(true, Ordering::SeqCst);
                Err(self.damage("redb cannot read a page of it"))
            }
        }
    }

    /// Whether damage was detected since the file was opened.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::SeqCst)
    }

    /// Whether the file was damaged when it was opened, and redb restored an older state.
    pub fn is_rolled_back(&self) -> bool {
        self.rolled_back
    }

    fn damage(&self, why: impl std::fmt::Display) -> Fault {
        self.damaged.store(true, Ordering::SeqCst);
        Fault::internal(format!("{} is damaged: {why}", self.what)).with_next(&self.repair)
    }

    /// Converts an error of redb, and distinguishes a full disk, damage and other errors.
    fn fault(&self, error: impl Into<redb::Error>) -> Fault {
        match error.into() {
            // redb reports a truncated file as one of these.
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
            // Other users of the database get only this error, without its cause.
            redb::Error::PreviousIo if self.full.load(Ordering::SeqCst) => {
                Fault::no_space(format!("{}: its disk is full", self.what))
            }
            redb::Error::PreviousIo
            | redb::Error::DatabaseClosed
            | redb::Error::LockPoisoned(_)
            | redb::Error::TransactionPoisoned => {
                self.failed.store(true, Ordering::SeqCst);
                Fault::unreachable(format!(
                    "{} is reopened after an error of its disk",
                    self.what
                ))
                .with_retry(Retry::Backoff)
                .with_next("no action is needed: the daemon reopens it automatically")
            }
            redb::Error::DatabaseAlreadyOpen if self.failed.load(Ordering::SeqCst) => {
                Fault::unreachable(format!(
                    "{} is still in use after an error of its disk",
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

/// Closes a database. That writes its last state, which can panic if the file is damaged.
fn close(database: Option<Database>) {
    let _ = guarded(|| drop(database));
}

impl Drop for Tree {
    fn drop(&mut self) {
        close(self.database.get_mut().take());
    }
}
