//! Packhorse carries artifacts between a hub and many sites. ARCHITECTURE.md is the map.

pub mod api;
pub mod cli;
pub mod config;
pub mod delivery;
pub mod hub;
pub mod jobs;
pub mod label_export;
pub mod log_filter;
pub mod metrics;
#[cfg(test)]
mod mutations;
pub mod open_source;
pub mod publisher;
pub mod quickstart;
pub mod reach;
pub mod sample;
pub mod serve;
pub mod site;
pub mod trainer;
