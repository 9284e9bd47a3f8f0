//! The answers of a daemon that cannot open its state because there is no room: the reason, at
//! once, for every request.

use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::get;
use axum::{Json, Router, middleware};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::proof::{Proof, ProofQuery};
use super::routes::{Q, healthz, presented, stamp};
use super::server::{Connection, Server};
use super::{ApiToken, LocalSocket};
use base::fault::Fault;

#[derive(Clone)]
struct Starting {
    token: ApiToken,
    why: watch::Receiver<Option<Fault>>,
}

/// Answers every request with `why`, when there is a reason. It never returns: when this future is
/// dropped, its connections end, and the listeners are free for [`serve`](super::serve).
pub async fn serve_starting(
    listener: &TcpListener,
    local: Option<&LocalSocket>,
    token: &ApiToken,
    mut why: watch::Receiver<Option<Fault>>,
) {
    if why.wait_for(Option::is_some).await.is_err() {
        return std::future::pending().await;
    }
    let stop = CancellationToken::new();
    let _ends_with_this = stop.clone().drop_guard();
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/v1/proof", get(proof))
        .fallback(answer)
        .layer(middleware::from_fn(stamp))
        .with_state(Starting {
            token: token.clone(),
            why,
        });
    let server = Server::new(router, stop);
    tokio::select! {
        () = server.accept_tcp(listener) => {}
        () = server.accept_local(local) => {}
    }
}

/// The reason for a client with the token; no path of this machine for any other client.
async fn answer(
    State(starting): State<Starting>,
    Extension(connection): Extension<Connection>,
    headers: HeaderMap,
) -> ApiError {
    let why = starting.why.borrow().clone();
    match why {
        Some(fault) if presented(&headers).is_some_and(|token| starting.token.is(token)) => {
            connection.finish();
            fault.into()
        }
        _ => ApiError::with_status(
            Fault::unreachable(
                "the daemon has not started yet: it waits for room on the disk of its state",
            )
            .with_next("see the log of the daemon"),
            StatusCode::SERVICE_UNAVAILABLE,
        ),
    }
}

async fn proof(
    State(starting): State<Starting>,
    Extension(connection): Extension<Connection>,
    Q(query): Q<ProofQuery>,
) -> Result<Json<Proof>, ApiError> {
    let address = connection
        .local
        .map(|address| address.to_string())
        .unwrap_or_default();
    let proof = Proof::make(&starting.token, &query, address);
    Ok(Json(proof.ok_or_else(|| {
        Fault::usage("the challenge is not 32 bytes in hex")
    })?))
}
