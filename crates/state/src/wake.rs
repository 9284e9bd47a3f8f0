//! Wake-ups: a task that waits for a change is woken when its subject changed, and only then.
//!
//! [`Catalogue`](crate::Catalogue) owns them. The engine reports the subjects of a transaction
//! after its commit. A wake-up is a hint: each waiter also polls every [`POLL_EVERY`]. Nothing here
//! survives a restart, and nothing needs to, because each task reads the catalogue once before it
//! waits.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use base::names::SiteName;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, sleep_until, timeout};

/// Each waiter polls at this interval, even without a wake-up.
pub(crate) const POLL_EVERY: Duration = Duration::from_secs(5);
/// Several changes within this time wake a [`Watch`] once.
const COALESCE: Duration = Duration::from_millis(10);

/// The kinds of changes that waiters distinguish.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
    /// The work of one site: its transfers, and the training runs that involve it.
    Site(SiteName),
    /// An artifact.
    Artifacts,
    /// How far transfers are, and why they wait; not that one began or ended.
    Progress,
    /// Anything else: a connection, a job, a site that connected.
    Other,
}

/// What a task waits for.
#[derive(Debug, Clone)]
pub(crate) enum Waits {
    /// Any change.
    All,
    /// Any change but [`Subject::Progress`], which comes often.
    Decisions,
    One(Subject),
}

/// The tasks that wait for changes.
#[derive(Debug, Default)]
pub(crate) struct Wakes {
    /// The tasks that wait for any change.
    all: Arc<Notify>,
    /// The tasks that wait for any change but progress.
    decisions: Arc<Notify>,
    /// The tasks that wait for one subject. An entry is removed when it is woken, so there is at
    /// most one for each subject.
    subjects: Mutex<HashMap<Subject, Arc<Notify>>>,
}

impl Wakes {
    /// Wakes the tasks that wait for these subjects, and the tasks that wait for any change.
    pub(crate) fn wake(&self, changed: &[Subject]) {
        if changed.is_empty() {
            return;
        }
        {
            let mut subjects = self.subjects.lock();
            for waiting in changed
                .iter()
                .filter_map(|subject| subjects.remove(subject))
            {
                waiting.notify_waiters();
            }
        }
        if changed.iter().any(|subject| *subject != Subject::Progress) {
            self.decisions.notify_waiters();
        }
        self.all.notify_waiters();
    }

    /// Completes at the first change of this kind after this call.
    fn wait(&self, waits: &Waits) -> OwnedNotified {
        let notify = match waits {
            Waits::All => self.all.clone(),
            Waits::Decisions => self.decisions.clone(),
            Waits::One(subject) => self
                .subjects
                .lock()
                .entry(subject.clone())
                .or_default()
                .clone(),
        };
        notify.notified_owned()
    }

    /// Completes at the first change of anything after this call, not after its first poll; or
    /// after [`POLL_EVERY`].
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + Send + 'static {
        let changed = self.wait(&Waits::All);
        async move {
            let _ = timeout(POLL_EVERY, changed).await;
        }
    }

    /// Watches from now on.
    pub(crate) fn watch(self: &Arc<Self>, waits: Waits) -> Watch {
        let next = Box::pin(self.wait(&waits));
        Watch {
            wakes: self.clone(),
            waits,
            next,
            is_woken: false,
            returned: None,
        }
    }
}

/// Waits for changes, again and again.
pub struct Watch {
    wakes: Arc<Wakes>,
    waits: Waits,
    next: Pin<Box<OwnedNotified>>,
    /// Whether `next` has completed.
    is_woken: bool,
    returned: Option<Instant>,
}

impl Watch {
    /// Returns when the subject changed after the previous return (the first time: after the watch
    /// began), or after `POLL_EVERY`. So a caller that reads the catalogue and then calls this
    /// misses no change. Several changes in a short time count as one. The future may be dropped at
    /// any time.
    pub async fn changed(&mut self) {
        self.changed_within(POLL_EVERY).await;
    }

    /// The same with a different polling interval.
    pub async fn changed_within(&mut self, poll: Duration) {
        if !self.is_woken {
            let _ = timeout(poll, &mut self.next).await;
            self.is_woken = true;
        }
        if let Some(returned) = self.returned {
            sleep_until(returned + COALESCE).await;
        }
        self.next = Box::pin(self.wakes.wait(&self.waits));
        self.is_woken = false;
        self.returned = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(name: &str) -> Subject {
        Subject::Site(name.parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn several_changes_in_a_short_time_wake_once() {
        let wakes = Arc::<Wakes>::default();
        let mut watch = wakes.watch(Waits::One(site("a")));
        let (waker, begun) = (wakes.clone(), Instant::now());
        let changing = tokio::spawn(async move {
            for _ in 0..1000 {
                waker.wake(&[site("a"), site("b")]);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let mut woken = 0;
        while begun.elapsed() < Duration::from_secs(1) {
            watch.changed().await;
            woken += 1;
        }
        assert!((80..=102).contains(&woken), "{woken}");
        changing.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_misses_no_change_and_does_not_delay_the_first_one() {
        let wakes = Arc::<Wakes>::default();
        let mut watch = wakes.watch(Waits::One(site("a")));
        let begun = Instant::now();
        // Before the first wait, and between two.
        wakes.wake(&[site("a")]);
        watch.changed().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        wakes.wake(&[site("a")]);
        // Dropped while it is delayed.
        assert!(
            timeout(Duration::from_millis(1), watch.changed())
                .await
                .is_err()
        );
        watch.changed().await;
        assert_eq!(begun.elapsed(), COALESCE);
        // A change of another subject; then the interval of polling.
        wakes.wake(&[site("b"), Subject::Artifacts, Subject::Other]);
        watch.changed().await;
        assert_eq!(begun.elapsed(), COALESCE + POLL_EVERY);
        watch.changed_within(2 * POLL_EVERY).await;
        assert_eq!(begun.elapsed(), COALESCE + 3 * POLL_EVERY);
        assert!(wakes.subjects.lock().len() <= 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_any_change_counts_from_the_call() {
        let wakes = Arc::<Wakes>::default();
        let begun = Instant::now();
        let changed = wakes.changed();
        wakes.wake(&[Subject::Artifacts]);
        changed.await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        wakes.wake(&[]);
        wakes.changed().await;
        assert_eq!(begun.elapsed(), POLL_EVERY);
    }

    #[tokio::test(start_paused = true)]
    async fn progress_wakes_nobody_who_waits_for_decisions() {
        let wakes = Arc::<Wakes>::default();
        let mut decisions = wakes.watch(Waits::Decisions);
        let mut all = wakes.watch(Waits::All);
        let begun = Instant::now();
        wakes.wake(&[Subject::Progress]);
        all.changed().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        decisions.changed().await;
        assert_eq!(begun.elapsed(), POLL_EVERY);
        wakes.wake(&[Subject::Progress, site("a")]);
        decisions.changed().await;
        assert_eq!(begun.elapsed(), POLL_EVERY + COALESCE);
    }
}
