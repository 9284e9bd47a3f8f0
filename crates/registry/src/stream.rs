//! Reading a whole blob: it continues after a break with the byte that it reached, and waits where
//! the registry asks for that.

use bytes::Bytes;
use sha2::Digest as _;
use tokio::sync::mpsc;

use crate::image::{Descriptor, Sha256};
use crate::{Error, Registry};
use base::fault::Fault;
use base::limits;

impl Registry {
    /// Sends a blob's bytes from `offset` on; `offset` is where it ended. The receiver may end it.
    /// Gives up when several tries in a row brought nothing.
    pub(super) async fn send_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        offset: &mut u64,
        to: &mpsc::Sender<Bytes>,
    ) -> Result<(), Error> {
        let mut tries = 1;
        while *offset < blob.size && !to.is_closed() {
            let before = *offset;
            let error = match self.send_rest(repository, blob, offset, to).await {
                Ok(()) if *offset == before => {
                    Fault::unreachable("the registry sent nothing more of it").into()
                }
                Ok(()) => continue,
                Err(error) => error,
            };
            tries = if *offset > before { 1 } else { tries + 1 };
            if !error.is_passing()
                || error.asks_for_pause()
                || tries > limits::REGISTRY_BLOB_TRIES_MAX
            {
                return Err(error);
            }
            tokio::time::sleep(limits::BACKOFF_FIRST * 2u32.pow(tries)).await;
        }
        Ok(())
    }

    async fn send_rest(
        &self,
        repository: &str,
        blob: &Descriptor,
        offset: &mut u64,
        to: &mpsc::Sender<Bytes>,
    ) -> Result<(), Error> {
        let mut stream = self.blob_stream(repository, &blob.digest, *offset).await?;
        while let Some(piece) = stream.next().await? {
            *offset += piece.len() as u64;
            if *offset > blob.size {
                return Err(Fault::integrity(format!(
                    "it is larger than the {} bytes that its manifest says",
                    blob.size
                ))
                .into());
            }
            if to.send(piece).await.is_err() {
                break; // the receiver failed, and says why when it is asked
            }
        }
        Ok(())
    }

    /// Reads a whole blob and compares it with its digest; gives each number of bytes to `read`.
    /// `None`: it is intact. Otherwise why not. An error: nothing can be said of it.
    pub async fn check_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        read: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<String>, Error> {
        let (send, mut receive) = mpsc::channel::<Bytes>(limits::REGISTRY_READ_AHEAD_MAX * 8);
        let (counted, mut count) = mpsc::channel::<u64>(limits::REGISTRY_READ_AHEAD_MAX * 8);
        let hasher = tokio::task::spawn_blocking(move || {
            let mut hash = sha2::Sha256::new();
            while let Some(piece) = receive.blocking_recv() {
                hash.update(&piece);
                let _ = counted.blocking_send(piece.len() as u64);
            }
            Sha256(hash.finalize().into())
        });
        let mut offset = 0;
        let sending = async {
            let sent = self.send_blob(repository, blob, &mut offset, &send).await;
            drop(send);
            sent
        };
        let counting = async {
            while let Some(bytes) = count.recv().await {
                read(bytes);
            }
        };
        let (sent, ()) = tokio::join!(sending, counting);
        match sent {
            Ok(()) => {}
            Err(error) if error.status() == Some(404) => return Ok(Some("it is gone".into())),
            // More bytes than its manifest says.
            Err(Error::Fault(fault)) if fault.code == base::fault::Code::Integrity => {
                return Ok(Some(fault.message));
            }
            Err(error) => return Err(error),
        }
        let found = hasher
            .await
            .map_err(|_| Fault::internal("a worker thread ended early"))?;
        Ok((found != blob.digest)
            .then(|| format!("its content is damaged: the {offset} bytes that the registry sent have the digest {found}")))
    }
}
