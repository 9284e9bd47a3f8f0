//! Images and registries for the tests of this crate and of crates that use it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "tests only"
)]

pub mod answers;
pub mod fixture;
pub mod standin;
