//! Packhorse carries artifacts between a hub and many sites. ARCHITECTURE.md is the map.

pub mod api;
pub mod chunk;
pub mod cli;
pub mod clock;
pub mod config;
pub mod durable;
pub mod fault;
pub mod frame;
pub mod labels;
pub mod limits;
pub mod manifest;
pub mod names;
pub mod quickstart;
pub mod serve;
pub mod sink;
pub mod source;
