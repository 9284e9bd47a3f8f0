//! Metrics in Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::api::types::Transfer;

/// Transfers by state and reason, and their bytes: counted one by one, since there may be many.
#[derive(Default)]
pub struct Transfers {
    states: BTreeMap<(&'static str, &'static str), u64>,
    bytes: BTreeMap<&'static str, u64>,
}

impl Transfers {
    /// Counts one more.
    pub fn add(&mut self, transfer: &Transfer) {
        *self.states.entry((transfer.state.as_str(), transfer.reason.map_or("", |r| r.as_str()))).or_default() += 1;
        let b = transfer.bytes;
        for (name, value) in
            [("reused", b.reused), ("resumed", b.resumed), ("received", b.received), ("committed", b.committed), ("wire", b.wire)]
        {
            let sum = self.bytes.entry(name).or_default();
            *sum = sum.saturating_add(value);
        }
    }

    /// The metrics.
    pub fn to_text(&self) -> String {
        let mut out = String::from("# HELP packhorse_transfers Transfers known, by state and reason.\n# TYPE packhorse_transfers gauge\n");
        for ((state, reason), count) in &self.states {
            let _ = writeln!(out, "packhorse_transfers{{state=\"{state}\",reason=\"{reason}\"}} {count}");
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
