//! What of a row the holder of a token with a scope sees. [`model::policy`] decides about each name;
//! nothing here does I/O.
//!
//! A row that names something outside the scope as its subject is not shown. Where a row only
//! mentions such a thing, the mention is removed.

use std::collections::{BTreeMap, BTreeSet};

use super::super::types::*;
use base::names::{ArtifactRef, SiteName};
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::run;

/// The sites that the holder sees.
#[derive(Debug, Clone)]
pub(super) enum Sites {
    /// Every site.
    All,
    /// Some sites.
    Some {
        /// These.
        visible: BTreeSet<SiteName>,
        /// The others that this daemon knows; `None`: it knows only itself, as a site does.
        hidden: Option<BTreeSet<SiteName>>,
    },
}

/// What the holder of a token sees.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) actor: Actor,
    pub(super) sites: Sites,
    /// Whether the scope limits the artifacts.
    pub(super) limits_artifacts: bool,
}

impl View {
    /// Whether the holder sees this artifact.
    pub(super) fn has_artifact(&self, artifact: &ArtifactRef) -> bool {
        policy::may(&self.actor, Verb::Watch, &Object::Named(artifact)).is_ok()
    }

    /// The same of a text that should name an artifact, or one of any version.
    fn has_named(&self, text: &str) -> bool {
        let parsed = text.parse().or_else(|_| format!("{text}:v").parse());
        parsed.is_ok_and(|artifact| self.has_artifact(&artifact))
    }

    /// Whether the holder sees this site.
    pub(super) fn has_site(&self, site: &SiteName) -> bool {
        match &self.sites {
            Sites::All => true,
            Sites::Some { visible, .. } => visible.contains(site),
        }
    }

    /// A text for people, unless it mentions something outside the scope.
    pub(super) fn text(&self, text: Option<String>) -> Option<String> {
        text.filter(|text| self.mentions_nothing_hidden(text))
    }

    fn mentions_nothing_hidden(&self, text: &str) -> bool {
        let hidden = match &self.sites {
            Sites::All => None,
            // The text may come from the hub, and this site does not know what it names.
            Sites::Some { hidden: None, .. } => return false,
            Sites::Some { hidden, .. } => hidden.as_ref(),
        };
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
        text.split(|c| !is_of_name(c)).all(|word| {
            let word = word.trim_end_matches(['.', ':', '/']);
            let names_site = hidden.is_some_and(|hidden| {
                word.parse::<SiteName>()
                    .is_ok_and(|site| hidden.contains(&site))
            });
            let is_artifact = word.parse::<ArtifactRef>().is_ok()
                || word.contains('/') && format!("{word}:v").parse::<ArtifactRef>().is_ok();
            !names_site && (!is_artifact || self.has_named(word))
        })
    }

    /// A transfer. Its cursor becomes the time of its last change: the number of an event says how
    /// much happened outside the scope.
    pub(super) fn transfer(&self, row: Transfer) -> Option<Transfer> {
        if !self.has_site(&row.site) || !self.has_artifact(&row.artifact) {
            return None;
        }
        let changed = row.updated_at.parse::<jiff::Timestamp>();
        Some(Transfer {
            cursor: changed.map_or(0, |at| at.as_millisecond().unsigned_abs()),
            waits_for: row.waits_for.filter(|_| !self.limits_artifacts),
            message: self.text(row.message),
            next: self.text(row.next),
            note: self.text(row.note),
            ..row
        })
    }

    /// An artifact.
    pub(super) fn artifact(&self, row: Artifact) -> Option<Artifact> {
        if !self.has_artifact(&row.artifact) {
            return None;
        }
        let origin = row.origin.filter(|origin| self.has_site(origin));
        let mut info = row.info;
        let dataset = info["dataset"]["artifact"].as_str();
        if dataset.is_some_and(|dataset| !self.has_named(dataset))
            && let Some(fields) = info.as_object_mut()
        {
            fields.insert("dataset".into(), serde_json::Value::Null);
        }
        Some(Artifact {
            origin,
            info,
            changed: self.text(row.changed),
            ..row
        })
    }

    /// A site. `open`: the open transfers of each artifact to each site.
    pub(super) fn site(&self, row: Site, open: &[(SiteName, ArtifactRef, u64)]) -> Option<Site> {
        if !self.has_site(&row.name) {
            return None;
        }
        let open_transfers = if self.limits_artifacts {
            let to_it = open
                .iter()
                .filter(|(site, artifact, _)| *site == row.name && self.has_artifact(artifact));
            to_it.map(|(.., count)| count).sum()
        } else {
            row.open_transfers
        };
        Some(Site {
            open_transfers,
            ..row
        })
    }

    /// A training run: all that it names must be in the scope.
    pub(super) fn run(&self, row: Run) -> Option<Run> {
        let named = row.inputs.iter().map(|input| &input.artifact);
        let is_visible = self.has_site(&row.from)
            && self.has_site(&row.on)
            && named.chain([&row.expect]).all(|name| self.has_named(name))
            && row
                .model
                .as_ref()
                .is_none_or(|model| self.has_named(&model.artifact));
        is_visible.then(|| Run {
            message: self.text(row.message),
            next: self.text(row.next),
            ..row
        })
    }

    /// The lineage of a model, unless a site or an input of it is outside the scope.
    pub(super) fn lineage(&self, row: ModelLineage) -> Option<ModelLineage> {
        let is_visible = self.has_site(&row.from)
            && self.has_site(&row.on)
            && row
                .inputs
                .iter()
                .all(|input| self.has_named(&input.artifact));
        is_visible.then_some(row)
    }

    /// An event. One whose subject is not known here is not shown.
    pub(super) fn event(
        &self,
        event: Event,
        open: &[(SiteName, ArtifactRef, u64)],
    ) -> Option<Event> {
        use serde_json::{from_value, to_value};
        let body = event.body;
        let body = match event.what.as_str() {
            "transfer" => to_value(self.transfer(from_value(body).ok()?)?),
            "artifact" => to_value(self.artifact(from_value(body).ok()?)?),
            "run" => to_value(self.run(from_value(body).ok()?)?),
            "site" => to_value(self.site(from_value(body).ok()?, open)?),
            _ => return None,
        };
        Some(Event {
            body: body.ok()?,
            ..event
        })
    }
}

/// The sites out of those that a daemon lists.
pub(super) fn sites_of(
    actor: &Actor,
    listed: impl IntoIterator<Item = (SiteName, BTreeMap<String, String>)>,
) -> Sites {
    let (mut visible, mut hidden) = (BTreeSet::new(), BTreeSet::new());
    for (site, labels) in listed {
        let place = Object::Place {
            site: &site,
            labels: &labels,
        };
        if policy::may(actor, Verb::Watch, &place).is_ok() {
            visible.insert(site);
        } else {
            hidden.insert(site);
        }
    }
    Sites::Some {
        visible,
        hidden: Some(hidden),
    }
}

/// The fault for a run that does not exist, or is not visible.
pub(super) fn no_run(name: &str) -> base::fault::Fault {
    match run::known(name) {
        Ok(name) => run::no_run(name.as_str()),
        Err(fault) => fault,
    }
}
