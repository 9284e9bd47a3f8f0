//! The steps of the quickstart with the hub and the sites, in order. Each step ("act") prints its
//! result to stdout.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::check::{self, CheckedArtifact};
use super::daemon::{Daemons, Home, write_config};
use super::folder::Folder;
use super::show::{self, Show, program, quoted, quoted_text};
use crate::api::types::{
    Artifact, Job, PublishRequest, Published, Run, RunRequest, RunState, Site, SourceOptions,
    State, TokenReply, TokenRequest, Transfer, TransferQuery,
};
use crate::cli::client::Client;
use crate::cli::human;
use crate::cli::output::{Table, emit};
use crate::cli::tracker::Tracker;
use crate::config;
use crate::sample::SampleSet;
use crate::serve;
use base::durable;
use base::fault::{Code, Fault};
use transport::identity::SiteIdentity;

/// The published series, one of each kind. The labels follow the dataset that they are bound to.
pub(super) const SERIES: [&str; 5] = [
    "dataset/panels",
    "labels/panels",
    "operator/adc",
    "image/adc",
    "model/adc",
];
const SITES: [&str; 2] = ["east", "west"];
/// How long the sites may take to connect to the hub.
const ONLINE_MAX: Duration = Duration::from_secs(60);
/// How long one artifact may take to reach both sites.
const ARRIVAL_MAX: Duration = Duration::from_secs(180);
/// How long the training run may take.
const RUN_MAX: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const JOB_WAIT: Duration = Duration::from_secs(10);

/// A hub and the sites that are connected to it.
pub(super) struct World<'a> {
    folder: &'a Folder,
    show: Show,
    hub: Home,
    client: Arc<Client>,
    sites: Vec<Home>,
    /// The clients of the sites' APIs, in the order of [`SITES`].
    clients: Vec<Arc<Client>>,
}

impl<'a> World<'a> {
    /// Starts the hub and the sites, and enrols each site that has not joined yet.
    pub(super) async fn raise(
        folder: &'a Folder,
        daemons: &mut Daemons,
        show: &Show,
    ) -> Result<Self, Fault> {
        show.act("Starting a hub and two sites");
        let hub = Home::new(folder.path(), "hub");
        let ready = daemons
            .start(&hub, async |api, line| {
                write_config(&hub, &hub_config(&hub, api, line)?)
            })
            .await?;
        let (client, line) = (ready.client, ready.line.to_string());
        show.say(&format!(
            "   hub is ready: API at http://{}, address for sites {line}, log in {}",
            ready.api,
            hub.log.display()
        ));
        let (mut sites, mut clients) = (Vec::new(), Vec::new());
        for name in SITES {
            let site = Home::new(folder.path(), name);
            let joined = SiteIdentity::load(&site.state())?.is_some();
            let ready = daemons
                .start(&site, async |api, _| {
                    enrol(&client, &site, &line, api).await
                })
                .await?;
            let how = if joined {
                "joined in an earlier run"
            } else {
                "joined with a token from the hub"
            };
            show.say(&format!(
                "   {name} {how}: API at http://{}, log in {}",
                ready.api,
                site.log.display()
            ));
            sites.push(site);
            clients.push(ready.client);
        }
        let world = Self {
            folder,
            show: show.clone(),
            hub,
            client,
            sites,
            clients,
        };
        world.wait_online().await?;
        Ok(world)
    }

