//! Where a site stores chunks: its own files and blobs are its chunk store.
//!
//! A B-tree on disk (redb) at `<data_dir>/places.redb` maps the hash of a chunk to a storage
//! location, an entry and an offset. A location holds the files of one artifact: first its staging
//! folder, after the commit the folder or repository that the sink reports. A row of the index is a
//! hint: the reader of a chunk hashes the bytes, and removes the row when the hash differs.
//!
//! The same file holds the journals of transfers (module `journal`). Rows and bits are written only
//! after their bytes were synced. After a kill or a power cut a transfer resumes from the last
//! commit, and nothing is hashed again. Bits are written at every group commit. Rows are spread
//! over the whole tree, and a commit copies each page that it changes, so rows are written in large
//! batches. A location whose rows are older than its bits is completed when its transfer resumes
//! (see [`ChunkIndex::is_behind`]).
//!
//! A damaged file is moved aside, and a damaged or missing file is rebuilt (see [`Loss`]).

mod intact;
mod journal;
mod loss;
mod reader;
mod sweep;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use base::clock;
use base::durable;
use base::fault::Fault;
use base::limits::STATE_WRITE_BYTES_MIN;
use base::names::RelPath;
use base::space::Space;
use content::chunk::Hash;
use content::manifest::{Digest, FileInfo};
use content::redb_file::{NotOpened, Tree};
use sink::StorageLocation;

pub use intact::{FileKey, Intact};
pub use journal::Journal;
pub use loss::Loss;
pub use reader::{Reader, buffers};

const CACHE_BYTES: usize = 16 << 20;
const FILE: &str = "places.redb";

type ChunkRow = (u32, u64, u64, u32);

const CHUNKS: TableDefinition<'_, &[u8; 32], ChunkRow> = TableDefinition::new("chunks");
const ENTRIES: TableDefinition<'_, (u32, u64), (&str, u64, &[u8; 32])> =
    TableDefinition::new("entries");
const PLACES: TableDefinition<'_, u32, &str> = TableDefinition::new("places");
/// The number of the next location. A number is never used again, so that a late row cannot be
/// taken for a row of another location.
const NEXT: TableDefinition<'_, (), u32> = TableDefinition::new("next");
/// Where a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// The number of the storage location.
    pub place: u32,
    /// The entry's number in the manifest of that location.
    pub entry: u64,
    /// Its offset in the entry's file, bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// One storage location.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LocationInfo {
    /// The folder or repository.
    pub place: StorageLocation,
    /// The artifact's digest.
    pub digest: Digest,
    /// The transfer that stages it; `None` after its commit.
    pub transfer: Option<String>,
    /// Whether its files belong to a user (published in place). The owner may write to them, so
    /// they are never shared by hard link.
    #[serde(default)]
    pub foreign: bool,
    /// Whether its journal is being rebuilt from the staging folder. The folder may hold more than
    /// the journal lists.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopting: bool,
}

/// What one group commit records.
#[derive(Debug, Default)]
pub struct Commit {
    /// Chunks that are durable.
    pub chunks: Vec<(Hash, At)>,
    /// Their files.
    pub entries: Vec<(u64, RelPath, FileInfo)>,
    /// Their ordinals.
    pub ordinals: Vec<u64>,
    /// Files that are intact and were taken over, or from which one was taken over.
    pub intact: Vec<(FileKey, Option<Intact>)>,
}

/// The index.
pub struct ChunkIndex {
    tree: Tree,
    known: RwLock<HashMap<u32, Arc<LocationInfo>>>,
    /// Staging locations that may lack rows of chunks that their journal lists.
    behind: Mutex<HashSet<u32>>,
    data_dir: PathBuf,
    /// The last loss of the file, if there was one.
    loss: Mutex<Option<Loss>>,
}

/// The next step when the file is damaged while it is in use.
const RESTART: &str = "restart the daemon: it moves the damaged file aside and rebuilds it from the artifacts at this site";

impl ChunkIndex {
    /// Opens or creates it. A damaged file is moved aside and replaced by a new one.
    pub fn open(data_dir: &Path) -> Result<Self, Fault> {
        Self::open_expected(data_dir, false)
    }

