//! What a delivery as a whole is, from what its parts are. Plain functions, called by the API's backends.

use crate::api::types::{Bytes, Delivery, LeftOut, State, Transfer};
use base::limits::{NAMES_LISTED_MAX, OFFENDERS_LISTED_MAX};
use model::paging::{fitting, json_bytes};
use state::DeliveryRow;

/// The state of the whole. While a part is open: what moves furthest, else why it stands. Once all have ended: `failed` if
/// one failed, else `cancelled` if one was, else `done`.
pub fn state(parts: &[State]) -> State {
    let any = |state: State| parts.contains(&state);
    if parts.iter().all(|state| state.is_final()) {
        return [State::Failed, State::Cancelled].into_iter().find(|state| any(*state)).unwrap_or(State::Done);
    }
    let moving = [State::Transferring, State::Committing, State::Planning, State::Queued];
    moving.into_iter().find(|state| any(*state)).unwrap_or(State::Paused)
}

/// The sum of the parts.
pub fn bytes(parts: &[Transfer]) -> Bytes {
    parts.iter().fold(Bytes::default(), |sum, part| Bytes {
        total: sum.total.saturating_add(part.bytes.total),
        reused: sum.reused.saturating_add(part.bytes.reused),
        resumed: sum.resumed.saturating_add(part.bytes.resumed),
        received: sum.received.saturating_add(part.bytes.received),
        committed: sum.committed.saturating_add(part.bytes.committed),
        wire: sum.wire.saturating_add(part.bytes.wire),
    })
}

/// The whole, as the API shows it. `parts` are the row's, as they are shown.
pub fn view(row: &DeliveryRow, parts: Vec<Transfer>) -> Delivery {
    let states: Vec<State> = parts.iter().map(|part| part.state).collect();
    let state = state(&states);
    // A failed part first, then one that waits for what is not just another part.
    let stuck = parts
        .iter()
        .filter(|part| part.reason.is_some() && part.state != State::Done)
        .min_by_key(|part| (part.state != State::Failed, part.reason == Some(base::fault::Reason::WaitingForDependency)));
    let mut artifacts: Vec<String> = Vec::new();
    let mut sites: Vec<String> = Vec::new();
    for part in &parts {
        let (artifact, site) = (part.artifact.to_string(), part.site.to_string());
        if !artifacts.contains(&artifact) {
            artifacts.push(artifact);
        }
        if !sites.contains(&site) {
            sites.push(site);
        }
    }
    Delivery {
        id: row.id.to_string(),
        state,
        reason: stuck.and_then(|part| part.reason),
        message: stuck.and_then(|part| part.message.clone()),
        next: stuck.and_then(|part| part.next.clone()),
        bytes: bytes(&parts),
        done: states.iter().filter(|state| **state == State::Done).count() as u64,
        artifacts,
        sites,
        run: row.run.clone(),
        created_at: jiff::Timestamp::from_millisecond(row.created_ms).map(base::clock::rfc3339).unwrap_or_default(),
        finished_at: state.is_final().then(|| parts.iter().filter_map(|part| part.finished_at.clone()).max()).flatten(),
        note: None,
        parts_total: None,
        parts,
    }
}

/// The delivery with as many of its parts as `max` bytes of JSON hold. What the parts are together stays.
pub fn within(mut whole: Delivery, max: usize) -> Delivery {
    if json_bytes(&whole) <= max {
        return whole;
    }
    let parts = std::mem::take(&mut whole.parts);
    whole.parts_total = Some(parts.len() as u64);
    whole.note.get_or_insert_with(|| {
        format!("it has {} parts, and not all are listed here: 'packhorse status {}' lists them", parts.len(), whole.id)
    });
    let room = max.saturating_sub(json_bytes(&whole));
    let listed = if room < 2 { 0 } else { fitting(&parts, room) };
    whole.parts = parts;
    whole.parts.truncate(listed);
    // The lists of names alone may be too long.
    let names = |list: &mut Vec<String>| list.truncate(NAMES_LISTED_MAX);
    if json_bytes(&whole) > max {
        names(&mut whole.artifacts);
        names(&mut whole.sites);
        whole.parts.clear();
    }
    whole
}

