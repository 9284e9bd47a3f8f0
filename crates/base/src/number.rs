//! Numbers from peers. They are limited when they are parsed, so that no sum of them overflows.

use serde::Deserialize;
use serde::de::Deserializer;

use crate::limits::{COUNTED_BYTES_MAX, GENERATION_MAX};

/// A count of bytes, bytes per second or seconds. A larger value is reduced to
/// [`COUNTED_BYTES_MAX`].
pub fn count<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    Ok(u64::deserialize(d)?.min(COUNTED_BYTES_MAX))
}

/// Like [`count`], for an optional field.
pub fn optional_count<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<u64>::deserialize(d)?.map(|count| count.min(COUNTED_BYTES_MAX)))
}

/// The generation of a transfer, which every retry increments. A value out of range is an error.
pub fn generation<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
    checked(i64::deserialize(d)?)
}

/// Like [`generation`], for an optional field.
pub fn optional_generation<'de, D: Deserializer<'de>>(d: D) -> Result<Option<i64>, D::Error> {
    Option::<i64>::deserialize(d)?.map(checked).transpose()
}

fn checked<E: serde::de::Error>(generation: i64) -> Result<i64, E> {
    match (0..=GENERATION_MAX).contains(&generation) {
        true => Ok(generation),
        false => Err(E::custom(format_args!(
            "generation {generation} is not between 0 and {GENERATION_MAX}"
        ))),
    }
}
