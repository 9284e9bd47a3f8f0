//! Names and links that the sink cannot store: all of them are found before a byte is staged.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use base::fault::{Fault, Reason};
use base::limits::OFFENDERS_LISTED_MAX;
use base::names::RelPath;
use content::manifest::{EntryBody, Pages, Step, Walk};
use sink::{Folding, Incoming, Sink};

const RENAME: &str = "rename those files and publish a new version";
const LINKS: &str = "publish a new version with files in place of the links; or mount the NAS so that it takes links (SMB: mfsymlinks), \
                     restart the site's daemon, and run 'packhorse retry'";

/// Refuses an artifact with names or links that its sink cannot store, and lists them.
pub(super) fn check<P: Pages + ?Sized>(
    incoming: &Incoming,
    walk: Walk<'_, P>,
    sink: &dyn Sink,
) -> Result<(), Fault> {
    let (mut listed, mut names, mut links) = (Vec::new(), 0u64, 0u64);
    let (folding, takes_links) = (sink.folding(), sink.takes_links());
    let mut seen = (folding != Folding::default()).then(|| SeenNames::new(folding));
    for step in walk {
        let Step::Entry { entry, .. } = step? else {
            continue;
        };
        let twin = |seen: &mut SeenNames| {
            seen.twin(&entry.path)
                .map(|first| format!("{first:?} beside it is the same name to the NAS"))
        };
        let why = match sink
            .refuse_path(&entry.path)
            .or_else(|| seen.as_mut().and_then(twin))
        {
            Some(why) => {
                names += 1;
                why
            }
            None if !takes_links && matches!(entry.body, EntryBody::Symlink(_)) => {
                links += 1;
                "the NAS does not support links".to_owned()
            }
            None => continue,
        };
        if listed.len() < OFFENDERS_LISTED_MAX {
            listed.push(format!("{:?} ({why})", entry.path.as_str()));
        }
    }
    let next = match (names, links) {
        (0, 0) => return Ok(()),
        (_, 0) => RENAME.to_owned(),
        (0, _) => LINKS.to_owned(),
        _ => format!("{RENAME}; of the links: {LINKS}"),
    };
    let total = names + links;
    let are = if total == 1 {
        "1 entry".to_owned()
    } else {
        format!("{total} entries")
    };
    Err(Fault::conflict(format!(
        "{are} of {} cannot exist at this site: {}",
        incoming.artifact,
        listed.join(", ")
    ))
    .with_reason(Reason::SinkRefused)
    .with_next(next))
}

/// The names in the folders that are open, as a filesystem that folds names compares them. Entries
/// come in the order of their paths, so the entries of a folder are consecutive: only the folders
/// above an entry are held in memory.
struct SeenNames {
    folding: Folding,
    /// Each folder with its names, by the hashes of their folded forms.
    open: Vec<(String, HashMap<u64, Box<str>>)>,
}

impl SeenNames {
    fn new(folding: Folding) -> Self {
        Self {
            folding,
            open: Vec::new(),
        }
    }

