//! Chunks that are being fetched from a site, for any number of waiting requests.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use base::fault::{Fault, Reason, Retry};
use content::chunk::Hash;
use content::manifest::Digest;

/// The in-flight fetch of each chunk, and the chunk's index in it.
#[derive(Default)]
pub(super) struct InflightFetches(Mutex<HashMap<Hash, (Arc<InflightFetch>, usize)>>);

impl InflightFetches {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<Hash, (Arc<InflightFetch>, usize)>> {
        self.0.lock()
    }

    /// Removes chunks that are kept or that will not arrive.
    pub(super) fn forget(&self, ids: impl Iterator<Item = Hash>) {
        let mut flights = self.lock();
        for id in ids {
            flights.remove(&id);
        }
    }
}

/// Chunks in flight, at most as many bytes as one request asks for.
pub(super) struct InflightFetch {
    /// The artifact that they are fetched for; others may have them too.
    digest: Digest,
    frames: Mutex<Vec<FrameSlot>>,
    seen: watch::Sender<FetchProgress>,
    /// How many were settled: kept, or not to be kept.
    settled: watch::Sender<usize>,
}

/// A frame stays in memory until it is settled and every waiting request has it: each of them has a
/// share of the daemon's budget.
#[derive(Default)]
struct FrameSlot {
    frame: Option<Bytes>,
    waiting: u32,
}

#[derive(Debug, Clone, Default)]
struct FetchProgress {
    landed: usize,
    fault: Option<Fault>,
}

impl InflightFetch {
    /// An in-flight fetch for this artifact.
    pub(super) fn new(digest: Digest) -> Self {
        let (frames, seen, settled) = Default::default();
        Self {
            digest,
            frames,
            seen,
            settled,
        }
    }

    /// A waiter for the frame of this number.
    pub(super) fn ticket(self: &Arc<Self>, index: usize) -> Ticket {
        let mut frames = self.frames.lock();
        if frames.len() <= index {
            frames.resize_with(index + 1, FrameSlot::default);
        }
        frames[index].waiting += 1;
        Ticket {
            flight: self.clone(),
            index,
        }
    }

    /// Adds the next frames.
    pub(super) fn land(&self, landed: Vec<Bytes>) {
        let (first, count) = (self.seen.borrow().landed, landed.len());
        for (held, frame) in self.frames.lock().iter_mut().skip(first).zip(landed) {
            held.frame = Some(frame);
        }
        self.seen.send_modify(|seen| seen.landed += count);
    }

    /// The next `count` frames are settled: later requests find them in the store, or nowhere.
    pub(super) fn settle(&self, count: usize) {
        let mut frames = self.frames.lock();
        let first = *self.settled.borrow();
        for held in frames
            .iter_mut()
            .skip(first)
            .take(count)
            .filter(|held| held.waiting == 0)
        {
            held.frame = None;
        }
        self.settled.send_modify(|settled| *settled += count);
    }

    /// The rest will not arrive.
    pub(super) fn fail(&self, fault: Fault) {
        self.seen.send_modify(|seen| seen.fault = Some(fault));
    }
}

/// One request's wait for one frame.
pub(super) struct Ticket {
    flight: Arc<InflightFetch>,
    index: usize,
}

impl Ticket {
    /// The frame, as soon as it arrives.
    pub(super) async fn frame(&self, digest: Digest) -> Result<Bytes, Fault> {
        self.landed(digest).await?;
        let frame = self
            .flight
            .frames
            .lock()
            .get(self.index)
            .and_then(|held| held.frame.clone());
        frame.ok_or_else(|| {
            Fault::internal("a relayed chunk was freed while a request waits for it")
        })
    }

    /// Waits until the frame is settled.
    pub(super) async fn settled(&self, digest: Digest) -> Result<(), Fault> {
        self.landed(digest).await?;
        let mut settled = self.flight.settled.subscribe();
        let over = settled
            .wait_for(|settled| *settled > self.index)
            .await
            .map(|_| ());
        over.map_err(|_| ended_early())
    }

    /// A fault of the artifact that the chunk is fetched for does not concern requests for another
    /// artifact: those ask again.
    async fn landed(&self, digest: Digest) -> Result<(), Fault> {
        let mut seen = self.flight.seen.subscribe();
        let seen = seen
            .wait_for(|seen| seen.landed > self.index || seen.fault.is_some())
            .await
            .map_err(|_| ended_early())?;
        match &seen.fault {
            Some(fault) if seen.landed <= self.index && digest == self.flight.digest => {
                Err(fault.clone())
            }
            Some(_) if seen.landed <= self.index => Err(Fault::unreachable(format!(
                "a chunk of {digest} did not arrive"
            ))
            .with_reason(Reason::WaitingForSource)
            .with_retry(Retry::Backoff)
            .with_next("no action is needed: it is requested again automatically")),
            _ => Ok(()),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut frames = self.flight.frames.lock();
        let settled = *self.flight.settled.borrow() > self.index;
        if let Some(held) = frames.get_mut(self.index) {
            held.waiting -= 1;
            if held.waiting == 0 && settled {
                held.frame = None;
            }
        }
    }
}

fn ended_early() -> Fault {
    Fault::internal("a fetch of the relay ended early")
}
