//! Frames: chunks as they are stored and sent.

use bytes::Bytes;
use content::chunk::Hash;
use content::frame::{Frame, HEADER_BYTES, Header, Verified};
use xxhash_rust::xxh3::Xxh3;

use super::Parts;
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const FRAME: Target = Target {
    name: "frame",
    about: "a chunk frame: as it is, or (first byte 1) behind a header whose lengths and sum are right",
    run: frame,
    seeds: || {
        let numbers: Vec<u8> = (0..6000_u32)
            .flat_map(|n| (n as f32 * 0.001).to_le_bytes())
            .collect();
        let raws: [Vec<u8>; 4] = [
            Vec::new(),
            b"some bytes".to_vec(),
            b"repeated, ".repeat(300),
            numbers,
        ];
        let frames: Vec<Frame> = raws
            .iter()
            .map(|raw| Frame::encode(&Verified::new(raw.clone().into())))
            .collect();
        let plain = frames
            .iter()
            .map(|frame| [&[0][..], &frame.to_bytes()[..]].concat());
        let fault = Frame::fault(&base::fault::Fault::not_found("no such chunk"));
        let fault = fault.map(|frame| [&[0][..], &frame.to_bytes()[..]].concat());
        let sealed = raws.iter().zip(&frames).map(|(raw, frame)| {
            let bytes = frame.to_bytes();
            [
                &[1, bytes[40]][..],
                &(raw.len() as u32).to_le_bytes()[..],
                &bytes[HEADER_BYTES..],
            ]
            .concat()
        });
        plain.chain(sealed).chain(fault.ok()).collect()
    },
    words: &[
        "(\u{b5}/\u{fd}",
        "\u{2}",
        "\u{fe}",
        "\u{ff}",
        "code",
        "reason",
        "retry",
        "message",
        "next",
    ],
    short: 1200,
};

fn frame(input: &[u8]) {
    let mut parts = Parts::new(input);
    if parts.byte() == 0 {
        let bytes = Bytes::copy_from_slice(parts.rest);
        if let Some(head) = bytes.first_chunk::<HEADER_BYTES>()
            && let Some(header) = taken(Header::parse(head))
            && let Some(frame) = taken(Frame::from_line(header, bytes.clone()))
        {
            verified(&frame, header.id, header.raw_len);
        }
        let Some(frame) = taken(Frame::parse(bytes.clone())) else {
            return;
        };
        assert_eq!(frame.to_bytes(), bytes, "a frame is its bytes");
        verified(&frame, frame.id(), frame.raw_len());
        return;
    }
    let codec = parts.byte();
    let len = u32::from_le_bytes([parts.byte(), parts.byte(), parts.byte(), parts.byte()]);
    // A name that the content does not have, unless the content is its own.
    for id in [Hash::of(parts.rest), Hash([7; 32])] {
        let bytes = sealed(id, len, codec, parts.rest);
        let Some(frame) = taken(Frame::parse(bytes)) else {
            continue;
        };
        if let Some(chunk) = verified(&frame, id, len) {
            assert_eq!(chunk, parts.rest, "only the content has this name");
        }
        taken(frame.compressed(len as usize));
    }
    unpacked(codec, len, parts.rest);
}

/// Bytes of a frame with this content.
fn sealed(id: Hash, raw_len: u32, codec: u8, stored: &[u8]) -> Bytes {
    let mut out = id.0.to_vec();
    out.extend_from_slice(&raw_len.to_le_bytes());
    out.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    out.extend_from_slice(&[codec, 0, 0, 0]);
    let mut sum = Xxh3::new();
    sum.update(&out);
    sum.update(stored);
    out.extend_from_slice(&sum.digest().to_le_bytes());
    out.extend_from_slice(stored);
    out.into()
}

fn verified(frame: &Frame, id: Hash, len: u32) -> Option<Bytes> {
    let chunk = taken(frame.verify(id, len))?;
    assert_eq!((chunk.id, chunk.bytes.len() as u32), (id, len));
    assert_eq!(Hash::of(&chunk.bytes), id);
    let again = Frame::encode(&chunk);
    let back = Frame::parse(again.to_bytes()).and_then(|frame| frame.verify(id, len));
    assert!(
        back.is_ok_and(|back| back.bytes == chunk.bytes),
        "encoded and decoded, it is the same"
    );
    note("verified");
    Some(chunk.bytes)
}

/// What the stored bytes decode to has to pass the comparison of names: the name of whatever they
/// decode to is tried by guessing that they are zstd, whose decoder is called without this program
/// too.
fn unpacked(codec: u8, len: u32, stored: &[u8]) {
    if codec != 1 || len > 1 << 20 {
        return;
    }
    let Ok(raw) = zstd::bulk::decompress(stored, len as usize) else {
        return;
    };
    if raw.len() != len as usize {
        return;
    }
    let id = Hash::of(&raw);
    let frame = Frame::parse(sealed(id, len, codec, stored));
    assert!(frame.is_ok(), "a frame with the right sum parses");
    if let Ok(frame) = frame {
        assert!(
            verified(&frame, id, len).is_some(),
            "a frame that decodes to its name is accepted"
        );
    }
}
