//! The desired state of a site over one connection: [`SentList`] is what the hub has sent,
//! [`ReceivedList`] what the site has received.
//!
//! `hub::session` and `site::connection` call them. Both begin empty with each connection, and a
//! complete list then makes them equal; so nothing has to survive a crash, and no message has to
//! arrive.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::Serialize;

use base::fault::Fault;
use base::limits::{CHANGES_BYTES_MAX, TRANSFERS_LISTED_MAX};
use base::names::TransferId;

use crate::paging::json_bytes;
use crate::protocol::{Changes, Desired, Known, PushedManifest, to_json};
use crate::run::DesiredRun;

/// One transfer of a [`SentList`].
#[derive(Debug)]
struct Entry {
    /// The hash of what was sent; `None`: only that the transfer exists.
    hash: Option<u64>,
    /// The last look that found it.
    look: u64,
}

/// What the hub has sent to a site. The hub looks at all open transfers of the site whenever one
/// changed, and sends those that differ.
#[derive(Debug, Default)]
pub struct SentList {
    revision: u64,
    look: u64,
    entries: HashMap<TransferId, Entry>,
    runs: Option<u64>,
}

impl SentList {
    /// The site has nothing: a complete list begins.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.runs = None;
    }

    /// A look at all open transfers begins.
    pub fn begin_look(&mut self) {
        self.look += 1;
    }

    /// The look found this transfer. Returns whether it must be sent.
    pub fn found(&mut self, wanted: &Desired) -> Result<bool, Fault> {
        let stated = Desired {
            // What the site reports itself, or what does not change.
            known: Known::default(),
            total: 0,
            lineage: None,
            ..wanted.clone()
        };
        let hash = Some(hash_of(&stated)?);
        let entry = Entry {
            hash,
            look: self.look,
        };
        let before = self.entries.insert(wanted.id.clone(), entry);
        Ok(before.is_none_or(|before| before.hash != hash))
    }

    /// Whether a transfer was ever sent over this connection.
    pub fn has(&self, id: &TransferId) -> bool {
        self.entries
            .get(id)
            .is_some_and(|entry| entry.hash.is_some())
    }

    /// The look found this transfer, but cannot read it. Returns whether the site must be informed
    /// that it exists.
    pub fn found_unreadable(&mut self, id: &TransferId) -> bool {
        let look = self.look;
        match self.entries.get_mut(id) {
            Some(entry) => {
                entry.look = look;
                false
            }
            None => {
                let entry = Entry { hash: None, look };
                self.entries.insert(id.clone(), entry);
                true
            }
        }
    }

    /// How many transfers the site has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the site has none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The transfers that the site has and that this look did not find.
    pub fn not_found(&self) -> Vec<TransferId> {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.look != self.look)
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// The site is informed that this transfer is not wanted any more.
    pub fn remove(&mut self, id: &TransferId) {
        self.entries.remove(id);
    }

    /// Whether the runs differ from those that were sent last.
    pub fn runs_differ(&mut self, runs: &[DesiredRun]) -> Result<bool, Fault> {
        let hash = Some(hash_of(runs)?);
        Ok(std::mem::replace(&mut self.runs, hash) != hash)
    }

    /// The revision of the next message.
    pub fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }
}

/// One message of changes while it is made. A message that is full is sent, and the next one begins.
#[derive(Debug, Default)]
pub struct Part {
    changes: Changes,
    bytes: usize,
}

impl Part {
    /// The first message of a complete list, or of changes.
    pub fn new(is_list: bool) -> Self {
        let changes = Changes {
            begin: is_list,
            ..Changes::default()
        };
        Self { changes, bytes: 0 }
    }

    /// Adds manifests, which arrive with the transfers that follow.
    pub fn add_manifests(&mut self, manifests: Vec<PushedManifest>) {
        self.changes.manifests.extend(manifests);
    }

    /// Adds a transfer. Returns the message before it, if that is full.
    #[must_use]
    pub fn set(&mut self, wanted: Desired, list: &mut SentList) -> Option<Changes> {
        let full = self.make_room(json_bytes(&wanted), list);
        self.changes.set.push(wanted);
        full
    }

