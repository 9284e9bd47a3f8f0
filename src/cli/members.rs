//! `site` and `publisher`: the sites and publishers of a hub, their certificates and revocations.

use clap::Subcommand;

use super::args::{Global, key_value};
use super::client::Client;
use super::human;
use super::output::{self, Table, fields, one, rows};
use crate::api::types::{
    MemberAction, MemberActionRequest, MemberCertificate, MemberChange, MemberRevocation,
    Publisher, SetSiteRequest, Site,
};
use base::fault::Fault;

#[derive(Debug, Subcommand)]
pub(super) enum SiteCommand {
    /// List the sites with their labels, certificates and revocations.
    #[command(after_help = "Example:\n  packhorse site list")]
    List,
    /// Show one site.
    #[command(after_help = "Example:\n  packhorse site show chengdu")]
    Show {
        /// The site.
        name: String,
    },
    /// Change the labels of a site; selections of sites use them at once.
    #[command(
        after_help = "Example:\n  packhorse site set chengdu --label region=west --unlabel line"
    )]
    Set {
        /// The site.
        name: String,
        /// A label to set; can be repeated.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
        labels: Vec<(String, String)>,
        /// The key of a label to remove; can be repeated.
        #[arg(long = "unlabel", value_name = "KEY")]
        unlabel: Vec<String>,
    },
    /// Close the connections of a site at once, and refuse it from now on. Its transfers and receipts
    /// are kept.
    #[command(after_help = "Example:\n  packhorse site revoke chengdu --why stolen")]
    Revoke {
        /// The site.
        name: String,
        /// Why; the site is told.
        #[arg(long, value_name = "TEXT")]
        why: Option<String>,
    },
    /// Let a revoked site in again, with its present certificate.
    #[command(after_help = "Example:\n  packhorse site restore chengdu")]
    Restore {
        /// The site.
        name: String,
    },
    /// Forget a site. Its transfers and their receipts stay readable. Refused while something would be
    /// lost with it.
    #[command(after_help = "Example:\n  packhorse site remove chengdu")]
    Remove {
        /// The site.
        name: String,
        /// Also if something is lost: its open transfers are cancelled, and content that only this site
        /// has cannot be delivered any more.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum PublisherCommand {
    /// List the publishers with their certificates and revocations.
    #[command(after_help = "Example:\n  packhorse publisher list")]
    List,
    /// Show one publisher.
    #[command(after_help = "Example:\n  packhorse publisher show office")]
    Show {
        /// The publisher.
        name: String,
    },
    /// Close the connections of a publisher at once, and refuse it from now on.
    #[command(after_help = "Example:\n  packhorse publisher revoke office --why lost")]
    Revoke {
        /// The publisher.
        name: String,
        /// Why; the publisher is told.
        #[arg(long, value_name = "TEXT")]
        why: Option<String>,
    },
    /// Let a revoked publisher in again, with its present certificate.
    #[command(after_help = "Example:\n  packhorse publisher restore office")]
    Restore {
        /// The publisher.
        name: String,
    },
    /// Forget a publisher. What it published stays.
    #[command(after_help = "Example:\n  packhorse publisher remove office")]
    Remove {
        /// The publisher.
        name: String,
    },
}

/// `site`
pub(super) async fn site(global: &Global, command: SiteCommand) -> Result<(), Fault> {
    let client = Client::new(global)?;
    let act = |name: String, action: MemberAction, why: Option<String>, force: bool| {
        let request = MemberActionRequest {
            name,
            action,
            why,
            force,
        };
        let client = &client;
        async move { client.post::<Site>("/v1/sites/action", &request).await }
    };
    let site: Site = match command {
        SiteCommand::List => {
            let sites: Vec<Site> = client.get("/v1/sites", &()).await?;
            return rows(global.output, &sites, |sites| {
                site_table(sites, output::colour())
            });
        }
        SiteCommand::Show { name } => client.get("/v1/sites/show", &[("name", &name)]).await?,
        SiteCommand::Set {
            name,
            labels,
            unlabel,
        } => {
            let request = SetSiteRequest {
                name,
                labels: labels.into_iter().collect(),
                remove_labels: unlabel,
            };
            client.post("/v1/sites/set", &request).await?
        }
        SiteCommand::Revoke { name, why } => act(name, MemberAction::Revoke, why, false).await?,
        SiteCommand::Restore { name } => act(name, MemberAction::Restore, None, false).await?,
        SiteCommand::Remove { name, force } => {
            let removed = act(name, MemberAction::Remove, None, force).await?;
            return one(global.output, &removed, |site| {
                format!("site {} was removed\n", site.name)
            });
        }
    };
    one(global.output, &site, site_text)
}

/// `publisher`
pub(super) async fn publisher(global: &Global, command: PublisherCommand) -> Result<(), Fault> {
    let client = Client::new(global)?;
    let act = |name: String, action: MemberAction, why: Option<String>| {
        let request = MemberActionRequest {
            name,
            action,
            why,
            force: false,
        };
        let client = &client;
        async move {
            client
                .post::<Publisher>("/v1/publishers/action", &request)
                .await
        }
    };
    let publisher: Publisher = match command {
        PublisherCommand::List => {
            let publishers: Vec<Publisher> = client.get("/v1/publishers", &()).await?;
            return rows(global.output, &publishers, |publishers| {
                publisher_table(publishers, output::colour())
            });
        }
        PublisherCommand::Show { name } => {
            client
                .get("/v1/publishers/show", &[("name", &name)])
                .await?
        }
        PublisherCommand::Revoke { name, why } => act(name, MemberAction::Revoke, why).await?,
        PublisherCommand::Restore { name } => act(name, MemberAction::Restore, None).await?,
        PublisherCommand::Remove { name } => {
            let removed = act(name, MemberAction::Remove, None).await?;
            return one(global.output, &removed, |publisher| {
                format!("publisher {} was removed\n", publisher.name)
            });
        }
    };
    one(global.output, &publisher, publisher_text)
}

