//! The state of a delivery from the states of its parts. Plain functions, called by the API's
//! backends.

use std::collections::HashSet;

use crate::api::types::{Bytes, Delivery, LeftOut, State, Transfer};
use base::fault::Reason;
use base::limits::{NAMES_LISTED_MAX, OFFENDERS_LISTED_MAX};
use model::paging::{fitting, json_bytes};
use state::DeliveryRow;

/// The state of the whole. While a part is open: the state of the part that has progressed
/// furthest, else the reason of the wait. When all have ended: `failed` if one failed, else
/// `cancelled` if one was cancelled, else `done`.
pub fn state(parts: &[State]) -> State {
    let any = |state: State| parts.contains(&state);
    if parts.iter().all(|state| state.is_final()) {
        return [State::Failed, State::Cancelled]
            .into_iter()
            .find(|state| any(*state))
            .unwrap_or(State::Done);
    }
    let moving = [
        State::Transferring,
        State::Committing,
        State::Planning,
        State::Queued,
    ];
    moving
        .into_iter()
        .find(|state| any(*state))
        .unwrap_or(State::Paused)
}

fn sum(sum: Bytes, part: Bytes) -> Bytes {
    Bytes {
        total: sum.total.saturating_add(part.total),
        reused: sum.reused.saturating_add(part.reused),
        resumed: sum.resumed.saturating_add(part.resumed),
        received: sum.received.saturating_add(part.received),
        committed: sum.committed.saturating_add(part.committed),
        wire: sum.wire.saturating_add(part.wire),
    }
}

/// Why a delivery is stalled.
struct Stuck {
    /// A failed part comes first, then one that waits for something other than another part.
    order: (bool, bool),
    reason: Option<Reason>,
    message: Option<String>,
    next: Option<String>,
}

/// A delivery that is composed from its parts, one after another: a long one is never completely in
/// memory.
pub struct Whole {
    /// The limit of its JSON, bytes.
    max: usize,
    /// The states of its parts.
    states: Vec<State>,
    parts_total: u64,
    done: u64,
    bytes: Bytes,
    stuck: Option<Stuck>,
    artifacts: Vec<String>,
    sites: Vec<String>,
    seen: HashSet<String>,
    finished_at: Option<String>,
    /// The first parts, as many as may fit, and their bytes.
    parts: Vec<Transfer>,
    listed: usize,
}

impl Whole {
    /// A delivery with as many of its parts as fit in `max` bytes of JSON.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            states: Vec::new(),
            parts_total: 0,
            done: 0,
            bytes: Bytes::default(),
            stuck: None,
            artifacts: Vec::new(),
            sites: Vec::new(),
            seen: HashSet::new(),
            finished_at: None,
            parts: Vec::new(),
            listed: 0,
        }
    }

    /// Adds a part in the form that is shown.
    pub fn add(&mut self, part: Transfer) {
        self.parts_total += 1;
        if !self.states.contains(&part.state) {
            self.states.push(part.state);
        }
        self.done += u64::from(part.state == State::Done);
        self.bytes = sum(self.bytes, part.bytes);
        if part.reason.is_some() && part.state != State::Done {
            let order = (
                part.state != State::Failed,
                part.reason == Some(Reason::WaitingForDependency),
            );
            if self.stuck.as_ref().is_none_or(|stuck| order < stuck.order) {
                let (reason, message, next) =
                    (part.reason, part.message.clone(), part.next.clone());
                self.stuck = Some(Stuck {
                    order,
                    reason,
                    message,
                    next,
                });
            }
        }
        // The name of an artifact has a slash, the name of a site has none.
        for (name, list) in [
            (part.artifact.to_string(), &mut self.artifacts),
            (part.site.to_string(), &mut self.sites),
        ] {
            if self.seen.insert(name.clone()) {
                list.push(name);
            }
        }
        if part.finished_at > self.finished_at {
            self.finished_at.clone_from(&part.finished_at);
        }
        if self.listed <= self.max {
            self.listed += json_bytes(&part) + 1;
            self.parts.push(part);
        }
    }

    /// The delivery. Its state is computed from all parts.
    pub fn end(self, row: &DeliveryRow) -> Delivery {
        let state = state(&self.states);
        let (reason, message, next) = self.stuck.map_or((None, None, None), |stuck| {
            (stuck.reason, stuck.message, stuck.next)
        });
        let whole = Delivery {
            id: row.id.to_string(),
            state,
            reason,
            message,
            next,
            bytes: self.bytes,
            done: self.done,
            artifacts: self.artifacts,
            sites: self.sites,
            run: row.run.clone(),
            created_at: jiff::Timestamp::from_millisecond(row.created_ms)
                .map(base::clock::rfc3339)
                .unwrap_or_default(),
            finished_at: self.finished_at.filter(|_| state.is_final()),
            note: None,
            parts_total: None,
            parts: self.parts,
        };
        cut(whole, self.parts_total, self.max)
    }
}

/// The delivery with as many of its listed parts as fit in `max` bytes of JSON. The state of the
/// whole does not change.
fn cut(mut whole: Delivery, parts_total: u64, max: usize) -> Delivery {
    if whole.parts.len() as u64 == parts_total && json_bytes(&whole) <= max {
        return whole;
    }
    let parts = std::mem::take(&mut whole.parts);
    whole.parts_total = Some(parts_total);
    whole.note = Some(format!(
        "it has {parts_total} parts, and not all are listed here: 'packhorse status {}' lists them",
        whole.id
    ));
    let room = max.saturating_sub(json_bytes(&whole));
    let listed = if room < 2 { 0 } else { fitting(&parts, room) };
    whole.parts = parts;
    whole.parts.truncate(listed);
    // The lists of names may already be too long.
    let names =
        |list: &mut Vec<String>| list.truncate(NAMES_LISTED_MAX.min(fitting(list, max / 4)));
    if json_bytes(&whole) > max {
        names(&mut whole.artifacts);
        names(&mut whole.sites);
        whole.parts.clear();
    }
    whole
}

