//! The black-box tests: real `packhorse` processes, real PostgreSQL and real registries, tested
//! from outside.
//!
//! There is one module for each subject. `support` has the servers, fixtures and helpers; `harness`
//! tests `support`. Every test begins with [`support::limit`], its hard time limit, and works in
//! its own [`support::Scratch`] folder. Tests share only the image fixtures, which are created once
//! below the target folder.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking; helpers are not marked as tests"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "fixtures need no durability, and the clock here is only for time limits"
)]

mod again;
mod bad_input;
mod borrow;
mod cancel;
mod control_traffic;
mod damage;
mod docs;
mod end_to_end;
mod fairness;
mod files;
mod harbor;
mod harness;
mod hostile_content;
mod hostile_ids;
mod hostile_messages;
mod hostile_peers;
mod hostile_requests;
mod idle;
mod images;
mod inner_mounts;
mod interruption;
mod largest_messages;
mod logs;
mod many_sites;
mod members;
mod nas;
mod offline;
mod omitted;
mod open_files;
mod operation;
mod program;
mod proxies;
mod quickstart;
mod relay;
mod remote_publish;
mod resume;
mod safe_defaults;
mod scrub;
mod sharing;
mod sinks;
mod site_sources;
mod source_rules;
mod support;
mod training;
mod watch;
mod wire_bytes;
mod workers;
