//! Starts the trainer of a run: a command of this machine, or a training platform that is called
//! over HTTP; and informs a platform that its run has ended.
//!
//! [`super::RunKeeper`] calls this when the state machine of the run requires it. The descriptor of
//! a run is written before the trainer starts, and survives a crash.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};

use super::RunKeeper;
use crate::api::RunToken;
use base::blocking::blocking;
use base::clock;
use base::fault::Fault;
use base::limits::TRAINER_CALL_MAX;
use base::names::{Kind, RunName};
use model::run::site::{Phase, Run};

impl RunKeeper {
    /// Starts the trainer command of this site for a run.
    pub(super) async fn start_command(&self, run: &Run) -> Result<(), Fault> {
        let Some(train) = &self.opened.config.train else {
            return Err(Fault::config("there is no [train]"));
        };
        let descriptor = self.descriptor(run).await?;
        let folder = self.folder(run);
        let path = folder.descriptor().display().to_string();
        let mut command = train.command.clone();
        command.push(path.clone());
        let environment = BTreeMap::from([
            ("PACKHORSE_RUN".to_owned(), path),
            (
                "PACKHORSE_API".to_owned(),
                format!("http://{}", from_here(self.opened.config.listen.api)),
            ),
            // Never the admin token: this token may only publish and finish this run, during its
            // training.
            (
                "PACKHORSE_TOKEN_FILE".to_owned(),
                folder.token().display().to_string(),
            ),
        ]);
        let (deadline_ms, token) = (run.spec.deadline_ms, RunToken::new(run.spec.name.clone())?);
        blocking(move || {
            folder.prepare(&descriptor)?;
            folder.keep_token(&token)?;
            folder.start(&command, environment, deadline_ms)
        })
        .await
    }

    /// Calls the training platform of this site for a run.
    pub(super) async fn call_platform(&self, run: &Run) -> Result<(), Fault> {
        self.check_inputs(run).await?;
        let descriptor = self.descriptor(run).await?;
        let (folder, text, id) = (self.folder(run), descriptor.clone(), run.spec.id.clone());
        // A platform may have accepted a call that was not answered: the output that it has written
        // since is kept.
        blocking(move || {
            if folder.descriptor_of(&id)?.is_some() {
                Ok(())
            } else {
                folder.prepare(&text)
            }
        })
        .await?;
        self.post(&descriptor).await
    }

    /// Informs a platform that its run has ended, with the content of the first call.
    pub(super) async fn call_off(&self, run: &Run) -> Result<(), Fault> {
        let (folder, id) = (self.folder(run), run.spec.id.clone());
        // Without a descriptor the platform was never called.
        let Some(mut descriptor) = blocking(move || folder.descriptor_of(&id)).await? else {
            return Ok(());
        };
        descriptor["cancel"] = true.into();
        self.post(&descriptor).await
    }

    async fn post(&self, descriptor: &Value) -> Result<(), Fault> {
        let url = self
            .opened
            .config
            .train
            .as_ref()
            .and_then(|train| train.url.clone());
        let Some(url) = url else {
            return Err(Fault::config("there is no [train] url"));
        };
        // Set once for each process; every caller sets the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(TRAINER_CALL_MAX)
            .build();
        let client =
            client.map_err(|e| Fault::internal(format!("cannot create an HTTP client: {e}")))?;
        let unreachable =
            |why: String| Fault::unreachable(format!("the training platform at {url} {why}"));
        let answer = client
            .post(&url)
            .json(descriptor)
            .send()
            .await
            .map_err(|e| unreachable(format!("does not answer: {e}")))?;
        if answer.status().is_success() {
            Ok(())
        } else {
            Err(unreachable(format!("answers {}", answer.status())))
        }
    }

    /// The descriptor for a trainer: the location of each input, and the output folder for the
    /// model.
    async fn descriptor(&self, run: &Run) -> Result<Value, Fault> {
        let spec = &run.spec;
        let mut inputs = Vec::new();
        for input in &spec.inputs {
            let row = self.opened.catalogue.artifact(&input.artifact).await?;
            let artifact = &input.artifact;
            let mut about = json!({
                "artifact": artifact, "kind": artifact.kind, "name": artifact.name(), "version": artifact.version(),
                "digest": input.digest.hex(), "bytes": input.bytes,
            });
            let more = match artifact.kind {
                Kind::Dataset | Kind::Operator | Kind::Model => json!({ "path": row.location }),
                Kind::Image => json!({ "image": row.location }),
                Kind::Labels => {
                    let sink = self.opened.config.labels_sink();
                    let schema = if sink.url.starts_with("sqlite:") {
                        ""
                    } else {
                        "packhorse."
                    };
                    json!({
                        "database": sink.url, "table": format!("{schema}annotations"),
                        "label_set": artifact.name(), "location": row.location,
                        "rows": row.place.as_ref().and_then(|place| match place {
                            sink::StorageLocation::Folder { path } => Some(path.display().to_string()),
                            sink::StorageLocation::Registry { .. } => None,
                        }),
                    })
                }
            };
            if let (Some(about), Value::Object(more)) = (about.as_object_mut(), more) {
                about.extend(more);
            }
            inputs.push(about);
        }
        let deadline = clock::rfc3339_ms(spec.deadline_ms);
        Ok(json!({
            "run": spec.name, "id": spec.id, "from": spec.from, "on": spec.on, "start": run.starts, "deadline_at": deadline,
            "inputs": inputs, "output": self.folder(run).output(), "expect": spec.expect,
            "model": spec.expect.reference(&spec.name)?,
        }))
    }

    /// The token of a run, during its training at this site.
    pub(in crate::site) async fn token_of(&self, name: &RunName) -> Option<RunToken> {
        let run = self
            .opened
            .catalogue
            .run::<Run>(name.as_str())
            .await
            .ok()??;
        if run.phase != Phase::Training || run.by_platform {
            return None;
        }
        let folder = self.folder(&run);
        blocking(move || Ok(folder.read_token()))
            .await
            .ok()?
            .filter(|token| token.run() == name)
    }
}

/// The address by which a local process reaches an address that the daemon listens on.
fn from_here(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}
