//! Reads a request's body with limits on its size, its silence and its slowness, and on the memory
//! of all bodies.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use futures::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use base::fault::Fault;
use base::limits::{
    API_BODIES_BYTES_MAX, API_BODY_BYTES_MAX, API_BODY_BYTES_SMALL, API_BODY_RATE_MIN,
    API_BODY_SILENCE_MAX, API_BODY_VALUES_MAX,
};
use base::text::check_values;

/// The bytes of one permit of [`BODIES`].
const UNIT_BYTES: usize = 1 << 10;

/// The memory of all bodies of the process.
static BODIES: Semaphore = Semaphore::const_new(API_BODIES_BYTES_MAX / UNIT_BYTES);

/// The memory that the body of one request holds, until the last copy is dropped: after the
/// response was made.
#[derive(Clone)]
pub(super) struct Memory {
    bodies: &'static Semaphore,
    held: Arc<Mutex<Option<SemaphorePermit<'static>>>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::of(&BODIES)
    }
}

impl Memory {
    fn of(bodies: &'static Semaphore) -> Self {
        Self {
            bodies,
            held: Arc::default(),
        }
    }

    /// Takes memory for a body of so many bytes. A request does not wait for others: each of them
    /// might hold what the other one needs.
    fn grow(&self, bytes: usize) -> Result<(), ApiError> {
        let mut held = self.held.lock();
        let units = bytes
            .saturating_sub(API_BODY_BYTES_SMALL)
            .div_ceil(UNIT_BYTES);
        let lacking = units.saturating_sub(held.as_ref().map_or(0, SemaphorePermit::num_permits));
        if lacking == 0 {
            return Ok(());
        }
        let Ok(more) = self.bodies.try_acquire_many(lacking as u32) else {
            let fault = Fault::unreachable("too many large requests are handled at once")
                .with_next("send the request again later");
            return Err(ApiError::with_status(
                fault,
                StatusCode::SERVICE_UNAVAILABLE,
            ));
        };
        match held.as_mut() {
            Some(held) => held.merge(more),
            None => *held = Some(more),
        }
        Ok(())
    }
}

/// Reads the whole body of a request, which has `memory` as an extension.
pub(super) async fn read(body: Body, memory: Option<&Memory>) -> Result<Bytes, ApiError> {
    let memory = memory.cloned().unwrap_or_default();
    let bytes = read_within(body, &memory, API_BODY_SILENCE_MAX, API_BODY_RATE_MIN).await?;
    check_values(&bytes, API_BODY_VALUES_MAX).map_err(|values| {
        Fault::usage(format!(
            "the request's body has {values} values, and {API_BODY_VALUES_MAX} are allowed"
        ))
        .with_next("send several smaller requests")
    })?;
    Ok(bytes)
}

/// Reads a body that may be silent for `silence_max`, and that must arrive at `rate_min` bytes per
/// second after its first `silence_max`.
async fn read_within(
    body: Body,
    memory: &Memory,
    silence_max: Duration,
    rate_min: u64,
) -> Result<Bytes, ApiError> {
    let mut pieces = body.into_data_stream();
    let (mut read, begun) = (Vec::new(), Instant::now());
    loop {
        let for_all =
            begun + silence_max + Duration::from_millis(read.len() as u64 * 1000 / rate_min);
        let deadline = for_all.min(Instant::now() + silence_max);
        match timeout_at(deadline, pieces.next()).await {
            Ok(None) => return Ok(read.into()),
            Ok(Some(Ok(piece))) if read.len() + piece.len() <= API_BODY_BYTES_MAX => {
                memory.grow(read.len() + piece.len())?;
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
        let whole = read_within(
            body(vec![b"{", b"}"], Duration::ZERO),
            &Memory::default(),
            SILENCE,
            1 << 20,
        )
        .await
        .unwrap();
        assert_eq!(&whole[..], b"{}");
        // A silence, and then a byte now and then, which never is silent for so long.
        let silent = read_within(
            body(vec![b"{", b"}"], Duration::from_secs(60)),
            &Memory::default(),
            SILENCE,
            1 << 20,
        )
        .await;
        let trickling = read_within(
            body(vec![b"x"; 10_000], SILENCE / 10),
            &Memory::default(),
            SILENCE,
            1 << 20,
        )
        .await;
        for slow in [silent, trickling] {
            let response = axum::response::IntoResponse::into_response(slow.unwrap_err());
            assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
        }
    }

    #[tokio::test]
    async fn a_body_has_a_largest_size() {
        static LARGE: [u8; 1 << 16] = [b' '; 1 << 16];
        let of = |pieces| body(vec![&LARGE[..]; pieces], Duration::ZERO);
        let too_large = read(of(API_BODY_BYTES_MAX / LARGE.len() + 1), None)
            .await
            .unwrap_err();
        assert_eq!(
            axum::response::IntoResponse::into_response(too_large).status(),
            StatusCode::PAYLOAD_TOO_LARGE
        );
        let largest = read(of(API_BODY_BYTES_MAX / LARGE.len()), None)
            .await
            .unwrap();
        assert_eq!(largest.len(), API_BODY_BYTES_MAX);
    }

    #[tokio::test]
    async fn all_bodies_together_have_a_largest_size() {
        static LARGE: [u8; 256 << 10] = [b' '; 256 << 10];
        static TWO: Semaphore = Semaphore::const_new(2 * LARGE.len() / UNIT_BYTES);
        let read = async |memory: &Memory| {
            let body = body(vec![&LARGE], Duration::ZERO);
            read(body, Some(memory)).await.map(|bytes| bytes.len())
        };
        let [first, second, third] = [(); 3].map(|()| Memory::of(&TWO));
        assert_eq!(read(&first).await.unwrap(), LARGE.len());
        // A body that is read twice, for its check and for its route, takes its memory once.
        assert_eq!(read(&first).await.unwrap(), LARGE.len());
        assert_eq!(read(&second).await.unwrap(), LARGE.len());
        let refused = read(&third).await.unwrap_err();
        assert_eq!(
            axum::response::IntoResponse::into_response(refused).status(),
            StatusCode::SERVICE_UNAVAILABLE
        );
        drop(first);
        assert_eq!(read(&third).await.unwrap(), LARGE.len());
    }

    #[tokio::test]
    async fn a_body_has_a_largest_number_of_values() {
        static MANY: [u8; API_BODY_VALUES_MAX + 1] = [b','; API_BODY_VALUES_MAX + 1];
        let refused = read(body(vec![&MANY], Duration::ZERO), None).await;
        assert_eq!(
            axum::response::IntoResponse::into_response(refused.unwrap_err()).status(),
            StatusCode::BAD_REQUEST
        );
    }
}
