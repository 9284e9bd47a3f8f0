//! Drives the core by bytes, for fuzzing: frames of a hostile peer, with the calls of this end
//! between them.

use std::collections::VecDeque;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};

use super::End;
use super::frame::{HEADER_BYTES, put_header, read_header};
use super::state::State;
use base::limits::MUX_FRAME_BYTES_MAX;

/// Streams that this end works on at once.
const STREAMS_MAX: usize = 32;

/// Runs the core on this input, and returns what the peer did wrong in the end, if anything. Each
/// step is a byte that chooses it and a byte for its stream. Panics when this end writes something
/// that is no frame.
pub fn drive(input: &[u8]) -> Result<(), String> {
    let now = Instant::now();
    let mut state = State::new(End::Listening, Duration::from_millis(1), now);
    let mut mine: VecDeque<u32> = VecDeque::new();
    let mut rest = input;
    let mut out = VecDeque::new();
    while let Some((&step, after)) = rest.split_first() {
        rest = after;
        let (&chosen, after) = rest.split_first().unwrap_or((&0, &[]));
        rest = after;
        let stream = mine
            .get(usize::from(chosen) % mine.len().max(1))
            .copied()
            .unwrap_or(0);
        match step % 20 {
            // A frame of each kind: the second byte is its stream, the third the length of its
            // body.
            kind @ 1..=9 => {
                let (&len, after) = rest.split_first().unwrap_or((&0, &[]));
                let (body, after) = after.split_at(usize::from(len).min(after.len()));
                rest = after;
                let mut bytes = [0; HEADER_BYTES];
                bytes[0] = kind;
                bytes[3] = body.len() as u8;
                bytes[7] = chosen;
                let header = read_header(bytes)?;
                if state
                    .on_frame(header, Bytes::copy_from_slice(body), now)?
                    .is_some()
                {
                    return Ok(());
                }
            }
            // A frame as the bytes say.
            0 => {
                let Some((bytes, after)) = rest.split_first_chunk::<HEADER_BYTES>() else {
                    return Ok(());
                };
                rest = after;
                let header = read_header(*bytes)?;
                let mut again = BytesMut::new();
                put_header(&mut again, header.kind, header.stream, header.len);
                assert_eq!(
                    &again[..],
                    bytes,
                    "a header that is read is written the same"
                );
                let (body, after) = rest.split_at(header.len.min(rest.len()));
                rest = after;
                let mut body = BytesMut::from(body);
                body.put_bytes(chosen, header.len - body.len());
                if state.on_frame(header, body.freeze(), now)?.is_some() {
                    return Ok(());
                }
            }
            10 => mine.extend(state.accept().filter(|_| mine.len() < STREAMS_MAX)),
            11 => mine.extend(
                state
                    .open(i32::from(chosen))
                    .filter(|_| mine.len() < STREAMS_MAX),
            ),
            12 => drop(state.poll_read(stream, usize::from(chosen) * 64, Waker::noop())),
            13 => {
                let mut data = Bytes::from(vec![chosen; usize::from(chosen) * 300]);
                let _ = state.poll_write(stream, &mut data, Waker::noop());
            }
            14 => {
                let _ = state.finish(stream);
            }
            15 => state.reset(stream),
            16 => state.stop(stream),
            17 => state.reader_gone(stream),
            18 => state.on_tick(now)?,
            _ => {
                state.take_batch(&mut out);
                written(&mut out);
            }
        }
    }
    state.take_batch(&mut out);
    written(&mut out);
    Ok(())
}

/// What this end writes are whole frames.
fn written(out: &mut VecDeque<Bytes>) {
    let mut all: Bytes = out
        .drain(..)
        .fold(BytesMut::new(), |mut all, piece| {
            all.extend_from_slice(&piece);
            all
        })
        .freeze();
    while let Some(bytes) = all.first_chunk::<HEADER_BYTES>() {
        let header = read_header(*bytes);
        assert!(
            header
                .as_ref()
                .is_ok_and(|header| header.len <= MUX_FRAME_BYTES_MAX),
            "{header:?}"
        );
        let len = HEADER_BYTES + header.map_or(0, |header| header.len);
        assert!(all.len() >= len, "a frame is cut off");
        all = all.split_off(len);
    }
    assert!(all.is_empty(), "a header is cut off");
}