    async fn wait_online(&self) -> Result<(), Fault> {
        let until = Instant::now() + ONLINE_MAX;
        loop {
            let sites: Vec<Site> = self.client.get("/v1/sites", &()).await?;
            let online: Vec<String> = sites.iter().filter(|s| s.online).map(said_of).collect();
            if online.len() == SITES.len() {
                self.show.say(&format!(
                    "   each site opened its connection to the hub: {}",
                    online.join(", ")
                ));
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(Fault::unreachable(format!(
                    "of the {} sites, only {} connected to the hub",
                    SITES.len(),
                    online.len()
                ))
                .with_next(format!("read the logs in {}", self.folder.path().display())));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Creates a version of each kind, publishes all of them to both sites, and waits until they
    /// have arrived.
    async fn deliver(&self, version: u32) -> Result<(SampleSet, Vec<Transfer>), Fault> {
        let set = self.folder.sample(version).await?;
        let mut arrivals = JoinSet::new();
        for series in SERIES {
            let published = self.publish(&set, series, version).await?;
            let (client, show) = (self.client.clone(), self.show.clone());
            arrivals.spawn(async move { follow(&client, &show, &published).await });
        }
        let mut transfers: Vec<Transfer> = Vec::new();
        while let Some(arrived) = arrivals.join_next().await {
            transfers.extend(
                arrived.map_err(|e| Fault::internal(format!("waiting for a transfer: {e}")))??,
            );
        }
        Ok((set, transfers))
    }

    async fn publish(
        &self,
        set: &SampleSet,
        series: &str,
        version: u32,
    ) -> Result<Published, Fault> {
        let source = source(set, series);
        let for_dataset = series
            .starts_with("labels/")
            .then(|| format!("{}:v{version}", SERIES[0]));
        let request = PublishRequest {
            source: source.to_string_lossy().into_owned(),
            as_ref: format!("{series}:v{version}"),
            to: Some("all".into()),
            options: SourceOptions {
                for_dataset,
                ..SourceOptions::default()
            },
            run: None,
        };
        let published = publish_by(&self.client, &request).await?;
        let (size, stored) = (
            human::bytes(published.bytes),
            human::bytes(published.stored),
        );
        self.show.say(&match published.unchanged {
            true => format!(
                "   {} was published before with the same content: {size}",
                published.artifact
            ),
            false => format!(
                "   {} is published: {size}, {stored} new in the hub's store",
                published.artifact
            ),
        });
        Ok(published)
    }

    /// Compares the content at both sites with its source.
    async fn check(
        &self,
        set: &SampleSet,
        transfers: &[Transfer],
        version: u32,
    ) -> Result<Vec<CheckedArtifact>, Fault> {
        let mut found = Vec::new();
        for series in SERIES {
            for site in &self.sites {
                let wire = of(transfers, series, site.name).map_or(0, |t| t.bytes.wire);
                found
                    .push(check::artifact(site, series, version, source(set, series), wire).await?);
            }
        }
        Ok(found)
    }
}

/// The first delivery: one artifact of each kind to both sites, which have no earlier version.
pub(super) async fn first_delivery(world: &World<'_>) -> Result<(), Fault> {
    world
        .show
        .act("Publishing one artifact of each kind at the hub, to both sites");
    let (set, transfers) = world.deliver(1).await?;
    let found = world.check(&set, &transfers, 1).await?;
    let mut table = Table::new(&[
        "ARTIFACT",
        "SITE",
        ">SIZE",
        "COMPARED WITH THE SOURCE",
        "WHERE",
    ]);
    for row in found {
        let size = of(&transfers, row.series, row.site).map_or(0, |t| t.bytes.total);
        table.row(vec![
            row.artifact.into(),
            row.site.into(),
            human::bytes(size).into(),
            row.what.into(),
            row.location.into(),
        ]);
    }
    emit(&format!(
        "\nThe delivered content was read at each site and compared with the source:\n\n{}",
        table.render(false)
    ))
}

/// The second version has small changes. Little more than the changes may be transmitted.
pub(super) async fn second_version(world: &World<'_>) -> Result<(), Fault> {
    world.show.act("Publishing version 2: some photos replaced, labels corrected, one line of code, one image layer and 1 % of the weights changed");
    let (set, transfers) = world.deliver(2).await?;
    let found = world.check(&set, &transfers, 2).await?;
    let mut table = Table::new(&[
        "ARTIFACT",
        ">SIZE",
        ">TO EAST",
        ">TO WEST",
        ">OF ITS SIZE",
        "COMPARED WITH THE SOURCE",
    ]);
    let mut sum = [0; 3];
    for series in SERIES {
        let rows: Vec<&CheckedArtifact> = found.iter().filter(|f| f.series == series).collect();
        let size = of(&transfers, series, SITES[0]).map_or(0, |t| t.bytes.total);
        let [east, west] =
            SITES.map(|site| rows.iter().find(|f| f.site == site).map_or(0, |f| f.wire));
        sum = [sum[0] + size, sum[1] + east, sum[2] + west];
        let (artifact, what) = rows
            .first()
            .map(|f| (f.artifact.clone(), format!("both: {}", f.what)))
            .unwrap_or_default();
        table.row(vec![
            artifact.into(),
            human::bytes(size).into(),
            human::bytes(east).into(),
            human::bytes(west).into(),
            percent(east.max(west), size).into(),
            what.into(),
        ]);
    }
    let [size, east, west] = sum;
    let cells = [
        human::bytes(size),
        human::bytes(east),
        human::bytes(west),
        percent(east.max(west), size),
    ];
    table.row(
        std::iter::once("all".to_owned())
            .chain(cells)
            .map(Into::into)
            .collect(),
    );
    emit(&format!(
        "\nBytes transmitted for version 2 (manifests and framing included):\n\n{}",
        table.render(false)
    ))
}

/// The last act. The site east has its own photos and no trainer; the site west has a trainer. East
/// publishes its photos in place. The hub requests them from east when west needs them. West trains
/// a model, the hub delivers the model to east, and west removes the inputs that only the run
/// needed.
pub(super) async fn borrowed_training(world: &World<'_>) -> Result<(), Fault> {
    let [east, west] = SITES;
    world.show.act("Training east's model at west: west fetches east's photos and labels, trains a model, and east receives the model");
    let set = world.folder.own_sample().await?;
    let [images, labels, model] = [
        "dataset/east-line:v1",
        "labels/east-line:v1",
        "model/east-judge",
    ];
    for (source, name) in [(&set.dataset, images), (&set.labels, labels)] {
        let request = PublishRequest {
            source: source.to_string_lossy().into_owned(),
            as_ref: name.into(),
            to: None,
            options: SourceOptions {
                for_dataset: (name == labels).then(|| images.into()),
                ..SourceOptions::default()
            },
            run: None,
        };
        let published = publish_by(&world.clients[0], &request).await?;
        world.show.say(&format!(
            "   {name} is published in place at {east}, without a copy: {}",
            human::bytes(published.bytes)
        ));
    }
    let request = RunRequest {
        name: "first".into(),
        from: east.into(),
        on: west.into(),
        inputs: vec![images.into(), labels.into(), format!("{}:v2", SERIES[2])],
        expect: model.into(),
        ttl_seconds: 3600,
    };
    let mut run: Run = world.clients[0].post("/v1/runs", &request).await?;
    let until = Instant::now() + RUN_MAX;
    let mut said = None;
    while !(run.state.is_final() && run.released) {
        if said != Some(run.state) {
            world
                .show
                .say(&format!("   run {} is {}", run.name, run.state.as_str()));
            said = Some(run.state);
        }
        if Instant::now() >= until {
            return Err(Fault::deadline(format!(
                "run {} is still {} after {RUN_MAX:?}",
                run.name,
                run.state.as_str()
            )));
        }
        sleep(LOOK_EVERY).await;
        run = world
            .client
            .get("/v1/runs/show", &[("name", run.name.as_str())])
            .await?;
    }
    let (Some(made), RunState::Done) = (&run.model, run.state) else {
        return Err(Fault::internal(format!(
            "run {} is {}: {}",
            run.name,
            run.state.as_str(),
            run.message.unwrap_or_default()
        ))
        .with_next(format!(
            "read the logs in {}",
            world.folder.path().display()
        )));
    };
    let home = check::nas(&world.sites[0])
        .join(made.artifact.replace(':', "/"))
        .join("model.json");
    let text = std::fs::read_to_string(&home).map_err(|e| Fault::io(home.display(), &e))?;
    let found: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Fault::integrity(format!("{}: {e}", home.display())))?;
    let listed: Vec<Artifact> = world.clients[1].get("/v1/artifacts", &()).await?;
    let is_listed = |name: &str| {
        listed
            .iter()
            .any(|there| there.artifact.to_string() == name)
    };
    if check::nas(&world.sites[1])
        .join(images.replace(':', "/"))
        .exists()
    {
        return Err(Fault::internal(format!(
            "{images} was not removed from {west}"
        )));
    }
    if let Some(left) = [images, labels].into_iter().find(|name| is_listed(name)) {
        return Err(Fault::internal(format!("{west} still lists {left}")));
    }
    let mut table = Table::new(&["INPUT", "DIGEST", "AT WEST NOW"]);
    for input in &run.inputs {
        let now = if is_listed(&input.artifact) {
            "kept: delivered before the run"
        } else {
            "removed"
        };
        table.row(vec![
            input.artifact.as_str().into(),
            input.digest.chars().take(16).collect::<String>().into(),
            now.into(),
        ]);
    }
    emit(&format!(
        "\nThe model {} was delivered to {}. Of {} test boxes that were not used for training, it classifies {} correctly. The run's inputs:\n\n{}",
        made.artifact,
        home.display(),
        found["tried_on"],
        found["right"],
        table.render(false)
    ))
}

/// The end: commands to try.
pub(super) fn farewell(world: &World<'_>, once: bool) -> Result<(), Fault> {
    if once && world.folder.is_temporary() {
        world.show.say("");
        world.show.say("All artifacts arrived, and their content matches the source. Without --once, the daemons keep running after this");
        return Ok(());
    }
    let program = program();
    let site = &world.sites[0];
    let (hub, east) = (quoted(&world.hub.config), quoted(&site.config));
    let panels = check::nas(site).join(SERIES[0]);
    let (folder, current) = (quoted(&panels.join("v2")), quoted(&panels.join("CURRENT")));
    let labels = quoted(&check::labels_db(site));
    let image = quoted_text(&format!(
        "oci:{}:v2",
        check::layout(site, SERIES[3]).display()
    ));
    let mut lines = format!(
        "\nAll artifacts arrived, and their content matches the source. To look at the delivered content:\n\n  \
         ls {folder}; cat {current}\n  \
         sqlite3 {labels} 'SELECT class, count(*) FROM current_annotations GROUP BY class'\n  \
         skopeo inspect {image}\n"
    );
    if once {
        lines.push_str(&format!(
            "\nTo start the daemons again and keep them running:\n\n  {program} quickstart --dir {}\n",
            quoted(world.folder.path())
        ));
    } else {
        lines.push_str(&format!(
            "\nTo query the daemons:\n\n  \
             {program} status --config {hub}\n  \
             {program} sites --config {hub}\n  \
             {program} show dataset/panels:v2 --config {hub}\n  \
             {program} artifacts --config {east}\n  \
             {program} verify model/adc:v2 --config {east}\n\n\
             To publish and deliver a folder of your own:\n\n  \
             {program} publish FOLDER --as dataset/mine:v1 --to region=east --wait --config {hub}\n\n\
             The daemons run until you press Ctrl-C.\n"
        ));
    }
    emit(&lines)
}

/// Waits for the transfers of one artifact, and shows their progress.
async fn follow(
    client: &Client,
    show: &Show,
    published: &Published,
) -> Result<Vec<Transfer>, Fault> {
    let mut tracker = Tracker::new(&published.transfers);
    let mut bars = show.bars();
    let until = Instant::now() + ARRIVAL_MAX;
    loop {
        let query = TransferQuery {
            id: Some(published.transfers.join(",")),
            ..TransferQuery::default()
        };
        for transfer in client.transfers(&query).await?.0 {
            bars.update(&transfer);
            let arrived = (transfer.state == State::Done)
                .then(|| show::arrived(&transfer, published.unchanged));
            if let Some(line) = tracker.absorb(transfer) {
                show.say(&arrived.unwrap_or_else(|| format!("   {line}")));
            }
        }
        if tracker.open().is_empty() {
            tracker.verdict()?;
            return Ok(tracker.seen());
        }
        if Instant::now() >= until {
            return Err(Fault::deadline(format!(
                "{} has not arrived at every site after {ARRIVAL_MAX:?}: {}",
                published.artifact,
                tracker.summary()
            )));
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Publishes through a daemon, and waits until its job ends.
async fn publish_by(client: &Client, request: &PublishRequest) -> Result<Published, Fault> {
    let mut job: Job = client.post("/v1/artifacts", request).await?;
    loop {
        let Job {
            id,
            state,
            result,
            error,
            ..
        } = job;
        match (state.as_str(), result) {
            ("running", _) => job = client.job(&id, JOB_WAIT).await?,
            ("done", Some(result)) => {
                return serde_json::from_value(result)
                    .map_err(|e| Fault::internal(format!("the daemon's answer: {e}")));
            }
            _ => return Err(refused(error, &request.as_ref)),
        }
    }
}

/// Writes a site's configuration, and enrols the site at the hub if it has not joined yet.
async fn enrol(
    client: &Client,
    site: &Home,
    line: &str,
    api: std::net::SocketAddr,
) -> Result<(), Fault> {
    durable::create_dir_all(&check::nas(site))?;
    write_config(site, &site_config(site, api, line)?)?;
    if SiteIdentity::load(&site.state())?.is_some() {
        return Ok(());
    }
    let labels = [("region".to_owned(), site.name.to_owned())].into();
    let request = TokenRequest {
        site: Some(site.name.into()),
        publisher: None,
        labels,
        artifacts: Vec::new(),
        deliver_to: None,
        ttl_seconds: 600,
    };
    let reply: TokenReply = client.post("/v1/tokens", &request).await?;
    serve::join(&config::load(&site.config)?, line, &reply.token)
        .await
        .map(|_| ())
}

fn hub_config(
    hub: &Home,
    api: std::net::SocketAddr,
    line: std::net::SocketAddr,
) -> Result<String, Fault> {
    let state = toml_path(&hub.state())?;
    Ok(format!(
        "role = \"hub\"\nname = \"hub\"\ndata_dir = {state}\n[listen]\napi = \"{api}\"\nquic = \"{line}\"\n"
    ))
}

fn site_config(site: &Home, api: std::net::SocketAddr, line: &str) -> Result<String, Fault> {
    let (name, state, nas) = (
        site.name,
        toml_path(&site.state())?,
        toml_path(&check::nas(site))?,
    );
    let labels = toml_text(&format!("sqlite://{}", check::labels_db(site).display()));
    let images = toml_text(&format!("oci-layout:{}", check::images(site).display()));
    let trainer =
        toml_path(&std::env::current_exe().map_err(|e| Fault::io("find this program", &e))?)?;
    Ok(format!(
        "role = \"site\"\nname = \"{name}\"\ndata_dir = {state}\n[listen]\napi = \"{api}\"\n[hub]\naddress = \"{line}\"\n\
         [sink.files]\nroot = {nas}\n[sink.labels]\nurl = {labels}\n[sink.images]\nurl = {images}\n\
         [train]\ncommand = [{trainer}, \"sample-trainer\"]\nallow = [\"all\"]\n"
    ))
}

fn toml_path(path: &Path) -> Result<String, Fault> {
    path.to_str()
        .map(toml_text)
        .ok_or_else(|| Fault::usage(format!("the path {} is not UTF-8", path.display())))
}

fn toml_text(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}

fn source<'s>(set: &'s SampleSet, series: &str) -> &'s Path {
    match series.split_once('/').map(|(kind, _)| kind) {
        Some("dataset") => &set.dataset,
        Some("labels") => &set.labels,
        Some("operator") => &set.operator,
        Some("image") => &set.image,
        _ => &set.model,
    }
}

fn of<'t>(transfers: &'t [Transfer], series: &str, site: &str) -> Option<&'t Transfer> {
    transfers.iter().find(|t| {
        t.site.as_str() == site && t.artifact.to_string().split(':').next() == Some(series)
    })
}

fn refused(error: Option<Fault>, artifact: &str) -> Fault {
    let fault = error
        .unwrap_or_else(|| Fault::internal("the daemon reports no reason"))
        .context(format_args!("publish {artifact}"));
    match fault.code {
        Code::Conflict => fault
            .with_next("another version of this program created that folder: choose a new --dir"),
        _ => fault,
    }
}

fn said_of(site: &Site) -> String {
    match (&site.line, site.rtt_ms) {
        (Some(line), Some(rtt)) => format!("{} by {line} ({rtt:.1} ms)", site.name),
        _ => site.name.to_string(),
    }
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64)
}
