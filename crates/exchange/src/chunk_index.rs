//! Where a site stores chunks: its own files and blobs are its chunk store.
//!
//! A B-tree on disk (redb) at `<data_dir>/places.redb` maps the hash of a chunk to a storage
//! location, an entry and an offset. A location holds the files of one artifact: first its staging
//! folder, after the commit the folder or repository that the sink reports. A row of the index is a
//! hint: the reader of a chunk hashes the bytes, and removes the row when the hash differs.
//!
//! The same file holds the journals of transfers: one bit for each chunk of a staged artifact, set
//! when the chunk is durable. Rows and bits are written only after their bytes were synced. After a
//! kill or a power cut a transfer resumes from the last commit, and nothing is hashed again. Bits
//! are written at every group commit. Rows are spread over the whole tree, and a commit copies each
//! page that it changes, so rows are written in large batches. A location whose rows are older than
//! its bits is completed when its transfer resumes (see [`ChunkIndex::is_behind`]).
//!
//! A damaged file is moved aside, and a damaged or missing file is rebuilt (see [`Loss`]).

mod loss;
mod reader;
mod sweep;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

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

pub use loss::Loss;
pub use reader::{Reader, buffers};

const CACHE_BYTES: usize = 16 << 20;
/// Journal bits in one row.
const SEGMENT_BITS: u64 = 1 << 16;
const SEGMENT_WORDS: usize = (SEGMENT_BITS / 64) as usize;
const FILE: &str = "places.redb";

type ChunkRow = (u32, u64, u64, u32);

const CHUNKS: TableDefinition<'_, &[u8; 32], ChunkRow> = TableDefinition::new("chunks");
const ENTRIES: TableDefinition<'_, (u32, u64), (&str, u64, &[u8; 32])> =
    TableDefinition::new("entries");
const PLACES: TableDefinition<'_, u32, &str> = TableDefinition::new("places");
/// The number of the next location. A number is never used again, so that a late row cannot be
/// taken for a row of another location.
const NEXT: TableDefinition<'_, (), u32> = TableDefinition::new("next");
/// Location and segment → the bits of the segment in words of 64, little endian, and their XXH3-64
/// with location and segment before them (8 bytes, little endian; rows of older versions have no
/// checksum). A wrong bit would mark a chunk as written that is not.
const JOURNAL: TableDefinition<'_, (u32, u32), &[u8]> = TableDefinition::new("journal");

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
    /// Whether its files belong to somebody else (published in place). The owner may write to them,
    /// so they are never shared by hard link.
    #[serde(default)]
    pub foreign: bool,
    /// Whether its journal is being rebuilt from the staging folder. The folder may hold more than
    /// the journal lists.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopting: bool,
}

fn segment_sum(place: u32, segment: u32, bits: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(&place.to_le_bytes());
    sum.update(&segment.to_le_bytes());
    sum.update(bits);
    sum.digest()
}

fn with_sum(place: u32, segment: u32, mut bits: Vec<u8>) -> Vec<u8> {
    let sum = segment_sum(place, segment, &bits);
    bits.extend_from_slice(&sum.to_le_bytes());
    bits
}

/// The bits of a journal row that should have so many words; `None`: the row is damaged.
fn sound_segment(place: u32, segment: u32, row: &[u8], words: usize) -> Option<&[u8]> {
    if row.len() == words * 8 {
        return Some(row);
    }
    let (bits, sum) = row.split_last_chunk::<8>()?;
    (bits.len() == words * 8 && segment_sum(place, segment, bits) == u64::from_le_bytes(*sum))
        .then_some(bits)
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
}

/// A transfer's journal: one bit for each chunk of the artifact.
#[derive(Debug)]
pub struct Journal {
    bits: Vec<u64>,
    set: u64,
}

impl Journal {
    /// Whether the chunk of this ordinal is durable.
    pub fn has(&self, ordinal: u64) -> bool {
        self.bits
            .get((ordinal / 64) as usize)
            .is_some_and(|word| word >> (ordinal % 64) & 1 == 1)
    }

