//! Bundles: artifacts in one file, for transport by disk. An import checks them as a transfer over
//! the network does.
//!
//! ```text
//! "PHBUNDL1"
//! u32 LE length, JSON array of {artifact, digest, root}     the root manifests, as text
//! frame*                                                    every page and chunk once, as stored (see `frame`)
//! ```
//! An import verifies the BLAKE3 of each frame while it reads. It then checks each manifest, and
//! that each chunk is present with the length that the manifest states. Only then does the artifact
//! exist. A failed import leaves chunks that no artifact references; `gc` removes them.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::frame::{Frame, HEADER_BYTES, Header};
use crate::manifest::{ChunkRef, Digest, Root, Step, Walk, check, for_each_page};
use crate::store::Store;
use base::durable;
use base::fault::{Fault, IoContext};
use base::job_progress::JobProgress;
use base::limits::BUNDLE_LIST_BYTES_MAX;
use base::names::ArtifactRef;

const MAGIC: &[u8; 8] = b"PHBUNDL1";
/// The number of chunks that are read from the store at once.
const READ_BATCH_CHUNKS: usize = 64;

/// One artifact of a bundle.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Member {
    pub artifact: ArtifactRef,
    pub digest: Digest,
    /// The canonical bytes of the root manifest.
    root: String,
}

impl Member {
    /// Creates a member from an artifact of the catalogue.
    pub fn new(artifact: ArtifactRef, root: &Root) -> Self {
        Self {
            artifact,
            digest: root.digest(),
            root: String::from_utf8_lossy(&root.to_bytes()).into_owned(),
        }
    }

    /// The root manifest, after its digest was checked.
    pub fn root(&self) -> Result<Root, Fault> {
        Root::parse(self.root.as_bytes(), self.digest)
    }
}

/// Writes artifacts to a new file. Removes the file on failure. Returns the number of bytes.
pub fn export(
    members: &[Member],
    store: &Store,
    out: &Path,
    progress: &JobProgress,
) -> Result<u64, Fault> {
    let what = format!("write {}", out.display());
    let file = File::options()
        .write(true)
        .create_new(true)
        .open(out)
        .at(&what)?;
    let result = write(members, store, file, &what, progress);
    if result.is_err() {
        let _ = std::fs::remove_file(out);
    }
    result
}

fn write(
    members: &[Member],
    store: &Store,
    file: File,
    what: &str,
    progress: &JobProgress,
) -> Result<u64, Fault> {
    let list = serde_json::to_vec(members)
        .map_err(|e| Fault::internal(format!("a bundle's list: {e}")))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(MAGIC)
        .and_then(|()| out.write_all(&(list.len() as u32).to_le_bytes()))
        .and_then(|()| out.write_all(&list))
        .at(what)?;
    let mut written = (MAGIC.len() + 4 + list.len()) as u64;
    let mut seen = HashSet::new();
    let mut pending = Vec::new();
    let mut put = |chunk: Option<ChunkRef>, pending: &mut Vec<ChunkRef>| -> Result<(), Fault> {
        pending.extend(chunk.filter(|chunk| seen.insert(chunk.id)));
        if pending.len() >= READ_BATCH_CHUNKS || chunk.is_none() {
            progress.check()?;
            for piece in store.read_listed(pending)? {
                out.write_all(&piece).at(what)?;
                written += piece.len() as u64;
                progress.bytes.store(written, Ordering::Relaxed);
            }
            pending.clear();
        }
        Ok(())
    };
    for member in members {
        let root = member.root()?;
        let checked = check(&member.artifact, &root, store, &progress.stop());
        progress.check()?;
        checked?;
        for_each_page(&root, store, |page| {
            put(
                Some(ChunkRef {
                    id: page.id,
                    len: page.len,
                }),
                &mut pending,
            )
        })?;
        for step in Walk::new(&root, store) {
            if let Step::Chunk(chunk, _) = step? {
                put(Some(chunk), &mut pending)?;
            }
        }
    }
    put(None, &mut pending)?;
    let file = out.into_inner().map_err(|e| Fault::io(what, e.error()))?;
    file.sync_all().at(what)?;
    Ok(written)
}