    /// The earlier name in the same folder that the filesystem takes for the same.
    fn twin(&mut self, path: &RelPath) -> Option<Box<str>> {
        let parent = path.parent().unwrap_or_default();
        let above = |folder: &str| {
            folder.is_empty()
                || parent
                    .strip_prefix(folder)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        while self.open.last().is_some_and(|(folder, _)| !above(folder)) {
            self.open.pop();
        }
        if self.open.last().is_none_or(|(folder, _)| folder != parent) {
            self.open.push((parent.into(), HashMap::new()));
        }
        let folded = xxhash_rust::xxh3::xxh3_64(self.folding.fold(path.file_name()).as_bytes());
        let (_, names) = self.open.last_mut()?;
        match names.entry(folded) {
            Entry::Occupied(first) => Some(first.get().clone()),
            Entry::Vacant(free) => {
                free.insert(path.file_name().into());
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;
    use base::durable;
    use base::fault::Retry;
    use base::names::Kind;
    use content::ingest::{Ingested, Progress, ingest};
    use content::store::Store;
    use sink::files::{FilesSink, Mount};
    use source::files::FilesSource;

    const CASE: Folding = Folding {
        case: true,
        unicode: false,
    };
    const UNICODE: Folding = Folding {
        case: false,
        unicode: true,
    };
    const BOTH: Folding = Folding {
        case: true,
        unicode: true,
    };

    #[test]
    fn twins_are_found_in_their_folder_only() {
        let mut seen = SeenNames::new(CASE);
        let paths = [
            "A", "A/x.png", "B", "B/X.png", "B/x.png", "a", "a-b", "a/x.png", "b-c", "É.png",
            "é.png",
        ];
        let twins: Vec<String> = paths
            .into_iter()
            .filter_map(|p| Some(format!("{p} {}", seen.twin(&p.parse().unwrap())?)))
            .collect();
        assert_eq!(twins, ["B/x.png X.png", "a A", "é.png É.png"]);
    }

    #[test]
    fn twins_differ_in_what_the_filesystem_folds() {
        let (composed, apart, upper) = ("\u{e9}", "e\u{301}", "E\u{301}");
        for (folding, name, is_twin) in [
            (CASE, apart, false),
            (UNICODE, apart, true),
            (UNICODE, upper, false),
            (BOTH, apart, true),
            (BOTH, upper, true),
            (BOTH, "e", false),
        ] {
            let mut seen = SeenNames::new(folding);
            assert_eq!(seen.twin(&composed.parse().unwrap()), None);
            assert_eq!(
                seen.twin(&name.parse().unwrap()).as_deref(),
                is_twin.then_some(composed),
                "{folding:?} {name:?}"
            );
        }
    }

    /// The error for a dataset on such a filesystem.
    fn checked(mount: Mount, fill: impl FnOnce(&Path)) -> Result<(), Fault> {
        let dir = tempfile::tempdir().unwrap();
        let (tree, store) = (
            dir.path().join("tree"),
            Store::open(&dir.path().join("store")).unwrap(),
        );
        std::fs::create_dir(&tree).unwrap();
        fill(&tree);
        let mut source = FilesSource::open(&tree).unwrap();
        let Ingested { root, digest, .. } = ingest(
            &mut source,
            Kind::Dataset,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap();
        let incoming = Incoming {
            artifact: "dataset/d:v1".parse().unwrap(),
            digest,
            root,
            transfer: "t-1".parse().unwrap(),
            waits: Default::default(),
        };
        let site = dir.path().join("site");
        std::fs::create_dir(&site).unwrap();
        let sink = FilesSink::open(None, &site).unwrap().assuming(mount);
        check(&incoming, Walk::new(&incoming.root, &store), &sink)
    }

    fn put(path: &Path) {
        durable::create_dir_all(path.parent().unwrap()).unwrap();
        durable::replace(path, b"x").unwrap();
    }

    fn fill(tree: &Path) {
        for name in [
            "a/B.png",
            "a/b.png",
            "\u{e9}.png",
            "e\u{301}.png",
            "c:d.png",
            "fine.png",
        ] {
            put(&tree.join(name));
        }
        symlink("../fine.png", tree.join("a/link")).unwrap();
        symlink("fine.png", tree.join("zlink")).unwrap();
    }

    #[test]
    fn all_that_a_sink_cannot_hold_is_refused_together() {
        checked(Mount::default(), fill).unwrap();
        let mount = Mount {
            windows_names: true,
            folding: BOTH,
            no_links: true,
            ..Mount::default()
        };
        let fault = checked(mount, fill).unwrap_err();
        assert_eq!(
            (fault.reason, fault.retry),
            (Reason::SinkRefused, Retry::Never),
            "{fault:?}"
        );
        assert!(
            fault
                .message
                .starts_with("5 entries of dataset/d:v1 cannot exist at this site: "),
            "{fault}"
        );
        for (one, other) in [("a/b.png", "B.png"), ("\u{e9}.png", "e\u{301}.png")] {
            assert!(
                fault
                    .message
                    .contains(&format!("{one:?} ({other:?} beside it is")),
                "{one:?}: {fault}"
            );
        }
        for part in [
            "\"c:d.png\" (",
            "\"a/link\" (the NAS does not support links)",
            "\"zlink\" (the NAS does not support links)",
        ] {
            assert!(fault.message.contains(part), "{part}: {fault}");
        }
        assert!(
            fault.next.contains("rename") && fault.next.contains("mfsymlinks"),
            "{}",
            fault.next
        );
    }

    #[test]
    fn what_to_do_is_about_what_was_found() {
        let links = Mount {
            no_links: true,
            ..Mount::default()
        };
        let fault = checked(links, |tree| symlink("a", tree.join("b")).unwrap()).unwrap_err();
        assert_eq!(
            fault.message,
            "1 entry of dataset/d:v1 cannot exist at this site: \"b\" (the NAS does not support links)"
        );
        assert!(
            fault.next.contains("mfsymlinks") && !fault.next.contains("rename"),
            "{}",
            fault.next
        );
        let names = Mount {
            windows_names: true,
            ..Mount::default()
        };
        let fault = checked(names, |tree| put(&tree.join("a:b"))).unwrap_err();
        assert!(
            fault.next.contains("rename") && !fault.next.contains("links"),
            "{}",
            fault.next
        );
    }
}