    fn set(&mut self, ordinal: u64) {
        if let Some(word) = self.bits.get_mut((ordinal / 64) as usize) {
            self.set += u64::from(*word >> (ordinal % 64) & 1 == 0);
            *word |= 1 << (ordinal % 64);
        }
    }

    fn clear(&mut self, ordinal: u64) {
        if let Some(word) = self.bits.get_mut((ordinal / 64) as usize) {
            self.set -= *word >> (ordinal % 64) & 1;
            *word &= !(1 << (ordinal % 64));
        }
    }

    /// The number of durable chunks.
    pub fn count(&self) -> u64 {
        self.set
    }

    fn segment(&self, number: u64) -> Vec<u8> {
        let start = number as usize * SEGMENT_WORDS;
        self.bits[start..(start + SEGMENT_WORDS).min(self.bits.len())]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect()
    }
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
            write.open_table(JOURNAL)?;
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
                write
                    .open_table(JOURNAL)?
                    .retain_in((number, 0)..(number, u32::MAX), |_, _| false)?;
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
            write
                .open_table(JOURNAL)?
                .retain_in((number, 0)..(number, u32::MAX), |_, _| false)?;
            write
                .open_table(ENTRIES)?
                .retain_in((number, 0)..(number, u64::MAX), |_, _| false)?;
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

