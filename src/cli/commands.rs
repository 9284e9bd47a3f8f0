//! The commands that call a daemon, each from request to printed answer, and the short commands
//! that work without one.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::args::{Deliver, Global, Output, Publish, Status, TokenCreate, Wait};
use super::client::Client;
use super::follow::{self, Deadline, Progress};
use super::output::{self, emit, fields, one, rows};
use super::{human, list, remote, status as show_status, watch};
use crate::api::types::*;
use crate::serve;
use crate::trainer;
use base::fault::{Fault, Retry};
use base::limits::API_ROWS_MAX;
use base::omitted::Category;
use content::store::Rebuilt;
use sink::files::FilesSink;
use source::files::name_text;

/// `config check`
pub(super) fn config_check(global: &Global) -> Result<(), Fault> {
    let config = global.load_config()?;
    let path = global.config_path()?.display().to_string();
    // A daemon starts although one of these is not available: a temporary outage must not stop its
    // other work.
    if let Some(files) = &config.sink.files {
        FilesSink::check_root(&files.root)?;
        FilesSink::check_writable(&files.root)?;
    }
    if let Some(program) = config
        .train
        .as_ref()
        .and_then(|train| train.command.first())
    {
        trainer::check_program(program)?;
    }
    let role = match config.role {
        crate::config::Role::Hub => "hub",
        crate::config::Role::Site => "site",
    };
    let warnings: &[&str] = if config.listen.is_api_local() {
        &[]
    } else {
        &[crate::config::API_WITHOUT_TLS]
    };
    let notes = config.notes();
    let answer = json!({"ok": true, "file": path, "role": role, "name": config.name.as_str(), "warnings": warnings, "notes": notes});
    one(global.output, &answer, |_| {
        let warnings = warnings.iter().map(|text| format!("warning: {text}\n"));
        let lines: String = warnings
            .chain(notes.iter().map(|note| format!("note: {note}\n")))
            .collect();
        format!("ok: {path} is valid ({role} {})\n{lines}", config.name)
    })
}

/// `join`
pub(super) async fn join(global: &Global, hub: &str, token: &str) -> Result<(), Fault> {
    let config = global.load_config()?;
    let certificate = Box::pin(serve::join(&config, hub, token))
        .await?
        .display()
        .to_string();
    let answer = json!({"site": config.name.as_str(), "hub": hub, "certificate": certificate});
    let file = global.config_path()?.display();
    one(global.output, &answer, |_| {
        format!(
            "site {} joined the hub at {hub}; its certificate is {certificate}; next: packhorse serve --config {file}\n",
            config.name
        )
    })
}

/// `token create`
pub(super) async fn token_create(global: &Global, create: TokenCreate) -> Result<(), Fault> {
    let request = TokenRequest {
        site: create.site,
        publisher: create.publisher,
        labels: create.labels.into_iter().collect(),
        artifacts: create.artifacts,
        deliver_to: create.deliver_to,
        ttl_seconds: create.ttl.as_secs(),
    };
    let reply: TokenReply = Client::new(global)?.post("/v1/tokens", &request).await?;
    // The token is alone on stdout, for TOKEN=$(packhorse token create …).
    one(global.output, &reply, |reply| format!("{}\n", reply.token))?;
    if let Some(limits) = &reply.limits {
        output::note(&format!("note: {}", human::clean(&limits_text(limits))));
    }
    for note in &reply.notes {
        output::note(&format!("note: {}", human::clean(note)));
    }
    Ok(())
}

/// What a publisher may do with the token that was made for it.
fn limits_text(limits: &TokenLimits) -> String {
    let artifacts = match &limits.artifacts {
        Some(patterns) => patterns.join(", "),
        None => "any artifact".into(),
    };
    let sites = limits.deliver_to.as_deref().unwrap_or("all");
    format!(
        "after it used this token, the publisher may publish {artifacts} and deliver to: {sites}"
    )
}