    /// Adds a transfer that is not wanted any more. Returns the message before it, if that is full.
    #[must_use]
    pub fn remove(&mut self, id: TransferId, list: &mut SentList) -> Option<Changes> {
        let full = self.make_room(id.len(), list);
        list.remove(&id);
        self.changes.removed.push(id);
        full
    }

    /// Adds a transfer that cannot be read. Returns the message before it, if that is full.
    #[must_use]
    pub fn keep(&mut self, id: TransferId, list: &mut SentList) -> Option<Changes> {
        let full = self.make_room(id.len(), list);
        self.changes.kept.push(id);
        full
    }

    fn make_room(&mut self, bytes: usize, list: &mut SentList) -> Option<Changes> {
        let is_full = self.bytes > 0 && self.bytes + bytes > CHANGES_BYTES_MAX;
        self.bytes = if is_full { bytes } else { self.bytes + bytes };
        is_full.then(|| Changes {
            revision: list.next_revision(),
            ..std::mem::take(&mut self.changes)
        })
    }

    /// The last message; `None`: nothing has changed. `is_list`: it ends a complete list, which is
    /// `partial` if it leaves out transfers.
    pub fn end(
        mut self,
        runs: Option<Vec<DesiredRun>>,
        is_list: bool,
        partial: bool,
        list: &mut SentList,
    ) -> Option<Changes> {
        self.changes.runs = runs;
        (self.changes.end, self.changes.partial) = (is_list, is_list && partial);
        (self.changes != Changes::default()).then(|| Changes {
            revision: list.next_revision(),
            ..self.changes
        })
    }
}

fn hash_of<T: Serialize + ?Sized>(value: &T) -> Result<u64, Fault> {
    let mut hasher = DefaultHasher::new();
    to_json(&value)?.hash(&mut hasher);
    Ok(hasher.finish())
}

/// The effect of a message on a [`ReceivedList`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Its content applies. `complete`: a complete list has ended, and the site gives up all other
    /// transfers.
    Applies {
        /// Whether the site gives up what is not listed.
        complete: bool,
    },
    /// An earlier message is missing: the site asks for the complete list, and ignores this message.
    /// It asks at each message until the list comes: the request, or the list, may be lost too.
    AskList,
}

/// The transfers that the hub wants, as far as a site has received them.
#[derive(Debug, Default)]
pub struct ReceivedList {
    /// `None`: the complete list is missing.
    revision: Option<u64>,
    listed: HashSet<TransferId>,
    /// The transfers of a complete list that has not ended.
    collected: Option<HashSet<TransferId>>,
}

impl ReceivedList {
    /// Takes a message.
    pub fn take(&mut self, changes: &Changes) -> Result<Received, Fault> {
        if changes.begin {
            self.collected = Some(HashSet::new());
        } else if self.revision.and_then(|revision| revision.checked_add(1))
            != Some(changes.revision)
        {
            self.revision = None;
            self.collected = None;
            return Ok(Received::AskList);
        }
        self.revision = Some(changes.revision);
        let list = self.collected.as_mut().unwrap_or(&mut self.listed);
        list.extend(changes.set.iter().map(|wanted| wanted.id.clone()));
        list.extend(changes.kept.iter().cloned());
        for id in &changes.removed {
            list.remove(id);
        }
        let too_many = Fault::integrity(format!(
            "the hub lists more than {TRANSFERS_LISTED_MAX} transfers"
        ));
        if list.len() > TRANSFERS_LISTED_MAX {
            return Err(too_many);
        }
        let mut complete = false;
        if changes.end
            && let Some(collected) = self.collected.take()
        {
            if changes.partial {
                self.listed.extend(collected);
                if self.listed.len() > TRANSFERS_LISTED_MAX {
                    return Err(too_many);
                }
            } else {
                self.listed = collected;
                complete = true;
            }
        }
        Ok(Received::Applies { complete })
    }

    /// Takes the complete list of a hub that sends no changes.
    pub fn replace(&mut self, list: &[Desired]) {
        self.listed = list.iter().map(|wanted| wanted.id.clone()).collect();
    }

    /// Whether the hub wants this transfer.
    pub fn contains(&self, id: &TransferId) -> bool {
        self.listed.contains(id)
    }
}

#[cfg(test)]
mod tests;
