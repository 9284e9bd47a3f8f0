use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::frame::{HEADER_BYTES, Kind, put_header, read_header};
use super::*;
use crate::{CLOSE_DONE, CLOSE_VIOLATION};
use base::limits::{
    CONNECTION_STREAM_WINDOW_BYTES, CONNECTION_STREAMS_MAX, MUX_FRAME_BYTES_MAX, MUX_QUEUE_BYTES,
    MUX_STREAM_QUEUE_BYTES, SILENCE_MAX,
};

const RTT: Duration = Duration::from_millis(1);

fn pair() -> (Mux, Mux) {
    let (a, b) = tokio::io::duplex(256 << 10);
    (
        Mux::start(a, End::Dialling, RTT, ()),
        Mux::start(b, End::Listening, RTT, ()),
    )
}

async fn read_all(stream: &mut RecvStream) -> Result<Vec<u8>, StreamEnd> {
    let mut all = Vec::new();
    while let Some(bytes) = stream.read_chunk(usize::MAX).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

#[tokio::test]
async fn both_ends_open_streams_and_see_their_ends() {
    let (a, b) = pair();
    for (from, to) in [(&a, &b), (&b, &a)] {
        let (mut send, mut recv) = from.open(0).await.unwrap();
        send.write_all(b"question").await.unwrap();
        send.finish().unwrap();
        let (mut answer, mut question) = to.accept().await.unwrap();
        assert_eq!(read_all(&mut question).await.unwrap(), b"question");
        answer
            .write_bytes(Bytes::from_static(b"answer"))
            .await
            .unwrap();
        answer.finish().unwrap();
        assert_eq!(read_all(&mut recv).await.unwrap(), b"answer");
        assert_eq!(send.write_all(b"more").await, Err(StreamEnd::Finished));
    }
}

#[tokio::test(start_paused = true)]
async fn an_unread_stream_blocks_only_its_writer() {
    let (a, b) = pair();
    let (mut stuck, _unread) = a.open(0).await.unwrap();
    let piece = Bytes::from(vec![7; 64 << 10]);
    let mut written = 0;
    while tokio::time::timeout(Duration::from_millis(200), stuck.write_bytes(piece.clone()))
        .await
        .is_ok()
    {
        written += piece.len();
    }
    // The window, plus what is queued on this side.
    assert!(
        written <= CONNECTION_STREAM_WINDOW_BYTES as usize + (256 << 10),
        "{written}"
    );
    let (_answer, mut slow) = b.accept().await.unwrap();

    let (mut free, _recv) = a.open(0).await.unwrap();
    free.write_all(b"hello").await.unwrap();
    free.finish().unwrap();
    let (_answer, mut other) = b.accept().await.unwrap();
    assert_eq!(read_all(&mut other).await.unwrap(), b"hello");

    let writing = tokio::spawn(async move {
        stuck.write_bytes(piece).await.unwrap();
        stuck.finish().unwrap();
    });
    assert_eq!(
        read_all(&mut slow).await.unwrap().len(),
        written + (64 << 10)
    );
    writing.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn unread_data_above_the_limit_stays_in_the_socket() {
    const LIMIT: usize = 1 << 20;
    const STREAMS: usize = 16;
    let (a, b) = pair();
    b.unread_limit().set(LIMIT as u64);
    let mut unread = Vec::new();
    for _ in 0..STREAMS {
        let (mut send, recv) = a.open(0).await.unwrap();
        tokio::spawn(async move {
            send.write_all(&vec![7; 1 << 20]).await.unwrap();
            send.finish().unwrap();
            drop(recv);
        });
    }
    // The clock is paused: a sleep ends when no task can do anything.
    tokio::time::sleep(SILENCE_MAX * 3).await;
    let held = b.shared().state.lock().unread();
    assert!(
        (LIMIT..LIMIT + MUX_FRAME_BYTES_MAX).contains(&held),
        "{held}"
    );
    for _ in 0..STREAMS {
        unread.push(b.accept().await.unwrap());
    }
    // A smaller limit, and one of nothing: the peer waits, and the connection stays.
    b.unread_limit().set(0);
    let first = &mut unread[0].1;
    assert_eq!(first.read_chunk(1).await.unwrap().unwrap().len(), 1);
    b.unread_limit().set(LIMIT as u64 / 2);
    // As with QUIC, who reads one stream only may wait for data behind that of the others.
    let reading = unread.iter_mut().map(|(_, stream)| read_all(stream));
    let read: usize = futures::future::join_all(reading)
        .await
        .into_iter()
        .map(|all| all.unwrap().len())
        .sum();
    assert_eq!(read + 1, STREAMS << 20);
    assert_eq!(b.shared().state.lock().unread(), 0);
    assert!(a.ended().is_none() && b.ended().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_reader_unblocks_its_writer() {
    let (a, b) = pair();
    let (send, recv) = a.open(0).await.unwrap();
    let (mut answer, _question) = b.accept().await.unwrap();
    let writing = tokio::spawn(async move {
        let piece = Bytes::from(vec![0; 64 << 10]);
        loop {
            if let Err(end) = answer.write_bytes(piece.clone()).await {
                return end;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    // The request was finished normally; only then was the reader dropped.
    let mut send = send;
    send.finish().unwrap();
    drop(recv);
    assert_eq!(writing.await.unwrap(), StreamEnd::Stopped);
}

#[tokio::test]
async fn a_dropped_writer_resets_the_stream() {
    let (a, b) = pair();
    let (mut send, _recv) = a.open(0).await.unwrap();
    send.write_all(b"half").await.unwrap();
    let (_answer, mut question) = b.accept().await.unwrap();
    assert_eq!(question.read_chunk(64).await.unwrap().unwrap(), "half");
    drop(send);
    assert_eq!(question.read_chunk(64).await, Err(StreamEnd::Reset));
}

#[tokio::test(start_paused = true)]
async fn slots_are_limited_and_freed() {
    let (a, b) = pair();
    let mut held = Vec::new();
    for _ in 0..CONNECTION_STREAMS_MAX {
        held.push(a.open(0).await.unwrap());
    }
    assert!(
        tokio::time::timeout(Duration::from_millis(50), a.open(0))
            .await
            .is_err()
    );
    // Aborted in both directions before it was accepted: the slot is freed when the other end
    // accepts the stream.
    held.clear();
    assert!(
        tokio::time::timeout(Duration::from_millis(50), a.open(0))
            .await
            .is_err()
    );
    tokio::spawn(async move {
        while let Some((mut answer, mut question)) = b.accept().await {
            if let Ok(bytes) = read_all(&mut question).await {
                answer.write_bytes(bytes.into()).await.unwrap();
                answer.finish().unwrap();
            }
        }
    });
    for round in 0..3 * CONNECTION_STREAMS_MAX {
        let (mut send, mut recv) = tokio::time::timeout(Duration::from_secs(5), a.open(0))
            .await
            .unwrap()
            .unwrap();
        send.write_all(&round.to_be_bytes()).await.unwrap();
        send.finish().unwrap();
        assert_eq!(read_all(&mut recv).await.unwrap(), round.to_be_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_without_an_answer_arrives() {
    let (a, b) = pair();
    let (mut send, recv) = a.open(0).await.unwrap();
    drop(recv);
    send.write_all(b"welcome").await.unwrap();
    send.finish().unwrap();
    drop(send);
    // All data has arrived before anybody reads.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (mut answer, mut message) = b.accept().await.unwrap();
    assert_eq!(read_all(&mut message).await.unwrap(), b"welcome");
    assert_eq!(answer.write_all(b"thanks").await, Err(StreamEnd::Stopped));
}

#[tokio::test]
async fn higher_priority_goes_first() {
    let (a, b) = tokio::io::duplex(16);
    let mux = Mux::start(a, End::Dialling, RTT, ());
    let (mut low, _r1) = mux.open(0).await.unwrap();
    let (mut high, _r2) = mux.open(5).await.unwrap();
    // The duplex holds 16 bytes, so both messages are queued before any data is sent.
    low.write_bytes(Bytes::from(vec![1; 200 << 10]))
        .await
        .unwrap();
    high.write_bytes(Bytes::from(vec![2; 100 << 10]))
        .await
        .unwrap();
    high.finish().unwrap();
    let mut peer = Peer(b);
    let mut order = Vec::new();
    while order.last() != Some(&(Kind::End, 3)) {
        let (kind, id, _) = peer.next().await;
        order.push((kind, id));
    }
    let data: Vec<_> = order
        .into_iter()
        .filter(|(kind, _)| *kind != Kind::Open)
        .collect();
    // At most the one batch that was being written when the message of higher priority arrived.
    let before = data.iter().take_while(|(_, id)| *id == 1).count();
    assert!(before * MUX_FRAME_BYTES_MAX <= 256 << 10, "{data:?}");
    assert!(data[before..].iter().all(|(_, id)| *id == 3), "{data:?}");
}

#[tokio::test(start_paused = true)]
async fn close_sends_the_reason_and_wakes_all_tasks() {
    let (a, b) = pair();
    let (_send, mut recv) = a.open(0).await.unwrap();
    let waiting = tokio::spawn(async move { recv.read_chunk(1).await });
    let accepting = tokio::spawn({
        let a = a.clone();
        async move { a.accept().await.is_none() }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    b.close(CLOSE_DONE, "going home", false);
    let ended = a.closed().await;
    assert!(
        ended.by_peer && ended.code == Some(CLOSE_DONE) && ended.reason == "going home",
        "{ended:?}"
    );
    assert_eq!(waiting.await.unwrap(), Err(StreamEnd::LineGone));
    assert!(accepting.await.unwrap());
    assert!(a.open(0).await.is_err());
    assert_eq!(b.closed().await.reason, "going home");
}

#[tokio::test]
async fn a_lost_peer_is_detected() {
    let (a, b) = tokio::io::duplex(1024);
    let mux = Mux::start(a, End::Listening, RTT, ());
    drop(b);
    let ended = mux.closed().await;
    assert!(ended.code.is_none(), "{ended:?}");
}

/// Whether a writer was woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Writes one piece to its own stream, without a runtime.
struct Writer {
    id: u32,
    rest: Bytes,
    woken: Arc<Woken>,
}

impl Writer {
    fn new(state: &mut State, piece: Bytes) -> Self {
        Self {
            id: state.open(0).unwrap(),
            rest: piece,
            woken: Arc::new(Woken(AtomicBool::new(true))),
        }
    }

    /// Like a runtime: does nothing unless it was woken.
    fn poll(&mut self, state: &mut State) {
        if self.rest.is_empty() || !self.woken.0.swap(false, Ordering::SeqCst) {
            return;
        }
        if let Poll::Ready(result) =
            state.poll_write(self.id, &mut self.rest, &Waker::from(self.woken.clone()))
        {
            result.unwrap();
            state.finish(self.id).unwrap();
        }
    }
}

/// Transfers one batch. Returns `false` if there was none.
fn transfer_batch(from: &mut State, to: &mut State) -> bool {
    let mut batch = VecDeque::new();
    from.take_batch(&mut batch);
    let mut bytes = BytesMut::new();
    batch
        .iter()
        .for_each(|piece| bytes.extend_from_slice(piece));
    let any = !bytes.is_empty();
    while !bytes.is_empty() {
        let header = read_header(bytes.split_to(HEADER_BYTES)[..].try_into().unwrap()).unwrap();
        let body = bytes.split_to(header.len).freeze();
        assert_eq!(to.on_frame(header, body, Instant::now()), Ok(None));
    }
    any
}

#[test]
fn queues_are_limited_for_a_peer_that_does_not_read() {
    const STREAMS: usize = 128;
    const PIECE: usize = 1 << 20;
    let now = Instant::now();
    let (mut hub, mut site) = (
        State::new(End::Listening, RTT, now),
        State::new(End::Dialling, RTT, now),
    );
    // Each stream has a different share of this.
    let mut noise = vec![0; PIECE + STREAMS];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let noise = Bytes::from(noise);
    let mut writers: Vec<Writer> = (0..STREAMS)
        .map(|n| Writer::new(&mut hub, noise.slice(n..n + PIECE)))
        .collect();
    for _ in 0..3 {
        writers.iter_mut().for_each(|writer| writer.poll(&mut hub));
    }
    let taken: usize = writers.iter().map(|writer| PIECE - writer.rest.len()).sum();
    assert!(
        taken <= MUX_QUEUE_BYTES + PIECE + STREAMS * MUX_STREAM_QUEUE_BYTES,
        "{taken}"
    );
    assert!(
        writers.iter().all(|writer| writer.rest.len() < PIECE),
        "no stream waits for the queue of another"
    );

    let mut reading: Vec<(usize, usize)> = (0..STREAMS).map(|n| (n, 0)).collect();
    while !reading.is_empty() {
        let moved = transfer_batch(&mut hub, &mut site) | transfer_batch(&mut site, &mut hub);
        assert!(moved, "{} streams are stalled", reading.len());
        writers.iter_mut().for_each(|writer| writer.poll(&mut hub));
        reading.retain_mut(|(n, read)| {
            loop {
                match site.poll_read(writers[*n].id, usize::MAX, Waker::noop()) {
                    Poll::Pending => return true,
                    Poll::Ready(Ok(Some(bytes))) => {
                        assert!(
                            bytes == noise[*n + *read..][..bytes.len()],
                            "stream {n} at {read}"
                        );
                        *read += bytes.len();
                    }
                    Poll::Ready(end) => {
                        assert_eq!((end, *read), (Ok(None), PIECE));
                        return false;
                    }
                }
            }
        });
    }
}

#[test]
fn an_aborted_stream_frees_its_space_in_the_queue() {
    let mut state = State::new(End::Listening, RTT, Instant::now());
    let piece = Bytes::from(vec![7; 1 << 20]);
    for round in 0..100 {
        let mut writer = Writer::new(&mut state, piece.clone());
        writer.poll(&mut state);
        assert!(
            writer.rest.is_empty(),
            "the queue is empty, but in round {round} a piece was not taken completely"
        );
        // A part is sent before.
        state.take_batch(&mut VecDeque::new());
        state.reset(writer.id);
    }
}

#[test]
fn a_silent_peer_ends_the_connection() {
    let now = Instant::now();
    let mut state = State::new(End::Dialling, RTT, now);
    assert!(state.on_tick(now + Duration::from_secs(29)).is_ok());
    assert!(
        state
            .on_tick(now + Duration::from_secs(30))
            .unwrap_err()
            .contains("30 s")
    );
    state.on_bytes(now + Duration::from_secs(30));
    assert!(state.on_tick(now + Duration::from_secs(59)).is_ok());
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_handle_closes_the_connection() {
    let (a, b) = pair();
    let (send, recv) = a.open(0).await.unwrap();
    drop(a);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), b.closed())
            .await
            .is_err()
    );
    drop((send, recv));
    assert_eq!(b.closed().await.reason, "no longer used");
}

/// The other end, controlled by the test.
struct Peer(DuplexStream);

impl Peer {
    async fn next(&mut self) -> (Kind, u32, Vec<u8>) {
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact(&mut header).await.unwrap();
        let header = read_header(header).unwrap();
        let mut body = vec![0; header.len];
        self.0.read_exact(&mut body).await.unwrap();
        (header.kind, header.stream, body)
    }

    async fn send(&mut self, kind: Kind, stream: u32, body: &[u8]) {
        let mut frame = BytesMut::new();
        put_header(&mut frame, kind, stream, body.len());
        frame.put_slice(body);
        // The other end may already be closed; the test checks its reason.
        let _ = self.0.write_all(&frame).await;
    }
}

/// Sends the frames to a new connection. Returns the reason with which it was closed.
async fn violation(frames: &[(Kind, u32, Vec<u8>)]) -> String {
    let (a, b) = tokio::io::duplex(4 << 20);
    let mux = Mux::start(a, End::Listening, RTT, ());
    let mut peer = Peer(b);
    for (kind, stream, body) in frames {
        peer.send(*kind, *stream, body).await;
    }
    let ended = tokio::time::timeout(Duration::from_secs(5), mux.closed())
        .await
        .expect("the connection did not end");
    assert_eq!(
        (ended.code, ended.by_peer),
        (Some(CLOSE_VIOLATION), false),
        "{ended:?}"
    );
    // The peer receives the reason.
    loop {
        let (kind, _, body) = peer.next().await;
        if kind == Kind::Close {
            assert_eq!(String::from_utf8_lossy(&body[4..]), ended.reason);
            return ended.reason;
        }
    }
}

#[tokio::test]
async fn protocol_violations_end_the_connection() {
    let full = vec![0; MUX_FRAME_BYTES_MAX];
    let mut too_much = vec![(Kind::Open, 1, vec![])];
    too_much.extend(
        (0..=CONNECTION_STREAM_WINDOW_BYTES as usize / full.len())
            .map(|_| (Kind::Data, 1, full.clone())),
    );
    let too_many: Vec<_> = (0..=CONNECTION_STREAMS_MAX)
        .map(|n| (Kind::Open, 2 * n + 1, vec![]))
        .collect();
    let pings: Vec<_> = (0..40_000).map(|_| (Kind::Ping, 0, vec![0; 8])).collect();
    for (frames, word) in [
        (vec![(Kind::Data, 1, b"x".to_vec())], "not open"),
        (vec![(Kind::Open, 3, vec![])], "but 1 is next"),
        (vec![(Kind::Open, 2, vec![])], "but 1 is next"),
        (vec![(Kind::Reset, 9, vec![])], "never existed"),
        (vec![(Kind::Credit, 2, vec![0, 0, 0, 1])], "never existed"),
        (
            vec![
                (Kind::Open, 1, vec![]),
                (Kind::End, 1, vec![]),
                (Kind::Data, 1, b"x".to_vec()),
            ],
            "not open",
        ),
        (too_much, "more data than its credit"),
        (too_many, "more than 256 streams"),
    ] {
        let reason = violation(&frames).await;
        assert!(reason.contains(word), "{reason:?} lacks {word:?}");
    }
    // A peer that requests answers and never reads them cannot receive the reason.
    let (a, b) = tokio::io::duplex(1024);
    let mux = Mux::start(a, End::Listening, RTT, ());
    let (_unread, mut writer) = tokio::io::split(b);
    for (kind, stream, body) in &pings {
        let mut frame = BytesMut::new();
        put_header(&mut frame, *kind, *stream, body.len());
        frame.put_slice(body);
        if writer.write_all(&frame).await.is_err() {
            break;
        }
    }
    assert!(mux.closed().await.reason.contains("does not read them"));
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    for garbage in [
        &[0u8; 64][..],
        &[0xff; 64],
        b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n",
    ] {
        let (a, mut b) = tokio::io::duplex(1 << 20);
        let mux = Mux::start(a, End::Listening, RTT, ());
        b.write_all(garbage).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), mux.closed())
            .await
            .unwrap();
        assert_eq!(ended.code, Some(CLOSE_VIOLATION), "{ended:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn tiny_frames_use_little_memory() {
    let (a, b) = tokio::io::duplex(1 << 20);
    let mux = Mux::start(a, End::Listening, RTT, ());
    let mut peer = Peer(b);
    peer.send(Kind::Open, 1, &[]).await;
    let mut sent = Vec::new();
    for n in 0..20_000u32 {
        let body = [n as u8; 3];
        peer.send(Kind::Data, 1, &body[..1 + n as usize % 3]).await;
        sent.extend_from_slice(&body[..1 + n as usize % 3]);
    }
    peer.send(Kind::End, 1, &[]).await;
    let (_send, mut recv) = mux.accept().await.unwrap();
    // All data has arrived when the end has; it was joined on receipt.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let first = recv.read_chunk(usize::MAX).await.unwrap().unwrap();
    let mut all = first.to_vec();
    all.extend(read_all(&mut recv).await.unwrap());
    assert_eq!(all, sent);
    assert!(first.len() > 10_000, "{}", first.len());
}