/// Reads a bundle into the store. Returns its artifacts, each complete.
pub fn import(from: &Path, store: &Store, progress: &JobProgress) -> Result<Vec<Member>, Fault> {
    let what = format!("read {}", from.display());
    let wrong = |why: &str| {
        Fault::integrity(format!("{} {why}", from.display()))
            .with_next("copy the file again, or export it again")
    };
    let file = durable::open_regular(from).at(&what)?;
    let length = file.metadata().at(&what)?.len();
    progress.total.store(length, Ordering::Relaxed);
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut head = [0; 12];
    file.read_exact(&mut head)
        .map_err(|_| wrong("is not a bundle"))?;
    let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    if head[..8] != MAGIC[..] || len > BUNDLE_LIST_BYTES_MAX {
        return Err(wrong("is not a bundle"));
    }
    // The stated length alone costs no memory: the list grows as it is read.
    let mut list = Vec::new();
    let read = file.by_ref().take(len as u64).read_to_end(&mut list);
    if read.map_err(|e| Fault::io(&what, &e))? < len {
        return Err(wrong("is truncated"));
    }
    let members: Vec<Member> =
        serde_json::from_slice(&list).map_err(|_| wrong("has a damaged list"))?;
    progress
        .bytes
        .store((head.len() + len) as u64, Ordering::Relaxed);
    let losses = store.losses();
    let mut header = [0; HEADER_BYTES];
    while read_or_end(&mut file, &mut header).map_err(|_| wrong("is truncated"))? {
        progress.check()?;
        let parsed = Header::parse(&header).map_err(|e| wrong(&format!("is damaged: {e}")))?;
        let mut bytes = vec![0; parsed.frame_len()];
        bytes[..HEADER_BYTES].copy_from_slice(&header);
        file.read_exact(&mut bytes[HEADER_BYTES..])
            .map_err(|_| wrong("is truncated"))?;
        progress
            .bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let frame =
            Frame::parse(Bytes::from(bytes)).map_err(|e| wrong(&format!("is damaged: {e}")))?;
        frame
            .verify(parsed.id, parsed.raw_len)
            .map_err(|e| wrong(&format!("is damaged: {e}")))?;
        store.put_over(&frame)?;
    }
    store.flush_since(losses)?;
    for member in &members {
        let root = member.root()?;
        let checked = check(&member.artifact, &root, store, &progress.stop());
        progress.check()?;
        checked.map_err(|fault| wrong(&format!("is malformed: {fault}")))?;
        // `has` pins each page, so that no collection removes a page that was already in the store.
        for_each_page(&root, store, |page| {
            if store.has(page.id)? {
                Ok(())
            } else {
                Err(wrong(&format!("lacks content of {}", member.artifact)))
            }
        })?;
        for step in Walk::new(&root, store) {
            progress.check()?;
            let Step::Chunk(chunk, _) = step? else {
                continue;
            };
            match store.raw_len(chunk.id)? {
                Some(len) if len == chunk.len => {}
                Some(_) => {
                    return Err(wrong(&format!(
                        "has a chunk of {} whose size differs from its manifest",
                        member.artifact
                    )));
                }
                None => return Err(wrong(&format!("lacks content of {}", member.artifact))),
            }
        }
    }
    Ok(members)
}

