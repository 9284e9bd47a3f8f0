//! The frames of the TCP connection.
//!
//! ```text
//! 0      1          4            8
//! +------+----------+------------+---- - - -
//! | kind |  length  |  stream    |  body (length bytes)
//! +------+----------+------------+---- - - -
//!   u8      u24 BE      u32 BE
//! ```
//!
//! | kind | name   | body                                                                     |
//! |------|--------|--------------------------------------------------------------------------|
//! | 1    | OPEN   | none; the next stream id of the sender (odd: ids of the connecting end)  |
//! | 2    | DATA   | the next bytes of the stream                                             |
//! | 3    | END    | the last bytes of the stream                                             |
//! | 4    | RESET  | none; the sender aborts this stream, the receiver discards its data      |
//! | 5    | STOP   | none; the sender no longer reads this stream, the receiver resets it     |
//! | 6    | CREDIT | u32: the receiver may send this many more bytes (stream 0: in total)     |
//! | 7    | PING   | u64                                                                      |
//! | 8    | PONG   | the same u64                                                             |
//! | 9    | CLOSE  | u32 code, then the reason in UTF-8                                       |

use bytes::{BufMut, BytesMut};

use base::limits::{CONNECTION_REASON_BYTES_MAX, MUX_FRAME_BYTES_MAX};

pub(super) const HEADER_BYTES: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Open = 1,
    Data = 2,
    End = 3,
    Reset = 4,
    Stop = 5,
    Credit = 6,
    Ping = 7,
    Pong = 8,
    Close = 9,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) len: usize,
    pub(super) stream: u32,
}

/// Writes a header; the caller appends a body of `len` bytes.
pub(super) fn put_header(out: &mut BytesMut, kind: Kind, stream: u32, len: usize) {
    debug_assert!(len <= MUX_FRAME_BYTES_MAX);
    out.put_u32((kind as u32) << 24 | len as u32);
    out.put_u32(stream);
}

/// Parses a header. Rejects a length that its kind does not allow, before anything is allocated.
pub(super) fn read_header(bytes: [u8; HEADER_BYTES]) -> Result<Header, String> {
    let [kind, a, b, c, stream @ ..] = bytes;
    let len = u32::from_be_bytes([0, a, b, c]) as usize;
    let (kind, allowed) = match kind {
        1 => (Kind::Open, 0..=0),
        2 => (Kind::Data, 0..=MUX_FRAME_BYTES_MAX),
        3 => (Kind::End, 0..=MUX_FRAME_BYTES_MAX),
        4 => (Kind::Reset, 0..=0),
        5 => (Kind::Stop, 0..=0),
        6 => (Kind::Credit, 4..=4),
        7 => (Kind::Ping, 8..=8),
        8 => (Kind::Pong, 8..=8),
        9 => (Kind::Close, 4..=4 + CONNECTION_REASON_BYTES_MAX),
        other => return Err(format!("a frame of unknown kind {other}")),
    };
    if !allowed.contains(&len) {
        return Err(format!(
            "a {kind:?} frame with an invalid length of {len} bytes"
        ));
    }
    Ok(Header {
        kind,
        len,
        stream: u32::from_be_bytes(stream),
    })
}
