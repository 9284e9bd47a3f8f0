//! Decodes PNG (ISO/IEC 15948) row by row, for masks: all colour types, depths and interlacing.
//!
//! Values are given as the file has them: grey values and palette indices unscaled, colours as
//! 0xRRGGBB; alpha is left out. Sizes are bounded before memory is used.

use std::io::{self, BufRead, Read};

use flate2::bufread::ZlibDecoder;

use base::limits::{LABEL_MASK_PIXELS_MAX, LABEL_MASK_SIDE_PIXELS_MAX};

/// The largest chunk that is read as a whole: a palette has 768 bytes.
const CHUNK_BYTES_MAX: u32 = 1 << 10;
/// The chunks before the picture, at most.
const CHUNKS_MAX: usize = 10_000;

/// What the values of an image are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Colours {
    /// Grey values of one to sixteen bits.
    Grey,
    /// Indices into this palette.
    Palette(Vec<u32>),
    /// Colours, 0xRRGGBB.
    Rgb,
}

/// An image whose rows are to be read.
pub(super) struct Png<R> {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) colours: Colours,
    depth: u8,
    channels: u8,
    interlaced: bool,
    input: R,
    /// The bytes of the first IDAT chunk.
    first: u32,
}

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn bytes<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    input.read_exact(&mut out)?;
    Ok(out)
}

impl<R: BufRead> Png<R> {
    /// Reads everything before the picture.
    pub(super) fn open(mut input: R) -> io::Result<Self> {
        if &bytes::<8>(&mut input)? != b"\x89PNG\r\n\x1a\n" {
            return Err(bad("it is not a PNG"));
        }
        let head: [u8; 25] = bytes(&mut input)?;
        if head[..8] != [0, 0, 0, 13, b'I', b'H', b'D', b'R'] {
            return Err(bad("it has no header"));
        }
        let number =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (width, height) = (number(8), number(12));
        let (depth, colour, interlace) = (head[16], head[17], head[20]);
        if width == 0 || height == 0 {
            return Err(bad("it has no pixels"));
        }
        if width.max(height) > LABEL_MASK_SIDE_PIXELS_MAX
            || u64::from(width) * u64::from(height) > LABEL_MASK_PIXELS_MAX
        {
            return Err(bad(format!(
                "it is {width} × {height}, and a mask may have {LABEL_MASK_PIXELS_MAX} pixels"
            )));
        }
        let (channels, depths): (u8, &[u8]) = match colour {
            0 => (1, &[1, 2, 4, 8, 16]),
            2 => (3, &[8, 16]),
            3 => (1, &[1, 2, 4, 8]),
            4 => (2, &[8, 16]),
            6 => (4, &[8, 16]),
            _ => return Err(bad(format!("there is no colour type {colour}"))),
        };
        if !depths.contains(&depth) || interlace > 1 {
            return Err(bad(format!(
                "its depth {depth} or interlacing {interlace} is not of PNG"
            )));
        }
        let mut palette = Vec::new();
        for _ in 0..CHUNKS_MAX {
            let length = u32::from_be_bytes(bytes(&mut input)?);
            let kind: [u8; 4] = bytes(&mut input)?;
            match &kind {
                b"IDAT" => {
                    let colours = match colour {
                        3 if palette.is_empty() => return Err(bad("it has no palette")),
                        3 => Colours::Palette(palette),
                        0 | 4 => Colours::Grey,
                        _ => Colours::Rgb,
                    };
                    return Ok(Self {
                        width,
                        height,
                        colours,
                        depth,
                        channels,
                        interlaced: interlace == 1,
                        input,
                        first: length,
                    });
                }
                b"PLTE" if length <= CHUNK_BYTES_MAX => {
                    let mut entries = vec![0; length as usize];
                    input.read_exact(&mut entries)?;
                    palette = entries
                        .chunks_exact(3)
                        .map(|rgb| u32::from_be_bytes([0, rgb[0], rgb[1], rgb[2]]))
                        .collect();
                    bytes::<4>(&mut input)?;
                }
                b"IEND" => break,
                _ => {
                    let skipped = io::copy(
                        &mut input.by_ref().take(u64::from(length) + 4),
                        &mut io::sink(),
                    )?;
                    if skipped != u64::from(length) + 4 {
                        return Err(bad("it is cut off"));
                    }
                }
            }
        }
        Err(bad("it has no picture"))
    }

