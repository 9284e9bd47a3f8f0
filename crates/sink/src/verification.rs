//! The options of a verification, and what it reports in addition to its findings.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

/// One verification. Cheap to clone; all clones share their reports.
#[derive(Clone, Default)]
pub struct Verification {
    /// Compares only names and sizes, and reads no content.
    pub quick: bool,
    shared: Arc<VerificationState>,
}

type Counter = Box<dyn Fn(u64) + Send + Sync>;

#[derive(Default)]
struct VerificationState {
    read: Option<Counter>,
    notes: Mutex<Vec<String>>,
    unread: Mutex<Option<String>>,
}

impl fmt::Debug for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verification")
            .field("quick", &self.quick)
            .finish_non_exhaustive()
    }
}

impl Verification {
    /// Creates a verification that passes each number of bytes read to `read`.
    pub fn new(quick: bool, read: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self {
            quick,
            shared: Arc::new(VerificationState {
                read: Some(Box::new(read)),
                ..VerificationState::default()
            }),
        }
    }

    /// Records that this many bytes were read.
    pub fn read(&self, bytes: u64) {
        if let Some(read) = &self.shared.read {
            read(bytes);
        }
    }

    /// Reports information that is not a problem.
    pub fn note(&self, text: impl Into<String>) {
        self.shared.notes.lock().push(text.into());
    }

    /// Reports that the content cannot be read at the moment, with the reason. No problem is known,
    /// and nothing was verified.
    pub fn cannot_read(&self, why: impl Into<String>) {
        self.shared.unread.lock().get_or_insert(why.into());
    }

    /// Takes the reason why the content could not be read.
    pub fn take_unread(&self) -> Option<String> {
        self.shared.unread.lock().take()
    }

    /// Takes the notes.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.notes.lock())
    }
}
