//! Log lines for events that a stranger can cause at will: one line a minute, with a count.
//!
//! The first event is logged at once. The events of the following minute are only counted; one line
//! at its end states how many there were, and the last of them. A [`Tally`] holds one short text,
//! whatever happens.

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
    /// A tally whose lines have this message.
    pub fn new(message: &'static str) -> Self {
        Self {
            message,
            state: Arc::default(),
        }
    }

    /// Notes an event; `what` describes this one. Must be called within a tokio runtime.
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

    /// What was counted since the last line. If that is nothing, the next event is logged at once.
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

    fn log(&self, count: u64, last: &str) {
        tracing::warn!(count, ?last, "{}", self.message);
    }
}

/// The log of a test, which runs on one thread.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

#[cfg(any(test, feature = "testing"))]
impl Log {
    /// Takes this thread's log until the second value is dropped.
    pub fn capture() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// The lines so far that have this text.
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
    async fn a_flood_is_one_line_a_minute_and_every_event_is_counted() {
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
        // At the end of the minute.
        assert_eq!(tally.take(), Some((4999, "number 4999".to_owned())));
        tally.note("still");
        assert_eq!(lines().len(), 1);
        assert_eq!(tally.take(), Some((1, "still".to_owned())));
        // After a quiet minute the next one is logged at once, clipped.
        assert_eq!(tally.take(), None);
        tally.note("x".repeat(LOG_TALLY_CHARS_MAX * 2));
        let all = lines();
        assert!(
            all.len() == 2 && all[1].len() < LOG_TALLY_CHARS_MAX + 200,
            "{all:?}"
        );
    }
}