/// `publish`
pub(super) async fn publish(global: &Global, publish: Publish) -> Result<(), Fault> {
    if let Some(file) = publish.list.clone() {
        return Box::pin(list::publish(global, publish, &file)).await;
    }
    let from = source(&publish)?;
    if publish.all {
        return Box::pin(list::publish_all(global, publish, from)).await;
    }
    let options = source_options(&publish)?;
    if let Some(hub) = publish.hub.clone() {
        return Box::pin(remote::publish(global, publish, from, hub, options)).await;
    }
    if options.username.is_some() || options.password_file.is_some() {
        let host = registry::Origin::split(&from)
            .map_or_else(|_| "HOST".to_owned(), |(origin, _)| origin.to_string());
        return Err(Fault::usage("a daemon takes a registry's password file from its configuration only").with_next(format!(
            "write [registry.\"{host}\"] with username and password_file into the daemon's configuration, restart the daemon, and omit --username and --password-file"
        )));
    }
    let client = Client::new(global)?;
    let deadline = Deadline::after(publish.wait.timeout);
    let request = PublishRequest {
        source: from,
        as_ref: publish.as_ref,
        to: publish.to,
        run: publish.run,
        options,
    };
    let published = publish_one(&client, &request, deadline).await?;
    one(global.output, &published, published_text)?;
    note_omitted(&published);
    wait_for(
        &client,
        global.output,
        &published.transfers,
        &publish.wait,
        deadline,
    )
    .await
}

/// Publishes at the daemon, and waits for the end of the publish.
pub(super) async fn publish_one(
    client: &Client,
    request: &PublishRequest,
    deadline: Deadline,
) -> Result<Published, Fault> {
    let mut progress = Progress::new();
    let job: Job = client.post("/v1/artifacts", request).await?;
    let job = follow::job(client, job, deadline, &mut progress).await?;
    answer(job.result.unwrap_or_default())
}

/// How a publish reads its source.
pub(super) fn source_options(publish: &Publish) -> Result<SourceOptions, Fault> {
    Ok(SourceOptions {
        format: publish.format.clone(),
        for_dataset: publish.for_dataset.clone(),
        allow_missing: publish.allow_missing,
        voc_base: publish.voc_base.clone(),
        on_bad: publish.on_bad.clone(),
        bad_out: publish.bad_out.as_deref().map(absolute).transpose()?,
        encoding: publish.encoding.clone(),
        klarf_scale: publish.klarf_scale.clone(),
        columns: publish.columns.iter().cloned().collect(),
        repository: publish.repository.clone(),
        tag: publish.tag.clone(),
        platforms: publish.platforms.clone(),
        compress: publish.compress,
        no_referrers: publish.no_referrers,
        exclude: publish.exclude.clone(),
        copy_links: publish.copy_links,
        settle_seconds: publish
            .settle
            .map(|time| time.as_millis().div_ceil(1000) as u64),
        name_encoding: publish.name_encoding.clone(),
        no_times: publish.no_times,
        xattrs: publish.xattrs,
        hard_links: publish.hard_links,
        strict: publish.strict,
        accept_omitted: publish.accept_omitted.iter().copied().collect(),
        username: publish.username.clone(),
        password_file: publish.password_file.as_deref().map(absolute).transpose()?,
        ca_file: publish.ca_file.as_deref().map(absolute).transpose()?,
        realm_hosts: publish.realm_hosts.clone(),
        insecure: publish.insecure,
    })
}

pub(super) fn published_text(p: &Published) -> String {
    let what = if p.unchanged {
        "was already published with this content"
    } else {
        "published"
    };
    let mut out = format!("{} {what}\n", p.artifact);
    out.push_str(&fields(&[
        ("  digest", p.digest.clone()),
        (
            "  size",
            format!(
                "{}, of which {} are new to the store",
                human::bytes(p.bytes),
                human::bytes(p.stored)
            ),
        ),
    ]));
    if let Some(note) = &p.note {
        out.push_str(&format!("  {}\n", human::clean(note)));
    }
    out + &transfers_text(&p.transfers)
}