fn site_table(sites: &[Site], colour: bool) -> String {
    if sites.is_empty() {
        return "no sites have joined\n".into();
    }
    let mut table = Table::new(&["SITE", "STATE", "CERTIFICATE ENDS", "VERSION", "LABELS"]);
    for site in sites {
        let state = match (&site.revoked, site.online) {
            (Some(_), _) => "revoked",
            (None, true) => "online",
            (None, false) => "offline",
        };
        table.row(vec![
            site.name.as_str().into(),
            state.into(),
            ends(site.certificate.as_ref()).into(),
            site.version.as_deref().unwrap_or("-").into(),
            labels(site).into(),
        ]);
    }
    table.render(colour)
}

fn publisher_table(publishers: &[Publisher], colour: bool) -> String {
    if publishers.is_empty() {
        return "no publishers have joined\n".into();
    }
    let mut table = Table::new(&[
        "PUBLISHER",
        "STATE",
        "LAST SEEN",
        "CERTIFICATE ENDS",
        "ARTIFACTS",
    ]);
    for publisher in publishers {
        let state = publisher.revoked.as_ref().map_or("-", |_| "revoked");
        table.row(vec![
            publisher.name.as_str().into(),
            state.into(),
            time(publisher.last_seen.as_ref()).into(),
            ends(publisher.certificate.as_ref()).into(),
            may_publish(publisher).into(),
        ]);
    }
    table.render(colour)
}

fn site_text(site: &Site) -> String {
    let mut text = format!("site {}\n", site.name);
    text.push_str(&fields(&[
        ("  labels", labels(site)),
        (
            "  online",
            match (&site.line, site.online) {
                (Some(line), true) => format!("yes, over {line}"),
                _ => "no".into(),
            },
        ),
        ("  joined", human::local(&site.joined_at)),
        ("  last seen", time(site.last_seen.as_ref())),
        (
            "  version",
            site.version.clone().unwrap_or_else(|| "-".into()),
        ),
        ("  open transfers", site.open_transfers.to_string()),
    ]));
    text + &member_text(
        site.certificate.as_ref(),
        site.revoked.as_ref(),
        site.changed.as_ref(),
    )
}

fn publisher_text(publisher: &Publisher) -> String {
    let to = publisher.deliver_to.as_deref().unwrap_or("all");
    let mut text = format!("publisher {}\n", publisher.name);
    text.push_str(&fields(&[
        ("  artifacts", may_publish(publisher)),
        ("  delivers to", to.to_owned()),
        ("  joined", human::local(&publisher.joined_at)),
        ("  last seen", time(publisher.last_seen.as_ref())),
    ]));
    text + &member_text(
        publisher.certificate.as_ref(),
        publisher.revoked.as_ref(),
        publisher.changed.as_ref(),
    )
}

fn member_text(
    certificate: Option<&MemberCertificate>,
    revoked: Option<&MemberRevocation>,
    changed: Option<&MemberChange>,
) -> String {
    let mut pairs = Vec::new();
    match certificate {
        Some(of) => {
            let used = of.used_at.as_ref().map_or_else(
                || "not used yet".to_owned(),
                |at| format!("first used {}", human::local(at)),
            );
            let (issued, ends) = (human::local(&of.issued_at), human::local(&of.expires_at));
            pairs.push((
                "  certificate",
                format!("issued {issued}, ends {ends}, {used}"),
            ));
            pairs.push(("  serial", of.serial.clone()));
            if let Some(until) = &of.previous_until {
                let until = human::local(until);
                pairs.push((
                    "  earlier one",
                    format!("accepted until the new one is used, or {until}"),
                ));
            }
        }
        None => pairs.push(("  certificate", "issued by an earlier version".to_owned())),
    }
    if let Some(revoked) = revoked {
        let why = revoked
            .why
            .as_deref()
            .map_or_else(String::new, |why| format!(": {why}"));
        let (at, by) = (human::local(&revoked.at), &revoked.by);
        pairs.push(("  revoked", human::clean(&format!("{at} by {by}{why}"))));
    }
    if let Some(changed) = changed {
        let (what, at, by) = (&changed.what, human::local(&changed.at), &changed.by);
        pairs.push((
            "  last change",
            human::clean(&format!("{what} {at} by {by}")),
        ));
    }
    fields(&pairs)
}

fn ends(certificate: Option<&MemberCertificate>) -> String {
    certificate.map_or_else(|| "-".into(), |of| human::local(&of.expires_at))
}

fn time(at: Option<&String>) -> String {
    at.map_or_else(|| "-".into(), |at| human::local(at))
}

fn labels(site: &Site) -> String {
    let labels: Vec<String> = site
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    match labels.is_empty() {
        true => "-".into(),
        false => labels.join(","),
    }
}

fn may_publish(publisher: &Publisher) -> String {
    match &publisher.artifacts {
        None => "anything".into(),
        Some(patterns) if patterns.is_empty() => "nothing".into(),
        Some(patterns) => patterns.join(","),
    }
}
