//! An image's width and height from its header: PNG, JPEG and BMP. Nothing is decoded.

use std::io::{BufReader, Read, Seek, SeekFrom};

use crate::inside::Inside;

/// The segments of a JPEG that are stepped over before its frame header is given up on.
const SEGMENTS_MAX: usize = 1000;

/// Width and height; `None` when the file cannot be read as an image.
pub(super) fn of_file(inside: &Inside, path: &str) -> Option<(i64, i64)> {
    // 512 bytes hold the header of most images; a larger buffer would only cost reads over the
    // network.
    of(&mut BufReader::with_capacity(
        512,
        inside.try_file(path).ok()?,
    ))
}

/// Width and height of an image that starts here.
pub(super) fn of<R: Read + Seek>(image: &mut R) -> Option<(i64, i64)> {
    let magic: [u8; 2] = bytes(image)?;
    let (width, height) = match magic {
        [0x89, b'P'] => png(image)?,
        [0xff, 0xd8] => jpeg(image)?,
        [b'B', b'M'] => bmp(image)?,
        _ => return None,
    };
    (width > 0 && height > 0).then_some((width, height))
}

fn bytes<R: Read, const N: usize>(image: &mut R) -> Option<[u8; N]> {
    let mut out = [0; N];
    image.read_exact(&mut out).ok()?;
    Some(out)
}

/// PNG (ISO/IEC 15948): the signature, then IHDR with two big-endian 32-bit numbers.
fn png<R: Read>(image: &mut R) -> Option<(i64, i64)> {
    let rest: [u8; 14] = bytes(image)?;
    if &rest[..6] != b"NG\r\n\x1a\n" || &rest[10..] != b"IHDR" {
        return None;
    }
    Some((
        u32::from_be_bytes(bytes(image)?).into(),
        u32::from_be_bytes(bytes(image)?).into(),
    ))
}

/// JPEG (ITU-T T.81): segments until a frame header SOF0–SOF15, which holds precision, height and
/// width.
fn jpeg<R: Read + Seek>(image: &mut R) -> Option<(i64, i64)> {
    for _ in 0..SEGMENTS_MAX {
        let [mark, mut kind]: [u8; 2] = bytes(image)?;
        if mark != 0xff {
            return None;
        }
        while kind == 0xff {
            // Fill bytes may stand before a marker.
            [kind] = bytes(image)?;
        }
        match kind {
            // Markers without a segment.
            0x01 | 0xd0..=0xd7 => continue,
            // The picture begins or ends before any frame header.
            0xd8..=0xda => return None,
            _ => {}
        }
        let length = u16::from_be_bytes(bytes(image)?);
        // DHT, JPG and DAC lie among the frame headers' numbers.
        if matches!(kind, 0xc0..=0xcf) && !matches!(kind, 0xc4 | 0xc8 | 0xcc) {
            let [_, h1, h2, w1, w2]: [u8; 5] = bytes(image)?;
            return Some((
                u16::from_be_bytes([w1, w2]).into(),
                u16::from_be_bytes([h1, h2]).into(),
            ));
        }
        image
            .seek(SeekFrom::Current(i64::from(length.checked_sub(2)?)))
            .ok()?;
    }
    None
}

/// BMP: a file header of 14 bytes, then BITMAPCOREHEADER (12 bytes, 16-bit sizes) or a later one
/// (32-bit, height negative for rows from top to bottom).
fn bmp<R: Read>(image: &mut R) -> Option<(i64, i64)> {
    let _rest_of_file_header: [u8; 12] = bytes(image)?;
    if u32::from_le_bytes(bytes(image)?) == 12 {
        return Some((
            u16::from_le_bytes(bytes(image)?).into(),
            u16::from_le_bytes(bytes(image)?).into(),
        ));
    }
    let (width, height) = (
        i32::from_le_bytes(bytes(image)?),
        i32::from_le_bytes(bytes(image)?),
    );
    Some((width.into(), i64::from(height).abs()))
}

#[cfg(test)]
mod unit {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn headers() {
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\x02\x80\0\0\x01\xe0\x08\x02";
        let jpeg =
            b"\xff\xd8\xff\xe0\0\x04ab\xff\xff\xc4\0\x02\xff\xc2\0\x11\x08\x01\xe0\x02\x80\x03";
        let bmp = b"BM\0\0\0\0\0\0\0\0\0\0\0\0\x28\0\0\0\x80\x02\0\0\x20\xfe\xff\xff";
        let old_bmp = b"BM\0\0\0\0\0\0\0\0\0\0\0\0\x0c\0\0\0\x80\x02\xe0\x01";
        for image in [&png[..], jpeg, bmp, old_bmp] {
            assert_eq!(of(&mut Cursor::new(image)), Some((640, 480)));
            for cut in 0..20 {
                assert_eq!(
                    of(&mut Cursor::new(&image[..cut.min(image.len() - 6)])),
                    None,
                    "a cut header is no size"
                );
            }
        }
        for bad in [
            &b"GIF89a"[..],
            b"\xff\xd8\xff\xda\0\0",
            b"\xff\xd8\xff\xe0\0\x01",
            b"\xff\xd8ab",
            b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\0\0\0\0\0",
        ] {
            assert_eq!(of(&mut Cursor::new(bad)), None);
        }
    }
}
