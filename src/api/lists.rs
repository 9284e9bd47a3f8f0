//! Lists. Each is read and sent a page at a time, so that neither a long list nor a slow reader
//! takes much memory: a page has [`API_PAGE_BYTES`], and only a few are created at once. The answer
//! is still one JSON array, or one object with an array in it.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::HeaderName};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use serde::Serialize;

use super::NEXT_HEADER;
use super::error::{ApiError, ErrorBody};
use super::routes::{App, B, For, Q, rows, wait_for, with_cursor};
use super::types::*;
use base::fault::Fault;
use base::limits::{API_PAGE_BYTES, API_PAGE_ROWS, API_QUERY_IDS_MAX, API_ROWS_DEFAULT};
use model::paging::{Page, Room};

/// Reads the page after a key.
type Read<T> =
    Box<dyn Fn(App, Option<String>, Room) -> BoxFuture<'static, Result<Page<T>, Fault>> + Send>;

/// A list that is being sent.
struct List<T> {
    app: App,
    read: Read<T>,
    /// The next page, if it was read already.
    ready: Option<Page<T>>,
    /// The key after which the next page begins.
    behind: Option<String>,
    /// Rows that may still be sent.
    left: u32,
    /// The rows that were sent, if the pages may repeat rows.
    sent: SentRows,
    /// The id of a row.
    id: Option<fn(&T) -> &str>,
    /// The text before the next row, and after the last.
    before: String,
    tail: String,
    ended: bool,
}

impl<T: Serialize + Send + 'static> List<T> {
    /// A list of at most so many rows, as a JSON array.
    fn new(app: App, rows: u32, read: Read<T>) -> Self {
        Self {
            app,
            read,
            ready: None,
            behind: None,
            left: rows,
            sent: SentRows::default(),
            id: None,
            before: "[".into(),
            tail: "]".into(),
            ended: false,
        }
    }

    /// Sends each row with the same id only once.
    fn unique_by(self, id: fn(&T) -> &str) -> Self {
        Self {
            id: Some(id),
            ..self
        }
    }

    /// The same as a field of an object, which contains it as an empty list.
    fn within(self, object: &impl Serialize, field: &str) -> Result<Self, Fault> {
        let json = |e: serde_json::Error| Fault::internal(format!("an answer as JSON: {e}"));
        let mut object = serde_json::to_value(object).map_err(json)?;
        object
            .as_object_mut()
            .and_then(|fields| fields.remove(field));
        let text = serde_json::to_string(&object).map_err(json)?;
        let fields = text.strip_suffix('}').unwrap_or(&text);
        Ok(Self {
            before: format!("{fields},\"{field}\":["),
            tail: "]}".into(),
            ..self
        })
    }

    fn room(&self) -> Room {
        Room {
            rows: self.left.min(API_PAGE_ROWS),
            bytes: API_PAGE_BYTES,
        }
    }

    async fn page(&mut self) -> Result<Page<T>, Fault> {
        match self.ready.take() {
            Some(page) => Ok(page),
            None => {
                let page = (self.read)(self.app.clone(), self.behind.take(), self.room());
                self.app.listed(page).await
            }
        }
    }

    /// The answer. The first page is read before the answer starts, so that a failure is an error
    /// in the usual form. If it is the only page, the answer has a length.
    async fn into_response(mut self) -> Result<Response, ApiError> {
        let first = self.step().await?;
        if self.ended {
            return Ok(([(header::CONTENT_TYPE, "application/json")], first).into_response());
        }
        let first = futures::stream::iter([Ok(first)]);
        let body = Body::from_stream(first.chain(futures::stream::unfold(
            self,
            |mut list| async move {
                if list.ended {
                    return None;
                }
                let text = list.step().await;
                list.ended |= text.is_err();
                Some((text.map_err(std::io::Error::other), list))
            },
        )));
        Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
    }

    /// The text of the next page. A fault ends the body early, which a reader detects.
    async fn step(&mut self) -> Result<Bytes, Fault> {
        let mut page = self.page().await?;
        let was_empty = page.rows.is_empty();
        if let Some(id) = self.id.filter(|_| page.repeats) {
            page.rows.retain(|row| self.sent.insert(id(row)));
        }
        let mut text = Vec::new();
        for row in &page.rows {
            text.extend_from_slice(self.before.as_bytes());
            self.before = ",".into();
            serde_json::to_writer(&mut text, row)
                .map_err(|e| Fault::internal(format!("an answer as JSON: {e}")))?;
        }
        self.left = self
            .left
            .saturating_sub(u32::try_from(page.rows.len()).unwrap_or(u32::MAX));
        self.behind = page.next.filter(|_| self.left > 0 && !was_empty);
        if self.behind.is_none() {
            if self.before != "," {
                text.extend_from_slice(self.before.as_bytes());
            }
            text.extend_from_slice(self.tail.as_bytes());
            self.ended = true;
        }
        Ok(text.into())
    }
}

