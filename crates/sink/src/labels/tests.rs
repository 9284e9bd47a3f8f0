//! One contract for both engines, and what only Postgres can do wrong.

mod contract;
mod postgres_only;
