//! Masks in PNG, row by row: the `png` library decodes, within bounds.
//!
//! Values are given as the file has them: grey values and palette indices unscaled, colours as
//! 0xRRGGBB; alpha is left out. Sizes are bounded before memory is used, and text and colour
//! profiles are passed over.

use std::io::{self, BufRead, Seek};

use png::{ColorType, DecodeOptions, Decoder, Limits, Reader};

use base::limits::{LABEL_MASK_PIXELS_MAX, LABEL_MASK_SIDE_PIXELS_MAX};

/// The memory of the decoder for rows and for chunks beside the picture: the longest row has 512
/// KiB.
const DECODER_BYTES_MAX: usize = 4 << 20;

/// The passes over an image: the first column and row, and the distances of columns and rows.
const WHOLE: [[u32; 4]; 1] = [[0, 0, 1, 1]];
const INTERLACED: [[u32; 4]; 7] = [
    [0, 0, 8, 8],
    [4, 0, 8, 8],
    [0, 4, 4, 8],
    [2, 0, 4, 4],
    [0, 2, 2, 4],
    [1, 0, 2, 2],
    [0, 1, 1, 2],
];

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
pub(super) struct Png<R: BufRead + Seek> {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) colours: Colours,
    reader: Reader<R>,
}

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl<R: BufRead + Seek> Png<R> {
    /// Reads everything before the picture.
    pub(super) fn open(input: R) -> io::Result<Self> {
        let mut options = DecodeOptions::default();
        options.set_ignore_adler32(false);
        options.set_ignore_text_chunk(true);
        options.set_ignore_iccp_chunk(true);
        let mut decoder = Decoder::new_with_options(input, options);
        decoder.set_limits(Limits {
            bytes: DECODER_BYTES_MAX,
        });
        let info = decoder.read_header_info()?;
        let (width, height) = (info.width, info.height);
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
        let reader = decoder.read_info()?;
        let info = reader.info();
        let colours = match (info.color_type, &info.palette) {
            (ColorType::Grayscale | ColorType::GrayscaleAlpha, _) => Colours::Grey,
            (ColorType::Rgb | ColorType::Rgba, _) => Colours::Rgb,
            (ColorType::Indexed, Some(palette)) if palette.len() >= 3 => Colours::Palette(
                palette
                    .chunks_exact(3)
                    .map(|rgb| u32::from_be_bytes([0, rgb[0], rgb[1], rgb[2]]))
                    .collect(),
            ),
            (ColorType::Indexed, _) => return Err(bad("it has no palette")),
        };
        Ok(Self {
            width,
            height,
            colours,
            reader,
        })
    }

    /// Reads all pixels: `row` gets the row, the column of the first value, the distance of the
    /// columns, and the values.
    pub(super) fn rows(
        mut self,
        mut row: impl FnMut(u32, u32, u32, &[u32]) -> io::Result<()>,
    ) -> io::Result<()> {
        let info = self.reader.info();
        let (depth, channels) = (info.bit_depth as u8, info.color_type.samples() as u8);
        let bits = usize::from(depth) * usize::from(channels);
        let passes: &[[u32; 4]] = match info.interlaced {
            false => &WHOLE,
            true => &INTERLACED,
        };
        for [x0, y0, dx, dy] in passes {
            let count = self.width.saturating_sub(*x0).div_ceil(*dx) as usize;
            if count == 0 {
                continue;
            }
            let mut values = vec![0u32; count];
            let mut y = *y0;
            while y < self.height {
                let line = self.reader.next_interlaced_row()?;
                let line = line.ok_or_else(|| bad("it has too few rows"))?;
                if line.data().len() != (count * bits).div_ceil(8) {
                    return Err(bad("a row of it has not the width of the image"));
                }
                for (at, value) in values.iter_mut().enumerate() {
                    *value = pixel(line.data(), at, depth, channels);
                }
                row(y, *x0, *dx, &values)?;
                y += dy;
            }
        }
        // The end of the data has a checksum.
        Ok(self.reader.finish()?)
    }
}

/// The value of a pixel of a row.
fn pixel(line: &[u8], at: usize, depth: u8, channels: u8) -> u32 {
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

#[cfg(test)]
pub(super) mod tests {
    use std::io::{Cursor, Write};

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
        let png = Png::open(Cursor::new(png))?;
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
            Png::open(Cursor::new(&palette[..])).unwrap().colours,
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
