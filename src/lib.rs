//! Packhorse carries artifacts between a hub and many sites. ARCHITECTURE.md is the map.

pub mod api;
pub mod catalogue;
pub mod chunk;
pub mod clock;
pub mod config;
pub mod durable;
pub mod fault;
pub mod fetch;
pub mod frame;
pub mod identity;
pub mod ingest;
pub mod jobs;
pub mod labels;
pub mod limits;
pub mod line;
pub mod manifest;
pub mod names;
pub mod places;
pub mod registry;
pub mod sample;
pub mod sink;
pub mod source;
pub mod stage;
pub mod store;
pub mod transfer;
pub mod wire;
