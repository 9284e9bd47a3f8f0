//! Reads a complete blob: continues after an interruption at the last received byte, and waits if
//! the registry asks for a pause.

use bytes::Bytes;
use sha2::Digest as _;
use tokio::sync::mpsc;

use crate::image::{Descriptor, Sha256};
use crate::{Error, Registry};
use base::fault::Fault;
use base::limits;

impl Registry {
    /// Sends the bytes of a blob from `offset`, and advances `offset`. Ends when the receiver is
    /// dropped. Fails after several consecutive attempts without progress.
    pub(super) async fn send_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        offset: &mut u64,
        to: &mpsc::Sender<Bytes>,
    ) -> Result<(), Error> {
        let mut tries = 1;
        while *offset < blob.size && !to.is_closed() {
            let offset_before = *offset;
            let error = match self.send_rest(repository, blob, offset, to).await {
                Ok(()) if *offset == offset_before => {
                    Fault::unreachable("the registry sent no more bytes of the blob").into()
                }
                Ok(()) => continue,
                Err(error) => error,
            };
            tries = if *offset > offset_before {
                1
            } else {
                tries + 1
            };
            if !error.is_transient()
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
                    "it is larger than the {} bytes that its manifest states",
                    blob.size
                ))
                .into());
            }
            if to.send(piece).await.is_err() {
                break; // the receiver failed; its own result states why
            }
        }
        Ok(())
    }

    /// Reads a complete blob and compares it with its digest; calls `read` with each number of
    /// bytes read. Returns `None` if it is intact, otherwise the reason. Fails if the content could
    /// not be read.
    pub async fn check_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        read: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<String>, Error> {
        let (send, mut receive) = mpsc::channel::<Bytes>(limits::REGISTRY_READ_AHEAD_MAX * 8);
        let (counted, mut count) = mpsc::channel::<u64>(limits::REGISTRY_READ_AHEAD_MAX * 8);
        let hasher = base::blocking::spawn(move || {
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
            Err(error) if error.status() == Some(404) => return Ok(Some("it is missing".into())),
            // More bytes than its manifest states.
            Err(Error::Fault(fault)) if fault.code == base::fault::Code::Integrity => {
                return Ok(Some(fault.message));
            }
            Err(error) => return Err(error),
        }
        let found = hasher
            .await
            .map_err(|_| Fault::internal("a worker thread ended unexpectedly"))?;
        Ok((found != blob.digest)
            .then(|| format!("its content is damaged: the {offset} bytes that the registry sent have the digest {found}")))
    }
}
