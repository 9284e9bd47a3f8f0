//! One site's line at the hub: the desired state goes out, reports come in, fetches and questions are answered.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{Connected, Hub};
use crate::api::types::{Action, State};
use crate::catalogue::{TransferRow, Want};
use crate::fault::Fault;
use crate::fetch;
use crate::identity::verify_signature;
use crate::limits::FETCH_STREAMS_MAX;
use crate::line::{Link, RecvHalf, SendHalf};
use crate::names::SiteName;
use crate::wire::{self, AskHub, CONTROL, Desired, FETCH, FromHub, FromSite, QUESTION, Report};

impl Hub {
    /// Serves a site until its line ends.
    pub(super) async fn welcome(&self, name: SiteName, link: Link, cert_der: Vec<u8>) {
        let known = self.inner.catalogue.sites().await.is_ok_and(|sites| sites.iter().any(|s| s.name == name));
        if !known {
            link.close("the hub does not know this site: join again");
            return;
        }
        let connected = Connected { link: link.clone(), cert_der: Arc::new(cert_der) };
        let old = self.inner.links.write().insert(name.clone(), connected.clone());
        if let Some(old) = old {
            old.link.close("the site has a newer line");
        }
        tracing::info!(site = %name, line = link.transport(), "a site is online");
        self.note_seen(&name, None).await;
        let streams = Arc::new(tokio::sync::Semaphore::new(FETCH_STREAMS_MAX));
        loop {
            let stream = tokio::select! {
                stream = link.accept() => stream,
                () = self.inner.stop.cancelled() => None,
            };
            let Some((send, recv)) = stream else { break };
            let Ok(turn) = streams.clone().acquire_owned().await else { break };
            let (this, name) = (self.clone(), name.clone());
            self.inner.tasks.spawn(async move {
                this.stream(send, recv, name).await;
                drop(turn);
            });
        }
        link.close("the hub stops");
        {
            let mut links = self.inner.links.write();
            // A newer line of the same site stays.
            if links.get(&name).is_some_and(|c| Arc::ptr_eq(&c.cert_der, &connected.cert_der)) {
                links.remove(&name);
            }
        }
        tracing::info!(site = %name, "a site is offline");
        self.note_seen(&name, None).await;
    }

    async fn note_seen(&self, name: &SiteName, version: Option<&str>) {
        if let Err(fault) = self.inner.catalogue.site_seen(name, version).await {
            tracing::error!(site = %name, error = %fault, "the catalogue cannot be written");
        }
    }

    async fn stream(&self, send: SendHalf, mut recv: RecvHalf, site: SiteName) {
        let mut kind = [0];
        if recv.read_exact(&mut kind).await.is_err() {
            return;
        }
        let result = match kind[0] {
            FETCH => {
                fetch::serve(send, recv, &site, self).await;
                Ok(())
            }
            CONTROL => self.control(send, recv, &site).await,
            QUESTION => self.question(send, recv, &site).await,
            other => Err(Fault::integrity(format!("a stream of kind {other}"))),
        };
        if let Err(fault) = result {
            tracing::debug!(%site, error = %fault, "a stream ended");
        }
    }

    /// The control stream: whatever changes, the whole desired state is sent again.
    async fn control(&self, mut send: SendHalf, mut recv: RecvHalf, site: &SiteName) -> Result<(), Fault> {
        send.set_priority(wire::PRIORITY_CONTROL);
        let read = async {
            loop {
                match wire::receive::<FromSite>(&mut recv).await? {
                    FromSite::Hello { version } => self.note_seen(site, Some(&version)).await,
                    FromSite::Report(reports) => {
                        for report in reports {
                            // One bad report must not end the line for all the others.
                            let id = report.id.clone();
                            if let Err(fault) = self.take_report(site, report).await {
                                tracing::warn!(%site, transfer = %id, error = %fault, "a report was refused");
                            }
                        }
                    }
                }
            }
            #[expect(unreachable_code, reason = "says the type of an endless loop's error")]
            Ok::<(), Fault>(())
        };
        let write = async {
            let mut last: Option<Vec<Desired>> = None;
            let mut revision = 0;
            loop {
                let changed = self.inner.catalogue.changed();
                tokio::pin!(changed);
                let now: Vec<Desired> = self.inner.catalogue.open_transfers(site).await?.into_iter().map(desired).collect();
                if last.as_ref() != Some(&now) {
                    revision += 1;
                    wire::send(&mut send, &FromHub::Desired { revision, transfers: now.clone() }).await?;
                    last = Some(now);
                }
                changed.await;
            }
            #[expect(unreachable_code, reason = "says the type of an endless loop's error")]
            Ok::<(), Fault>(())
        };
        tokio::select! {
            result = read => result,
            result = write => result,
            () = self.inner.stop.cancelled() => Ok(()),
        }
    }

