//! The event stream: SSE for clients that can keep a stream open, a JSON array with a bounded wait
//! for others.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Json;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::Stream;
use futures::future::BoxFuture;

use super::error::{ApiError, ErrorBody};
use super::routes::{App, For, Q, rows, wait_for, with_cursor};
use super::types::{Event, EventQuery};
use base::fault::Fault;
use base::limits::{API_ROWS_DEFAULT, API_STREAM_EVENTS, LONG_POLL_MAX, SSE_HEARTBEAT};

/// Events in order. A client resumes with `Last-Event-ID` or `since`.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(EventQuery), responses(
    (status = 200, description = "a stream (`text/event-stream`; id: the event's seq, event: its what, data: the event), or with `Accept: application/json` or `format=json` an array and the header X-Packhorse-Cursor", body = Vec<Event>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn events(
    For(app): For,
    headers: HeaderMap,
    Q(query): Q<EventQuery>,
) -> Result<Response, ApiError> {
    let since = match headers.get("last-event-id") {
        None => query.since.unwrap_or(0),
        Some(id) => id
            .to_str()
            .ok()
            .and_then(|id| id.trim().parse().ok())
            .ok_or_else(|| Fault::usage("Last-Event-ID is not a number"))?,
    };
    if wants_json(&headers, &query)? {
        let limit = rows(query.limit).min(API_ROWS_DEFAULT);
        let look =
            || -> BoxFuture<'_, _> { Box::pin(app.listed(app.backend.events(since, limit))) };
        let events = wait_for(&app, query.wait, look, |events: &Vec<Event>| {
            !events.is_empty()
        })
        .await?;
        let cursor = events.last().map_or(since, |event| event.seq);
        return Ok(with_cursor(Json(events), cursor));
    }
    // A cursor that is refused must not become a stream: a client would connect again for ever.
    let ready = app
        .listed(app.backend.events(since, API_STREAM_EVENTS))
        .await?;
    let mut response = Sse::new(stream(app, since, ready.into()))
        .keep_alive(KeepAlive::new().interval(SSE_HEARTBEAT).text("heartbeat"))
        .into_response();
    // nginx, which is in front of many clusters, would buffer the stream.
    response
        .headers_mut()
        .insert("x-accel-buffering", header::HeaderValue::from_static("no"));
    Ok(response)
}

fn wants_json(headers: &HeaderMap, query: &EventQuery) -> Result<bool, Fault> {
    match query.format.as_deref() {
        Some("json") => Ok(true),
        Some("sse") => Ok(false),
        Some(other) => Err(Fault::usage(format!("format {other:?} is not known"))
            .with_next("use format=json or format=sse")),
        None => {
            let accept = headers
                .get(header::ACCEPT)
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default();
            Ok(accept.contains("application/json") && !accept.contains("text/event-stream"))
        }
    }
}

/// The position of a stream.
struct Cursor {
    app: App,
    since: u64,
    ready: VecDeque<Event>,
    ended: bool,
}

/// Events as they occur, at most one batch in memory, until the client disconnects or the daemon
/// stops. A fault is sent as an event named `error`, after which the stream ends.
fn stream(
    app: App,
    since: u64,
    ready: VecDeque<Event>,
) -> impl Stream<Item = Result<SseEvent, Infallible>> + Send + 'static {
    let start = Cursor {
        app,
        since,
        ready,
        ended: false,
    };
    futures::stream::unfold(start, |mut cursor| async move {
        if cursor.ended {
            return None;
        }
        while cursor.ready.is_empty() {
            if cursor.app.stop.is_cancelled() {
                return None;
            }
            let look = || -> BoxFuture<'_, _> {
                Box::pin(
                    cursor
                        .app
                        .listed(cursor.app.backend.events(cursor.since, API_STREAM_EVENTS)),
                )
            };
            match wait_for(
                &cursor.app,
                Some(LONG_POLL_MAX.as_secs()),
                look,
                |events: &Vec<Event>| !events.is_empty(),
            )
            .await
            {
                Ok(events) => cursor.ready = events.into(),
                Err(fault) => {
                    cursor.ended = true;
                    return Some((Ok(error_frame(&fault)), cursor));
                }
            }
        }
        let event = cursor.ready.pop_front()?;
        cursor.since = event.seq;
        let sent = frame(&event).unwrap_or_else(|fault| {
            cursor.ended = true;
            error_frame(&fault)
        });
        Some((Ok(sent), cursor))
    })
}

/// The last event of a stream that failed.
fn error_frame(fault: &Fault) -> SseEvent {
    let body = ErrorBody::from(fault).to_json();
    SseEvent::default().event("error").data(body)
}

fn frame(event: &Event) -> Result<SseEvent, Fault> {
    let data = serde_json::to_string(event)
        .map_err(|e| Fault::internal(format!("event {} has no JSON form: {e}", event.seq)))?;
    // A name with a line break would be a frame of its own; these names are single words.
    let name: String = event.what.chars().filter(|c| !c.is_control()).collect();
    Ok(SseEvent::default()
        .id(event.seq.to_string())
        .event(name)
        .data(data))
}