/// Reports on stderr what a publish left out, in every output format.
pub(super) fn note_omitted(published: &Published) {
    for omission in &published.omitted {
        let about = if omission.what.is_note() {
            ""
        } else {
            "left out of "
        };
        output::note(&format!(
            "note: {about}{}: {}",
            published.artifact,
            human::clean(&omission.line())
        ));
        if omission.what == Category::BadRecords {
            // The first of each kind, which the line above cannot hold.
            for example in &omission.examples {
                output::note(&format!("  {}", human::clean(example)));
            }
        }
    }
}

fn transfers_text(ids: &[String]) -> String {
    if ids.is_empty() {
        String::new()
    } else {
        format!("  transfers: {}\n", ids.join(", "))
    }
}

/// `deliver`
pub(super) async fn deliver(global: &Global, deliver: Deliver) -> Result<(), Fault> {
    let client = Client::new(global)?;
    let deadline = Deadline::after(deliver.wait.timeout);
    let request = DeliverRequest {
        artifacts: deliver.artifacts,
        to: deliver.to,
    };
    let delivered: Delivered = client.post("/v1/transfers", &request).await?;
    let text = |d: &Delivered| {
        let notes: String = d
            .notes
            .iter()
            .map(|note| format!("  note: {}\n", human::clean(note)))
            .collect();
        format!(
            "delivery {} of {}\n{}{}{notes}",
            d.delivery,
            d.artifact,
            transfers_text(&d.transfers),
            show_status::left_out(&d.left_out)
        )
    };
    one(global.output, &delivered, text)?;
    wait_for(
        &client,
        global.output,
        &delivered.transfers,
        &deliver.wait,
        deadline,
    )
    .await
}

/// With `--wait`, waits for the transfers and returns their result.
pub(super) async fn wait_for(
    client: &Client,
    format: Output,
    ids: &[String],
    wait: &Wait,
    deadline: Deadline,
) -> Result<(), Fault> {
    if !wait.wait || ids.is_empty() {
        return Ok(());
    }
    let mut progress = Progress::new();
    let tracker = follow::transfers(client, ids, deadline, &mut progress).await?;
    drop(progress);
    // Programs received the ids and use `status`.
    if format == Output::Table {
        emit(&show_status::table(&tracker.seen(), output::colour()))?;
    }
    tracker.verdict()
}

/// `status`
pub(super) async fn status(global: &Global, args: Status) -> Result<(), Fault> {
    let client = Client::new(global)?;
    let query = TransferQuery {
        id: args.transfer.clone(),
        since: args.since,
        wait: None,
        limit: Some(args.limit.min(API_ROWS_MAX)),
    };
    if args.watch {
        return watch::run(&client, global.output, query).await;
    }
    let (transfers, cursor) = client.transfers(&query).await?;
    if transfers.is_empty() && args.transfer.is_some() && args.since.is_none() {
        return Err(watch::no_transfer(args.transfer.as_deref()));
    }
    let cut = transfers.len() as u64 >= u64::from(args.limit);
    // For the id of a delivery, people see the delivery and then its parts; programs get the parts,
    // and the delivery from the API.
    let whole: Option<Delivery> = match &args.transfer {
        Some(id)
            if global.output == Output::Table
                && args.since.is_none()
                && !transfers.iter().any(|t| t.id == *id) =>
        {
            client.get("/v1/deliveries/show", &[("id", id)]).await.ok()
        }
        _ => None,
    };
    rows(global.output, &transfers, |transfers| {
        match (transfers, &whole) {
            (_, Some(whole)) => show_status::delivery(whole, output::colour()),
            ([only], None) if args.transfer.is_some() => show_status::detail(only),
            _ => show_status::table(transfers, output::colour()),
        }
    })?;
    match args.since {
        Some(_) => output::note(&format!("cursor: {cursor}")),
        None if cut && args.transfer.is_none() => output::note(&format!(
            "only the newest {} transfers are shown; --limit shows more",
            args.limit
        )),
        None => {}
    }
    Ok(())
}

