//! The plan questions that sites are answering at this moment. Until its answer has arrived, a site
//! may read the manifest of the planned artifact, and nothing else of it.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use base::names::SiteName;
use content::manifest::Digest;

/// The number of open plan questions for each site and digest. Clones share the same state.
#[derive(Clone, Default)]
pub(super) struct Planning {
    book: Arc<Mutex<HashMap<(SiteName, Digest), usize>>>,
}

impl Planning {
    /// Records that a site plans this digest, until the returned value is dropped.
    pub(super) fn begin(&self, site: &SiteName, digest: Digest) -> Plan {
        let key = (site.clone(), digest);
        *self.book.lock().entry(key.clone()).or_default() += 1;
        Plan {
            key,
            planning: self.clone(),
        }
    }

    /// Whether a site plans this digest at this moment.
    pub(super) fn has(&self, site: &SiteName, digest: Digest) -> bool {
        self.book.lock().contains_key(&(site.clone(), digest))
    }
}

/// One open plan question.
pub(super) struct Plan {
    key: (SiteName, Digest),
    planning: Planning,
}

impl Drop for Plan {
    fn drop(&mut self) {
        let mut book = self.planning.book.lock();
        if let Some(count) = book.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                book.remove(&self.key);
            }
        }
    }
}