    async fn take_report(&self, site: &SiteName, report: Report) -> Result<(), Fault> {
        let Ok(row) = self.inner.catalogue.transfer(&report.id).await else { return Ok(()) };
        if row.site != *site {
            return Err(Fault::not_allowed(format!("site {site} reports a transfer of {}", row.site)));
        }
        // What somebody held or gave up here stays so until the site has heard of it.
        let held = (row.state == State::Paused && row.want == Want::Pause && report.state != State::Paused && report.state != State::Done)
            || row.state == State::Cancelled;
        if row.state == State::Cancelled && row.want == Want::Cancel && report.state.is_final() {
            return self.inner.catalogue.confirm_cancelled(&row.id).await;
        }
        if held || report.generation < row.generation {
            return Ok(());
        }
        if report.state == State::Done {
            self.check_receipt(&row, report.body.receipt.as_ref())?;
        }
        self.inner.catalogue.update_transfer(&report.id, row.generation, report.state, &report.body).await
    }

    async fn question(&self, mut send: SendHalf, mut recv: RecvHalf, site: &SiteName) -> Result<(), Fault> {
        let answer = match wire::receive::<AskHub>(&mut recv).await? {
            AskHub::Act { id, action } => self.act_for(site, &id, action).await,
            AskHub::Deliver { artifacts, to } => self.deliver_for(site, &artifacts, &to).await,
            AskHub::Renew { request } => self.renew(site, &request),
        };
        wire::send(&mut send, &answer).await?;
        send.finish()
    }

    /// A site may send on what it was given, and nothing else: it cannot make itself entitled to the rest.
    async fn deliver_for(&self, site: &SiteName, artifacts: &[String], to: &str) -> Result<serde_json::Value, Fault> {
        for artifact in artifacts {
            let held = match self.inner.catalogue.artifact(&artifact.parse()?).await {
                Ok(row) => self.inner.catalogue.is_entitled(site, row.digest).await?,
                Err(_) => false,
            };
            if !held {
                return Err(Fault::not_found(format!("site {site} holds no artifact {artifact}")));
            }
        }
        let delivered = self.deliver_to(artifacts, to).await?;
        serde_json::to_value(delivered).map_err(|e| Fault::internal(e.to_string()))
    }

    fn renew(&self, site: &SiteName, request: &str) -> Result<serde_json::Value, Fault> {
        let request = hex::decode(request).map_err(|_| Fault::integrity("a malformed certificate request"))?;
        Ok(serde_json::Value::String(hex::encode(self.inner.identity.issue_for(site, &request)?)))
    }

    async fn act_for(&self, site: &SiteName, id: &str, action: Action) -> Result<serde_json::Value, Fault> {
        let rows = self.inner.catalogue.transfers_of(id).await?;
        if rows.iter().any(|row| row.site != *site) {
            return Err(Fault::not_found(format!("there is no transfer {id} at this site")));
        }
        let rows = self.act_on(id, action).await?;
        serde_json::to_value(rows).map_err(|e| Fault::internal(e.to_string()))
    }

    /// Asks a site that is online.
    pub(super) async fn ask_site<T: serde::de::DeserializeOwned>(&self, site: &SiteName, question: &wire::AskSite) -> Result<T, Fault> {
        let link = self.inner.links.read().get(site).map(|c| c.link.clone());
        let link = link.ok_or_else(|| Fault::unreachable(format!("site {site} is not connected")))?;
        let (mut send, mut recv) = link.open(wire::PRIORITY_QUESTION).await?;
        send.write_all(&[QUESTION]).await?;
        wire::send(&mut send, question).await?;
        send.finish()?;
        wire::receive::<Result<T, Fault>>(&mut recv).await?
    }
}

fn desired(row: TransferRow) -> Desired {
    Desired {
        id: row.id,
        delivery: row.delivery,
        artifact: row.artifact,
        digest: row.digest,
        want: row.want,
        generation: row.generation,
        total: row.body.bytes.total,
        created_ms: row.created_ms,
    }
}

impl Hub {
    /// "Done" counts only with a receipt that a key of this very site signed for this very artifact. The certificate
    /// comes with it, since the site may have renewed its own between the commit and the report.
    fn check_receipt(&self, row: &TransferRow, receipt: Option<&serde_json::Value>) -> Result<(), Fault> {
        let wrong = |why: &str| Fault::integrity(format!("the receipt for transfer {} {why}", row.id));
        let text = |key: &str| receipt.and_then(|r| r.get(key)).and_then(|v| v.as_str()).ok_or_else(|| wrong("is missing"));
        let bytes = |key: &str| BASE64.decode(text(key)?).map_err(|_| wrong("is malformed"));
        let (certificate, statement) = (bytes("certificate")?, text("statement")?);
        if self.inner.identity.verify_site(&certificate)? != row.site {
            return Err(wrong("is signed by another site"));
        }
        verify_signature(&certificate, statement.as_bytes(), &bytes("signature")?)?;
        let said: serde_json::Value = serde_json::from_str(statement).map_err(|_| wrong("is malformed"))?;
        let matches =
            said["digest"] == row.digest.hex() && said["artifact"] == row.artifact.to_string() && said["site"] == row.site.as_str();
        if matches { Ok(()) } else { Err(wrong("is for something else")) }
    }
}
