//! Chunks on their way from a site, which any number of requests may wait for.

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::fault::Fault;

/// Some chunks on their way, at most as many bytes as one request asks for.
#[derive(Default)]
pub(super) struct Flight {
    /// Frames that have landed, in order. Those that are kept are dropped at the end of the flight, so that a slow
    /// reader holds none.
    frames: Mutex<Vec<Option<Bytes>>>,
    kept: Mutex<Vec<bool>>,
    seen: watch::Sender<Seen>,
}

#[derive(Debug, Clone, Default)]
struct Seen {
    landed: usize,
    fault: Option<Fault>,
}

impl Flight {
    /// Takes in what landed next; says of each whether it was kept.
    pub(super) fn land(&self, frames: Vec<(Bytes, bool)>) {
        let count = frames.len();
        let (frames, kept): (Vec<Option<Bytes>>, Vec<bool>) = frames.into_iter().map(|(frame, kept)| (Some(frame), kept)).unzip();
        self.frames.lock().extend(frames);
        self.kept.lock().extend(kept);
        self.seen.send_modify(|seen| seen.landed += count);
    }

    /// The rest does not come.
    pub(super) fn fail(&self, fault: Fault) {
        self.seen.send_modify(|seen| seen.fault = Some(fault));
    }

    /// Nothing more lands.
    pub(super) fn end(&self) {
        let kept = self.kept.lock();
        for (frame, _) in self.frames.lock().iter_mut().zip(kept.iter()).filter(|(_, kept)| **kept) {
            *frame = None;
        }
    }

    /// Waits for the frame of this number; `None`: it has landed and lies in the store.
    pub(super) async fn wait(&self, index: usize) -> Result<Option<Bytes>, Fault> {
        let mut seen = self.seen.subscribe();
        let fault = {
            let seen = seen.wait_for(|seen| seen.landed > index || seen.fault.is_some()).await;
            let seen = seen.map_err(|_| Fault::internal("a fetch of the relay ended early"))?;
            if seen.landed > index { None } else { seen.fault.clone() }
        };
        match fault {
            Some(fault) => Err(fault),
            None => Ok(self.frames.lock().get(index).cloned().flatten()),
        }
    }
}
