//! The text form of transfers, artifacts, sites and plans.

use super::human;
use super::output::{Cell, Table, fields};
use crate::api::types::{
    Artifact, ArtifactDetail, Delivery, LeftOut, PlanRow, Site, State, Transfer,
};
use base::fault::Reason;
use base::limits::OFFENDERS_LISTED_MAX;

/// The table of `status`; below it the message and the next step of each transfer with a problem.
pub(super) fn table(transfers: &[Transfer], colour: bool) -> String {
    if transfers.is_empty() {
        return "no transfers\n".into();
    }
    rows(transfers, colour) + &troubles(transfers)
}

/// The table alone.
pub(super) fn rows(transfers: &[Transfer], colour: bool) -> String {
    let mut table = Table::new(&[
        "ID", "ARTIFACT", "SITE", "STATE", "REASON", ">DONE", ">SIZE", ">RATE", ">ETA",
    ]);
    for t in transfers {
        table.row(vec![
            t.id.as_str().into(),
            t.artifact.to_string().into(),
            t.site.as_str().into(),
            Cell::state(t.state, stuck(t)),
            t.reason.map_or("-", Reason::as_str).into(),
            human::percent(t)
                .map_or_else(|| "-".into(), |p| format!("{p} %"))
                .into(),
            human::bytes(t.bytes.total).into(),
            // A transfer that has ended has no rate, even if one was measured before.
            human::rate(if t.state.is_final() { 0 } else { t.rate }).into(),
            t.eta_seconds
                .filter(|_| !t.state.is_final())
                .map_or_else(|| "-".into(), human::seconds)
                .into(),
        ]);
    }
    table.render(colour)
}

/// Whether the transfer may need action by a person.
fn stuck(t: &Transfer) -> bool {
    match t.state {
        State::Done | State::Cancelled => false,
        State::Failed => true,
        _ => t.reason.is_some_and(|r| r != Reason::WaitingForTurn),
    }
}

fn troubles(transfers: &[Transfer]) -> String {
    let stuck: Vec<&Transfer> = transfers
        .iter()
        .filter(|t| stuck(t) && t.message.is_some())
        .collect();
    let mut out = String::new();
    for t in stuck.iter().take(OFFENDERS_LISTED_MAX) {
        let message = t.message.as_deref().unwrap_or_default();
        out.push_str(&format!("\n{}: {}\n", t.id, human::clean_lines(message)));
        if let Some(next) = &t.next {
            out.push_str(&format!("  next: {}\n", human::clean_lines(next)));
        }
    }
    if stuck.len() > OFFENDERS_LISTED_MAX {
        out.push_str(&format!(
            "\nand {} more: see 'packhorse status TRANSFER'\n",
            stuck.len() - OFFENDERS_LISTED_MAX
        ));
    }
    out
}

/// A delivery: its fields, then the table of its parts.
pub(super) fn delivery(whole: &Delivery, colour: bool) -> String {
    let b = &whole.bytes;
    let mut pairs = vec![
        ("delivery", whole.id.clone()),
        ("state", whole.state.as_str().into()),
        (
            "done",
            format!(
                "{} of {} parts, {} of {}",
                whole.done,
                whole.parts.len(),
                human::bytes(b.committed),
                human::bytes(b.total)
            ),
        ),
        ("artifacts", whole.artifacts.join(", ")),
        ("sites", whole.sites.join(", ")),
    ];
    let mut add = |name, value: Option<String>| pairs.extend(value.map(|v| (name, v)));
    add("reason", whole.reason.map(|r| r.as_str().into()));
    add("run", whole.run.clone());
    add("created", Some(human::local(&whole.created_at)));
    add("finished", whole.finished_at.as_deref().map(human::local));
    add("note", whole.note.clone());
    format!("{}\n{}", fields(&pairs), table(&whole.parts, colour))
}