/// `pause`, `resume`, `cancel`, `retry`
pub(super) async fn act(global: &Global, id: String, action: Action) -> Result<(), Fault> {
    let transfers: Vec<Transfer> = Client::new(global)?
        .post("/v1/transfers/action", &ActionRequest { id, action })
        .await?;
    rows(global.output, &transfers, |transfers| {
        show_status::table(transfers, output::colour())
    })
}

/// `cancel`: a transfer, a delivery, or a job.
pub(super) async fn cancel(global: &Global, id: String) -> Result<(), Fault> {
    if !id.starts_with("j-") {
        return act(global, id, Action::Cancel).await;
    }
    let job = Client::new(global)?.cancel_job(&id).await?;
    one(global.output, &job, |job| {
        format!(
            "job {} is {}\n",
            job.id,
            if job.state == "running" {
                "stopping"
            } else {
                &job.state
            }
        )
    })
}

/// `jobs`
pub(super) async fn jobs(global: &Global) -> Result<(), Fault> {
    let jobs: Vec<Job> = Client::new(global)?.get("/v1/jobs/list", &()).await?;
    rows(global.output, &jobs, |jobs| {
        let line = |job: &Job| {
            format!(
                "{}  {:9}  {}\n",
                job.id,
                job.state,
                human::clean(&job.doing)
            )
        };
        jobs.iter().map(line).collect()
    })
}

/// `artifacts`
pub(super) async fn artifacts(global: &Global) -> Result<(), Fault> {
    let artifacts: Vec<Artifact> = Client::new(global)?.get("/v1/artifacts", &()).await?;
    rows(global.output, &artifacts, |artifacts| {
        show_status::artifacts(artifacts, output::colour())
    })
}

/// `show`
pub(super) async fn show(global: &Global, artifact: &str) -> Result<(), Fault> {
    let detail: ArtifactDetail = Client::new(global)?
        .get("/v1/artifacts/show", &[("ref", artifact)])
        .await?;
    one(global.output, &detail, |detail| {
        show_status::artifact(detail, output::colour())
    })
}

/// `sites`
pub(super) async fn sites(global: &Global) -> Result<(), Fault> {
    let sites: Vec<Site> = Client::new(global)?.get("/v1/sites", &()).await?;
    rows(global.output, &sites, |sites| {
        show_status::sites(sites, output::colour())
    })
}

/// `plan`
pub(super) async fn plan(global: &Global, artifacts: Vec<String>, to: String) -> Result<(), Fault> {
    let plan: Vec<PlanRow> = Client::new(global)?
        .post("/v1/plan", &DeliverRequest { artifacts, to })
        .await?;
    rows(global.output, &plan, |plan| {
        show_status::plan(plan, output::colour())
    })
}

/// `verify`
pub(super) async fn verify(
    global: &Global,
    artifact: String,
    repair: bool,
    quick: bool,
) -> Result<(), Fault> {
    let request = VerifyRequest {
        artifact: artifact.clone(),
        repair,
        quick,
    };
    let Job { result, notes, .. } = job(global, "/v1/verify", &request).await?;
    let findings: Vec<String> = answer(result.unwrap_or_default())?;
    let result = json!({"artifact": artifact, "sound": findings.is_empty(), "findings": findings, "notes": notes});
    one(global.output, &result, |_| {
        let mut out = match findings.is_empty() {
            true if quick => format!("{artifact}: the quick check found no difference\n"),
            true => format!("{artifact} is intact\n"),
            false => String::new(),
        };
        out.extend(
            findings
                .iter()
                .map(|line| format!("{}\n", human::clean(line))),
        );
        out.extend(
            notes
                .iter()
                .map(|line| format!("  note: {}\n", human::clean(line))),
        );
        out
    })?;
    match findings.len() {
        0 => Ok(()),
        count => {
            let next = if repair {
                "no action is needed: the missing content is being delivered; run verify again when the transfer is done"
            } else if was_published_there(global, &artifact).await {
                "it was published at this site: restore the original content, or publish the current content as a new version"
            } else {
                "at a site: run the command again with --repair; at the hub: publish the same content again, then retry the failed transfers"
            };
            Err(Fault::integrity(format!(
                "{artifact}: {count} finding{}",
                if count == 1 { "" } else { "s" }
            ))
            .with_next(next))
        }
    }
}

