//! Reads and writes the messages of `model::protocol` on streams: each behind its length, within
//! its limits and its time.
//!
//! Hub, site and publisher call it. Nothing here survives a crash, nor has to.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use base::blocking::blocking;
use base::budget::{Budget, Share};
use base::fault::Fault;
use base::limits::{
    ANSWER_IDLE_MAX, ANSWER_MAX, CONTROL_FRAME_BYTES_MAX, HUB_MESSAGE_VALUES_MAX,
    MESSAGE_BYTES_PER_SECOND_MIN, MESSAGE_BYTES_SMALL, MESSAGE_VALUES_MAX, QUESTION_BYTES_FACTOR,
    QUESTION_BYTES_MAX, SILENCE_MAX,
};
use base::peer::Peer;
use base::text::check_values;
use model::protocol::{QUESTION, from_json, to_json};
use transport::{Link, RecvHalf, SendHalf};

/// Priorities of streams: control before questions before small transfers before large.
pub use transport::PRIORITY_CONTROL;
/// Questions.
pub const PRIORITY_QUESTION: i32 = 50;
/// Manifests.
pub const PRIORITY_MANIFEST: i32 = 20;

/// Asks the other end of a line, and waits for its answer, which must come soon.
pub async fn ask<Q: Serialize + Sync, T: DeserializeOwned + Send + 'static>(
    link: &Link,
    question: &Q,
) -> Result<T, Fault> {
    let answer = timeout(ANSWER_MAX, async {
        receive_answer(&mut put(link, question).await?.1).await
    })
    .await;
    answer.unwrap_or_else(|_| Err(unanswered(link, ANSWER_MAX)))
}

/// [`ask`] for a question whose answer comes only after content was moved: it may take as long as
/// some is moving.
pub async fn ask_to_move<Q: Serialize + Sync, T: DeserializeOwned + Send + 'static>(
    link: &Link,
    question: &Q,
) -> Result<T, Fault> {
    let answer = async { receive_answer(&mut put(link, question).await?.1).await };
    tokio::select! {
        answer = answer => answer,
        () = nothing_moves(link, ANSWER_IDLE_MAX) => Err(unanswered(link, ANSWER_IDLE_MAX)),
    }
}

/// Ends once no stream of the line carried anything for so long, either way.
async fn nothing_moves(link: &Link, idle_max: Duration) {
    let (mut moved, mut since) = (link.stream_bytes(), Instant::now());
    loop {
        tokio::time::sleep(idle_max / 20).await;
        let now = link.stream_bytes();
        if now != moved {
            (moved, since) = (now, Instant::now());
        } else if since.elapsed() >= idle_max {
            return;
        }
    }
}

fn unanswered(link: &Link, after: Duration) -> Fault {
    let peer = link
        .peer()
        .map_or_else(|| "the peer".to_owned(), ToString::to_string);
    Fault::unreachable(format!(
        "{peer} did not answer a question within {} s",
        after.as_secs()
    ))
    .with_next("look at the log of the other daemon, then run the command again")
}

/// Opens a stream with a question on it. The stream lives as long as both halves.
async fn put<Q: Serialize + Sync>(
    link: &Link,
    question: &Q,
) -> Result<(SendHalf, RecvHalf), Fault> {
    let text = to_json(question)?;
    if text.len() > QUESTION_BYTES_MAX {
        return Err(Fault::usage(format!(
            "the request has {} bytes; {QUESTION_BYTES_MAX} are allowed",
            text.len()
        ))
        .with_next("name fewer artifacts at once, or give shorter settings"));
    }
    let (mut send, recv) = link.open(PRIORITY_QUESTION).await?;
    // In one piece: the other end waits only so long for what follows the first byte.
    let mut out = Vec::with_capacity(text.len() + 5);
    out.push(QUESTION);
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(&text);
    send.write_all(&out).await?;
    // The other end may have answered already, and read no more: the answer counts.
    let _ = send.finish();
    Ok((send, recv))
}

async fn receive_answer<T: DeserializeOwned + Send + 'static>(
    recv: &mut RecvHalf,
) -> Result<T, Fault> {
    receive::<Result<T, Fault>>(recv).await?
}

/// Sends one message behind its length.
pub async fn send<T: Serialize + Sync>(to: &mut SendHalf, message: &T) -> Result<(), Fault> {
    send_counted(to, message).await.map(drop)
}

