//! Names that the far end cannot hold: all of them are found before a byte is staged.

use std::collections::HashSet;

use crate::fault::{Fault, Reason};
use crate::limits::OFFENDERS_LISTED_MAX;
use crate::manifest::{Pages, Step, Walk};
use crate::names::RelPath;
use crate::sink::{Incoming, Sink};

/// Refuses an artifact with names that its sink cannot hold, and lists them.
pub(super) fn check<P: Pages + ?Sized>(incoming: &Incoming, walk: Walk<'_, P>, sink: &dyn Sink) -> Result<(), Fault> {
    let (mut listed, mut total) = (Vec::new(), 0);
    let mut folded = sink.folds_case().then(Folded::default);
    for step in walk {
        let Step::Entry { entry, .. } = step? else { continue };
        let twin = |folded: &mut Folded| folded.has_twin(&entry.path).then(|| "another differs from it in case only".to_owned());
        if let Some(why) = sink.refuse_path(&entry.path).or_else(|| folded.as_mut().and_then(twin)) {
            total += 1;
            if listed.len() < OFFENDERS_LISTED_MAX {
                listed.push(format!("{:?} ({why})", entry.path.as_str()));
            }
        }
    }
    if total == 0 {
        return Ok(());
    }
    Err(Fault::conflict(format!("{total} names of {} cannot exist at this site: {}", incoming.artifact, listed.join(", ")))
        .with_reason(Reason::SinkRefused)
        .with_next("rename those files and publish a new version"))
}

/// The names seen in the folders that are open, as a filesystem that folds case takes them. Entries come in the order of
/// their paths, in which all of a folder stands together: what is held is no more than the folders above an entry.
#[derive(Default)]
struct Folded(Vec<(String, HashSet<u64>)>);

impl Folded {
    fn has_twin(&mut self, path: &RelPath) -> bool {
        let parent = path.parent().unwrap_or_default();
        let above =
            |folder: &str| folder.is_empty() || parent.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        while self.0.last().is_some_and(|(folder, _)| !above(folder)) {
            self.0.pop();
        }
        if self.0.last().is_none_or(|(folder, _)| folder != parent) {
            self.0.push((parent.into(), HashSet::new()));
        }
        let name = xxhash_rust::xxh3::xxh3_64(path.file_name().to_lowercase().as_bytes());
        self.0.last_mut().is_some_and(|(_, names)| !names.insert(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twins_are_found_in_their_folder_only() {
        let mut folded = Folded::default();
        let paths = ["A", "A/x.png", "B", "B/X.png", "B/x.png", "a", "a-b", "a/x.png", "b-c", "É.png", "é.png"];
        let twins: Vec<&str> = paths.into_iter().filter(|p| folded.has_twin(&p.parse().unwrap())).collect();
        assert_eq!(twins, ["B/x.png", "a", "é.png"]);
    }
}