    /// The same. `expected`: the file existed before, so its absence is a loss.
    pub fn open_expected(data_dir: &Path, expected: bool) -> Result<Self, Fault> {
        let path = data_dir.join(FILE);
        if !path.exists() {
            if expected {
                Loss::begin(data_dir, &format!("{} was missing", path.display()), None)?;
            }
            return Ok(Self::open_file(data_dir)?);
        }
        match Self::open_file(data_dir) {
            Ok(index) if !index.tree.is_rolled_back() => Ok(index),
            Err(not) if !not.is_damaged => Err(not.fault),
            other => {
                let why = match other {
                    Ok(old) => {
                        // Closed before another file gets this name.
                        drop(old);
                        format!("{} was damaged", path.display())
                    }
                    Err(not) => not.fault.message,
                };
                let aside = data_dir.join(format!("{FILE}.damaged-{}", clock::now_unix_ms()));
                Loss::begin(data_dir, &why, Some(&aside))?;
                durable::rename_noreplace(&path, &aside)?;
                Ok(Self::open_file(data_dir)?)
            }
        }
    }

    fn open_file(data_dir: &Path) -> Result<Self, NotOpened> {
        let path = data_dir.join(FILE);
        let tree = Tree::open(&path, "the site's chunk index", RESTART.into(), CACHE_BYTES)?;
        let rows = tree.write(|write| {
            write.open_table(CHUNKS)?;
            write.open_table(ENTRIES)?;
            journal::create(write)?;
            write.open_table(NEXT)?;
            let index = write.open_table(PLACES)?;
            index
                .iter()?
                .map(|row| {
                    row.map(|(number, text)| (number.value(), text.value().to_owned()))
                        .map_err(Into::into)
                })
                .collect()
        });
        let rows: Vec<(u32, String)> = rows.map_err(|fault| NotOpened {
            is_damaged: tree.is_damaged(),
            fault,
        })?;
        let mut known = HashMap::new();
        for (number, text) in rows {
            let info = serde_json::from_str(&text).map_err(|e| NotOpened {
                fault: Fault::internal(format!(
                    "{} is damaged: a malformed place: {e}",
                    path.display()
                )),
                is_damaged: true,
            })?;
            known.insert(number, Arc::new(info));
        }
        // What the previous process had not written is unknown.
        let behind = known
            .iter()
            .filter(|(_, info): &(_, &Arc<LocationInfo>)| info.transfer.is_some())
            .map(|(number, _)| *number)
            .collect();
        let loss = Mutex::new(Loss::load(data_dir));
        Ok(Self {
            tree,
            known: RwLock::new(known),
            behind: Mutex::new(behind),
            data_dir: data_dir.to_owned(),
            loss,
        })
    }

    /// The last loss of the file. Its content is rebuilt from the catalogue, the manifests and the
    /// staging folders.
    pub fn loss(&self) -> Option<Loss> {
        self.loss.lock().clone()
    }

    /// Records that the rows of all `artifacts` are rebuilt.
    pub fn rebuilt(&self, artifacts: u64) -> Result<(), Fault> {
        let mut loss = self.loss.lock();
        if let Some(loss) = loss.as_mut() {
            loss.end(&self.data_dir, artifacts)?;
        }
        Ok(())
    }

    /// A location; `None` after its removal.
    pub fn info(&self, place: u32) -> Option<Arc<LocationInfo>> {
        self.known.read().get(&place).cloned()
    }

    /// The staging location of this transfer, if it has one.
    pub fn staged_by(&self, transfer: &str) -> Option<u32> {
        self.known
            .read()
            .iter()
            .find(|(_, info)| info.transfer.as_deref() == Some(transfer))
            .map(|(number, _)| *number)
    }

    /// Adds a location, or changes a known one.
    pub fn put(&self, number: Option<u32>, info: LocationInfo) -> Result<u32, Fault> {
        let mut known = self.known.write();
        let text = serde_json::to_string(&info)
            .map_err(|e| Fault::internal(format!("a storage location as JSON: {e}")))?;
        let number = self.tree.write(|write| {
            let number = match number {
                Some(number) => number,
                None => {
                    let mut next = write.open_table(NEXT)?;
                    let number = next.get(())?.map_or(1, |n| n.value());
                    next.insert((), number + 1)?;
                    number
                }
            };
            write.open_table(PLACES)?.insert(number, text.as_str())?;
            if info.transfer.is_none() {
                journal::remove(write, number)?;
            }
            Ok(number)
        })?;
        known.insert(number, Arc::new(info));
        Ok(number)
    }