/// [`send`]; returns the bytes of the message.
pub async fn send_counted<T: Serialize + Sync>(
    to: &mut SendHalf,
    message: &T,
) -> Result<usize, Fault> {
    let text = to_json(message)?;
    if text.len() > CONTROL_FRAME_BYTES_MAX {
        // The other end would refuse it, and end the stream.
        return Err(Fault::internal(format!(
            "a message has {} bytes, and {CONTROL_FRAME_BYTES_MAX} are allowed",
            text.len()
        )));
    }
    send_bytes(to, &text).await?;
    Ok(text.len() + 4)
}

/// Sends bytes behind their length.
pub async fn send_bytes(to: &mut SendHalf, bytes: &[u8]) -> Result<(), Fault> {
    let mut out = Vec::with_capacity(bytes.len() + 4);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
    to.write_all(&out).await
}

/// Receives one message of the hub, of at most [`CONTROL_FRAME_BYTES_MAX`]. It may begin at any
/// time; once begun it must arrive.
pub async fn receive<T: DeserializeOwned + Send + 'static>(
    from: &mut RecvHalf,
) -> Result<T, Fault> {
    let len = receive_len(from, CONTROL_FRAME_BYTES_MAX).await?;
    parse(receive_body(from, len).await?, HUB_MESSAGE_VALUES_MAX).await
}

/// [`receive`], for a message of a peer of the hub, whose memory comes out of the peer's share of
/// `budget` before it is read. The share is to be kept as long as the message.
pub async fn receive_within<T: DeserializeOwned + Send + 'static>(
    from: &mut RecvHalf,
    budget: &Budget,
    peer: &Peer,
) -> Result<(T, Share), Fault> {
    let len = receive_len(from, CONTROL_FRAME_BYTES_MAX).await?;
    let share = budget.take(peer, len as u64, PRIORITY_CONTROL).await?;
    let body = receive_body(from, len).await?;
    Ok((parse(body, MESSAGE_VALUES_MAX).await?, share))
}

/// Receives a question, which has to begin at once; as [`receive_within`].
pub async fn receive_question<T: DeserializeOwned + Send + 'static>(
    from: &mut RecvHalf,
    budget: &Budget,
    peer: &Peer,
) -> Result<(T, Share), Fault> {
    let len = timeout(SILENCE_MAX, receive_len(from, QUESTION_BYTES_MAX)).await;
    let len = len.map_err(|_| Fault::unreachable("a question did not arrive"))??;
    let share = budget
        .take(peer, len as u64 * QUESTION_BYTES_FACTOR, PRIORITY_QUESTION)
        .await?;
    let body = receive_body(from, len).await?;
    Ok((parse(body, MESSAGE_VALUES_MAX).await?, share))
}

/// Receives bytes behind their length. They may begin at any time; once begun they must arrive.
pub async fn receive_bytes(from: &mut RecvHalf, max: usize) -> Result<Vec<u8>, Fault> {
    let len = receive_len(from, max).await?;
    receive_body(from, len).await
}

async fn receive_len(from: &mut RecvHalf, max: usize) -> Result<usize, Fault> {
    let mut len = [0; 4];
    from.read_exact(&mut len).await?;
    let len = u32::from_le_bytes(len) as usize;
    if len > max {
        return Err(Fault::integrity(format!(
            "the peer sent a message of {len} bytes; {max} are allowed"
        )));
    }
    Ok(len)
}

async fn receive_body(from: &mut RecvHalf, len: usize) -> Result<Vec<u8>, Fault> {
    let mut out = vec![0; len];
    let patience = SILENCE_MAX + Duration::from_secs(len as u64 / MESSAGE_BYTES_PER_SECOND_MIN);
    let read = timeout(patience, from.read_exact(&mut out)).await;
    read.map_err(|_| {
        Fault::unreachable(format!(
            "a message did not arrive within {} s",
            patience.as_secs()
        ))
    })??;
    Ok(out)
}

async fn parse<T: DeserializeOwned + Send + 'static>(
    text: Vec<u8>,
    values_max: usize,
) -> Result<T, Fault> {
    let is_small = text.len() <= MESSAGE_BYTES_SMALL;
    let work = move || {
        check_values(&text, values_max).map_err(|values| {
            Fault::integrity(format!(
                "the peer sent a message of {values} values; {values_max} are allowed"
            ))
        })?;
        from_json(&text)
    };
    if is_small {
        work()
    } else {
        blocking(work).await
    }
}
