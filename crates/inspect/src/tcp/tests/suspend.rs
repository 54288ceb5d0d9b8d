//! Offload windows that are suspended: what the programs forward must not keep the worker from knowing that a connection is
//! alive, and what its ends have acknowledged.

use super::*;

const BODY: u32 = 1 << 20;
const MSS: u32 = 1_448;
const HOUR: Millis = 3_600_000;

/// A client that sends a long message, the programs, a worker, and a server.
struct Upload {
    bench: Bench,
    /// Offload windows in force.
    windows: [u32; 4],
    /// Segments that the programs have forwarded without the worker, and those that were punted.
    unseen: usize,
    punted: usize,
    /// What the client has sent, and what the server has sent.
    sent: [u32; 2],
    /// What has reached the client.
    got: u32,
}

impl Upload {
    fn new() -> Self {
        let mut bench = Bench::new(TcpLimits {
            window: 64 << 10,
            ..TcpLimits::default()
        });
        bench.handshake();
        let mut upload = Self {
            bench,
            windows: [0; 4],
            unseen: 0,
            punted: 0,
            sent: [0; 2],
            got: 0,
        };
        let [_, a, b, c] = BODY.to_be_bytes();
        upload.client(&[4, b'B', a, b, c]);
        assert_ne!(upload.windows, [0; 4]);
        upload
    }

    /// A segment passes the programs. Returns what the worker does with it, if it is punted.
    fn pass(&mut self, seg: &Seg) -> Option<Out> {
        let [a, b, c, d] = self.windows;
        let (own, other) = match seg.from {
            Side::Client => ((a, b), (c, d)),
            Side::Server => ((c, d), (a, b)),
        };
        let within = |(from, to): (u32, u32), at: u32, length: u32| {
            let at = at.wrapping_sub(from);
            at < to.wrapping_sub(from) && length <= to.wrapping_sub(from) - at
        };
        let is_exempt = match seg.data.len() as u32 {
            0 => within(other, seg.ack, 0),
            length => within(own, seg.seq, length),
        };
        if seg.flags == ACK && is_exempt {
            self.unseen += 1;
            return None;
        }
        self.punted += 1;
        self.bench.put(seg);
        Some(self.worker())
    }

    /// Runs the commands of the worker.
    fn worker(&mut self) -> Out {
        let out = self.bench.take();
        for command in out.bare_commands.iter().chain(&out.commands) {
            if command.op == flow_op::WINDOWS {
                self.windows = command.windows;
            }
        }
        out
    }

    fn client(&mut self, data: &[u8]) {
        let seg = Seg {
            ack: SERVER_ISN.wrapping_add(1 + self.got),
            ..client(self.sent[0], data)
        };
        self.sent[0] += data.len() as u32;
        if let Some(out) = self.pass(&seg) {
            assert_eq!((out.released.len(), &out.discarded[..]), (1, &[][..]));
        }
    }

    fn server(&mut self, data: &[u8]) {
        let seg = Seg {
            seq: SERVER_ISN.wrapping_add(1 + self.sent[1]),
            data: data.to_vec(),
            ..server(self.sent[0])
        };
        self.sent[1] += data.len() as u32;
        match self.pass(&seg) {
            Some(out) if out.released.len() == 1 => self.got += data.len() as u32,
            Some(out) => panic!("{:?} at {}", out.discarded, self.sent[1]),
            None => {}
        }
    }

    /// Sends the rest of the message, and a denied one behind it.
    fn finish(&mut self) {
        let rest = 5 + BODY - self.sent[0];
        for _ in 0..rest / MSS {
            self.client(&[b'x'; MSS as usize]);
        }
        self.client(&vec![b'x'; (rest % MSS) as usize]);
        self.server(b"");
        let seg = client(self.sent[0], b"\x01X");
        let seg = Seg {
            ack: SERVER_ISN.wrapping_add(1 + self.got),
            ..seg
        };
        let out = self.pass(&seg).expect("behind the window");
        assert_eq!(out.discarded, [Reason::AppDenied]);
    }
}

