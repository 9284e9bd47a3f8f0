//! What sites are asked to plan at this moment: until the answer is here they may read the manifest
//! of it, and nothing else.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use base::names::SiteName;
use content::manifest::Digest;

/// Who plans what, and how often at once. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Planning {
    book: Arc<Mutex<HashMap<(SiteName, Digest), usize>>>,
}

impl Planning {
    /// Notes that a site plans this, for as long as what is returned is kept.
    pub(super) fn begin(&self, site: &SiteName, digest: Digest) -> Plan {
        let key = (site.clone(), digest);
        *self.book.lock().entry(key.clone()).or_default() += 1;
        Plan {
            key,
            planning: self.clone(),
        }
    }

    /// Whether a site plans this.
    pub(super) fn has(&self, site: &SiteName, digest: Digest) -> bool {
        self.book.lock().contains_key(&(site.clone(), digest))
    }
}

/// One question that is being answered.
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
