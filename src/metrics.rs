//! Metrics in Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::api::types::State;
use base::fault::Reason;
use state::Counted;

/// Transfers by state and reason, and their bytes, as the catalogue counts them.
#[derive(Default)]
pub struct Transfers {
    states: BTreeMap<(&'static str, &'static str), u64>,
    bytes: BTreeMap<&'static str, u64>,
}

impl Transfers {
    /// Adds some; `reason` goes before theirs.
    pub fn add(&mut self, some: &Counted, reason: Option<Reason>) {
        let Some(state) = State::parse(&some.state) else {
            return;
        };
        let own = || serde_json::from_value(serde_json::Value::from(some.reason.clone()?)).ok();
        let reason = reason.or_else(own);
        *self
            .states
            .entry((state.as_str(), reason.map_or("", |r: Reason| r.as_str())))
            .or_default() += some.transfers as u64;
        for (name, value) in [
            ("reused", some.reused),
            ("resumed", some.resumed),
            ("received", some.received),
            ("committed", some.committed),
            ("wire", some.wire),
        ] {
            let sum = self.bytes.entry(name).or_default();
            *sum = sum.saturating_add(value as u64);
        }
    }

    /// The metrics.
    pub fn to_text(&self) -> String {
        let mut out = String::from(
            "# HELP packhorse_transfers Transfers known, by state and reason.\n# TYPE packhorse_transfers gauge\n",
        );
        for ((state, reason), count) in &self.states {
            let _ = writeln!(
                out,
                "packhorse_transfers{{state=\"{state}\",reason=\"{reason}\"}} {count}"
            );
        }
        out.push_str(
            "# HELP packhorse_transfer_bytes Bytes of the transfers known, by how they came.\n# TYPE packhorse_transfer_bytes gauge\n",
        );
        for (how, count) in &self.bytes {
            let _ = writeln!(out, "packhorse_transfer_bytes{{how=\"{how}\"}} {count}");
        }
        out
    }
}
