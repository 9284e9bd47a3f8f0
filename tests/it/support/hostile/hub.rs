//! A hostile hub with the real hub's keys, as after a break-in. It sends what the test requests.

use std::sync::Arc;
use std::time::Duration;

use base::limits::CONNECTION_SEND_BYTES_MAX;
use content::manifest::Digest;
use serde_json::{Value, json};
use transport::identity::HubIdentity;
use transport::{Arrival, Listener};

use super::super::daemon::Hub;
use super::super::secs;
use super::{Connection, RUNTIME, Stream, over, within};

/// The listener at the real hub's address.
pub(crate) struct FalseHub {
    listener: Listener,
}

impl FalseHub {
    /// Kills the hub and listens at its address.
    #[track_caller]
    pub(crate) fn take_over(hub: &mut Hub) -> Self {
        hub.kill();
        let name = "hub".parse().expect("the hub's name");
        let identity =
            Arc::new(HubIdentity::open_or_create(&hub.data_dir, &name).expect("the hub's keys"));
        let _within = RUNTIME.enter();
        let line = over(packhorse::config::Transport::Auto);
        let listener = Listener::bind(
            hub.quic,
            identity,
            Arc::new(transport::testing::AdmitAll),
            &line,
            CONNECTION_SEND_BYTES_MAX,
            &base::workers::Workers::default(),
        )
        .expect("bind the hub's address");
        Self { listener }
    }

    /// Waits for a site. Returns its connection, and its control stream after its hello.
    #[track_caller]
    pub(crate) fn site(&self, limit: Duration) -> (Connection, Stream) {
        let link = within("a site connects", limit, async {
            loop {
                match self.listener.accept().await.expect("the listener works") {
                    Arrival::Site { link, .. } => return link,
                    _ => continue,
                }
            }
        });
        let connection = Connection::new(link);
        loop {
            let (kind, mut stream) = connection.accept(limit);
            if kind == b'C' {
                stream.receive(secs(20)).expect("the site says hello");
                return (connection, stream);
            }
        }
    }
}

/// The desired state that a hub sends to a site.
pub(crate) fn desired(revision: u64, transfers: &[Value]) -> Value {
    json!({"desired": {"revision": revision, "transfers": transfers, "runs": [], "manifests": []}})
}

/// One transfer of the desired state; a test makes parts of it invalid.
pub(crate) fn wanted(id: &str, artifact: &str, digest: Digest, want: &str) -> Value {
    json!({
        "id": id, "delivery": "d-x", "artifact": artifact, "digest": digest.hex(), "want": want,
        "generation": 0, "total": 0, "created_ms": 1_700_000_000_000_i64, "after": [], "lineage": null,
    })
}
