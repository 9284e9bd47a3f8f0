//! An image's width and height from its header: PNG, JPEG, TIFF, WebP, GIF and BMP. Nothing is
//! decoded.
//!
//! The size is that of the image as it is shown: where its EXIF orientation turns it by a quarter,
//! width and height change places, as they do in annotation tools and trainers.

use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};

use crate::inside::Inside;

/// The segments of a JPEG, or the chunks of a PNG or WebP, that are looked at before the header is
/// given up on.
const SEGMENTS_MAX: usize = 1000;
/// The EXIF orientation, in TIFF and in EXIF data.
const ORIENTATION: u16 = 0x0112;

type Size = (i64, i64);

/// Width and height; `None` when the file cannot be read as an image.
pub(super) fn of_file(inside: &Inside, path: &str) -> Option<Size> {
    // 512 bytes hold the header of most images; a larger buffer would only cost reads over the
    // network.
    of(&mut BufReader::with_capacity(
        512,
        inside.try_file(path).ok()?,
    ))
}

/// Width and height of an image that starts here.
pub(super) fn of<R: Read + Seek>(image: &mut R) -> Option<Size> {
    let magic: [u8; 2] = bytes(image)?;
    let (width, height) = match &magic {
        [0x89, b'P'] => png(image)?,
        [0xff, 0xd8] => jpeg(image)?,
        b"BM" => bmp(image)?,
        b"II" | b"MM" => tiff_size(image, magic)?,
        b"RI" => webp(image)?,
        b"GI" => gif(image)?,
        _ => return None,
    };
    (width > 0 && height > 0).then_some((width, height))
}

fn bytes<R: Read, const N: usize>(image: &mut R) -> Option<[u8; N]> {
    let mut out = [0; N];
    image.read_exact(&mut out).ok()?;
    Some(out)
}

/// The size as shown: a turn by a quarter swaps width and height.
fn oriented((width, height): Size, orientation: Option<u64>) -> Size {
    if matches!(orientation, Some(5..=8)) {
        (height, width)
    } else {
        (width, height)
    }
}

/// PNG (ISO/IEC 15948): the signature, then IHDR with two big-endian 32-bit numbers. EXIF data is
/// in a chunk eXIf.
fn png<R: Read + Seek>(image: &mut R) -> Option<Size> {
    let rest: [u8; 14] = bytes(image)?;
    if &rest[..6] != b"NG\r\n\x1a\n" || &rest[10..] != b"IHDR" {
        return None;
    }
    let size: Size = (
        u32::from_be_bytes(bytes(image)?).into(),
        u32::from_be_bytes(bytes(image)?).into(),
    );
    Some(oriented(size, png_orientation(image)))
}

/// The orientation from the chunks before the picture itself. The rest of IHDR comes next: 5 bytes
/// and a checksum.
fn png_orientation<R: Read + Seek>(image: &mut R) -> Option<u64> {
    image.seek(SeekFrom::Current(9)).ok()?;
    for _ in 0..SEGMENTS_MAX {
        let length = u32::from_be_bytes(bytes(image)?);
        match &bytes::<R, 4>(image)? {
            b"eXIf" => return exif(image, length.into()),
            b"IDAT" | b"IEND" => return None,
            _ => image.seek(SeekFrom::Current(i64::from(length) + 4)).ok()?,
        };
    }
    None
}

