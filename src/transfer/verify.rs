//! Compares what a site holds of an artifact with its manifest.

use std::fs::File;
use std::path::Path;

use crate::fault::{Fault, IoContext};
use crate::fetch::blocking;
use crate::manifest::{EntryBody, FileInfo, Step, Walk};
use crate::sink::{Incoming, Place, Sink};
use crate::store::Store;

/// Reads again all that was committed of an artifact, and tells `read` of the bytes. One line a fault.
pub async fn verify(
    sink: &dyn Sink,
    store: Store,
    incoming: &Incoming,
    place: &Place,
    read: impl Fn(u64) + Send + 'static,
) -> Result<Vec<String>, Fault> {
    let faults = sink.verify(incoming, place).await?;
    // What is gone as a whole need not be told file by file.
    let Place::Folder { path: folder } = place.clone() else { return Ok(faults) };
    if !faults.is_empty() || !incoming.artifact.kind.is_files() {
        return Ok(faults);
    }
    let root = incoming.root.clone();
    blocking(move || {
        let mut faults = Vec::new();
        for step in Walk::new(&root, &store) {
            let Step::Entry { entry, .. } = step? else { continue };
            let path = folder.join(entry.path.as_str());
            let fault = match entry.body {
                EntryBody::Dir => (!path.is_dir()).then(|| "the folder is gone".to_owned()),
                EntryBody::Symlink(target) => {
                    let now = std::fs::read_link(&path).ok();
                    (now.as_deref() != Some(Path::new(&target))).then(|| "the link is gone or another".to_owned())
                }
                EntryBody::File(file) => {
                    read(file.size);
                    file_fault(&path, file)
                }
            };
            faults.extend(fault.map(|why| format!("{}: {why}", path.display())));
        }
        Ok(faults)
    })
    .await
}

fn file_fault(path: &Path, file: FileInfo) -> Option<String> {
    let mut hasher = blake3::Hasher::new();
    match File::open(path).and_then(|f| hasher.update_reader(f).map(|_| ())).at("read") {
        Err(fault) => Some(fault.message),
        Ok(()) => (*hasher.finalize().as_bytes() != file.hash.0).then(|| "its content is not what was delivered".to_owned()),
    }
}