    /// Removes a location. The rows of its chunks stay until [`ChunkIndex::sweep`] removes them.
    pub fn remove(&self, number: u32) -> Result<(), Fault> {
        let mut known = self.known.write();
        self.tree.write(|write| {
            write.open_table(PLACES)?.remove(number)?;
            journal::remove(write, number)?;
            write
                .open_table(ENTRIES)?
                .retain_in((number, 0)..(number, u64::MAX), |_, _| false)?;
            intact::remove(write, number)?;
            sweep::note(write)
        })?;
        known.remove(&number);
        self.behind.lock().remove(&number);
        Ok(())
    }

    /// The committed location of an artifact at this site, if it is known.
    pub fn landed(&self, digest: Digest, place: &StorageLocation) -> Option<u32> {
        let known = self.known.read();
        known
            .iter()
            .find(|(_, i)| i.digest == digest && i.transfer.is_none() && i.place == *place)
            .map(|(number, _)| *number)
    }

    /// All committed locations.
    pub fn committed(&self) -> Vec<(u32, Arc<LocationInfo>)> {
        let known = self.known.read();
        let committed = known.iter().filter(|(_, info)| info.transfer.is_none());
        committed
            .map(|(number, info)| (*number, info.clone()))
            .collect()
    }

    /// Records chunks of committed locations. `replace`: also those for which another committed
    /// location is known.
    pub fn note(
        &self,
        rows: &mut Vec<(Hash, At)>,
        entries: &mut Vec<(u32, u64, RelPath, FileInfo)>,
        replace: bool,
    ) -> Result<(), Fault> {
        rows.sort_unstable_by_key(|(id, _)| *id);
        let known = self.known.read();
        self.tree.write(|write| {
            let mut chunks = write.open_table(CHUNKS)?;
            for (id, at) in rows.drain(..) {
                let keep = |row: &ChunkRow| {
                    known
                        .get(&row.0)
                        .is_some_and(|info| info.transfer.is_none())
                };
                if replace || !chunks.get(&id.0)?.is_some_and(|row| keep(&row.value())) {
                    chunks.insert(&id.0, (at.place, at.entry, at.offset, at.len))?;
                }
            }
            let mut table = write.open_table(ENTRIES)?;
            for (place, number, path, file) in entries.drain(..) {
                table.insert((place, number), (path.as_str(), file.size, &file.hash.0))?;
            }
            Ok(())
        })
    }

    /// Whether a staging location may lack rows of chunks that its journal lists. The task that
    /// resumes the transfer adds them, then calls [`ChunkIndex::caught_up`].
    pub fn is_behind(&self, place: u32) -> bool {
        self.behind.lock().contains(&place)
    }

    /// Every chunk that the location's journal lists has a row.
    pub fn caught_up(&self, place: u32) {
        self.behind.lock().remove(&place);
    }

    /// Removes every committed location of an artifact.
    pub fn remove_digest(&self, digest: Digest) -> Result<(), Fault> {
        let gone: Vec<u32> = self
            .known
            .read()
            .iter()
            .filter(|(_, i)| i.digest == digest && i.transfer.is_none())
            .map(|(number, _)| *number)
            .collect();
        gone.into_iter().try_for_each(|number| self.remove(number))
    }

    /// Where these chunks are stored, as far as it is known.
    pub fn find(&self, ids: &[Hash]) -> Result<Vec<Option<At>>, Fault> {
        let known = self.known.read();
        if known.is_empty() {
            return Ok(vec![None; ids.len()]);
        }
        self.tree.read(|read| {
            let chunks = read.open_table(CHUNKS)?;
            ids.iter()
                .map(|id| {
                    let row = chunks.get(&id.0)?.map(|row| row.value());
                    Ok(row.filter(|row| known.contains_key(&row.0)).map(
                        |(place, entry, offset, len)| At {
                            place,
                            entry,
                            offset,
                            len,
                        },
                    ))
                })
                .collect()
        })
    }

