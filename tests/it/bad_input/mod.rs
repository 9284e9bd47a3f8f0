//! Invalid input and external failures: each has a specific error and the right exit code or state,
//! and leaves no files.

mod access;
mod config;
mod disks;
mod folders;
mod image_archives;
mod label_files;
mod servers;

use std::path::PathBuf;

use crate::support::daemon::Hub;
use crate::support::{Scratch, disk_usage, find};

/// A hub without sites, and a check that refused input leaves nothing in it.
struct Refusing {
    hub: Hub,
    scratch: Scratch,
}

impl Refusing {
    fn start() -> Self {
        let scratch = Scratch::new();
        let hub = Hub::start_new(scratch.path());
        Self { hub, scratch }
    }

    /// Checks that no artifact is listed, and that no scratch or staging file is left.
    #[track_caller]
    fn check_clean(&self) {
        assert_eq!(
            self.hub.artifacts(),
            Vec::<String>::new(),
            "refused input is listed"
        );
        assert_eq!(
            leftovers(&self.hub),
            Vec::<PathBuf>::new(),
            "refused input left files behind"
        );
        let kept = disk_usage(&self.hub.data_dir);
        assert!(
            kept < 64 << 20,
            "refused input left {kept} bytes in the store"
        );
    }
}

/// The files in a hub's folders for incoming content.
fn leftovers(hub: &Hub) -> Vec<PathBuf> {
    find(&hub.data_dir, &|path| {
        let inside = path
            .strip_prefix(&hub.data_dir)
            .expect("found under it")
            .to_string_lossy()
            .into_owned();
        path.is_file()
            && ["scratch/", "staging/", "tmp/", "incoming/"]
                .iter()
                .any(|name| inside.contains(name))
    })
}