/// Whether the artifact was published at this site, which then cannot repair it.
async fn was_published_there(global: &Global, artifact: &str) -> bool {
    let Ok(client) = Client::new(global) else {
        return false;
    };
    let detail: Result<ArtifactDetail, Fault> =
        client.get("/v1/artifacts/show", &[("ref", artifact)]).await;
    detail.is_ok_and(|detail| detail.artifact.published_here)
}

/// `pin`, `unpin`
pub(super) async fn pin(global: &Global, artifact: String, pinned: bool) -> Result<(), Fault> {
    let artifact: Artifact = Client::new(global)?
        .post("/v1/pin", &PinRequest { artifact, pinned })
        .await?;
    let what = if pinned {
        "kept regardless of its age"
    } else {
        "removed when it is old or space is needed"
    };
    one(global.output, &artifact, |a| {
        format!("the hub's copy of {} is {what}\n", a.artifact)
    })
}

/// `export`
pub(super) async fn export(
    global: &Global,
    artifacts: Vec<String>,
    out: &Path,
) -> Result<(), Fault> {
    let result = work(
        global,
        "/v1/export",
        &ExportRequest {
            artifacts,
            out: absolute(out)?,
        },
    )
    .await?;
    one(global.output, &result, value_text)
}

/// `export-labels`
pub(super) async fn export_labels(
    global: &Global,
    artifact: String,
    format: String,
    out: &Path,
) -> Result<(), Fault> {
    let request = ExportLabelsRequest {
        artifact,
        format,
        out: absolute(out)?,
    };
    let exported = job(global, "/v1/labels/export", &request).await?;
    one(global.output, &with_notes(exported), value_text)
}

/// `import`
pub(super) async fn import(global: &Global, file: &Path) -> Result<(), Fault> {
    let result = work(
        global,
        "/v1/import",
        &ImportRequest {
            file: absolute(file)?,
        },
    )
    .await?;
    one(global.output, &result, value_text)
}

/// `adopt`
pub(super) async fn adopt(global: &Global) -> Result<(), Fault> {
    let Job { result, .. } = job(global, "/v1/adopt", &json!({})).await?;
    let result = result.unwrap_or_default();
    one(global.output, &result, value_text)?;
    match result["differs"].as_array().map_or(0, Vec::len) {
        0 => Ok(()),
        count => Err(Fault::integrity(format!(
            "{count} versions on the NAS do not have the content of their artifacts"
        ))
        .with_next("move these directories to another location, then run 'packhorse deliver' for the artifacts at the hub")),
    }
}

/// `gc`
pub(super) async fn gc(global: &Global) -> Result<(), Fault> {
    let collected = job(global, "/v1/gc", &json!({})).await?;
    one(global.output, &with_notes(collected), value_text)
}

/// The result of a job, and its notes if it has any.
fn with_notes(Job { result, notes, .. }: Job) -> Value {
    let mut result = result.unwrap_or_default();
    if let Some(fields) = result.as_object_mut().filter(|_| !notes.is_empty()) {
        fields.insert("notes".into(), notes.into());
    }
    result
}