/// JPEG (ITU-T T.81): segments until a frame header SOF0–SOF15, which holds precision, height and
/// width. EXIF data is in a segment APP1 before it.
fn jpeg<R: Read + Seek>(image: &mut R) -> Option<Size> {
    let mut orientation = None;
    for _ in 0..SEGMENTS_MAX {
        let [mark, mut kind]: [u8; 2] = bytes(image)?;
        if mark != 0xff {
            return None;
        }
        while kind == 0xff {
            // Fill bytes may come before a marker.
            [kind] = bytes(image)?;
        }
        match kind {
            // Markers without a segment.
            0x01 | 0xd0..=0xd7 => continue,
            // The picture begins or ends before any frame header.
            0xd8..=0xda => return None,
            _ => {}
        }
        let length = u16::from_be_bytes(bytes(image)?).checked_sub(2)?;
        // DHT, JPG and DAC have numbers among those of the frame headers.
        if matches!(kind, 0xc0..=0xcf) && !matches!(kind, 0xc4 | 0xc8 | 0xcc) {
            let [_, h1, h2, w1, w2]: [u8; 5] = bytes(image)?;
            let size = (
                u16::from_be_bytes([w1, w2]).into(),
                u16::from_be_bytes([h1, h2]).into(),
            );
            return Some(oriented(size, orientation));
        }
        if kind == 0xe1 && orientation.is_none() {
            let mut segment = vec![0; length.into()];
            image.read_exact(&mut segment).ok()?;
            orientation = exif(&mut Cursor::new(segment), length.into());
        } else {
            image.seek(SeekFrom::Current(length.into())).ok()?;
        }
    }
    None
}

