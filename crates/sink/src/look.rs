//! How closely an artifact is verified, and what a verification reports beside its findings.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

/// One verification. Cheap to clone; all clones report to the same place.
#[derive(Clone, Default)]
pub struct Look {
    /// Compare names and sizes only, and read no content.
    pub quick: bool,
    shared: Arc<LookState>,
}

type Counter = Box<dyn Fn(u64) + Send + Sync>;

#[derive(Default)]
struct LookState {
    read: Option<Counter>,
    notes: Mutex<Vec<String>>,
    unread: Mutex<Option<String>>,
}

impl fmt::Debug for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Look")
            .field("quick", &self.quick)
            .finish_non_exhaustive()
    }
}

impl Look {
    /// A verification that gives each number of bytes read to `read`.
    pub fn new(quick: bool, read: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self {
            quick,
            shared: Arc::new(LookState {
                read: Some(Box::new(read)),
                ..LookState::default()
            }),
        }
    }

    /// So many bytes were read.
    pub fn read(&self, bytes: u64) {
        if let Some(read) = &self.shared.read {
            read(bytes);
        }
    }

    /// Reports what is no fault.
    pub fn note(&self, text: impl Into<String>) {
        self.shared.notes.lock().push(text.into());
    }

    /// Reports that the content cannot be read now, and why: nothing is known to be wrong, and
    /// nothing was verified.
    pub fn cannot_read(&self, why: impl Into<String>) {
        self.shared.unread.lock().get_or_insert(why.into());
    }

    /// Takes why the content could not be read, if that was reported.
    pub fn take_unread(&self) -> Option<String> {
        self.shared.unread.lock().take()
    }

    /// Takes the notes so far.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.notes.lock())
    }
}
