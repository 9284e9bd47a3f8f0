//! The cost of delivering an artifact to this site: for `plan`, and when room is short.

use std::collections::HashMap;
use std::path::PathBuf;

use super::recent::Recent;
use super::{Assembly, LOOK_UP, Local};
use crate::chunk_index::{At, Journal};
use base::fault::Fault;
use base::mounts::are_apart;
use base::space::Space;
use content::chunk::Hash;
use content::manifest::{ChunkRef, EntryBody, FileInfo, Step};
use sink::StorageLocation;

/// The cost of a delivery.
#[derive(Debug, Clone, Copy, Default)]
pub struct Estimate {
    /// Raw bytes that the site lacks. A chunk that occurs again much later may be counted twice.
    pub missing: u64,
    /// Raw bytes that would be written: also local content, except files that can be shared whole.
    pub needs: u64,
    /// Entries that would be created, except files that can be shared by a hard link.
    pub inodes: u64,
}

/// What a commit would copy to another mount.
#[derive(Debug)]
pub(super) struct CopyAtCommit {
    /// The directory there.
    pub(super) to: PathBuf,
    /// Bytes without holes.
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

/// The room that a delivery needs and has: on the filesystem that has the least to spare of those
/// that it writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub needs: u64,
    /// `None`: unknown.
    pub free: Option<u64>,
    pub inodes: u64,
    /// `None`: unknown.
    pub free_inodes: Option<u64>,
}

impl Room {
    fn of(needs: u64, inodes: u64, space: Option<Space>) -> Self {
        Self {
            needs,
            free: space.and_then(|space| space.bytes),
            inodes,
            free_inodes: space.and_then(|space| space.inodes),
        }
    }

    /// Each quantity of the filesystem that has less of it to spare.
    fn tightest(self, other: Self) -> Self {
        let spare =
            |free: Option<u64>, needs: u64| free.map(|free| i128::from(free) - i128::from(needs));
        let less = |one: Option<i128>, other: Option<i128>| match (one, other) {
            (Some(one), Some(other)) => other < one,
            (one, other) => one.is_none() && other.is_some(),
        };
        let mut room = self;
        if less(spare(self.free, self.needs), spare(other.free, other.needs)) {
            (room.needs, room.free) = (other.needs, other.free);
        }
        if less(
            spare(self.free_inodes, self.inodes),
            spare(other.free_inodes, other.inodes),
        ) {
            (room.inodes, room.free_inodes) = (other.inodes, other.free_inodes);
        }
        room
    }
}

impl Assembly {
    /// The cost of delivering the artifact.
    pub fn estimate(&self, journal: Option<&Journal>) -> Result<Estimate, Fault> {
        let mut out = Estimate::default();
        // Each with its file, the file's number, and its offset.
        let mut pending: Vec<(ChunkRef, FileInfo, u64, u64)> = Vec::new();
        let mut seen = Recent::default();
        let places = &self.shared.chunk_index;
        let (mut whole, mut linked, mut entries) = (None, 0, 0);
        let (sparse, shares) = (self.sparse_files(journal)?, self.sink.shares_files());
        // A file on another mount than the staging directory cannot be shared.
        let mut near: HashMap<u32, bool> = HashMap::new();
        let mut is_near = |place: u32| {
            *near.entry(place).or_insert_with(|| {
                places.info(place).is_some_and(|info| match &info.place {
                    StorageLocation::Folder { path } => {
                        !are_apart(path, self.sink.staging_root()).unwrap_or(true)
                    }
                    StorageLocation::Registry { .. } => false,
                })
            })
        };
        // The index learns late that a folder was removed.
        let mut gone: HashMap<u32, bool> = HashMap::new();
        let mut is_gone = |place: u32| {
            *gone.entry(place).or_insert_with(|| {
                places.info(place).is_none_or(
                    |i| matches!(&i.place, StorageLocation::Folder { path } if !path.is_dir()),
                )
            })
        };
        let mut look = |pending: &mut Vec<(ChunkRef, FileInfo, u64, u64)>| -> Result<(), Fault> {
            let ids: Vec<Hash> = pending.iter().map(|(chunk, ..)| chunk.id).collect();
            let found: Vec<Option<At>> = places
                .find(&ids)?
                .into_iter()
                .map(|at| at.filter(|at| !is_gone(at.place)))
                .collect();
            let wholes = self.shareable(
                pending
                    .iter()
                    .zip(&found)
                    .map(|((_, file, _, offset), at)| (*file, at.filter(|_| *offset == 0))),
            )?;
            for (((chunk, _, number, _), at), local) in pending.drain(..).zip(found).zip(wholes) {
                let len = u64::from(chunk.len);
                if sparse
                    .get(&number)
                    .is_some_and(|file| file.is_hole(&chunk.id))
                {
                    continue;
                }
                if shares
                    && whole != Some(number)
                    && at.is_some_and(|at| is_near(at.place))
                    && local.is_some_and(|local| local.link)
                {
                    whole = Some(number);
                    linked += 1;
                }
                out.missing += if at.is_none() && seen.insert(chunk.id) {
                    len
                } else {
                    0
                };
                out.needs += if whole == Some(number) { 0 } else { len };
            }
            Ok(())
        };
        let mut of = None;
        for step in self.walk() {
            match step? {
                Step::Entry { number, entry, .. } => {
                    entries += 1;
                    of = if let EntryBody::File(file) = entry.body {
                        Some((number, file))
                    } else {
                        None
                    };
                }
                Step::Chunk(chunk, spot) => {
                    let Some((number, file)) =
                        of.filter(|_| !journal.is_some_and(|j| j.has(spot.ordinal)))
                    else {
                        continue;
                    };
                    pending.push((chunk, file, number, spot.offset));
                    if pending.len() >= LOOK_UP {
                        look(&mut pending)?;
                    }
                }
            }
        }
        look(&mut pending)?;
        out.inodes = u64::saturating_sub(entries, linked);
        Ok(out)
    }

