//! Rate-limited log lines for events that any stranger can trigger: one line per minute, with a
//! count.
//!
//! The first event is logged immediately. Events in the following minute are only counted; one line
//! at its end states their number and the last event. A [`Tally`] keeps only one short text. In
//! memory only.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::limits::{LOG_TALLY_CHARS_MAX, LOG_TALLY_EVERY};

/// Counts events of one kind. Clones share the count.
#[derive(Clone)]
pub struct Tally {
    message: &'static str,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Whether a line was logged less than a minute ago.
    is_quiet: bool,
    count: u64,
    last: String,
}

impl Tally {
    /// Creates a tally that logs this message.
    pub fn new(message: &'static str) -> Self {
        Self {
            message,
            state: Arc::default(),
        }
    }

    /// Counts an event; `what` describes it. Must be called in a tokio runtime.
    pub fn note(&self, what: impl std::fmt::Display) {
        let what: String = what.to_string().chars().take(LOG_TALLY_CHARS_MAX).collect();
        {
            let mut state = self.state.lock();
            if state.is_quiet {
                state.count += 1;
                state.last = what;
                return;
            }
            state.is_quiet = true;
        }
        self.log(1, &what);
        let tally = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOG_TALLY_EVERY).await;
                let Some((count, last)) = tally.take() else {
                    return;
                };
                tally.log(count, &last);
            }
        });
    }

    /// Returns the number of events since the last line, and the last of them. If there were none,
    /// the next event is logged immediately.
    fn take(&self) -> Option<(u64, String)> {
        let mut state = self.state.lock();
        if state.count == 0 {
            state.is_quiet = false;
            return None;
        }
        Some((
            std::mem::take(&mut state.count),
            std::mem::take(&mut state.last),
        ))
    }

    /// The events that were not logged yet.
    #[cfg(any(test, feature = "testing"))]
    pub fn waiting(&self) -> u64 {
        self.state.lock().count
    }

    fn log(&self, count: u64, last: &str) {
        tracing::warn!(count, ?last, "{}", self.message);
    }
}

/// Captures the log of a test that runs on one thread.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

#[cfg(any(test, feature = "testing"))]
impl Log {
    /// Captures the log of this thread until the second value is dropped.
    pub fn capture() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// The captured lines that contain this text.
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        String::from_utf8_lossy(&self.0.lock())
            .lines()
            .filter(|line| line.contains(text))
            .map(str::to_owned)
            .collect()
    }
}

#[cfg(any(test, feature = "testing"))]
impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_events_make_one_line_per_minute_and_all_are_counted() {
        let (log, _captured) = Log::capture();
        let tally = Tally::new("a connection was refused");
        let lines = || log.lines_with("a connection was refused");
        for n in 0..5000 {
            tally.note(format_args!("number {n}"));
        }
        assert_eq!(lines().len(), 1, "{:?}", lines());
        assert!(
            lines()[0].contains("count=1") && lines()[0].contains("number 0"),
            "{:?}",
            lines()
        );
        // The end of the minute.
        assert_eq!(tally.take(), Some((4999, "number 4999".to_owned())));
        tally.note("still");
        assert_eq!(lines().len(), 1);
        assert_eq!(tally.take(), Some((1, "still".to_owned())));
        // After a minute without events, the next event is logged immediately, shortened.
        assert_eq!(tally.take(), None);
        tally.note("x".repeat(LOG_TALLY_CHARS_MAX * 2));
        let all = lines();
        assert!(
            all.len() == 2 && all[1].len() < LOG_TALLY_CHARS_MAX + 200,
            "{all:?}"
        );
    }
}