/// `store rebuild-index`
pub(super) async fn rebuild_index(global: &Global) -> Result<(), Fault> {
    let config = global.load_config()?;
    let rebuilt = serve::rebuild_index(&config).await?;
    rows(global.output, &rebuilt, |stores| {
        let kept = |kept: &Option<PathBuf>| {
            kept.as_ref()
                .map(|path| format!("; the previous index is {}", path.display()))
        };
        let line = |r: &Rebuilt| {
            let damaged = if r.damaged_bytes > 0 {
                format!(
                    "; {} bytes in packs belong to no whole chunk",
                    r.damaged_bytes
                )
            } else {
                String::new()
            };
            format!(
                "{}: {} chunks in {} packs{damaged}{}\n",
                r.store.display(),
                r.chunks,
                r.packs,
                kept(&r.kept).unwrap_or_default()
            )
        };
        stores.iter().map(line).collect()
    })
}

/// `doctor`
pub(super) async fn doctor(global: &Global) -> Result<(), Fault> {
    let lines: Vec<String> = Client::new(global)?.get("/v1/doctor", &()).await?;
    rows(global.output, &lines, |lines| {
        lines
            .iter()
            .map(|line| format!("{}\n", human::clean(line)))
            .collect()
    })?;
    match lines
        .iter()
        .filter(|line| line.starts_with("fault"))
        .count()
    {
        0 => Ok(()),
        bad => Err(
            Fault::internal(format!("{bad} of {} checks failed", lines.len()))
                .with_next("correct the faults that the lines describe")
                .with_retry(Retry::Never),
        ),
    }
}

/// Starts a job, waits for its end, and returns its result.
async fn work(
    global: &Global,
    path: &str,
    request: &impl serde::Serialize,
) -> Result<Value, Fault> {
    Ok(job(global, path, request).await?.result.unwrap_or_default())
}

async fn job(global: &Global, path: &str, request: &impl serde::Serialize) -> Result<Job, Fault> {
    let client = Client::new(global)?;
    let job: Job = client.post(path, request).await?;
    follow::job(&client, job, Deadline::after(None), &mut Progress::new()).await
}

fn answer<T: serde::de::DeserializeOwned>(result: Value) -> Result<T, Fault> {
    serde_json::from_value(result)
        .map_err(|e| Fault::internal(format!("cannot read the daemon's answer: {e}")))
}

/// A result as text: its fields, its lines, or the value itself.
fn value_text(value: &Value) -> String {
    let plain = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    match value {
        Value::Null => "done\n".into(),
        Value::Array(items) => items
            .iter()
            .map(|item| format!("{}\n", human::clean(&plain(item))))
            .collect(),
        Value::Object(map) => {
            let field = |(name, v): (&'_ String, &Value)| match v
                .as_u64()
                .filter(|_| name.contains("bytes") || name == "freed")
            {
                Some(count) => format!("{} ({count})", human::bytes(count)),
                None => plain(v),
            };
            fields(
                &map.iter()
                    .map(|(name, v)| (name.as_str(), field((name, v))))
                    .collect::<Vec<_>>(),
            )
        }
        other => format!("{}\n", human::clean(&plain(other))),
    }
}

/// The source of a publish. A path that is not UTF-8 becomes text in the encoding of the names.
fn source(publish: &Publish) -> Result<String, Fault> {
    let text = match (publish.source.to_str(), &publish.name_encoding) {
        (Some(text), _) => text.to_owned(),
        (None, Some(encoding)) => name_text(publish.source.as_bytes(), encoding)?.into_owned(),
        (None, None) => {
            return Err(
                Fault::usage(format!("{:?} is not UTF-8", publish.source)).with_next(
                    "state the encoding of the names, such as --name-encoding gbk, or rename it",
                ),
            );
        }
    };
    if text.contains("://") || text.starts_with("db:") {
        Ok(text)
    } else {
        absolute(&PathBuf::from(text))
    }
}

/// Makes a path absolute, because the daemon has another working directory.
fn absolute(path: &Path) -> Result<String, Fault> {
    let absolute = std::path::absolute(path)
        .map_err(|e| Fault::usage(format!("{} is not a path: {e}", path.display())))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|path| Fault::usage(format!("{path:?} is not UTF-8")).with_next("rename it"))
}