/// BMP: a file header of 14 bytes, then BITMAPCOREHEADER (12 bytes, 16-bit sizes) or a later one
/// (32-bit, height negative for rows from top to bottom).
fn bmp<R: Read>(image: &mut R) -> Option<Size> {
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

/// GIF: the signature with its version, then two little-endian 16-bit numbers.
fn gif<R: Read>(image: &mut R) -> Option<Size> {
    let version: [u8; 4] = bytes(image)?;
    if !matches!(&version, b"F87a" | b"F89a") {
        return None;
    }
    Some((
        u16::from_le_bytes(bytes(image)?).into(),
        u16::from_le_bytes(bytes(image)?).into(),
    ))
}

/// WebP (developers.google.com/speed/webp/docs/riff_container): RIFF, and a first chunk `VP8 `
/// (lossy), `VP8L` (lossless) or `VP8X` (extended, with EXIF data in a later chunk).
fn webp<R: Read + Seek>(image: &mut R) -> Option<Size> {
    let head: [u8; 14] = bytes(image)?;
    if &head[..2] != b"FF" || &head[6..10] != b"WEBP" {
        return None;
    }
    let length = u32::from_le_bytes(bytes(image)?);
    match &head[10..] {
        b"VP8 " => {
            let frame: [u8; 10] = bytes(image)?;
            if frame[3..6] != [0x9d, 0x01, 0x2a] {
                return None;
            }
            // The upper two bits of each say how the image is to be scaled.
            let side =
                |at: usize| i64::from(u16::from_le_bytes([frame[at], frame[at + 1]]) & 0x3fff);
            Some((side(6), side(8)))
        }
        b"VP8L" => {
            let [signature, a, b, c, d]: [u8; 5] = bytes(image)?;
            let bits = u32::from_le_bytes([a, b, c, d]);
            (signature == 0x2f).then_some((
                i64::from(bits & 0x3fff) + 1,
                i64::from((bits >> 14) & 0x3fff) + 1,
            ))
        }
        b"VP8X" => {
            let [flags, _, _, _, w1, w2, w3, h1, h2, h3]: [u8; 10] = bytes(image)?;
            let side = |a, b, c| i64::from(u32::from_le_bytes([a, b, c, 0])) + 1;
            let size = (side(w1, w2, w3), side(h1, h2, h3));
            let has_exif = flags & 0x08 != 0;
            let rest = i64::from(length) - 10;
            let orientation = if has_exif {
                webp_orientation(image, rest)
            } else {
                None
            };
            Some(oriented(size, orientation))
        }
        _ => None,
    }
}

/// The orientation from a chunk `EXIF`, after so many bytes of the chunk before.
fn webp_orientation<R: Read + Seek>(image: &mut R, mut rest: i64) -> Option<u64> {
    for _ in 0..SEGMENTS_MAX {
        image.seek(SeekFrom::Current(rest)).ok()?;
        let name: [u8; 4] = bytes(image)?;
        let length = u32::from_le_bytes(bytes(image)?);
        if &name == b"EXIF" {
            return exif(image, length.into());
        }
        // Chunks are padded to an even length.
        rest = i64::from(length) + i64::from(length % 2);
    }
    None
}

/// TIFF 6.0 and BigTIFF: width and height from the first directory.
fn tiff_size<R: Read + Seek>(image: &mut R, order: [u8; 2]) -> Option<Size> {
    let [width, height, orientation] = tiff(image, 0, order, [0x0100, 0x0101, ORIENTATION])?;
    let side = |value: Option<u64>| i64::try_from(value?).ok();
    Some(oriented((side(width)?, side(height)?), orientation))
}

/// The orientation in EXIF data of this length: TIFF, after an optional `Exif\0\0`.
fn exif<R: Read + Seek>(data: &mut R, length: u64) -> Option<u64> {
    let mut head = Vec::new();
    data.take(length.min(64 << 10))
        .read_to_end(&mut head)
        .ok()?;
    let tiff_data = head.strip_prefix(b"Exif\0\0").unwrap_or(&head);
    let order = [*tiff_data.first()?, *tiff_data.get(1)?];
    let mut data = Cursor::new(tiff_data);
    data.set_position(2);
    let [orientation] = tiff(&mut data, 0, order, [ORIENTATION])?;
    orientation
}

/// The values of these tags in the first directory of a TIFF that starts at `start`, whose byte
/// order was read.
fn tiff<R: Read + Seek, const N: usize>(
    image: &mut R,
    start: u64,
    order: [u8; 2],
    tags: [u16; N],
) -> Option<[Option<u64>; N]> {
    let little = match &order {
        b"II" => true,
        b"MM" => false,
        _ => return None,
    };
    let number = |bytes: &[u8]| {
        let fold = |value: u64, byte: &u8| (value << 8) | u64::from(*byte);
        if little {
            bytes.iter().rev().fold(0, fold)
        } else {
            bytes.iter().fold(0, fold)
        }
    };
    let is_big = match number(&bytes::<R, 2>(image)?) {
        42 => false,
        43 => true,
        _ => return None,
    };
    let offset = if is_big {
        let _sizes: [u8; 4] = bytes(image)?;
        number(&bytes::<R, 8>(image)?)
    } else {
        number(&bytes::<R, 4>(image)?)
    };
    image
        .seek(SeekFrom::Start(start.checked_add(offset)?))
        .ok()?;
    let entries = if is_big {
        number(&bytes::<R, 8>(image)?)
    } else {
        number(&bytes::<R, 2>(image)?)
    };
    let mut found = [None; N];
    for _ in 0..entries.min(u64::from(u16::MAX)) {
        let (tag, kind) = (
            number(&bytes::<R, 2>(image)?),
            number(&bytes::<R, 2>(image)?),
        );
        let value: Vec<u8> = if is_big {
            bytes::<R, 16>(image)?[8..].to_vec()
        } else {
            bytes::<R, 8>(image)?[4..].to_vec()
        };
        // SHORT, LONG, LONG8: a value of its own size at the beginning of the field.
        let width = match kind {
            3 => 2,
            4 => 4,
            16 => 8,
            _ => continue,
        };
        for (slot, wanted) in found.iter_mut().zip(tags) {
            if tag == u64::from(wanted) {
                *slot = value.get(..width).map(number);
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod unit {
    use super::*;

    fn size(image: &[u8]) -> Option<Size> {
        of(&mut Cursor::new(image))
    }

    /// A TIFF directory of these tags, as SHORT; the file ends behind it.
    fn tiff_of(little: bool, tags: &[(u16, u16)]) -> Vec<u8> {
        let two = |n: u16| {
            if little {
                n.to_le_bytes()
            } else {
                n.to_be_bytes()
            }
        };
        let four = |n: u32| {
            if little {
                n.to_le_bytes()
            } else {
                n.to_be_bytes()
            }
        };
        let mut out = if little {
            b"II".to_vec()
        } else {
            b"MM".to_vec()
        };
        out.extend(two(42));
        out.extend(four(8));
        out.extend(two(tags.len() as u16));
        for (tag, value) in tags {
            out.extend([two(*tag), two(3)].concat());
            out.extend(four(1));
            out.extend([two(*value), two(0)].concat());
        }
        out
    }

    #[test]
    fn headers() {
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\x02\x80\0\0\x01\xe0\x08\x02";
        let jpeg =
            b"\xff\xd8\xff\xe0\0\x04ab\xff\xff\xc4\0\x02\xff\xc2\0\x11\x08\x01\xe0\x02\x80\x03";
        let bmp = b"BM\0\0\0\0\0\0\0\0\0\0\0\0\x28\0\0\0\x80\x02\0\0\x20\xfe\xff\xff";
        let old_bmp = b"BM\0\0\0\0\0\0\0\0\0\0\0\0\x0c\0\0\0\x80\x02\xe0\x01";
        let gif = b"GIF89a\x80\x02\xe0\x01\0\0\0\0\0\0\0\0";
        let lossy = b"RIFF\0\0\0\0WEBPVP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a\x80\x02\xe0\x01";
        // 639 and 479 in 14 bits each.
        let lossless = b"RIFF\0\0\0\0WEBPVP8L\x05\0\0\0\x2f\x7f\xc2\x77\0\0\0";
        let extended = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\x7f\x02\0\xdf\x01\0";
        let tiffs = [true, false].map(|little| tiff_of(little, &[(0x0100, 640), (0x0101, 480)]));
        let big_tiff = [
            &b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"[..],
            b"\0\x01\x04\0\x01\0\0\0\0\0\0\0\x80\x02\0\0\0\0\0\0",
            b"\x01\x01\x10\0\x01\0\0\0\0\0\0\0\xe0\x01\0\0\0\0\0\0",
        ]
        .concat();
        for image in [
            &png[..],
            jpeg,
            bmp,
            old_bmp,
            gif,
            lossy,
            lossless,
            extended,
            &tiffs[0],
            &tiffs[1],
            &big_tiff,
        ] {
            assert_eq!(
                size(image),
                Some((640, 480)),
                "{:?}",
                image.escape_ascii().to_string()
            );
            for cut in 0..20 {
                let cut = cut.min(image.len() - 9);
                if image != &gif[..] || cut < 10 {
                    assert_eq!(size(&image[..cut]), None, "a cut header is no size");
                }
            }
        }
        for bad in [
            &b"GIF80a\x01\0\x01\0"[..],
            b"RIFF\0\0\0\0WAVEfmt ",
            b"II\x2a\0\xff\xff\xff\xff",
            b"\xff\xd8\xff\xda\0\0",
            b"\xff\xd8\xff\xe0\0\x01",
            b"\xff\xd8ab",
            b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\0\0\0\0\0",
        ] {
            assert_eq!(size(bad), None);
        }
    }

    #[test]
    fn a_turned_image_is_measured_as_it_is_shown() {
        for (orientation, expected) in [
            (1, (640, 480)),
            (3, (640, 480)),
            (5, (480, 640)),
            (6, (480, 640)),
            (8, (480, 640)),
        ] {
            for little in [true, false] {
                let tags = tiff_of(little, &[(0x0110, 0), (ORIENTATION, orientation)]);
                let app1 = [&b"Exif\0\0"[..], &tags].concat();
                let jpeg = [
                    &b"\xff\xd8\xff\xe1"[..],
                    &(app1.len() as u16 + 2).to_be_bytes(),
                    &app1,
                    b"\xff\xc0\0\x11\x08\x01\xe0\x02\x80\x03",
                ]
                .concat();
                let png = [
                    &b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\x02\x80\0\0\x01\xe0\x08\x02\0\0\0crc_\0\0\0\x01gAMAxcrc_"[..],
                    &(tags.len() as u32).to_be_bytes(),
                    b"eXIf",
                    &tags,
                ]
                .concat();
                let webp = [
                    &b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x08\0\0\0\x7f\x02\0\xdf\x01\0"[..],
                    b"ICCP\x01\0\0\0xyEXIF",
                    &(tags.len() as u32).to_le_bytes(),
                    &tags,
                ]
                .concat();
                let tiff = tiff_of(
                    little,
                    &[(0x0100, 640), (0x0101, 480), (ORIENTATION, orientation)],
                );
                for image in [jpeg, png, webp, tiff] {
                    assert_eq!(
                        size(&image),
                        Some(expected),
                        "{orientation}: {:?}",
                        image.escape_ascii().to_string()
                    );
                }
            }
        }
    }
}