/// Who is left out, as people read it: a text for each artifact and list that leaves sites out.
pub fn left_out(all: &[LeftOut]) -> Vec<String> {
    let mut groups: Vec<(&LeftOut, Vec<&str>)> = Vec::new();
    for one in all {
        match groups.iter_mut().find(|(first, _)| first.artifact == one.artifact && first.why == one.why) {
            Some((_, sites)) => sites.push(one.site.as_str()),
            None => groups.push((one, vec![one.site.as_str()])),
        }
    }
    let text = |(first, sites): (&LeftOut, Vec<&str>)| {
        let listed = sites.len().min(OFFENDERS_LISTED_MAX);
        let more = if listed < sites.len() { format!(" and {} more", sites.len() - listed) } else { String::new() };
        format!("{} is not shared with {}{more}: {}", first.artifact, sites[..listed].join(", "), first.why)
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
        let all =
            [one("model/m:1", "c", "here"), one("model/m:1", "d", "there"), one("model/m:1", "e", "here"), one("model/n:1", "c", "here")];
        let texts =
            ["model/m:1 is not shared with c, e: here", "model/m:1 is not shared with d: there", "model/n:1 is not shared with c: here"];
        assert_eq!(left_out(&all), texts);
        let many: Vec<LeftOut> = (0..OFFENDERS_LISTED_MAX + 2).map(|i| one("model/m:1", &format!("s{i}"), "here")).collect();
        let texts = left_out(&many);
        assert!(texts.len() == 1 && texts[0].ends_with("s19 and 2 more: here"), "{texts:?}");
    }

    #[test]
    fn a_delivery_of_many_parts_is_cut_and_says_so() {
        use crate::api::fake::offline;
        let parts: Vec<Transfer> = (0..200).map(|n| offline(&format!("t-{n}"), &format!("s{n}"))).collect();
        let row = DeliveryRow { id: "d-1".parse().unwrap(), run: None, created_ms: 0, parts: vec![] };
        let whole = view(&row, parts);
        assert_eq!(within(whole.clone(), 1 << 20), whole, "what fits stays as it is");
        for max in [50_000, 20_000, 8_000] {
            let cut = within(whole.clone(), max);
            assert!(json_bytes(&cut) <= max, "{}", json_bytes(&cut));
            assert_eq!((cut.parts_total, cut.bytes, cut.done, cut.state), (Some(200), whole.bytes, whole.done, whole.state));
            assert!(cut.note.is_some_and(|note| note.contains("200 parts")));
            assert_eq!(cut.parts[..], whole.parts[..cut.parts.len()]);
        }
    }

    #[test]
    fn the_whole_follows_from_its_parts() {
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
    fn bytes_add_up_and_a_failed_part_is_told_first() {
        use crate::api::fake::{offline, transfer};
        let failed = Transfer {
            reason: Some(base::fault::Reason::NoSpace),
            message: Some("the disk is full".into()),
            bytes: Bytes { total: 7, committed: 3, ..Bytes::default() },
            ..transfer("t2", "b", State::Failed)
        };
        let parts = vec![offline("t1", "a"), failed];
        let row = DeliveryRow { id: "d".parse().unwrap(), run: None, created_ms: 0, parts: vec![] };
        let whole = view(&row, parts);
        assert_eq!((whole.bytes.total, whole.bytes.committed, whole.done), (1007, 3, 0));
        assert_eq!(whole.message.as_deref(), Some("the disk is full"));
        assert_eq!((whole.artifacts.len(), whole.sites.len(), whole.state), (1, 2, State::Queued));
    }
}
