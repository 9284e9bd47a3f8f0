//! One contract for both engines, and tests of PostgreSQL only.

mod contract;
mod postgres_only;
