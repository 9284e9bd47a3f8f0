//! Where chunks lie at a site: its own files and blobs are its chunk store.
//!
//! A B-tree on disk (redb) at `<data_dir>/places.redb` maps a chunk's name to a place, an entry and an offset. A place
//! is one artifact's files: first its staging folder, after the commit what the sink says. What the index says is a
//! hint: whoever reads a chunk by it hashes the bytes, and forgets the hint when they are others.
//!
//! It is also the journal of transfers: which chunks of a staged artifact are durable, a bit each. Rows and bits are
//! written only after the bytes they speak of were synced, so after a kill or a power cut a transfer goes on where the last
//! commit stood and nothing is hashed again. Bits are written at every group commit; rows, which lie all over the tree and would
//! have most of it copied each time, once there are many. A place whose rows are behind its bits is made good when its transfer goes
//! on (see [`Places::is_behind`]).

mod reader;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::chunk::Hash;
use crate::fault::Fault;
use crate::manifest::{Digest, FileInfo};
use crate::names::RelPath;
use crate::sink::Place;
use crate::tree::Tree;

pub use reader::{Reader, buffers};

const CACHE_BYTES: usize = 16 << 20;
/// Journal bits that are written together.
const SEGMENT_BITS: u64 = 1 << 16;

type ChunkRow = (u32, u64, u64, u32);

const CHUNKS: TableDefinition<'_, &[u8; 32], ChunkRow> = TableDefinition::new("chunks");
const ENTRIES: TableDefinition<'_, (u32, u64), (&str, u64, &[u8; 32])> = TableDefinition::new("entries");
const PLACES: TableDefinition<'_, u32, &str> = TableDefinition::new("places");
/// The next place's number: numbers are never used again, so that no late row can be taken for another place's.
const NEXT: TableDefinition<'_, (), u32> = TableDefinition::new("next");
const JOURNAL: TableDefinition<'_, (u32, u32), &[u8]> = TableDefinition::new("journal");

/// Where a chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// The place.
    pub place: u32,
    /// The entry's number in the place's manifest.
    pub entry: u64,
    /// Where it begins in the entry's file, bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// One place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlaceInfo {
    /// Where.
    pub place: Place,
    /// The artifact's digest.
    pub digest: Digest,
    /// The transfer that stages it, until it has landed.
    pub transfer: Option<String>,
    /// Whether its files are somebody else's, published where they lie: he may write into them, so none may be shared by link.
    #[serde(default)]
    pub foreign: bool,
}

/// What one group commit makes known.
#[derive(Debug, Default)]
pub struct Commit {
    /// Chunks that are durable now.
    pub chunks: Vec<(Hash, At)>,
    /// The files that they are in.
    pub entries: Vec<(u64, RelPath, FileInfo)>,
    /// Their ordinals.
    pub ordinals: Vec<u64>,
}

/// A transfer's journal: a bit for every chunk of the artifact.
#[derive(Debug)]
pub struct Journal {
    bits: Vec<u64>,
    set: u64,
}

impl Journal {
    /// Whether the chunk of this ordinal is durable.
    pub fn has(&self, ordinal: u64) -> bool {
        self.bits.get((ordinal / 64) as usize).is_some_and(|word| word >> (ordinal % 64) & 1 == 1)
    }

    fn set(&mut self, ordinal: u64) {
        if let Some(word) = self.bits.get_mut((ordinal / 64) as usize) {
            self.set += u64::from(*word >> (ordinal % 64) & 1 == 0);
            *word |= 1 << (ordinal % 64);
        }
    }

    /// How many are.
    pub fn count(&self) -> u64 {
        self.set
    }