    /// Reads all pixels: `row` gets the row, the column of the first value, the distance of the
    /// columns, and the values.
    pub(super) fn rows(
        self,
        mut row: impl FnMut(u32, u32, u32, &[u32]) -> io::Result<()>,
    ) -> io::Result<()> {
        let bits = usize::from(self.depth) * usize::from(self.channels);
        // A filter looks back by whole pixels, at least a byte.
        let back = bits.div_ceil(8);
        let data = io::BufReader::new(Data {
            input: self.input,
            left: self.first,
            is_over: false,
        });
        let mut data = ZlibDecoder::new(data);
        let passes: &[[u32; 4]] = match self.interlaced {
            false => &[[0, 0, 1, 1]],
            true => &[
                [0, 0, 8, 8],
                [4, 0, 8, 8],
                [0, 4, 4, 8],
                [2, 0, 4, 4],
                [0, 2, 2, 4],
                [1, 0, 2, 2],
                [0, 1, 1, 2],
            ],
        };
        for [x0, y0, dx, dy] in passes {
            let count = self.width.saturating_sub(*x0).div_ceil(*dx) as usize;
            if count == 0 {
                continue;
            }
            let length = (count * bits).div_ceil(8);
            let (mut line, mut above) = (vec![0; length], vec![0; length]);
            let mut values = vec![0u32; count];
            let mut y = *y0;
            while y < self.height {
                let [filter] = bytes(&mut data)?;
                data.read_exact(&mut line)?;
                unfilter(filter, &mut line, &above, back)?;
                for (at, value) in values.iter_mut().enumerate() {
                    *value = self_value(&line, at, self.depth, self.channels);
                }
                row(y, *x0, *dx, &values)?;
                std::mem::swap(&mut line, &mut above);
                y += dy;
            }
        }
        // The end of the data has a checksum.
        io::copy(&mut data.take(1), &mut io::sink())?;
        Ok(())
    }
}

/// The value of a pixel of a row.
fn self_value(line: &[u8], at: usize, depth: u8, channels: u8) -> u32 {
    let byte = |at: usize| u32::from(line.get(at).copied().unwrap_or(0));
    let depth = usize::from(depth);
    match (channels, depth) {
        (1, 1..8) => {
            let bit = at * depth;
            (byte(bit / 8) >> (8 - depth - bit % 8)) & ((1 << depth) - 1)
        }
        (1 | 2, 16) => {
            byte(at * 2 * usize::from(channels)) << 8 | byte(at * 2 * usize::from(channels) + 1)
        }
        (1 | 2, _) => byte(at * usize::from(channels)),
        (_, wide) => {
            let step = wide / 8;
            let start = at * usize::from(channels) * step;
            byte(start) << 16 | byte(start + step) << 8 | byte(start + 2 * step)
        }
    }
}

fn unfilter(filter: u8, line: &mut [u8], above: &[u8], back: usize) -> io::Result<()> {
    for at in 0..line.len() {
        let left = if at >= back { line[at - back] } else { 0 };
        let corner = if at >= back { above[at - back] } else { 0 };
        let up = above[at];
        let add = match filter {
            0 => return Ok(()),
            1 => left,
            2 => up,
            3 => ((u16::from(left) + u16::from(up)) / 2) as u8,
            4 => {
                let (a, b, c) = (i16::from(left), i16::from(up), i16::from(corner));
                let guess = a + b - c;
                let (da, db, dc) = ((guess - a).abs(), (guess - b).abs(), (guess - c).abs());
                if da <= db && da <= dc {
                    left
                } else if db <= dc {
                    up
                } else {
                    corner
                }
            }
            other => return Err(bad(format!("there is no filter {other}"))),
        };
        line[at] = line[at].wrapping_add(add);
    }
    Ok(())
}

/// The data of all IDAT chunks.
struct Data<R> {
    input: R,
    left: u32,
    is_over: bool,
}

