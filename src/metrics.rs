//! Metrics in Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::api::types::Transfer;

/// Transfers by state and reason, and their bytes.
pub fn transfers(all: &[Transfer]) -> String {
    let mut states: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut bytes: BTreeMap<&str, u64> = BTreeMap::new();
    for transfer in all {
        *states.entry((transfer.state.as_str(), transfer.reason.map_or("", |r| r.as_str()))).or_default() += 1;
        let b = transfer.bytes;
        for (name, value) in
            [("reused", b.reused), ("resumed", b.resumed), ("received", b.received), ("committed", b.committed), ("wire", b.wire)]
        {
            let sum = bytes.entry(name).or_default();
            *sum = sum.saturating_add(value);
        }
    }
    let mut out = String::from("# HELP packhorse_transfers Transfers known, by state and reason.\n# TYPE packhorse_transfers gauge\n");
    for ((state, reason), count) in states {
        let _ = writeln!(out, "packhorse_transfers{{state=\"{state}\",reason=\"{reason}\"}} {count}");
    }
    out.push_str(
        "# HELP packhorse_transfer_bytes Bytes of the transfers known, by how they came.\n# TYPE packhorse_transfer_bytes gauge\n",
    );
    for (how, count) in bytes {
        let _ = writeln!(out, "packhorse_transfer_bytes{{how=\"{how}\"}} {count}");
    }
    out
}