    /// The file of an entry of a location.
    pub fn entry(&self, place: u32, entry: u64) -> Result<Option<(RelPath, FileInfo)>, Fault> {
        Ok(self.entries(&[(place, entry)])?.pop().flatten())
    }

    /// [`ChunkIndex::entry`] for many: locations, each with the number of an entry.
    pub fn entries(
        &self,
        wanted: &[(u32, u64)],
    ) -> Result<Vec<Option<(RelPath, FileInfo)>>, Fault> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let rows: Vec<Option<(String, u64, [u8; 32])>> = self.tree.read(|read| {
            let entries = read.open_table(ENTRIES)?;
            let file = |key: &(u32, u64)| {
                let row = entries.get(key)?;
                Ok(row.map(|row| {
                    let (path, size, hash) = row.value();
                    (path.to_owned(), size, *hash)
                }))
            };
            wanted.iter().map(file).collect()
        })?;
        rows.into_iter()
            .map(|row| {
                row.map(|(path, size, hash)| {
                    Ok((
                        path.parse()?,
                        FileInfo {
                            size,
                            hash: Hash(hash),
                        },
                    ))
                })
                .transpose()
            })
            .collect()
    }

    /// Removes the row of a chunk whose stored bytes do not match its hash.
    pub fn forget(&self, id: Hash) -> Result<(), Fault> {
        self.tree.write(|write| {
            // After a crash the row is checked once more.
            write.set_durability(redb::Durability::None)?;
            write.open_table(CHUNKS)?.remove(&id.0)?;
            Ok(())
        })
    }

    /// Writes a small value. Called after a failed write, before more bytes are requested that
    /// could not be recorded.
    pub fn trial(&self) -> Result<(), Fault> {
        let space = Space::of(&self.data_dir)?;
        if !space.has(STATE_WRITE_BYTES_MIN, 1) {
            return Err(Fault::no_space(format!(
                "data_dir {}: its disk has {} free",
                self.data_dir.display(),
                space.text()
            )));
        }
        self.tree.write(|write| {
            let mut next = write.open_table(NEXT)?;
            let number = next.get(())?.map_or(1, |n| n.value());
            next.insert((), number)?;
            Ok(())
        })
    }

    /// Records a group commit. Everything in it must be synced. A commit without chunks leaves
    /// their rows to a later commit.
    pub fn commit(
        &self,
        place: u32,
        journal: &RwLock<Journal>,
        commit: &mut Commit,
    ) -> Result<(), Fault> {
        // In the order of their hashes: neighbours share a leaf of the tree.
        commit.chunks.sort_unstable_by_key(|(id, _)| *id);
        let known = self.known.read();
        if !known.contains_key(&place) {
            return Err(Fault::internal(
                "the staging location of this transfer is gone",
            ));
        }
        // A row of a committed version is worth more than a row of a staging folder, which may be
        // removed.
        let keep = |row: &ChunkRow| {
            row.0 != place
                && known
                    .get(&row.0)
                    .is_some_and(|info| info.transfer.is_none())
        };
        if commit.chunks.is_empty() {
            self.behind.lock().insert(place);
        }
        self.tree.write(|write| {
            let mut chunks = write.open_table(CHUNKS)?;
            for (id, at) in &commit.chunks {
                if known.len() > 1 && chunks.get(&id.0)?.is_some_and(|row| keep(&row.value())) {
                    continue;
                }
                chunks.insert(&id.0, (at.place, at.entry, at.offset, at.len))?;
            }
            let mut entries = write.open_table(ENTRIES)?;
            for (number, path, file) in &commit.entries {
                entries.insert((place, *number), (path.as_str(), file.size, &file.hash.0))?;
            }
            intact::write(write, &commit.intact)?;
            let mut journal = journal.write();
            for ordinal in &commit.ordinals {
                journal.set(*ordinal);
            }
            journal::write_bits(write, place, &journal, &commit.ordinals)
        })?;
        if !commit.chunks.is_empty() {
            self.behind.lock().remove(&place);
        }
        *commit = Commit::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