/// All fields of one transfer.
pub(super) fn detail(t: &Transfer) -> String {
    let b = &t.bytes;
    let mut pairs = vec![
        ("transfer", t.id.clone()),
        ("delivery", t.delivery.clone()),
        ("artifact", t.artifact.to_string()),
        ("digest", t.digest.clone()),
        ("site", t.site.to_string()),
        ("state", t.state.as_str().into()),
    ];
    let mut add = |name, value: Option<String>| pairs.extend(value.map(|v| (name, v)));
    add("reason", t.reason.map(|r| r.as_str().into()));
    add("message", t.message.clone());
    add("next", t.next.clone());
    add(
        "done",
        human::percent(t).map(|p| format!("{p} % of {}", human::bytes(b.total))),
    );
    add(
        "reused",
        Some(format!(
            "{}, from files at the site",
            human::bytes(b.reused)
        )),
    );
    add(
        "resumed",
        Some(format!(
            "{}, from before an interruption",
            human::bytes(b.resumed)
        )),
    );
    add(
        "received",
        Some(format!("{}, over the network", human::bytes(b.received))),
    );
    add(
        "committed",
        Some(format!(
            "{}, written and synced at the site",
            human::bytes(b.committed)
        )),
    );
    add(
        "wire",
        Some(format!(
            "{}, sent and received in total",
            human::bytes(b.wire)
        )),
    );
    add(
        "rate",
        (t.rate > 0 && !t.state.is_final()).then(|| human::rate(t.rate)),
    );
    add(
        "eta",
        t.eta_seconds
            .filter(|_| !t.state.is_final())
            .map(human::seconds),
    );
    add("attempts", Some(t.attempts.to_string()));
    add("location", t.location.clone());
    add("note", t.note.clone());
    add("created", Some(human::local(&t.created_at)));
    add("updated", Some(human::local(&t.updated_at)));
    add("finished", t.finished_at.as_deref().map(human::local));
    add("removed", t.removed_at.as_deref().map(human::local));
    add(
        "receipt",
        t.receipt
            .as_ref()
            .map(|_| "signed by the site; -o json shows it".into()),
    );
    fields(&pairs)
}

/// Where the artifact was published. A site that received it knows only that it came from the hub.
fn origin(a: &Artifact) -> &str {
    match &a.origin {
        Some(site) => site.as_str(),
        None if a.published_here => "here",
        None => "hub",
    }
}

/// The table of `artifacts`.
pub(super) fn artifacts(artifacts: &[Artifact], colour: bool) -> String {
    if artifacts.is_empty() {
        return "no artifacts\n".into();
    }
    let mut table = Table::new(&[
        "ARTIFACT",
        ">SIZE",
        ">FILES",
        "ORIGIN",
        "PUBLISHED",
        "DIGEST",
    ]);
    for a in artifacts {
        table.row(vec![
            a.artifact.to_string().into(),
            human::bytes(a.bytes).into(),
            a.files.to_string().into(),
            origin(a).into(),
            human::local(&a.created_at).into(),
            a.digest.chars().take(16).collect::<String>().into(),
        ]);
    }
    let mut out = table.render(colour);
    let changed: Vec<(&Artifact, &String)> = artifacts
        .iter()
        .filter_map(|a| a.changed.as_ref().map(|how| (a, how)))
        .collect();
    for (a, how) in changed.iter().take(OFFENDERS_LISTED_MAX) {
        let at = a
            .origin
            .as_ref()
            .map(|site| format!(" at {site}"))
            .unwrap_or_default();
        out.push_str(&format!(
            "\n{}{at}: {}\n",
            a.artifact,
            human::clean_lines(how)
        ));
    }
    if changed.len() > OFFENDERS_LISTED_MAX {
        out.push_str(&format!(
            "\nand {} more: see 'packhorse show REF'\n",
            changed.len() - OFFENDERS_LISTED_MAX
        ));
    }
    out
}

