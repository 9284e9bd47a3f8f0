//! The frames of the TCP line.
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
//! | 1    | OPEN   | none; the next stream id of the sender (odd: the dialling end's)         |
//! | 2    | DATA   | the stream's next bytes                                                  |
//! | 3    | END    | the stream's last bytes                                                  |
//! | 4    | RESET  | none; the sender gives this stream up, what was sent of it is void       |
//! | 5    | STOP   | none; the sender reads no more of this stream, the other end resets it   |
//! | 6    | CREDIT | u32: so many more bytes may be sent (stream 0: on all streams together)  |
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

/// Puts a header; the caller puts `len` bytes of body behind it.
pub(super) fn put_header(out: &mut BytesMut, kind: Kind, stream: u32, len: usize) {
    debug_assert!(len <= MUX_FRAME_BYTES_MAX);
    out.put_u32((kind as u32) << 24 | len as u32);
    out.put_u32(stream);
}

/// Reads a header, and refuses a length that its kind cannot have, so that nothing is allocated for
/// it.
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
        other => return Err(format!("a frame of the unknown kind {other}")),
    };
    if !allowed.contains(&len) {
        return Err(format!("a {kind:?} frame of {len} bytes"));
    }
    Ok(Header {
        kind,
        len,
        stream: u32::from_be_bytes(stream),
    })
}
