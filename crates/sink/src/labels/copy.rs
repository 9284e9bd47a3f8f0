//! The part of PostgreSQL's binary COPY format that labels need.
//!
//! Layout (PostgreSQL documentation, "COPY", binary format): the signature `PGCOPY\n\xff\r\n\0`,
//! flags `i32`, length of the header extension `i32`; then per row the number of fields `i16` and
//! per field its length `i32` (−1: null) and its bytes; at the end −1 as `i16`. All big-endian.
//! `text` and `json` fields are their UTF-8 text.

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// Encoded rows.
pub(super) struct CopyRows {
    bytes: Vec<u8>,
    batch_bytes: usize,
}

impl CopyRows {
    /// Starts with the signature.
    pub(super) fn new(batch_bytes: usize) -> Self {
        let mut rows = Self {
            bytes: Vec::new(),
            batch_bytes,
        };
        rows.bytes = rows.buffer();
        rows.bytes.extend_from_slice(SIGNATURE);
        rows
    }

    fn buffer(&self) -> Vec<u8> {
        Vec::with_capacity(self.batch_bytes + (64 << 10))
    }

    /// The encoded bytes when they fill a batch.
    pub(super) fn full(&mut self) -> Option<Vec<u8>> {
        if self.bytes.len() < self.batch_bytes {
            return None;
        }
        let next = self.buffer();
        Some(std::mem::replace(&mut self.bytes, next))
    }

    /// The remaining bytes with the end mark.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&(-1i16).to_be_bytes());
        self.bytes
    }

    /// Starts a row.
    pub(super) fn row(&mut self, fields: i16) -> &mut Self {
        self.bytes.extend_from_slice(&fields.to_be_bytes());
        self
    }

    pub(super) fn int(&mut self, value: i64) -> &mut Self {
        self.bytes.extend_from_slice(&8i32.to_be_bytes());
        self.bytes.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn opt_int(&mut self, value: Option<i64>) -> &mut Self {
        match value {
            Some(value) => self.int(value),
            None => self.null(),
        }
    }

    pub(super) fn opt_float(&mut self, value: Option<f64>) -> &mut Self {
        let Some(value) = value else {
            return self.null();
        };
        self.bytes.extend_from_slice(&8i32.to_be_bytes());
        self.bytes.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// A `text` or `json`. A line has at most 12 MiB, so the length always fits.
    pub(super) fn text(&mut self, value: &str) -> &mut Self {
        self.bytes
            .extend_from_slice(&(value.len() as i32).to_be_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self
    }

    pub(super) fn opt_text(&mut self, value: Option<&str>) -> &mut Self {
        match value {
            Some(value) => self.text(value),
            None => self.null(),
        }
    }

    fn null(&mut self) -> &mut Self {
        self.bytes.extend_from_slice(&(-1i32).to_be_bytes());
        self
    }
}