    fn segment(&self, number: u64) -> Vec<u8> {
        let words = (SEGMENT_BITS / 64) as usize;
        let start = number as usize * words;
        self.bits[start..(start + words).min(self.bits.len())].iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

/// The index.
pub struct Places {
    tree: Tree,
    known: RwLock<HashMap<u32, Arc<PlaceInfo>>>,
    /// Staging places that may lack rows of chunks that their journal has.
    behind: Mutex<HashSet<u32>>,
}

impl Places {
    /// Opens or makes it.
    pub fn open(data_dir: &Path) -> Result<Self, Fault> {
        let path = data_dir.join("places.redb");
        let tree = Tree::open(&path, "the site's chunk index", CACHE_BYTES)?;
        let write = tree.write()?;
        write.open_table(CHUNKS).map_err(|e| tree.fault(e))?;
        write.open_table(ENTRIES).map_err(|e| tree.fault(e))?;
        write.open_table(JOURNAL).map_err(|e| tree.fault(e))?;
        write.open_table(NEXT).map_err(|e| tree.fault(e))?;
        let mut known = HashMap::new();
        for row in write.open_table(PLACES).map_err(|e| tree.fault(e))?.iter().map_err(|e| tree.fault(e))? {
            let (number, text) = row.map_err(|e| tree.fault(e))?;
            let info =
                serde_json::from_str(text.value()).map_err(|e| Fault::internal(format!("{}: a malformed place: {e}", path.display())))?;
            known.insert(number.value(), Arc::new(info));
        }
        write.commit().map_err(|e| tree.fault(e))?;
        // What the process before had not written, nobody knows.
        let behind = known.iter().filter(|(_, info): &(_, &Arc<PlaceInfo>)| info.transfer.is_some()).map(|(number, _)| *number).collect();
        Ok(Self { tree, known: RwLock::new(known), behind: Mutex::new(behind) })
    }

    /// What is known of a place; `None` once it is gone.
    pub fn info(&self, place: u32) -> Option<Arc<PlaceInfo>> {
        self.known.read().get(&place).cloned()
    }

    /// The place that this transfer stages in, if it began.
    pub fn staged_by(&self, transfer: &str) -> Option<u32> {
        self.known.read().iter().find(|(_, info)| info.transfer.as_deref() == Some(transfer)).map(|(number, _)| *number)
    }

    /// Makes a place known, or changes where a known one is.
    pub fn put(&self, number: Option<u32>, info: PlaceInfo) -> Result<u32, Fault> {
        let mut known = self.known.write();
        let text = serde_json::to_string(&info).map_err(|e| Fault::internal(format!("a place as JSON: {e}")))?;
        let write = self.tree.write()?;
        let number = match number {
            Some(number) => number,
            None => {
                let mut next = write.open_table(NEXT).map_err(|e| self.tree.fault(e))?;
                let number = next.get(()).map_err(|e| self.tree.fault(e))?.map_or(1, |n| n.value());
                next.insert((), number + 1).map_err(|e| self.tree.fault(e))?;
                number
            }
        };
        write.open_table(PLACES).map_err(|e| self.tree.fault(e))?.insert(number, text.as_str()).map_err(|e| self.tree.fault(e))?;
        if info.transfer.is_none() {
            let mut journal = write.open_table(JOURNAL).map_err(|e| self.tree.fault(e))?;
            journal.retain_in((number, 0)..(number, u32::MAX), |_, _| false).map_err(|e| self.tree.fault(e))?;
        }
        write.commit().map_err(|e| self.tree.fault(e))?;
        known.insert(number, Arc::new(info));
        Ok(number)
    }

    /// Forgets a place. Its chunks' rows stay until somebody stumbles over them or overwrites them.
    pub fn remove(&self, number: u32) -> Result<(), Fault> {
        let mut known = self.known.write();
        let write = self.tree.write()?;
        write.open_table(PLACES).map_err(|e| self.tree.fault(e))?.remove(number).map_err(|e| self.tree.fault(e))?;
        write
            .open_table(JOURNAL)
            .map_err(|e| self.tree.fault(e))?
            .retain_in((number, 0)..(number, u32::MAX), |_, _| false)
            .map_err(|e| self.tree.fault(e))?;
        write
            .open_table(ENTRIES)
            .map_err(|e| self.tree.fault(e))?
            .retain_in((number, 0)..(number, u64::MAX), |_, _| false)
            .map_err(|e| self.tree.fault(e))?;
        write.commit().map_err(|e| self.tree.fault(e))?;
        known.remove(&number);
        self.behind.lock().remove(&number);
        Ok(())
    }

    /// The landed place of an artifact that lies here, if it is known.
    pub fn landed(&self, digest: Digest, place: &Place) -> Option<u32> {
        let known = self.known.read();
        known.iter().find(|(_, i)| i.digest == digest && i.transfer.is_none() && i.place == *place).map(|(number, _)| *number)
    }

    /// Notes where chunks of landed places lie. `anew`: even those of which another landed place is known already.
    pub fn note(&self, rows: &mut Vec<(Hash, At)>, entries: &mut Vec<(u32, u64, RelPath, FileInfo)>, anew: bool) -> Result<(), Fault> {
        rows.sort_unstable_by_key(|(id, _)| *id);
        let known = self.known.read();
        let write = self.tree.write()?;
        {
            let mut chunks = write.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
            for (id, at) in rows.drain(..) {
                let keep = |row: &ChunkRow| known.get(&row.0).is_some_and(|info| info.transfer.is_none());
                if anew || !chunks.get(&id.0).map_err(|e| self.tree.fault(e))?.is_some_and(|row| keep(&row.value())) {
                    chunks.insert(&id.0, (at.place, at.entry, at.offset, at.len)).map_err(|e| self.tree.fault(e))?;
                }
            }
            let mut table = write.open_table(ENTRIES).map_err(|e| self.tree.fault(e))?;
            for (place, number, path, file) in entries.drain(..) {
                table.insert((place, number), (path.as_str(), file.size, &file.hash.0)).map_err(|e| self.tree.fault(e))?;
            }
        }
        write.commit().map_err(|e| self.tree.fault(e))
    }

    /// Whether a staging place may lack rows of chunks that its journal has: whoever goes on with it notes them, then says so.
    pub fn is_behind(&self, place: u32) -> bool {
        self.behind.lock().contains(&place)
    }

    /// Every chunk that the place's journal has was noted.
    pub fn caught_up(&self, place: u32) {
        self.behind.lock().remove(&place);
    }

    /// Forgets every place of an artifact that has landed.
    pub fn remove_digest(&self, digest: Digest) -> Result<(), Fault> {
        let gone: Vec<u32> =
            self.known.read().iter().filter(|(_, i)| i.digest == digest && i.transfer.is_none()).map(|(number, _)| *number).collect();
        gone.into_iter().try_for_each(|number| self.remove(number))
    }

    /// Where these chunks lie, as far as it is known.
    pub fn find(&self, ids: &[Hash]) -> Result<Vec<Option<At>>, Fault> {
        let known = self.known.read();
        if known.is_empty() {
            return Ok(vec![None; ids.len()]);
        }
        let read = self.tree.read()?;
        let chunks = read.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
        ids.iter()
            .map(|id| {
                let row = chunks.get(&id.0).map_err(|e| self.tree.fault(e))?.map(|row| row.value());
                Ok(row.filter(|row| known.contains_key(&row.0)).map(|(place, entry, offset, len)| At { place, entry, offset, len }))
            })
            .collect()
    }

    /// The file that an entry of a place is.
    pub fn entry(&self, place: u32, entry: u64) -> Result<Option<(RelPath, FileInfo)>, Fault> {
        Ok(self.entries(&[(place, entry)])?.pop().flatten())
    }

    /// [`Places::entry`] for many: places, each with the number of an entry.
    pub fn entries(&self, wanted: &[(u32, u64)]) -> Result<Vec<Option<(RelPath, FileInfo)>>, Fault> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let read = self.tree.read()?;
        let entries = read.open_table(ENTRIES).map_err(|e| self.tree.fault(e))?;
        let file = |key: &(u32, u64)| {
            let row = entries.get(key).map_err(|e| self.tree.fault(e))?;
            row.map(|row| {
                let (path, size, hash) = row.value();
                Ok((path.parse()?, FileInfo { size, hash: Hash(*hash) }))
            })
            .transpose()
        };
        wanted.iter().map(file).collect()
    }

    /// Forgets that a chunk lies there: its bytes were others.
    pub fn forget(&self, id: Hash) -> Result<(), Fault> {
        let mut write = self.tree.write()?;
        // Losing this in a crash costs one more look.
        write.set_durability(redb::Durability::None).map_err(|e| Fault::internal(format!("the site's chunk index: {e}")))?;
        write.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?.remove(&id.0).map_err(|e| self.tree.fault(e))?;
        write.commit().map_err(|e| self.tree.fault(e))
    }

    /// A transfer's journal as it was last committed.
    pub fn journal(&self, place: u32, chunks: u64) -> Result<Journal, Fault> {
        let mut bits = vec![0u64; chunks.div_ceil(64) as usize];
        let read = self.tree.read()?;
        let journal = read.open_table(JOURNAL).map_err(|e| self.tree.fault(e))?;
        for row in journal.range((place, 0)..(place, u32::MAX)).map_err(|e| self.tree.fault(e))? {
            let (key, value) = row.map_err(|e| self.tree.fault(e))?;
            let start = key.value().1 as usize * (SEGMENT_BITS / 64) as usize;
            for (word, bytes) in bits.iter_mut().skip(start).zip(value.value().chunks_exact(8)) {
                let mut out = [0; 8];
                out.copy_from_slice(bytes);
                *word = u64::from_le_bytes(out);
            }
        }
        let set = bits.iter().map(|w| u64::from(w.count_ones())).sum();
        Ok(Journal { bits, set })
    }

    /// Makes a group commit known. Everything in it must be synced. One without chunks leaves them to a later one.
    pub fn commit(&self, place: u32, journal: &RwLock<Journal>, commit: &mut Commit) -> Result<(), Fault> {
        // In the order of their names: neighbours share a leaf of the tree.
        commit.chunks.sort_unstable_by_key(|(id, _)| *id);
        let known = self.known.read();
        if !known.contains_key(&place) {
            return Err(Fault::internal("the staging place of this transfer is gone"));
        }
        // A row that names a version which has landed is worth more than one of a staging folder that may go away.
        let keep = |row: &ChunkRow| row.0 != place && known.get(&row.0).is_some_and(|info| info.transfer.is_none());
        let write = self.tree.write()?;
        {
            let mut chunks = write.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
            for (id, at) in &commit.chunks {
                if known.len() > 1 && chunks.get(&id.0).map_err(|e| self.tree.fault(e))?.is_some_and(|row| keep(&row.value())) {
                    continue;
                }
                chunks.insert(&id.0, (at.place, at.entry, at.offset, at.len)).map_err(|e| self.tree.fault(e))?;
            }
            let mut entries = write.open_table(ENTRIES).map_err(|e| self.tree.fault(e))?;
            for (number, path, file) in &commit.entries {
                entries.insert((place, *number), (path.as_str(), file.size, &file.hash.0)).map_err(|e| self.tree.fault(e))?;
            }
            let mut table = write.open_table(JOURNAL).map_err(|e| self.tree.fault(e))?;
            let segments: BTreeSet<u64> = commit.ordinals.iter().map(|ordinal| ordinal / SEGMENT_BITS).collect();
            let mut journal = journal.write();
            for ordinal in &commit.ordinals {
                journal.set(*ordinal);
            }
            for segment in segments {
                table.insert((place, segment as u32), journal.segment(segment).as_slice()).map_err(|e| self.tree.fault(e))?;
            }
        }
        if commit.chunks.is_empty() {
            self.behind.lock().insert(place);
        }
        write.commit().map_err(|e| self.tree.fault(e))?;
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
        let places = Places::open(dir.path()).unwrap();
        let info =
            PlaceInfo { place: Place::Folder { path: "/x".into() }, digest: Hash([1; 32]), transfer: Some("t-1".into()), foreign: false };
        let place = places.put(None, info).unwrap();
        let journal = RwLock::new(places.journal(place, 200_000).unwrap());
        let file = FileInfo { size: 5, hash: Hash([2; 32]) };
        let at = At { place, entry: 7, offset: 0, len: 5 };
        let mut commit = Commit {
            chunks: vec![(Hash([3; 32]), at)],
            entries: vec![(7, "a/b".parse().unwrap(), file)],
            ordinals: vec![0, 70_000, 199_999],
        };
        places.commit(place, &journal, &mut commit).unwrap();
        drop(places);
        let places = Places::open(dir.path()).unwrap();
        assert_eq!(places.staged_by("t-1"), Some(place));
        let journal = places.journal(place, 200_000).unwrap();
        assert_eq!(journal.count(), 3);
        assert!(journal.has(70_000) && journal.has(199_999) && !journal.has(1));
        assert_eq!(places.find(&[Hash([3; 32]), Hash([4; 32])]).unwrap(), [Some(at), None]);
        assert_eq!(places.entry(place, 7).unwrap().unwrap().1, file);
        places.remove(place).unwrap();
        assert_eq!(places.find(&[Hash([3; 32])]).unwrap(), [None]);
    }

    #[test]
    fn rows_that_wait_are_missed_until_they_are_noted() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::open(dir.path()).unwrap();
        let transfer = Some("t-1".into());
        let info = PlaceInfo { place: Place::Folder { path: "/x".into() }, digest: Hash([1; 32]), transfer, foreign: false };
        let place = places.put(None, info).unwrap();
        let journal = RwLock::new(places.journal(place, 2).unwrap());
        let row = |n: u8| (Hash([n; 32]), At { place, entry: 0, offset: 0, len: 5 });
        assert!(!places.is_behind(place));
        places.commit(place, &journal, &mut Commit { ordinals: vec![0], ..Commit::default() }).unwrap();
        assert!(places.is_behind(place));
        let both = Commit { chunks: vec![row(1), row(2)], ordinals: vec![1], ..Commit::default() };
        places.commit(place, &journal, &mut { both }).unwrap();
        assert!(!places.is_behind(place));
        drop(places);
        let places = Places::open(dir.path()).unwrap();
        assert!(places.is_behind(place), "who knows what a process that ended had not written");
        places.note(&mut vec![row(1), row(2)], &mut Vec::new(), false).unwrap();
        places.caught_up(place);
        assert!(!places.is_behind(place) && places.find(&[row(2).0]).unwrap()[0].is_some());
    }
}
