//! Pictures like those of an inspection camera: a panel's grid under uneven light, with defects, as
//! greyscale PNG.

use std::io::Write;

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};

use super::Random;

/// Pixels of every picture.
pub(super) const WIDTH: i32 = 320;
/// Pixels of every picture.
pub(super) const HEIGHT: i32 = 256;
/// The kinds of defects, by [`Defect::category`].
pub(super) const CATEGORIES: [&str; 4] = ["scratch", "stain", "dent", "bubble"];
/// Pixels between two lines of the panel's grid.
const GRID: i32 = 32;
/// A defect shows from this many grey levels on; its box goes around the pixels that do.
const VISIBLE: i32 = 8;

/// A defect that was drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Defect {
    pub(super) category: usize,
    /// Left, top, width and height in pixels.
    pub(super) bbox: [i32; 4],
}

/// A panel with up to two defects: the PNG file's bytes and what is on it.
pub(super) fn panel(random: &mut Random) -> (Vec<u8>, Vec<Defect>) {
    let (light, slope_x, slope_y) = (
        random.between(96, 128),
        random.between(-24, 24),
        random.between(-24, 24),
    );
    let phase = random.between(0, GRID);
    let mut levels: Vec<i32> = Vec::with_capacity((WIDTH * HEIGHT) as usize);
    for y in 0..HEIGHT {
        let mut noise = 0;
        for x in 0..WIDTH {
            if x % 16 == 0 {
                noise = random.next();
            }
            let line = if (x + phase) % GRID == 0 || (y + phase) % GRID == 0 {
                -14
            } else {
                0
            };
            let grain = (noise >> (x % 16 * 4) & 7) as i32 - 3;
            levels.push(light + slope_x * x / WIDTH + slope_y * y / HEIGHT + line + grain);
        }
    }
    let count = [0, 1, 1, 1, 1, 1, 1, 2, 2, 2][random.between(0, 10) as usize];
    let defects = (0..count)
        .map(|side| {
            let category = random.between(0, CATEGORIES.len() as i32) as usize;
            // Each in its own half, so that two never overlap.
            let at = (
                random.between(60, 100) + side * 150,
                random.between(60, HEIGHT - 60),
            );
            Defect {
                category,
                bbox: draw(&mut levels, category, at, random),
            }
        })
        .collect();
    let pixels: Vec<u8> = levels.into_iter().map(|v| v.clamp(0, 255) as u8).collect();
    (png(&pixels), defects)
}

/// Adds a defect to the picture and gives its box.
fn draw(
    levels: &mut [i32],
    category: usize,
    (cx, cy): (i32, i32),
    random: &mut Random,
) -> [i32; 4] {
    let size = f64::from(match category {
        0 => random.between(20, 45),
        1 => random.between(14, 28),
        2 => random.between(9, 16),
        _ => random.between(4, 8),
    });
    let angle = f64::from(random.between(0, 314)) / 100.0;
    let (sin, cos) = angle.sin_cos();
    let (mut left, mut top, mut right, mut bottom) = (cx, cy, cx, cy);
    for y in (cy - 50).max(0)..(cy + 50).min(HEIGHT) {
        for x in (cx - 50).max(0)..(cx + 50).min(WIDTH) {
            let (dx, dy) = (f64::from(x - cx), f64::from(y - cy));
            let (along, across) = (dx * cos + dy * sin, dy * cos - dx * sin);
            let far = dx.hypot(dy);
            let change = match category {
                // a thin bright line
                0 if along.abs() < size && across.abs() < 1.4 => 60.0,
                // soft and dark, longer than wide
                1 => -55.0 * (-(along / size).powi(2) * 3.0 - (across / size).powi(2) * 6.0).exp(),
                // lit from one side
                2 if far < size => 48.0 * across / size,
                // a bright rim
                3 if (far - size).abs() < 1.5 => 55.0,
                _ => 0.0,
            } as i32;
            if change.abs() >= VISIBLE {
                levels[(y * WIDTH + x) as usize] += change;
                (left, top, right, bottom) = (left.min(x), top.min(y), right.max(x), bottom.max(y));
            }
        }
    }
    [left, top, right - left + 1, bottom - top + 1]
}

/// A PNG file (W3C PNG, third edition): signature, IHDR, one IDAT, IEND; 8-bit greyscale, no
/// filter.
fn png(pixels: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(13);
    header.extend_from_slice(&WIDTH.to_be_bytes());
    header.extend_from_slice(&HEIGHT.to_be_bytes());
    header.extend_from_slice(&[8, 0, 0, 0, 0]);
    let mut rows = Vec::with_capacity(pixels.len() + HEIGHT as usize);
    for row in pixels.chunks_exact(WIDTH as usize) {
        rows.push(0);
        rows.extend_from_slice(row);
    }
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, body) in [
        (b"IHDR", header),
        (b"IDAT", deflated(&rows)),
        (b"IEND", Vec::new()),
    ] {
        let mut crc = Crc::new();
        crc.update(kind);
        crc.update(&body);
        out.extend_from_slice(&(body.len() as u32).to_be_bytes());
        out.extend_from_slice(kind);
        out.extend_from_slice(&body);
        out.extend_from_slice(&crc.sum().to_be_bytes());
    }
    out
}

#[expect(clippy::expect_used, reason = "writing into memory does not fail")]
fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
    zlib.write_all(bytes)
        .and_then(|()| zlib.finish())
        .expect("in memory")
}
