//! Moves bytes between the connection and the [`State`](super::State). One task per connection.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::MuxShared;
use super::frame::{HEADER_BYTES, Kind, put_header, read_header};
use crate::{CLOSE_VIOLATION, Ended, SEVER_MAX};
use base::limits::CONNECTION_KEEP_ALIVE;

/// How long sending the close message may take before the connection is dropped.
const GOODBYE_MAX: Duration = Duration::from_secs(2);
/// How long to wait after a failed write for the close message of the peer, which states why the
/// write failed.
const LAST_WORDS_MAX: Duration = Duration::from_millis(500);
const SLICES_MAX: usize = 64;

/// Runs until the end of the connection. Then sends a close message if this end closed it.
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
                    Err(_) => Ended::lost(&format!("write error: {error}")),
                },
                // This end closed the connection; the recorded reason is kept.
                None => Ended::lost("it was closed by this end"),
            },
            reason = watch_silence(shared) => Ended::lost(&reason),
        }
    };
    shared.end(ended);
    let recorded = shared.state.lock().ended.clone();
    if let Some(ended) = recorded.filter(|e| !e.by_peer)
        && let Some(code) = ended.code
    {
        // Complete a partly written frame first. Otherwise the peer would read the close message as
        // its body.
        put_close(&mut batch, code, &ended.reason);
        let goodbye = async {
            write_all(&mut writer, &mut batch).await?;
            writer.shutdown().await?;
            // Read until the peer closes: dropping a socket with unread bytes would reset it, and
            // the close message could be lost.
            tokio::io::copy(&mut reader, &mut tokio::io::sink()).await
        };
        let limit = match shared.sever.load(Ordering::Relaxed) {
            true => SEVER_MAX,
            false => GOODBYE_MAX,
        };
        let _ = tokio::time::timeout(limit, goodbye).await;
    }
}

fn put_close(batch: &mut VecDeque<Bytes>, code: u32, reason: &str) {
    let mut frame = BytesMut::new();
    put_header(&mut frame, Kind::Close, 0, 4 + reason.len());
    frame.put_u32(code);
    frame.put_slice(reason.as_bytes());
    batch.push_back(frame.freeze());
}

/// Writes queued data. Returns the error, or `None` after this end has closed the connection.
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
            // A peer that does not read must not prevent this end from closing.
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

/// Writes the batch and removes what was written, so that the batch is correct if this is
/// cancelled.
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
        while shared.with(|state| state.is_full()) {
            shared.to_read.notified().await;
        }
        match read_frame(reader, shared).await {
            Ok(None) => {}
            Ok(Some(ended)) => return ended,
            Err(ReadFrame::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Ended::lost("the peer dropped the connection");
            }
            Err(ReadFrame::Io(error)) => return Ended::from_io(&error),
            Err(ReadFrame::Violation(how)) => {
                tracing::warn!(%how, "the peer violated the protocol of the connection");
                return Ended::by_us(CLOSE_VIOLATION, &format!("protocol violation: {how}"));
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
    // Each frame has its own allocation, so that an unread piece does not keep other memory alive.
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
        if let Err(reason) = shared.with(|state| state.on_tick(Instant::now())) {
            return reason;
        }
    }
}
