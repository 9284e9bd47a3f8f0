//! Converts faults to HTTP answers, and back for the command line.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use base::fault::{Code, Fault, Retry};

/// Each class of fault, its name in JSON, its HTTP status.
const CLASSES: [(Code, &str, StatusCode); 11] = [
    (
        Code::Internal,
        "internal",
        StatusCode::INTERNAL_SERVER_ERROR,
    ),
    (Code::Usage, "usage", StatusCode::BAD_REQUEST),
    (Code::Config, "config", StatusCode::INTERNAL_SERVER_ERROR),
    (Code::NotAllowed, "not_allowed", StatusCode::FORBIDDEN),
    (Code::NotFound, "not_found", StatusCode::NOT_FOUND),
    (Code::Conflict, "conflict", StatusCode::CONFLICT),
    (Code::Partial, "partial", StatusCode::INTERNAL_SERVER_ERROR),
    (
        Code::Integrity,
        "integrity",
        StatusCode::UNPROCESSABLE_ENTITY,
    ),
    (Code::NoSpace, "no_space", StatusCode::INSUFFICIENT_STORAGE),
    (
        Code::Unreachable,
        "unreachable",
        StatusCode::SERVICE_UNAVAILABLE,
    ),
    (Code::Deadline, "deadline", StatusCode::GATEWAY_TIMEOUT),
];

/// The body of every answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The class: `internal`, `usage`, `config`, `not_allowed`, `not_found`, `conflict`, `partial`,
    /// `integrity`, `no_space`, `unreachable`, `deadline`.
    pub code: String,
    /// What happened, where and why.
    pub message: String,
    /// The next step for the user.
    pub next: String,
}

impl ErrorBody {
    /// The body as one line of JSON.
    pub fn to_json(&self) -> String {
        let Self {
            code,
            message,
            next,
        } = self;
        serde_json::json!({ "code": code, "message": message, "next": next }).to_string()
    }
}

impl From<&Fault> for ErrorBody {
    fn from(fault: &Fault) -> Self {
        let code = CLASSES
            .iter()
            .find(|(code, ..)| *code == fault.code)
            .map_or("internal", |(_, word, _)| *word);
        Self {
            code: code.into(),
            message: fault.message.clone(),
            next: fault.next.clone(),
        }
    }
}

impl From<ErrorBody> for Fault {
    fn from(body: ErrorBody) -> Self {
        let code = CLASSES
            .iter()
            .find(|(_, word, _)| *word == body.code)
            .map_or(Code::Internal, |(code, ..)| *code);
        let mut fault = Fault::internal(body.message)
            .with_next(body.next)
            .with_retry(Retry::Never);
        fault.code = code;
        fault
    }
}

/// An error answer. The status is that of the class unless HTTP has a better one.
#[derive(Debug)]
pub(super) struct ApiError {
    fault: Fault,
    status: Option<StatusCode>,
}

impl ApiError {
    pub(super) fn with_status(fault: Fault, status: StatusCode) -> Self {
        Self {
            fault,
            status: Some(status),
        }
    }
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        Self {
            fault,
            status: None,
        }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        // axum answers a well-formed body of the wrong shape with 422, which here means damaged
        // content.
        let status = match rejection.status() {
            status @ (StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNSUPPORTED_MEDIA_TYPE) => status,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::with_status(bad_request("body", &rejection.body_text()), status)
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::with_status(
            bad_request("query", &rejection.body_text()),
            StatusCode::BAD_REQUEST,
        )
    }
}

fn bad_request(part: &str, why: &str) -> Fault {
    Fault::usage(format!("the request's {part} is not understood: {why}"))
        .with_next("see openapi.json for its shape")
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let class = CLASSES.iter().find(|(code, ..)| *code == self.fault.code);
        let status = self
            .status
            .or(class.map(|(.., status)| *status))
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(code = ?self.fault.code, message = ?self.fault.message, "a request failed");
        }
        let mut response = (status, Json(ErrorBody::from(&self.fault))).into_response();
        if let Retry::AfterMs(ms) = self.fault.retry {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
        }
        response
    }
}