impl<R: BufRead> Read for Data<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 && !self.is_over {
            bytes::<4>(&mut self.input)?;
            self.left = u32::from_be_bytes(bytes(&mut self.input)?);
            self.is_over = &bytes::<4>(&mut self.input)? != b"IDAT";
        }
        if self.is_over {
            return Ok(0);
        }
        let most = out.len().min(self.left as usize);
        let count = self.input.read(&mut out[..most])?;
        self.left -= count as u32;
        Ok(count)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
        let mut crc = flate2::Crc::new();
        crc.update(kind);
        crc.update(data);
        [
            &(data.len() as u32).to_be_bytes()[..],
            kind,
            data,
            &crc.sum().to_be_bytes(),
        ]
        .concat()
    }

    /// A PNG of these rows, each with its filter byte.
    pub(in crate::labels) fn png(
        (width, height): (u32, u32),
        depth: u8,
        colour: u8,
        palette: &[u8],
        rows: &[u8],
    ) -> Vec<u8> {
        let mut data = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        data.write_all(rows).unwrap();
        let data = data.finish().unwrap();
        let head = [
            &width.to_be_bytes()[..],
            &height.to_be_bytes(),
            &[depth, colour, 0, 0, 0],
        ]
        .concat();
        let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
        out.extend(chunk(b"IHDR", &head));
        if !palette.is_empty() {
            out.extend(chunk(b"PLTE", palette));
        }
        // The data may be cut into chunks anywhere.
        let half = data.len() / 2;
        out.extend(chunk(b"IDAT", &data[..half]));
        out.extend(chunk(b"IDAT", &data[half..]));
        out.extend(chunk(b"IEND", b""));
        out
    }

    fn pixels(png: &[u8]) -> io::Result<Vec<Vec<u32>>> {
        let png = Png::open(png)?;
        let mut out = vec![vec![0; png.width as usize]; png.height as usize];
        png.rows(|y, x0, dx, values| {
            for (at, value) in values.iter().enumerate() {
                out[y as usize][(x0 + dx * at as u32) as usize] = *value;
            }
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn depths_filters_and_colours() {
        // One bit a pixel: 10 pixels in two bytes.
        let bits = png(
            (10, 2),
            1,
            0,
            &[],
            &[0, 0b1010_0000, 0b0100_0000, 0, 0xff, 0xff],
        );
        assert_eq!(
            pixels(&bits).unwrap(),
            [vec![1, 0, 1, 0, 0, 0, 0, 0, 0, 1], vec![1; 10]]
        );
        // Each filter over the row 1 2 3, above it 1 1 1.
        for (filter, line) in [
            (0, [1, 2, 3]),
            (1, [1, 1, 1]),
            (2, [0, 1, 2]),
            (3, [1, 1, 2]),
            (4, [0, 1, 1]),
        ] {
            let rows = [&[0, 1, 1, 1, filter][..], &line].concat();
            let grey = png((3, 2), 8, 0, &[], &rows);
            assert_eq!(pixels(&grey).unwrap()[1], [1, 2, 3], "filter {filter}");
        }
        let palette = png((2, 1), 4, 3, &[0, 0, 0, 255, 0, 1], &[0, 0x01]);
        assert_eq!(pixels(&palette).unwrap(), [[0, 1]]);
        assert_eq!(
            Png::open(&palette[..]).unwrap().colours,
            Colours::Palette(vec![0, 0x00ff_0001])
        );
        let rgba = png((1, 1), 8, 6, &[], &[0, 1, 2, 3, 200]);
        assert_eq!(pixels(&rgba).unwrap(), [[0x0001_0203]]);
        let grey16 = png((1, 1), 16, 0, &[], &[0, 1, 4]);
        assert_eq!(pixels(&grey16).unwrap(), [[260]]);
    }

    #[test]
    fn what_is_no_png_or_cut_off_is_an_error() {
        let good = png((3, 1), 8, 0, &[], &[0, 1, 2, 3]);
        for end in 0..good.len() - 16 {
            assert!(pixels(&good[..end]).is_err(), "{end}");
        }
        assert!(pixels(&png((0, 1), 8, 0, &[], &[0])).is_err());
        assert!(pixels(&png((1 << 20, 1 << 20), 8, 0, &[], &[0])).is_err());
        assert!(pixels(&png((1, 1), 8, 3, &[], &[0, 0])).is_err());
        assert!(pixels(&png((1, 1), 8, 0, &[], &[9, 0])).is_err());
    }
}
