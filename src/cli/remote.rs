//! `publish --hub`: publishes from this machine at a remote hub, without a local daemon.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::args::{Global, Publish};
use super::commands::{note_omitted, published_text};
use super::follow::{Deadline, Progress};
use super::human;
use super::output::one;
use crate::api::types::SourceOptions;
use crate::publisher::{self, Asked};
use base::fault::Fault;
use base::job_progress::JobProgress;

/// The time between two updates of the progress.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// `publish --hub`
pub(super) async fn publish(
    global: &Global,
    publish: Publish,
    source: String,
    hub: String,
    options: SourceOptions,
) -> Result<(), Fault> {
    if publish.wait.wait {
        return Err(
            Fault::usage("--wait cannot be used with --hub: it needs the API of the hub")
                .with_next("omit --wait, and run 'packhorse status' at the hub"),
        );
    }
    let deadline = Deadline::after(publish.wait.timeout);
    let asked = Asked {
        source,
        artifact: publish.as_ref.parse()?,
        to: publish.to,
        options,
        hub,
        token: publish.join_token,
        state: state_dir(publish.state)?,
    };
    let watched = Arc::new(JobProgress::default());
    let work = publisher::publish(asked, watched.clone());
    tokio::pin!(work);
    let mut progress = Progress::new();
    let uploaded = loop {
        tokio::select! {
            result = &mut work => break result?,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        if deadline.passed() {
            return Err(
                Fault::deadline("the time is over before all content was sent to the hub")
                    .with_next("run the command again; content that the hub has is not sent again"),
            );
        }
        let (bytes, doing) = (watched.bytes.load(Ordering::Relaxed), watched.what());
        let total = watched.total.load(Ordering::Relaxed);
        progress.update(bytes, total, || {
            format!("{}: {}", human::clean(&doing), human::bytes(bytes))
        });
    };
    drop(progress);
    one(global.output, &uploaded, |uploaded| {
        format!(
            "{}  {} sent and received over the network\n",
            published_text(&uploaded.published),
            human::bytes(uploaded.wire)
        )
    })?;
    note_omitted(&uploaded.published);
    Ok(())
}

/// The directory of the publisher's certificate.
fn state_dir(given: Option<PathBuf>) -> Result<PathBuf, Fault> {
    let home = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    given
        .or_else(|| home("XDG_DATA_HOME").map(|data| data.join("packhorse")))
        .or_else(|| home("HOME").map(|home| home.join(".local/share/packhorse")))
        .ok_or_else(|| {
            Fault::usage("the home directory is unknown: HOME is not set")
                .with_next("give --state DIR")
        })
}