/// Fills the buffer. Returns `false` if the file ends before its first byte.
fn read_or_end(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<bool> {
    let first = file.read(buffer)?;
    if first == 0 {
        return Ok(false);
    }
    file.read_exact(&mut buffer[first..])?;
    Ok(true)
}

/// Checks that the directory for a new file exists, and syncs it. Call this before the work and
/// after it.
pub fn sync_parent(of: &Path) -> Result<(), Fault> {
    durable::sync_dir(
        of.parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new(".")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Hash;
    use crate::frame::Verified;
    use crate::ingest::{Progress, ingest};
    use crate::testing::Folder;
    use base::fault::Code;
    use base::names::Kind;

    /// Writes a bundle of this member and these frames, with any content.
    fn bundle(at: &Path, artifact: &str, root: &str, digest: Digest, frames: &[Frame]) {
        let list = serde_json::to_vec(
            &serde_json::json!([{"artifact": artifact, "digest": digest, "root": root}]),
        )
        .unwrap();
        let mut out = [&MAGIC[..], &(list.len() as u32).to_le_bytes(), &list].concat();
        frames.iter().for_each(|frame| out.extend(frame.to_bytes()));
        durable::replace(at, &out).unwrap();
    }

    #[test]
    fn the_content_of_a_bundle_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, file) = (dir.path().join("tree"), dir.path().join("b.ph"));
        durable::create_dir_all(&tree).unwrap();
        let content = Verified::new(b"hello world, ".repeat(400).into());
        durable::replace(&tree.join("a"), &content.bytes).unwrap();
        let store = Store::open(&dir.path().join("one")).unwrap();
        let read = ingest(
            &mut Folder::open(&tree),
            Kind::Dataset,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap();
        let page = store.read(read.root.pages[0].id).unwrap();
        let root = String::from_utf8(read.root.to_bytes()).unwrap();
        let (valid, page) = (Frame::encode(&content), Frame::encode(&page));
        let import = |name: &str| {
            import(
                &file,
                &Store::open(&dir.path().join(name)).unwrap(),
                &JobProgress::default(),
            )
        };

        bundle(
            &file,
            "dataset/d:1",
            &root,
            read.digest,
            &[page.clone(), valid.clone()],
        );
        assert_eq!(import("sound").unwrap().len(), 1);
        // The store holds this chunk with a wrong length, accepted by an earlier version. The
        // import replaces it.
        let poisoned = Store::open(&dir.path().join("poisoned")).unwrap();
        poisoned
            .append(&Frame::lying(&content, content.bytes.len() + 1000))
            .unwrap();
        poisoned.flush().unwrap();
        drop(poisoned);
        import("poisoned").unwrap();
        assert!(
            Store::open(&dir.path().join("poisoned"))
                .unwrap()
                .read(content.id)
                .is_ok()
        );

        let mut larger = read.root;
        larger.totals.bytes += 1;
        let space = root.replacen(':', ": ", 1);
        let wrong_frame = Frame::lying(&content, content.bytes.len() + 1000);
        for (name, artifact, root, frames, why) in [
            (
                "length",
                "dataset/d:1",
                root.clone(),
                vec![page.clone(), wrong_frame],
                "does not match its hash",
            ),
            (
                "lacking",
                "dataset/d:1",
                root.clone(),
                vec![page.clone()],
                "lacks content",
            ),
            (
                "page",
                "dataset/d:1",
                root.clone(),
                vec![valid.clone()],
                "manifest page",
            ),
            (
                "kind",
                "model/d:1",
                root,
                vec![page.clone(), valid.clone()],
                "manifest is that of a dataset",
            ),
            (
                "totals",
                "dataset/d:1",
                String::from_utf8(larger.to_bytes()).unwrap(),
                vec![page.clone(), valid.clone()],
                "totals",
            ),
            (
                "form",
                "dataset/d:1",
                space,
                vec![page, valid],
                "canonical form",
            ),
        ] {
            bundle(&file, artifact, &root, Hash::of(root.as_bytes()), &frames);
            let fault = import(name).expect_err(name);
            assert!(
                fault.code == Code::Integrity && fault.message.contains(why),
                "{name}: {fault}"
            );
        }
    }
}