#[test]
fn a_reset_that_its_receiver_refuses_does_not_end_an_upload() {
    for side in Side::BOTH {
        let mut upload = Upload::new();
        upload.client(&[b'x'; MSS as usize]);
        assert_eq!(upload.punted, 1);
        let (seq, ack) = (CLIENT_ISN.wrapping_add(500_000), SERVER_ISN.wrapping_add(1));
        let forged = match side {
            Side::Client => Seg::new(side, RST, seq, 0, b""),
            // The server has bytes in flight.
            Side::Server => {
                upload.server(b"abc");
                Seg::new(side, RST, ack.wrapping_add(1), 0, b"")
            }
        };
        let out = upload.pass(&forged).expect("each reset is punted");
        assert_eq!(out.released.len(), 1, "its receiver decides");
        assert_eq!(upload.windows, [0; 4]);
        // The challenge ACK.
        let from = side.other();
        let challenge = match from {
            Side::Server => Seg {
                seq: ack.wrapping_add(upload.sent[1]),
                ..server(upload.sent[0])
            },
            Side::Client => Seg {
                ack: ack.wrapping_add(upload.got),
                ..client(upload.sent[0], b"")
            },
        };
        let out = upload.pass(&challenge).expect("the window is suspended");
        assert_eq!(out.released.len(), 1);
        assert_ne!(upload.windows, [0; 4], "in force again");
        // No further packet is punted for more than the time after which a connection that has ended is removed.
        upload.bench.tick(600_000);
        upload.worker();
        assert_eq!(upload.bench.table.stats().connections, 1, "{side:?}");
        upload.finish();
    }
}

#[test]
fn a_reset_that_ends_an_upload_ends_the_connection() {
    let mut upload = Upload::new();
    let reset = Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(500_000), 0, b"");
    upload.pass(&reset);
    upload.bench.tick(60_001);
    assert_eq!(upload.bench.table.stats().connections, 0);
}

#[test]
fn an_upload_can_take_longer_than_the_idle_timeout() {
    let mut upload = Upload::new();
    for minute in 0..24 * 60 {
        upload.bench.tick(minute * 60_000);
        upload.worker();
        upload.client(b"x");
        upload.server(b"");
    }
    assert_eq!(upload.bench.table.stats().connections, 1);
    assert!(upload.punted < 24 && upload.unseen > 2_800, "{}", upload.punted);
    upload.finish();
}

#[test]
fn an_idle_connection_with_a_window_ends_at_the_idle_timeout() {
    let mut upload = Upload::new();
    upload.bench.tick(3 * HOUR);
    upload.worker();
    assert_eq!(upload.windows, [0; 4]);
    upload.bench.tick(6 * HOUR - 1);
    assert_eq!(upload.bench.table.stats().connections, 1);
    upload.bench.tick(6 * HOUR);
    assert_eq!(upload.bench.table.stats().connections, 0);
}

/// A client that always sends acknowledges the bytes of the server in the segments of its message.
#[test]
fn a_server_can_send_during_an_upload_whatever_its_client_offers() {
    for burst in [1, 20, 55] {
        for length in [1, 100, 1_000] {
            let mut upload = Upload::new();
            for _ in 0..700 / burst {
                for _ in 0..burst {
                    upload.server(&vec![b'y'; length]);
                }
                upload.client(&[b'x'; MSS as usize]);
            }
            assert!(
                upload.punted < 2 * 700,
                "{burst} of {length}: {} punted",
                upload.punted
            );
            assert!(upload.bench.table.stats().bytes <= 1 << 20);
            upload.finish();
        }
    }
}

/// The segment of the server that would exceed the window is lost if it arrives first; its repetition is not.
#[test]
fn a_segment_beyond_a_window_that_the_worker_has_not_seen_is_lost_once() {
    let mut upload = Upload::new();
    for _ in 0..29 {
        upload.server(&[b'y'; 1_000]);
    }
    assert_ne!(upload.windows, [0; 4]);
    // Acknowledged in a segment of the window.
    upload.client(&[b'x'; 100]);
    let beyond = Seg {
        seq: SERVER_ISN.wrapping_add(1 + 29_000),
        data: vec![b'y'; 50_000],
        ..server(upload.sent[0])
    };
    let out = upload.pass(&beyond).unwrap();
    assert_eq!(out.discarded, [Reason::TcpOutOfWindow]);
    assert_eq!(upload.windows, [0; 4]);
    upload.client(&[b'x'; 100]);
    assert_ne!(upload.windows, [0; 4]);
    let out = upload.pass(&beyond).unwrap();
    assert_eq!(out.released.len(), 1);
}

#[test]
fn a_stranger_cannot_suspend_windows_with_any_sequence_number() {
    let mut upload = Upload::new();
    let mut suspended = 0;
    for n in 0..10_000_u32 {
        let seg = Seg {
            seq: n.wrapping_mul(429_496),
            data: b"z".to_vec(),
            ..server(0)
        };
        upload.pass(&seg);
        suspended += usize::from(upload.windows == [0; 4]);
        if upload.windows == [0; 4] {
            upload.client(b"x");
        }
    }
    assert!(suspended <= 2, "{suspended}");
}