/// All fields of one artifact, and the table of its transfers.
pub(super) fn artifact(detail: &ArtifactDetail, colour: bool) -> String {
    let a = &detail.artifact;
    let changed_at = a
        .origin
        .as_ref()
        .map_or_else(|| "changed".to_owned(), |site| format!("changed at {site}"));
    let mut pairs = vec![
        ("artifact", a.artifact.to_string()),
        ("digest", a.digest.clone()),
        (
            "size",
            format!("{} ({} bytes)", human::bytes(a.bytes), a.bytes),
        ),
        ("files", a.files.to_string()),
        ("origin", origin(a).into()),
        ("published", human::local(&a.created_at)),
    ];
    pairs.extend(a.location.clone().map(|l| ("location", l)));
    pairs.extend(a.changed.clone().map(|how| (changed_at.as_str(), how)));
    for (name, value) in a
        .info
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, value)| !matches!(name.as_str(), "is" | "referrers") && !value.is_null())
    {
        pairs.push((
            name.as_str(),
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned),
        ));
    }
    let referrers = a.info["referrers"].as_array().into_iter().flatten();
    pairs.extend(referrers.map(|referrer| {
        let text = |field: &str| referrer[field].as_str().unwrap_or_default().to_owned();
        let tag = text("tag");
        let own = if tag.is_empty() {
            text("digest")
        } else {
            format!("{tag} ({})", text("digest"))
        };
        (
            "carries",
            human::clean(&format!("{own}, about {}", text("about"))),
        )
    }));
    pairs.extend(a.omitted.iter().map(|omission| {
        let word = if omission.what.is_note() {
            "note"
        } else {
            "left out"
        };
        (word, human::clean(&omission.line()))
    }));
    if let Some(lineage) = &detail.lineage {
        pairs.push((
            "made by",
            format!(
                "run {}, for {}, on {}",
                lineage.run, lineage.from, lineage.on
            ),
        ));
        pairs.extend(
            lineage
                .inputs
                .iter()
                .map(|input| ("made of", format!("{} ({})", input.artifact, input.digest))),
        );
    }
    let mut out = fields(&pairs);
    if !detail.transfers.is_empty() {
        out.push('\n');
        out.push_str(&table(&detail.transfers, colour));
    }
    out
}

/// The table of `sites`.
pub(super) fn sites(sites: &[Site], colour: bool) -> String {
    if sites.is_empty() {
        return "no sites have joined\n".into();
    }
    let mut table = Table::new(&[
        "SITE",
        "ONLINE",
        "LINE",
        ">RTT",
        ">OPEN",
        "LAST SEEN",
        "VERSION",
        "LABELS",
    ]);
    for s in sites {
        let labels: Vec<String> = s
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        table.row(vec![
            s.name.as_str().into(),
            if s.online { "yes" } else { "no" }.into(),
            s.line.as_deref().unwrap_or("-").into(),
            s.rtt_ms
                .map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms"))
                .into(),
            s.open_transfers.to_string().into(),
            s.last_seen
                .as_deref()
                .map_or_else(|| "-".into(), human::local)
                .into(),
            s.version.as_deref().unwrap_or("-").into(),
            labels.join(",").into(),
        ]);
    }
    table.render(colour)
}

/// The table of `plan`.
pub(super) fn plan(rows: &[PlanRow], colour: bool) -> String {
    let mut table = Table::new(&[
        "ARTIFACT", "SITE", ">SIZE", ">TO MOVE", ">FREE", ">TIME", "NOTE",
    ]);
    for row in rows {
        let note = match row.free {
            Some(free) if free < row.needs => "no space",
            _ if matches!((row.inodes, row.free_inodes), (Some(needs), Some(free)) if free < needs) => {
                "no space: too few inodes"
            }
            _ if !row.asked => "no answer: assumes that the site has no content",
            _ => "",
        };
        table.row(vec![
            row.artifact.as_str().into(),
            row.site.as_str().into(),
            human::bytes(row.total).into(),
            human::bytes(row.missing).into(),
            row.free.map_or_else(|| "-".into(), human::bytes).into(),
            row.seconds
                .map_or_else(|| "-".into(), human::seconds)
                .into(),
            note.into(),
        ]);
    }
    let all: Vec<LeftOut> = rows
        .iter()
        .flat_map(|row| row.left_out.iter().cloned())
        .collect();
    table.render(colour) + &left_out(&all)
}

/// The selected sites that receive nothing: one line for each artifact and reason.
pub(super) fn left_out(all: &[LeftOut]) -> String {
    crate::delivery::left_out(all)
        .iter()
        .map(|text| format!("  left out: {}\n", human::clean(text)))
        .collect()
}