/// The ids of the rows that were sent, as hashes: a long list takes little memory.
#[derive(Default)]
struct SentRows {
    hasher: RandomState,
    ids: HashSet<u64>,
}

impl SentRows {
    /// Adds a row; `false` if it was sent before.
    fn insert(&mut self, id: &str) -> bool {
        self.ids.insert(self.hasher.hash_one(id))
    }
}

/// The transfers that a query selects, at most `rows` of them.
fn transfer_list(app: App, rows: u32, query: TransferQuery) -> List<Transfer> {
    List::new(app, rows, transfers_of(query)).unique_by(|transfer| &transfer.id)
}

/// The transfers of ids, or the newest.
fn transfers_of(query: TransferQuery) -> Read<Transfer> {
    Box::new(move |app, behind, room| {
        let query = query.clone();
        Box::pin(async move {
            Ok(app
                .backend
                .transfers(&query, behind.as_deref(), room)
                .await?
                .0)
        })
    })
}

/// All artifacts.
#[utoipa::path(get, path = "/v1/artifacts", tag = "artifacts", responses(
    (status = 200, description = "all artifacts that this daemon knows", body = Vec<Artifact>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn artifacts(For(app): For) -> Result<Response, ApiError> {
    let read: Read<Artifact> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.artifacts(behind.as_deref(), room).await })
    });
    List::new(app, u32::MAX, read).into_response().await
}

/// One artifact and its transfers.
#[utoipa::path(get, path = "/v1/artifacts/show", tag = "artifacts", params(ShowQuery), responses(
    (status = 200, description = "the artifact", body = ArtifactDetail),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn show(For(app): For, Q(query): Q<ShowQuery>) -> Result<Response, ApiError> {
    let detail = app.listed(app.backend.show(&query.artifact)).await?;
    let read: Read<Transfer> = Box::new(move |app, behind, room| {
        let artifact = query.artifact.clone();
        Box::pin(async move {
            app.backend
                .transfers_of_artifact(&artifact, behind.as_deref(), room)
                .await
        })
    });
    List::new(app, u32::MAX, read)
        .within(&detail, "transfers")?
        .into_response()
        .await
}

/// Transfers: a snapshot, or with `since` the changes after that cursor, with a wait of up to
/// `wait` seconds (50 at most). The header X-Packhorse-Cursor is the next `since`; with
/// X-Packhorse-Next there are more changes already.
#[utoipa::path(get, path = "/v1/transfers", tag = "transfers", params(TransferQuery), responses(
    (status = 200, description = "the transfers", body = Vec<Transfer>, headers(
        ("X-Packhorse-Cursor" = u64, description = "the next `since`"),
        ("X-Packhorse-Next" = u64, description = "the same, where the answer had no room for all that changed"),
    )),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn transfers(
    For(app): For,
    Q(query): Q<TransferQuery>,
) -> Result<Response, ApiError> {
    let limit = rows(query.limit);
    if query
        .id
        .as_ref()
        .is_some_and(|ids| ids.split(',').count() > API_QUERY_IDS_MAX)
    {
        return Err(
            Fault::usage(format!("a query has at most {API_QUERY_IDS_MAX} ids"))
                .with_next("ask for fewer at once")
                .into(),
        );
    }
    if query.since.is_none() {
        // The answer is the current state: without a cursor there is nothing to wait for. With ids
        // it is complete.
        let limit = if query.id.is_some() { u32::MAX } else { limit };
        let mut list = transfer_list(app, limit, query.clone());
        let (first, cursor) = list
            .app
            .listed(list.app.backend.transfers(&query, None, list.room()))
            .await?;
        list.ready = Some(first);
        return Ok(with_cursor(list.into_response().await?, cursor));
    }
    // A client that continues from the cursor gets the rest.
    let room = Room {
        rows: limit.min(API_ROWS_DEFAULT),
        bytes: API_PAGE_BYTES,
    };
    let look =
        || -> BoxFuture<'_, _> { Box::pin(app.listed(app.backend.transfers(&query, None, room))) };
    let (page, cursor) =
        wait_for(&app, query.wait, look, |(page, _)| !page.rows.is_empty()).await?;
    let mut response = with_cursor(Json(&page.rows), cursor);
    if page.next.is_some() {
        response.headers_mut().insert(
            HeaderName::from_static(NEXT_HEADER),
            HeaderValue::from(cursor),
        );
    }
    Ok(response)
}

