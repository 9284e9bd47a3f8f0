//! Puts chunks that the hub's own store has lost into it again, from a site that holds the artifact.

use super::{Of, Relay, Slot};
use crate::fetch::Child;
use base::blocking::blocking;
use base::fault::Fault;
use base::peer::Peer;
use content::frame::Frame;

impl Relay {
    /// Fetches those of these chunks that the hub's own store lacks from a connected site that holds
    /// the artifact, except `peer`, and puts them into that store. Returns the number of chunks;
    /// 0 also if no such site is connected.
    pub async fn restore(&self, peer: &Peer, of: Of, children: &[Child]) -> Result<usize, Fault> {
        let upstream = &self.inner.upstream;
        let (main, asked) = (self.inner.main.clone(), children.to_vec());
        let lacking = move || {
            let ids: Vec<_> = asked.iter().map(|child| child.chunk.id).collect();
            let has = main.has_many(&ids)?;
            let lacking = asked.into_iter().zip(has).filter(|(_, has)| !has);
            Ok(lacking.map(|(child, _)| child).collect::<Vec<Child>>())
        };
        let lacking = blocking(lacking).await?;
        if lacking.is_empty() || upstream.sources(of.digest, peer.site()).await?.is_empty() {
            return Ok(0);
        }
        for slot in self.plan(peer.site(), of, lacking.clone(), false).await? {
            if let Slot::Coming(ticket) = slot {
                ticket.settled(of.digest).await?;
            }
        }
        let inner = self.inner.clone();
        blocking(move || {
            for child in &lacking {
                let chunk = inner.kept.store.read_chunk(child.chunk)?;
                inner.main.put(&Frame::encode(&chunk))?;
            }
            inner.main.flush()?;
            Ok(lacking.len())
        })
        .await
    }
}
