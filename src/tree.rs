//! The embedded B-tree (redb) that the store's index and a site's places lie in.
//!
//! After a disk failed it once, a full one say, redb refuses everything until the file is closed and opened again. That is
//! done here, at the next use: a daemon goes on by itself when there is room.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{RwLock, RwLockUpgradableReadGuard};
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, WriteTransaction};

use crate::fault::{Code, Fault, Retry};

/// A B-tree in a file.
pub struct Tree {
    /// What people call it.
    what: String,
    path: PathBuf,
    cache_bytes: usize,
    /// `None` after it failed and could not be opened again yet.
    database: RwLock<Option<Database>>,
    failed: AtomicBool,
    /// Whether it failed for want of room.
    full: AtomicBool,
}

fn open(path: &Path, cache_bytes: usize) -> Result<Database, DatabaseError> {
    Database::builder().set_cache_size(cache_bytes).create(path)
}

impl Tree {
    /// Opens or makes it. `what` it is for people.
    pub fn open(path: &Path, what: &str, cache_bytes: usize) -> Result<Self, Fault> {
        let what = format!("{what} {}", path.display());
        let tree = Self {
            what,
            path: path.to_owned(),
            cache_bytes,
            database: RwLock::default(),
            failed: AtomicBool::new(false),
            full: AtomicBool::new(false),
        };
        *tree.database.write() = Some(open(path, cache_bytes).map_err(|e| tree.fault(e))?);
        Ok(tree)
    }

    /// Begins to read.
    pub fn read(&self) -> Result<ReadTransaction, Fault> {
        self.with(|database| database.begin_read())
    }

    /// Begins to write, once nobody else does.
    pub fn write(&self) -> Result<WriteTransaction, Fault> {
        self.with(|database| database.begin_write())
    }

    fn with<T>(&self, begin: impl FnOnce(&Database) -> Result<T, redb::TransactionError>) -> Result<T, Fault> {
        let guard = self.database.upgradable_read();
        let guard = if self.failed.load(Ordering::SeqCst) || guard.is_none() {
            let mut guard = RwLockUpgradableReadGuard::upgrade(guard);
            // Closed first: two cannot have the file open.
            *guard = None;
            *guard = Some(open(&self.path, self.cache_bytes).map_err(|e| self.fault(e))?);
            self.failed.store(false, Ordering::SeqCst);
            tracing::info!(what = self.what, "opened anew after its disk failed");
            parking_lot::RwLockWriteGuard::downgrade(guard)
        } else {
            RwLockUpgradableReadGuard::downgrade(guard)
        };
        match &*guard {
            Some(database) => begin(database).map_err(|e| self.fault(e)),
            None => Err(Fault::internal(format!("{} is closed", self.what))),
        }
    }

    /// An error of it, with a full disk told from a defect.
    pub fn fault(&self, error: impl Into<redb::Error>) -> Fault {
        match error.into() {
            redb::Error::Io(e) => {
                let fault = Fault::io(&self.what, &e);
                self.full.store(fault.code == Code::NoSpace, Ordering::SeqCst);
                self.failed.store(true, Ordering::SeqCst);
                fault
            }
            // To the others that use it at that moment it says no more than that.
            redb::Error::PreviousIo if self.full.load(Ordering::SeqCst) => Fault::no_space(format!("{}: its disk is full", self.what)),
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => {
                self.failed.store(true, Ordering::SeqCst);
                Fault::unreachable(format!("{} is opened anew after its disk failed", self.what))
                    .with_retry(Retry::Backoff)
                    .with_next("nothing: it goes on by itself")
            }
            redb::Error::DatabaseAlreadyOpen if self.failed.load(Ordering::SeqCst) => {
                Fault::unreachable(format!("{} is still being read after its disk failed", self.what)).with_retry(Retry::Backoff)
            }
            redb::Error::DatabaseAlreadyOpen => {
                Fault::conflict(format!("{} is in use by another daemon", self.what)).with_next("stop the other daemon first")
            }
            other => Fault::internal(format!("{}: {other}", self.what)),
        }
    }
}