    /// What the commit would copy to another mount; `None`: it copies nothing.
    pub(super) fn copy_at_commit(&self) -> Result<Option<CopyAtCommit>, Fault> {
        let Some(to) = self.sink.copies_to(&self.incoming.artifact) else {
            return Ok(None);
        };
        let (sparse, totals) = (self.sparse_files(None)?, self.incoming.root.totals);
        let (mut bytes, mut of) = (totals.bytes, None);
        if !sparse.is_empty() {
            for step in self.walk() {
                match step? {
                    Step::Entry { number, .. } => of = sparse.get(&number),
                    Step::Chunk(chunk, _) if of.is_some_and(|file| file.is_hole(&chunk.id)) => {
                        bytes = bytes.saturating_sub(u64::from(chunk.len));
                    }
                    Step::Chunk(..) => {}
                }
            }
        }
        Ok(Some(CopyAtCommit {
            to,
            bytes,
            inodes: totals.files + totals.dirs + totals.symlinks,
        }))
    }

    /// The room that a delivery with this cost needs and has, for `plan`.
    pub fn room(&self, estimate: Estimate) -> Result<Room, Fault> {
        let space = Space::of(self.sink.staging_root()).ok();
        let staged = Room::of(estimate.needs, estimate.inodes, space);
        Ok(match self.copy_at_commit()? {
            Some(copy) => {
                let there = Space::of(&copy.to).ok();
                staged.tightest(Room::of(copy.bytes, copy.inodes, there))
            }
            None => staged,
        })
    }

    /// Local copies of whole files. The caller passes where the first chunk of each was found.
    pub(super) fn shareable(
        &self,
        files: impl Iterator<Item = (FileInfo, Option<At>)>,
    ) -> Result<Vec<Option<Local>>, Fault> {
        let places = &self.shared.chunk_index;
        let mut out: Vec<Option<Local>> = Vec::new();
        let (mut wanted, mut of) = (Vec::new(), Vec::new());
        for (number, (file, at)) in files.enumerate() {
            out.push(None);
            let Some(at) = at.filter(|at| at.offset == 0) else {
                continue;
            };
            let Some(info) = places.info(at.place).filter(|info| info.transfer.is_none()) else {
                continue;
            };
            if matches!(info.place, StorageLocation::Folder { .. }) {
                wanted.push((at.place, at.entry));
                of.push((number, file, info));
            }
        }
        let known = places.intact(&wanted)?.into_iter();
        for ((((number, file, info), key), there), intact) in of
            .into_iter()
            .zip(&wanted)
            .zip(places.entries(&wanted)?)
            .zip(known)
        {
            let (StorageLocation::Folder { path }, Some((rel, _))) =
                (&info.place, there.filter(|(_, there)| *there == file))
            else {
                continue;
            };
            let link = self.incoming.artifact.kind.is_files() && !info.foreign;
            out[number] = Some(Local {
                path: rel.in_dir(path),
                link,
                key: *key,
                intact: intact.filter(|_| link),
            });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filesystem_with_the_least_to_spare_decides() {
        let room = |needs, free, inodes, free_inodes| Room {
            needs,
            free,
            inodes,
            free_inodes,
        };
        let staged = room(10, Some(100), 5, Some(50));
        for (other, expected) in [
            (room(20, Some(15), 9, None), room(20, Some(15), 5, Some(50))),
            (
                room(20, Some(500), 9, Some(8)),
                room(10, Some(100), 9, Some(8)),
            ),
            (room(20, None, 9, Some(500)), staged),
        ] {
            assert_eq!(staged.tightest(other), expected, "{other:?}");
        }
        assert_eq!(room(1, None, 1, None).tightest(staged), staged);
    }
}
