//! Chunks on their way from a site, which any number of requests may wait for.

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::fault::{Fault, Reason, Retry};
use crate::manifest::Digest;

/// Some chunks on their way, at most as many bytes as one request asks for.
pub(super) struct Flight {
    /// The artifact that they are fetched for; others may have them too.
    digest: Digest,
    /// Frames that have landed, in order, and whether each was kept. Those that were are dropped at the end of the flight,
    /// so that a slow reader holds none.
    frames: Mutex<Vec<(Option<Bytes>, bool)>>,
    seen: watch::Sender<Seen>,
}

#[derive(Debug, Clone, Default)]
struct Seen {
    landed: usize,
    fault: Option<Fault>,
}

impl Flight {
    /// A flight for this artifact.
    pub(super) fn new(digest: Digest) -> Self {
        let (frames, seen) = Default::default();
        Self { digest, frames, seen }
    }

    /// Takes in what landed next; says of each whether it was kept.
    pub(super) fn land(&self, frames: Vec<(Bytes, bool)>) {
        let count = frames.len();
        self.frames.lock().extend(frames.into_iter().map(|(frame, kept)| (Some(frame), kept)));
        self.seen.send_modify(|seen| seen.landed += count);
    }

    /// The rest does not come.
    pub(super) fn fail(&self, fault: Fault) {
        self.seen.send_modify(|seen| seen.fault = Some(fault));
    }

    /// Nothing more lands.
    pub(super) fn end(&self) {
        for (frame, _) in self.frames.lock().iter_mut().filter(|(_, kept)| *kept) {
            *frame = None;
        }
    }

    /// Waits for the frame of this number; `None`: it has landed and lies in the store. What is wrong with the artifact that it
    /// is fetched for is no fault of another, nor its business: that one asks again.
    pub(super) async fn wait(&self, digest: Digest, index: usize) -> Result<Option<Bytes>, Fault> {
        let mut seen = self.seen.subscribe();
        let fault = {
            let seen = seen.wait_for(|seen| seen.landed > index || seen.fault.is_some()).await;
            let seen = seen.map_err(|_| Fault::internal("a fetch of the relay ended early"))?;
            if seen.landed > index { None } else { seen.fault.clone() }
        };
        match fault {
            Some(fault) if digest == self.digest => Err(fault),
            Some(_) => Err(Fault::unreachable(format!("a chunk of {digest} did not come"))
                .with_reason(Reason::WaitingForSource)
                .with_retry(Retry::Backoff)
                .with_next("nothing: it is asked for again by itself")),
            None => Ok(self.frames.lock().get(index).and_then(|(frame, _)| frame.clone())),
        }
    }
}
