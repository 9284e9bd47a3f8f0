//! Reads a request's body with limits on its size, its silence and its slowness.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use futures::StreamExt as _;
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use base::fault::Fault;
use base::limits::{API_BODY_BYTES_MAX, API_BODY_RATE_MIN, API_BODY_SILENCE_MAX};

/// Reads a whole body.
pub(super) async fn read(body: Body) -> Result<Bytes, ApiError> {
    read_within(body, API_BODY_SILENCE_MAX, API_BODY_RATE_MIN).await
}

/// Reads a body that may be silent for `silence_max`, and that must arrive at `rate_min` bytes per
/// second after its first `silence_max`.
async fn read_within(body: Body, silence_max: Duration, rate_min: u64) -> Result<Bytes, ApiError> {
    let mut pieces = body.into_data_stream();
    let (mut read, begun) = (Vec::new(), Instant::now());
    loop {
        let for_all =
            begun + silence_max + Duration::from_millis(read.len() as u64 * 1000 / rate_min);
        let deadline = for_all.min(Instant::now() + silence_max);
        match timeout_at(deadline, pieces.next()).await {
            Ok(None) => return Ok(read.into()),
            Ok(Some(Ok(piece))) if read.len() + piece.len() <= API_BODY_BYTES_MAX => {
                read.extend_from_slice(&piece);
            }
            Ok(Some(Ok(_))) => {
                let fault = Fault::usage(format!(
                    "the request's body has more than {API_BODY_BYTES_MAX} bytes"
                ));
                return Err(ApiError::with_status(fault, StatusCode::PAYLOAD_TOO_LARGE));
            }
            Ok(Some(Err(error))) => {
                let fault = Fault::usage(format!("the request's body did not arrive: {error}"));
                return Err(ApiError::with_status(fault, StatusCode::BAD_REQUEST));
            }
            Err(_) => {
                let fault = Fault::usage("the request's body came too slowly")
                    .with_next("send the request again");
                return Err(ApiError::with_status(fault, StatusCode::REQUEST_TIMEOUT));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A body of these pieces, each after this pause.
    fn body(pieces: Vec<&'static [u8]>, pause: Duration) -> Body {
        Body::from_stream(futures::stream::iter(pieces).then(move |piece| async move {
            tokio::time::sleep(pause).await;
            Ok::<_, Infallible>(Bytes::from_static(piece))
        }))
    }

    #[tokio::test]
    async fn a_body_that_arrives_too_slowly_is_rejected() {
        const SILENCE: Duration = Duration::from_millis(300);
        let whole = read_within(body(vec![b"{", b"}"], Duration::ZERO), SILENCE, 1 << 20)
            .await
            .unwrap();
        assert_eq!(&whole[..], b"{}");
        // A silence, and then a byte now and then, which never is silent for so long.
        let silent = read_within(
            body(vec![b"{", b"}"], Duration::from_secs(60)),
            SILENCE,
            1 << 20,
        )
        .await;
        let trickling = read_within(body(vec![b"x"; 10_000], SILENCE / 10), SILENCE, 1 << 20).await;
        for slow in [silent, trickling] {
            let response = axum::response::IntoResponse::into_response(slow.unwrap_err());
            assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
        }
    }

    #[tokio::test]
    async fn a_body_has_a_largest_size() {
        static LARGE: [u8; 1 << 16] = [b' '; 1 << 16];
        let too_large = read(body(
            vec![&LARGE; API_BODY_BYTES_MAX / LARGE.len() + 1],
            Duration::ZERO,
        ))
        .await
        .unwrap_err();
        assert_eq!(
            axum::response::IntoResponse::into_response(too_large).status(),
            StatusCode::PAYLOAD_TOO_LARGE
        );
        let largest = read(body(
            vec![&LARGE; API_BODY_BYTES_MAX / LARGE.len()],
            Duration::ZERO,
        ))
        .await
        .unwrap();
        assert_eq!(largest.len(), API_BODY_BYTES_MAX);
    }
}
