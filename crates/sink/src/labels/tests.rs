//! One contract for both engines, tests of PostgreSQL only, its layout with many versions, and what
//! real installations have.

mod contract;
mod installations;
mod layout;
mod postgres_only;
