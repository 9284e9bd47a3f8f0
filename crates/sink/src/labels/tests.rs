//! One contract for both engines, tests of PostgreSQL only, and what real installations have.

mod contract;
mod installations;
mod postgres_only;