/// Pauses, resumes, cancels or retries a transfer, or all of a delivery.
#[utoipa::path(post, path = "/v1/transfers/action", tag = "transfers", request_body = ActionRequest, responses(
    (status = 200, description = "the transfers after it", body = Vec<Transfer>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn act(For(app): For, B(request): B<ActionRequest>) -> Result<Response, ApiError> {
    let query = TransferQuery {
        id: Some(request.id.clone()),
        ..TransferQuery::default()
    };
    let mut list = transfer_list(app, u32::MAX, query);
    list.ready = Some(
        list.app
            .backend
            .act(&request.id, request.action, list.room())
            .await?,
    );
    list.into_response().await
}

/// The newest deliveries, each with its parts; of a long one, the first parts and their number.
#[utoipa::path(get, path = "/v1/deliveries", tag = "transfers", params(LimitQuery), responses(
    (status = 200, description = "the deliveries, newest first", body = Vec<Delivery>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn deliveries(
    For(app): For,
    Q(query): Q<LimitQuery>,
) -> Result<Response, ApiError> {
    let read: Read<Delivery> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.deliveries(behind.as_deref(), room).await })
    });
    List::new(app, rows(query.limit), read)
        .into_response()
        .await
}

/// One delivery and its parts, at its end or after `wait` seconds (50 at most), whichever is first.
#[utoipa::path(get, path = "/v1/deliveries/show", tag = "transfers", params(DeliveryQuery), responses(
    (status = 200, description = "the delivery", body = Delivery),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn delivery(
    For(app): For,
    Q(query): Q<DeliveryQuery>,
) -> Result<Response, ApiError> {
    let look = || -> BoxFuture<'_, _> {
        Box::pin(app.listed(app.backend.delivery(&query.id, API_PAGE_BYTES)))
    };
    let whole = wait_for(&app, query.wait, look, |whole: &Delivery| {
        whole.state.is_final()
    })
    .await?;
    if whole.parts_total.is_none() {
        return Ok(Json(whole).into_response());
    }
    // Too many for one page: further pages follow.
    let parts = TransferQuery {
        id: Some(query.id),
        ..TransferQuery::default()
    };
    let whole = Delivery {
        parts_total: None,
        note: None,
        parts: Vec::new(),
        ..whole
    };
    transfer_list(app, u32::MAX, parts)
        .within(&whole, "parts")?
        .into_response()
        .await
}

/// The newest training runs; at a site only those that involve it.
#[utoipa::path(get, path = "/v1/runs", tag = "runs", params(LimitQuery), responses(
    (status = 200, description = "the runs, newest first", body = Vec<Run>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn runs(For(app): For, Q(query): Q<LimitQuery>) -> Result<Response, ApiError> {
    let read: Read<Run> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.runs(behind.as_deref(), room).await })
    });
    List::new(app, rows(query.limit), read)
        .into_response()
        .await
}

/// All sites; at a site, itself.
#[utoipa::path(get, path = "/v1/sites", tag = "sites", responses(
    (status = 200, description = "the sites", body = Vec<Site>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn sites(For(app): For) -> Result<Response, ApiError> {
    let read: Read<Site> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.sites(behind.as_deref(), room).await })
    });
    List::new(app, u32::MAX, read).into_response().await
}

/// All publishers (hub only).
#[utoipa::path(get, path = "/v1/publishers", tag = "sites", responses(
    (status = 200, description = "the publishers", body = Vec<Publisher>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn publishers(For(app): For) -> Result<Response, ApiError> {
    let read: Read<Publisher> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.publishers(behind.as_deref(), room).await })
    });
    List::new(app, u32::MAX, read).into_response().await
}

/// The jobs in the daemon's memory, the newest first.
#[utoipa::path(get, path = "/v1/jobs/list", tag = "daemon", responses(
    (status = 200, description = "the jobs", body = Vec<Job>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn jobs(For(app): For) -> Result<Response, ApiError> {
    let read: Read<Job> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.jobs(behind.as_deref(), room).await })
    });
    List::new(app, u32::MAX, read).into_response().await
}

/// The background workers of this daemon, in the order in which they were started.
#[utoipa::path(get, path = "/v1/workers", tag = "daemon", responses(
    (status = 200, description = "the workers", body = Vec<Worker>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn workers(For(app): For) -> Result<Response, ApiError> {
    let read: Read<Worker> = Box::new(|app, behind, room| {
        Box::pin(async move { app.backend.workers(behind.as_deref(), room).await })
    });
    List::new(app, u32::MAX, read).into_response().await
}
