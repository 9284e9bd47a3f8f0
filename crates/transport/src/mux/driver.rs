//! Moves bytes between the connection and the [`State`](super::State). One task a connection.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::MuxShared;
use super::frame::{HEADER_BYTES, Kind, put_header, read_header};
use crate::{CLOSE_VIOLATION, Ended};
use base::limits::CONNECTION_KEEP_ALIVE;

/// How long the goodbye may take before the connection is dropped without it.
const GOODBYE_MAX: Duration = Duration::from_secs(2);
/// How long after a failed write the peer's goodbye is looked for: it says why the write failed.
const LAST_WORDS_MAX: Duration = Duration::from_millis(500);
const SLICES_MAX: usize = 64;

/// Runs until the line is over, then says goodbye if it was this end that ended it.
pub(super) async fn run<IO>(io: IO, shared: &MuxShared)
where
    IO: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(io);
    let mut batch = VecDeque::new();
    let ended = {
        let mut reading = std::pin::pin!(read_loop(&mut reader, shared));
        tokio::select! {
            ended = reading.as_mut() => ended,
            error = write_loop(&mut writer, shared, &mut batch) => match error {
                Some(error) => match tokio::time::timeout(LAST_WORDS_MAX, reading).await {
                    Ok(ended) => ended,
                    Err(_) => Ended::lost(&format!("writing to it failed: {error}")),
                },
                // Ended from this side; what is recorded already stands.
                None => Ended::lost("it was closed"),
            },
            silence = watch_silence(shared) => Ended::lost(&silence),
        }
    };
    shared.end(ended);
    let recorded = shared.state.lock().ended.clone();
    if let Some(ended) = recorded.filter(|e| !e.by_peer)
        && let Some(code) = ended.code
    {
        // A frame that was cut in the middle must be completed first, or the goodbye would be taken
        // for its body.
        put_close(&mut batch, code, &ended.reason);
        let goodbye = async {
            write_all(&mut writer, &mut batch).await?;
            writer.shutdown().await?;
            // Dropping a socket with bytes unread would reset it, and the goodbye might be lost
            // with it.
            tokio::io::copy(&mut reader, &mut tokio::io::sink()).await
        };
        let _ = tokio::time::timeout(GOODBYE_MAX, goodbye).await;
    }
}

fn put_close(batch: &mut VecDeque<Bytes>, code: u32, reason: &str) {
    let mut frame = BytesMut::new();
    put_header(&mut frame, Kind::Close, 0, 4 + reason.len());
    frame.put_u32(code);
    frame.put_slice(reason.as_bytes());
    batch.push_back(frame.freeze());
}

/// Writes whatever there is. Returns the error, or `None` once the line was ended from this side.
async fn write_loop(
    writer: &mut (impl AsyncWrite + Unpin),
    shared: &MuxShared,
    batch: &mut VecDeque<Bytes>,
) -> Option<std::io::Error> {
    let mut ended = std::pin::pin!(ended_here(shared));
    loop {
        shared.with(|state| state.take_batch(batch));
        let idle = batch.is_empty();
        let result = tokio::select! {
            // A peer that reads nothing must not keep this end from closing.
            () = ended.as_mut() => return None,
            result = async { if idle { writer.flush().await } else { write_all(writer, batch).await } } => result,
        };
        if let Err(error) = result {
            return Some(error);
        }
        if idle {
            tokio::select! {
                () = ended.as_mut() => return None,
                () = shared.to_write.notified() => {}
            }
        }
    }
}

async fn ended_here(shared: &MuxShared) {
    let mut ended = shared.ended.subscribe();
    let _ = ended.wait_for(Option::is_some).await;
}

/// Writes the batch; what is written leaves it, so that it stays exact when this is cancelled.
async fn write_all(
    writer: &mut (impl AsyncWrite + Unpin),
    batch: &mut VecDeque<Bytes>,
) -> std::io::Result<()> {
    while !batch.is_empty() {
        let mut written = poll_fn(|cx| {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = batch.len().min(SLICES_MAX);
            for (slice, bytes) in slices.iter_mut().zip(batch.iter()) {
                *slice = IoSlice::new(bytes);
            }
            Pin::new(&mut *writer).poll_write_vectored(cx, &slices[..count])
        })
        .await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        while let Some(front) = batch.front_mut() {
            if front.len() > written {
                front.advance(written);
                break;
            }
            written -= front.len();
            batch.pop_front();
        }
    }
    Ok(())
}

async fn read_loop(reader: &mut (impl AsyncRead + Unpin), shared: &MuxShared) -> Ended {
    loop {
        match read_frame(reader, shared).await {
            Ok(None) => {}
            Ok(Some(ended)) => return ended,
            Err(ReadFrame::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Ended::lost("the other end dropped the connection");
            }
            Err(ReadFrame::Io(error)) => return Ended::from_io(&error),
            Err(ReadFrame::Violation(how)) => {
                tracing::warn!(%how, "the peer broke the protocol of the line");
                return Ended::by_us(CLOSE_VIOLATION, &format!("protocol broken: {how}"));
            }
        }
    }
}

enum ReadFrame {
    Io(std::io::Error),
    Violation(String),
}

impl From<std::io::Error> for ReadFrame {
    fn from(error: std::io::Error) -> Self {
        ReadFrame::Io(error)
    }
}

async fn read_frame(
    reader: &mut (impl AsyncRead + Unpin),
    shared: &MuxShared,
) -> Result<Option<Ended>, ReadFrame> {
    let mut bytes = [0; HEADER_BYTES];
    reader.read_exact(&mut bytes).await?;
    let header = read_header(bytes).map_err(ReadFrame::Violation)?;
    // Its own allocation for each frame, so that an unread piece keeps no other memory alive.
    let mut body = BytesMut::with_capacity(header.len);
    while body.len() < header.len {
        let missing = header.len - body.len();
        if reader.read_buf(&mut (&mut body).limit(missing)).await? == 0 {
            return Err(ReadFrame::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        if body.len() < header.len {
            shared.with(|state| state.on_bytes(Instant::now()));
        }
    }
    shared
        .with(|state| state.on_frame(header, body.freeze(), Instant::now()))
        .map_err(ReadFrame::Violation)
}

async fn watch_silence(shared: &MuxShared) -> String {
    let mut tick = tokio::time::interval_at(
        tokio::time::Instant::now() + CONNECTION_KEEP_ALIVE,
        CONNECTION_KEEP_ALIVE,
    );
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Err(silence) = shared.with(|state| state.on_tick(Instant::now())) {
            return silence;
        }
    }
}
