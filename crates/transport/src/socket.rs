//! The UDP socket of QUIC: quinn's socket, plus support for batches that are too large for one
//! system call.
//!
//! quinn passes up to ten packets at once. Up to a packet size of 6,500 bytes they fit one
//! segmented send (64 KiB). If the path carries larger packets, as a loopback and jumbo frames do,
//! a batch is sent with several calls. The overhead per packet is most of the cost of a fast
//! connection.

use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use base::limits::CONNECTION_PACKET_BYTES_MAX;

/// The limit of one call: the largest datagram of IPv4, which is slightly smaller than that of
/// IPv6.
const SEND_BYTES_MAX: usize = 65_507;
/// A received message has less than 64 KiB for every packet size; this many of the largest packets
/// cover it.
const SEGMENTS_RECEIVED_MAX: usize = 65_536_usize.div_ceil(CONNECTION_PACKET_BYTES_MAX as usize);
/// The number of partly sent batches that are remembered. A batch that is not retried belongs to a
/// connection that has ended.
const PARTLY_SENT_MAX: usize = 1024;

/// Identifies a batch by its first bytes. They are encrypted, so no two batches have the same ones.
type Mark = [u8; 16];

#[derive(Debug)]
pub(super) struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The sent bytes of each batch that the kernel took only in part.
    partly_sent: Mutex<HashMap<Mark, usize>>,
}

impl Socket {
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>) -> Self {
        Self {
            inner,
            partly_sent: Mutex::default(),
        }
    }

    /// Sends a batch of packets of this size with several calls. If the kernel accepts no more
    /// data, quinn passes the same batch again later, and sending continues at the same position.
    fn send_in_parts(&self, transmit: &Transmit<'_>, segment: usize) -> io::Result<()> {
        let all = transmit.contents;
        let mark = all.first_chunk::<16>().copied().unwrap_or_default();
        let mut sent = self.partly_sent.lock().remove(&mark).unwrap_or(0);
        let part = SEND_BYTES_MAX / segment * segment;
        while sent < all.len() {
            let contents = &all[sent..all.len().min(sent + part)];
            let segment_size = (contents.len() > segment).then_some(segment);
            if let Err(error) = self.inner.try_send(&Transmit {
                contents,
                segment_size,
                ..*transmit
            }) {
                if error.kind() == ErrorKind::WouldBlock && sent > 0 {
                    let mut partly_sent = self.partly_sent.lock();
                    if partly_sent.len() >= PARTLY_SENT_MAX {
                        partly_sent.clear();
                    }
                    partly_sent.insert(mark, sent);
                }
                return Err(error);
            }
            sent += contents.len();
        }
        Ok(())
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match transmit.segment_size {
            Some(segment) if transmit.contents.len() > SEND_BYTES_MAX => {
                self.send_in_parts(transmit, segment)
            }
            _ => self.inner.try_send(transmit),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min(SEGMENTS_RECEIVED_MAX)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Destination port, content, packet size.
    type Call = (u16, Vec<u8>, Option<usize>);

    /// Accepts a number of calls and then none until the test allows more.
    #[derive(Debug, Default)]
    struct Kernel {
        room: Mutex<usize>,
        taken: Mutex<Vec<Call>>,
    }

    impl AsyncUdpSocket for Kernel {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unreachable!("the test does not wait")
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let mut room = self.room.lock();
            *room = room.checked_sub(1).ok_or(ErrorKind::WouldBlock)?;
            self.taken.lock().push((
                transmit.destination.port(),
                transmit.contents.to_vec(),
                transmit.segment_size,
            ));
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(ErrorKind::Unsupported.into())
        }
    }

    fn batch(first: u8, len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| first.wrapping_add((at / 7) as u8))
            .collect()
    }

    fn send(
        socket: &Socket,
        port: u16,
        contents: &[u8],
        segment: Option<usize>,
    ) -> Result<(), ErrorKind> {
        let destination = SocketAddr::from(([127, 0, 0, 1], port));
        let transmit = Transmit {
            destination,
            ecn: None,
            contents,
            segment_size: segment,
            src_ip: None,
        };
        socket.try_send(&transmit).map_err(|e| e.kind())
    }

    #[test]
    fn a_batch_is_sent_completely_and_once_even_if_the_kernel_is_often_full() {
        let kernel = Arc::new(Kernel::default());
        let socket = Socket::new(kernel.clone());
        let segment = usize::from(CONNECTION_PACKET_BYTES_MAX);
        // Two connections alternate; the kernel accepts one call at a time.
        let batches = [(1, batch(1, 8 * segment + 5)), (2, batch(2, 10 * segment))];
        let mut left: Vec<_> = batches.iter().collect();
        for _ in 0..20 {
            left.retain(|(port, batch)| {
                *kernel.room.lock() = 1;
                send(&socket, *port, batch, Some(segment)).is_err()
            });
        }
        assert!(left.is_empty() && socket.partly_sent.lock().is_empty());
        let taken = std::mem::take(&mut *kernel.taken.lock());
        assert!(
            taken
                .iter()
                .all(|(_, part, size)| part.len() <= SEND_BYTES_MAX
                    && *size == (part.len() > segment).then_some(segment))
        );
        for (port, batch) in &batches {
            let parts: Vec<&[u8]> = taken
                .iter()
                .filter(|(to, ..)| to == port)
                .map(|(_, part, _)| &part[..])
                .collect();
            assert!(parts.concat() == *batch, "to {port}: {} parts", parts.len());
        }

        // A batch that fits one call is passed unchanged. A batch of which the kernel took nothing
        // is not recorded.
        let whole = &batches[1].1;
        *kernel.room.lock() = 2;
        send(&socket, 1, &whole[..1200], None).unwrap();
        send(&socket, 1, &whole[..4 * segment], Some(segment)).unwrap();
        assert_eq!(
            send(&socket, 1, whole, Some(segment)),
            Err(ErrorKind::WouldBlock)
        );
        let taken: Vec<_> = kernel
            .taken
            .lock()
            .iter()
            .map(|(_, part, size)| (part.len(), *size))
            .collect();
        assert_eq!(taken, [(1200, None), (4 * segment, Some(segment))]);
        assert!(socket.partly_sent.lock().is_empty());
    }
}
