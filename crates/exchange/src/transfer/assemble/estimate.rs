//! The cost of delivering an artifact to this site: for `plan`, and when room is short.

use std::collections::HashMap;

use super::recent::Recent;
use super::{Assembly, LOOK_UP, Local};
use crate::chunk_index::{At, Journal};
use base::fault::Fault;
use base::space::Space;
use content::chunk::Hash;
use content::manifest::{ChunkRef, EntryBody, FileInfo, Step};
use sink::{Sink, StorageLocation};

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
                if local.is_some_and(|local| local.link && shares) && whole != Some(number) {
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

/// Free bytes of a sink's staging, for `plan`.
pub fn free_room(sink: &dyn Sink) -> Option<u64> {
    Space::of(sink.staging_root()).ok()?.bytes
}