    /// Records chunks of committed locations. `anew`: also those for which another committed
    /// location is known.
    pub fn note(
        &self,
        rows: &mut Vec<(Hash, At)>,
        entries: &mut Vec<(u32, u64, RelPath, FileInfo)>,
        anew: bool,
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
                if anew || !chunks.get(&id.0)?.is_some_and(|row| keep(&row.value())) {
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

    /// A transfer's journal as of its last commit. A damaged part counts as empty: its chunks are
    /// fetched again.
    pub fn journal(&self, place: u32, chunks: u64) -> Result<Journal, Fault> {
        let rows: Vec<(u32, Vec<u8>)> = self.tree.read(|read| {
            let journal = read.open_table(JOURNAL)?;
            let rows = journal.range((place, 0)..(place, u32::MAX))?;
            rows.map(|row| {
                row.map(|(key, value)| (key.value().1, value.value().to_vec()))
                    .map_err(Into::into)
            })
            .collect()
        })?;
        let mut bits = vec![0u64; chunks.div_ceil(64) as usize];
        for (segment, value) in rows {
            let start = (segment as usize).saturating_mul(SEGMENT_WORDS);
            let words = bits.len().saturating_sub(start).min(SEGMENT_WORDS);
            let Some(sound) = sound_segment(place, segment, &value, words) else {
                tracing::error!(
                    place,
                    segment,
                    "a part of a transfer's journal is damaged: its chunks are fetched again"
                );
                continue;
            };
            for (word, bytes) in bits.iter_mut().skip(start).zip(sound.chunks_exact(8)) {
                let mut out = [0; 8];
                out.copy_from_slice(bytes);
                *word = u64::from_le_bytes(out);
            }
        }
        let set = bits.iter().map(|w| u64::from(w.count_ones())).sum();
        Ok(Journal { bits, set })
    }

    /// Clears the bits of these chunks: their file must be written again.
    pub fn uncommit(
        &self,
        place: u32,
        journal: &RwLock<Journal>,
        ordinals: &[u64],
    ) -> Result<(), Fault> {
        let mut journal = journal.write();
        let segments: BTreeSet<u64> = ordinals
            .iter()
            .map(|ordinal| ordinal / SEGMENT_BITS)
            .collect();
        ordinals.iter().for_each(|ordinal| journal.clear(*ordinal));
        self.tree.write(|write| {
            let mut table = write.open_table(JOURNAL)?;
            for segment in segments {
                let number = segment as u32;
                table.insert(
                    (place, number),
                    with_sum(place, number, journal.segment(segment)).as_slice(),
                )?;
            }
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
            let mut table = write.open_table(JOURNAL)?;
            let segments: BTreeSet<u64> = commit
                .ordinals
                .iter()
                .map(|ordinal| ordinal / SEGMENT_BITS)
                .collect();
            let mut journal = journal.write();
            for ordinal in &commit.ordinals {
                journal.set(*ordinal);
            }
            for segment in segments {
                let number = segment as u32;
                table.insert(
                    (place, number),
                    with_sum(place, number, journal.segment(segment)).as_slice(),
                )?;
            }
            Ok(())
        })?;
        if !commit.chunks.is_empty() {
            self.behind.lock().remove(&place);
        }
        *commit = Commit::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_survives_and_a_removed_place_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let index = ChunkIndex::open(dir.path()).unwrap();
        let info = LocationInfo {
            place: StorageLocation::Folder { path: "/x".into() },
            digest: Hash([1; 32]),
            transfer: Some("t-1".into()),
            foreign: false,
            adopting: false,
        };
        let place = index.put(None, info).unwrap();
        let journal = RwLock::new(index.journal(place, 200_000).unwrap());
        let file = FileInfo {
            size: 5,
            hash: Hash([2; 32]),
        };
        let at = At {
            place,
            entry: 7,
            offset: 0,
            len: 5,
        };
        let mut commit = Commit {
            chunks: vec![(Hash([3; 32]), at)],
            entries: vec![(7, "a/b".parse().unwrap(), file)],
            ordinals: vec![0, 70_000, 199_999],
        };
        index.commit(place, &journal, &mut commit).unwrap();
        drop(index);
        let index = ChunkIndex::open(dir.path()).unwrap();
        assert_eq!(index.staged_by("t-1"), Some(place));
        let journal = index.journal(place, 200_000).unwrap();
        assert_eq!(journal.count(), 3);
        assert!(journal.has(70_000) && journal.has(199_999) && !journal.has(1));
        let journal = RwLock::new(journal);
        index.uncommit(place, &journal, &[70_000, 70_001]).unwrap();
        for journal in [journal.into_inner(), index.journal(place, 200_000).unwrap()] {
            assert!(
                journal.count() == 2
                    && !journal.has(70_000)
                    && journal.has(0)
                    && journal.has(199_999)
            );
        }
        assert_eq!(
            index.find(&[Hash([3; 32]), Hash([4; 32])]).unwrap(),
            [Some(at), None]
        );
        assert_eq!(index.entry(place, 7).unwrap().unwrap().1, file);
        index.remove(place).unwrap();
        assert_eq!(index.find(&[Hash([3; 32])]).unwrap(), [None]);
    }

    #[test]
    fn rows_that_wait_are_missed_until_they_are_noted() {
        let dir = tempfile::tempdir().unwrap();
        let index = ChunkIndex::open(dir.path()).unwrap();
        let transfer = Some("t-1".into());
        let info = LocationInfo {
            place: StorageLocation::Folder { path: "/x".into() },
            digest: Hash([1; 32]),
            transfer,
            foreign: false,
            adopting: false,
        };
        let place = index.put(None, info).unwrap();
        let journal = RwLock::new(index.journal(place, 2).unwrap());
        let row = |n: u8| {
            (
                Hash([n; 32]),
                At {
                    place,
                    entry: 0,
                    offset: 0,
                    len: 5,
                },
            )
        };
        assert!(!index.is_behind(place));
        index
            .commit(
                place,
                &journal,
                &mut Commit {
                    ordinals: vec![0],
                    ..Commit::default()
                },
            )
            .unwrap();
        assert!(index.is_behind(place));
        let both = Commit {
            chunks: vec![row(1), row(2)],
            ordinals: vec![1],
            ..Commit::default()
        };
        index.commit(place, &journal, &mut { both }).unwrap();
        assert!(!index.is_behind(place));
        drop(index);
        let index = ChunkIndex::open(dir.path()).unwrap();
        assert!(
            index.is_behind(place),
            "it is unknown what the previous process had not written"
        );
        index
            .note(&mut vec![row(1), row(2)], &mut Vec::new(), false)
            .unwrap();
        index.caught_up(place);
        assert!(!index.is_behind(place) && index.find(&[row(2).0]).unwrap()[0].is_some());
    }

    fn staged(dir: &Path) -> u32 {
        let index = ChunkIndex::open(dir).unwrap();
        let info = LocationInfo {
            place: StorageLocation::Folder { path: "/x".into() },
            digest: Hash([1; 32]),
            transfer: Some("t-1".into()),
            foreign: false,
            adopting: false,
        };
        let place = index.put(None, info).unwrap();
        let journal = RwLock::new(index.journal(place, 100).unwrap());
        index
            .commit(
                place,
                &journal,
                &mut Commit {
                    ordinals: vec![3, 64],
                    ..Commit::default()
                },
            )
            .unwrap();
        place
    }

    #[test]
    fn a_damaged_or_missing_file_is_made_again_and_reported() {
        let dir = tempfile::tempdir().unwrap();
        staged(dir.path());
        let path = dir.path().join(FILE);
        let sound = std::fs::read(&path).unwrap();
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(sound.len() as u64 / 2)
            .unwrap();
        let index = ChunkIndex::open(dir.path()).unwrap();
        let loss = index.loss().unwrap();
        assert_eq!(
            index.staged_by("t-1"),
            None,
            "nothing of the damaged file is used"
        );
        assert_eq!(
            std::fs::read(loss.aside.as_ref().unwrap()).unwrap(),
            sound[..sound.len() / 2],
            "it is kept"
        );
        assert!(
            loss.report(dir.path())
                .starts_with("fault places: being made again"),
            "{}",
            loss.report(dir.path())
        );
        drop(index);
        let index = ChunkIndex::open(dir.path()).unwrap();
        assert_eq!(
            index.loss().unwrap().artifacts,
            None,
            "a restart does not forget that rows lack"
        );
        index.rebuilt(7).unwrap();
        drop(index);
        let report = ChunkIndex::open(dir.path())
            .unwrap()
            .loss()
            .unwrap()
            .report(dir.path());
        assert!(
            report.starts_with("ok places: made again on") && report.contains("7 artifacts"),
            "{report}"
        );

        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            ChunkIndex::open_expected(dir.path(), false).unwrap().loss(),
            None,
            "a new site has lost nothing"
        );
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        let loss = ChunkIndex::open_expected(dir.path(), true)
            .unwrap()
            .loss()
            .unwrap();
        assert!(
            loss.why.contains("missing") && loss.aside.is_none(),
            "{loss:?}"
        );
    }

    #[test]
    fn a_bit_of_a_journal_that_flipped_on_the_disk_is_not_believed() {
        let sum = with_sum(7, 0, vec![0; 16]);
        assert_eq!(sound_segment(7, 0, &sum, 2), Some(&[0; 16][..]));
        assert_eq!(
            sound_segment(7, 0, &[0; 16], 2),
            Some(&[0; 16][..]),
            "a row of an older version"
        );
        for bit in 0..sum.len() * 8 {
            let mut flipped = sum.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(sound_segment(7, 0, &flipped, 2), None, "bit {bit}");
        }
        assert_eq!(
            sound_segment(8, 0, &sum, 2),
            None,
            "the journal of another transfer"
        );
        assert_eq!(sound_segment(7, 0, &sum, 1), None);
        let dir = tempfile::tempdir().unwrap();
        let place = staged(dir.path());
        let index = ChunkIndex::open(dir.path()).unwrap();
        let journal = index.journal(place, 100).unwrap();
        assert!(journal.has(3) && journal.has(64) && journal.count() == 2);
    }
}