/// The delivery of these parts, all of them listed.
#[cfg(test)]
pub fn view(row: &DeliveryRow, parts: Vec<Transfer>) -> Delivery {
    let mut whole = Whole::new(usize::MAX);
    parts.into_iter().for_each(|part| whole.add(part));
    whole.end(row)
}

/// The excluded sites for users: one text for each artifact and list that excludes sites.
pub fn left_out(all: &[LeftOut]) -> Vec<String> {
    let mut groups: Vec<(&LeftOut, Vec<&str>)> = Vec::new();
    for one in all {
        match groups
            .iter_mut()
            .find(|(first, _)| first.artifact == one.artifact && first.why == one.why)
        {
            Some((_, sites)) => sites.push(one.site.as_str()),
            None => groups.push((one, vec![one.site.as_str()])),
        }
    }
    let text = |(first, sites): (&LeftOut, Vec<&str>)| {
        let listed = sites.len().min(OFFENDERS_LISTED_MAX);
        let more = if listed < sites.len() {
            format!(" and {} more", sites.len() - listed)
        } else {
            String::new()
        };
        format!(
            "{} is not shared with {}{more}: {}",
            first.artifact,
            sites[..listed].join(", "),
            first.why
        )
    };
    groups.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_left_out_is_one_text_for_each_artifact_and_list() {
        let one = |artifact: &str, site: &str, why: &str| LeftOut {
            artifact: artifact.into(),
            site: site.into(),
            by: "hub".into(),
            why: why.into(),
        };
        assert_eq!(left_out(&[]), Vec::<String>::new());
        let all = [
            one("model/m:1", "c", "here"),
            one("model/m:1", "d", "there"),
            one("model/m:1", "e", "here"),
            one("model/n:1", "c", "here"),
        ];
        let texts = [
            "model/m:1 is not shared with c, e: here",
            "model/m:1 is not shared with d: there",
            "model/n:1 is not shared with c: here",
        ];
        assert_eq!(left_out(&all), texts);
        let many: Vec<LeftOut> = (0..OFFENDERS_LISTED_MAX + 2)
            .map(|i| one("model/m:1", &format!("s{i}"), "here"))
            .collect();
        let texts = left_out(&many);
        assert!(
            texts.len() == 1 && texts[0].ends_with("s19 and 2 more: here"),
            "{texts:?}"
        );
    }

    #[test]
    fn a_delivery_of_many_parts_is_cut_and_says_so() {
        use crate::api::fake::offline;
        let parts: Vec<Transfer> = (0..200)
            .map(|n| offline(&format!("t-{n}"), &format!("s{n}")))
            .collect();
        let row = DeliveryRow {
            id: "d-1".parse().unwrap(),
            run: None,
            created_ms: 0,
        };
        let whole = view(&row, parts.clone());
        let within = |max| {
            let mut whole = Whole::new(max);
            parts.iter().for_each(|part| whole.add(part.clone()));
            whole.end(&row)
        };
        assert_eq!(
            (within(1 << 20), whole.parts.len(), whole.parts_total),
            (whole.clone(), 200, None),
            "what fits stays as it is"
        );
        for max in [50_000, 20_000, 8_000] {
            let cut = within(max);
            assert!(json_bytes(&cut) <= max, "{}", json_bytes(&cut));
            assert_eq!(
                (cut.parts_total, cut.bytes, cut.done, cut.state),
                (Some(200), whole.bytes, whole.done, whole.state)
            );
            assert!(cut.note.is_some_and(|note| note.contains("200 parts")));
            assert_eq!(cut.parts[..], whole.parts[..cut.parts.len()]);
        }
    }

    #[test]
    fn the_state_of_a_delivery_follows_from_its_parts() {
        use State as S;
        let cases: [(&[State], State); 9] = [
            (&[S::Done, S::Done], S::Done),
            (&[S::Done, S::Failed, S::Cancelled], S::Failed),
            (&[S::Done, S::Cancelled], S::Cancelled),
            (&[S::Failed, S::Transferring], S::Transferring),
            (&[S::Queued, S::Done], S::Queued),
            (&[S::Queued, S::Planning], S::Planning),
            (&[S::Paused, S::Done], S::Paused),
            (&[S::Paused, S::Queued], S::Queued),
            (&[S::Queued, S::Committing], S::Committing),
        ];
        for (parts, whole) in cases {
            assert_eq!(state(parts), whole, "{parts:?}");
        }
    }

    #[test]
    fn bytes_add_up_and_a_failed_part_is_reported_first() {
        use crate::api::fake::{offline, transfer};
        let failed = Transfer {
            reason: Some(Reason::NoSpace),
            message: Some("the disk is full".into()),
            bytes: Bytes {
                total: 7,
                committed: 3,
                ..Bytes::default()
            },
            ..transfer("t2", "b", State::Failed)
        };
        let parts = vec![offline("t1", "a"), failed];
        let row = DeliveryRow {
            id: "d".parse().unwrap(),
            run: None,
            created_ms: 0,
        };
        let whole = view(&row, parts);
        assert_eq!(
            (whole.bytes.total, whole.bytes.committed, whole.done),
            (1007, 3, 0)
        );
        assert_eq!(whole.message.as_deref(), Some("the disk is full"));
        assert_eq!(
            (whole.artifacts.len(), whole.sites.len(), whole.state),
            (1, 2, State::Queued)
        );
    }
}
