//! Segmentations of one byte stream, and segments that contradict each other, as a client with its own TCP can send them.
//!
//! Two streams of the same length differ in a few bytes: the policy allows the *good* one and denies the *bad* one. In
//! every segmentation, the good stream must arrive byte for byte, and no byte of the bad one. From a mixture of both
//! streams, only a prefix of the good one may arrive.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palisade_testbed::{
    Ns,
    ns::wait_until,
    rawtcp::{Delivered, RawTcp, Segment, flags, pieces},
    recorder::{End, Recorder},
};

use std::net::{IpAddr, SocketAddr};

/// Longest time until allowed bytes arrive.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Time to wait before a test concludes that bytes do not arrive.
const SHORT: Duration = Duration::from_millis(60);

/// The two streams.
#[derive(Clone, Debug)]
pub struct Streams {
    /// The allowed stream.
    pub good: Vec<u8>,
    /// The denied stream, of the same length.
    pub bad: Vec<u8>,
    /// Offset of the first byte in which the streams differ.
    pub from: usize,
    /// Offset after the last byte in which the streams differ.
    pub to: usize,
    /// The server's response to the good stream.
    pub answer: Vec<u8>,
    /// Whether the flow is offloaded after that response.
    pub ends_reading: bool,
    /// Other streams that may arrive from a mixture: parts of the bad stream that are allowed.
    pub also: Vec<Vec<u8>>,
}

impl Streams {
    /// Returns a pair of streams that differ between two offsets.
    ///
    /// # Panics
    /// If they do not, or are not as long as each other.
    #[must_use]
    pub fn new(good: Vec<u8>, bad: Vec<u8>, answer: Vec<u8>) -> Self {
        assert_eq!(good.len(), bad.len());
        let differs = |(a, b): (&u8, &u8)| a != b;
        let from = good.iter().zip(&bad).position(differs);
        let to = good.iter().zip(&bad).rposition(differs);
        let (Some(from), Some(to)) = (from, to) else {
            panic!("the streams do not differ");
        };
        Self {
            good,
            bad,
            from,
            to: to + 1,
            answer,
            ends_reading: false,
            also: Vec::new(),
        }
    }

    /// Marks the flow as offloaded after the response.
    #[must_use]
    pub fn ends_reading(mut self) -> Self {
        self.ends_reading = true;
        self
    }

    /// Adds a stream that may arrive from a mixture.
    #[must_use]
    pub fn also(mut self, bytes: Vec<u8>) -> Self {
        self.also.push(bytes);
        self
    }

    /// Returns whether a server may have received these bytes from a mixture.
    fn may_hear(&self, heard: &[u8], client: &RawTcp) -> bool {
        self.good.starts_with(heard)
            || self.also.iter().any(|also| also.starts_with(heard))
            || (self.ends_reading && heard.starts_with(&self.good) && client.received() == self.answer)
    }

    fn of(&self, good: bool) -> &[u8] {
        if good { &self.good } else { &self.bad }
    }
}

/// The path on which streams are sent.
#[derive(Debug)]
pub struct AttackPath<'a> {
    /// Namespace of the client, [`palisade_testbed::rawtcp::prepare`]d.
    pub ns: &'a Ns,
    /// Source address of the client.
    pub source: IpAddr,
    /// Address of the recorder.
    pub to: SocketAddr,
    /// The recorder.
    pub recorder: &'a Recorder,
    /// The streams.
    pub streams: &'a Streams,
}

/// A segmentation of a stream.
type Cut = fn(&[u8]) -> Vec<Segment>;

/// Shuffles with a fixed pseudo-random sequence, so that each run is the same.
fn shuffled<T>(mut items: Vec<T>) -> Vec<T> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for n in (1..items.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        items.swap(n, (state % (n as u64 + 1)) as usize);
    }
    items
}

/// Adds, for each segment, one with other content that a receiver must discard.
fn with_decoys(bytes: &[u8], decoy: impl Fn(Segment) -> Segment) -> Vec<Segment> {
    pieces(0, bytes, 40)
        .into_iter()
        .enumerate()
        .flat_map(|(n, piece)| {
            let other = vec![b'#'; bytes.len().min(n * 40 + 40) - n * 40];
            [decoy(Segment::data(n as i64 * 40, &other)), piece]
        })
        .collect()
}

/// Segmentations of one stream.
pub const CUTS: &[(&str, Cut)] = &[
    ("in one", |b| pieces(0, b, 1400)),
    ("a byte a packet", |b| pieces(0, b, 1)),
    ("backwards", |b| {
        let mut all = pieces(0, b, 7);
        all.reverse();
        all
    }),
    ("a byte a packet, backwards", |b| {
        let mut all = pieces(0, b, 1);
        all.reverse();
        all
    }),
    ("shuffled, each twice", |b| {
        shuffled([pieces(0, b, 11), pieces(0, b, 11)].concat())
    }),
    ("overlapping", |b| {
        (0..b.len())
            .step_by(7)
            .map(|at| Segment::data(at as i64, &b[at..b.len().min(at + 20)]))
            .collect()
    }),
    ("overlapping, shuffled", |b| {
        shuffled(
            (0..b.len())
                .step_by(5)
                .map(|at| Segment::data(at as i64, &b[at..b.len().min(at + 23)]))
                .collect(),
        )
    }),
    ("growing from the start each time", |b| {
        (1..=b.len().div_ceil(16))
            .map(|n| Segment::data(0, &b[..b.len().min(n * 16)]))
            .collect()
    }),
    ("each time all of the rest", |b| {
        (0..b.len())
            .step_by(16)
            .rev()
            .map(|at| Segment::data(at as i64, &b[at..]))
            .collect()
    }),
    ("beside others with a wrong checksum", |b| {
        with_decoys(b, Segment::bad_checksum)
    }),
    ("beside others far outside the window", |b| {
        let decoy = |at: i64| Segment::data(at + 0x2000_0000, b"##########");
        pieces(0, b, 40)
            .into_iter()
            .enumerate()
            .flat_map(|(n, piece)| [decoy(n as i64 * 40), decoy(-0x4000_0000), piece])
            .collect()
    }),
    ("with probes of a connection that is idle", |b| {
        let mut all = vec![Segment::data(-1, b""), Segment::data(-1, b"#")];
        for piece in pieces(0, b, 30) {
            all.push(piece);
            all.push(Segment::data(-1, b"#"));
        }
        all
    }),
    ("beside empty ones", |b| {
        pieces(0, b, 25)
            .into_iter()
            .enumerate()
            .flat_map(|(n, piece)| [Segment::data(n as i64 * 25, b""), piece])
            .collect()
    }),
    ("with the end in the last", |b| {
        let mut all = pieces(0, b, 50);
        if let Some(last) = all.pop() {
            all.push(last.flags(flags::ACK | flags::PSH | flags::FIN));
        }
        all
    }),
    ("with the end first", |b| {
        let mut all = pieces(0, b, 50);
        all.insert(
            0,
            Segment::data(b.len() as i64, b"").flags(flags::ACK | flags::FIN),
        );
        all
    }),
    ("while the client takes nothing", |b| {
        // Until the receiver has the whole stream; the recorder responds only then.
        let mut all = pieces(0, b, 60);
        let last = all.pop();
        all.into_iter().map(|p| p.window(0)).chain(last).collect()
    }),
    ("with options that are not known", |b| {
        pieces(0, b, 60)
            .into_iter()
            .map(|p| p.options(&[1, 1, 254, 6, 1, 2, 3, 4, 0, 0, 0, 0]))
            .collect()
    }),
];

/// A mixture of segments of both streams.
type Mix = fn(&mut RawTcp, &Streams) -> Result<()>;

/// Sends the segments, then waits for a moment.
fn send_all(client: &mut RawTcp, segments: &[Segment]) -> Result<()> {
    for segment in segments {
        client.send(segment)?;
    }
    client.listen(SHORT, RawTcp::is_reset)?;
    Ok(())
}

/// Sends good bytes in segments that the receiver discards, then bad bytes at the same sequence numbers.
fn hidden(client: &mut RawTcp, streams: &Streams, hide: impl Fn(Segment) -> Segment) -> Result<()> {
    let (good, bad, middle) = (&streams.good, &streams.bad, streams.from);
    // The whole stream at once.
    send_all(client, &[hide(Segment::data(0, good)), Segment::data(0, bad)])?;
    if client.is_reset() {
        return Ok(());
    }
    // Only the bytes that differ.
    send_all(
        client,
        &[
            Segment::data(0, &good[..middle]),
            hide(Segment::data(middle as i64, &good[middle..])),
            Segment::data(middle as i64, &bad[middle..]),
            Segment::data(0, bad),
        ],
    )
}

/// Mixtures of both streams: nothing of the bad one may arrive.
pub const MIXES: &[(&str, Mix)] = &[
    ("good ones that die on the way, then bad ones", |c, s| {
        hidden(c, s, |p| p.ttl(1))
    }),
    ("bad ones that die on the way, then good ones", |c, s| {
        send_all(c, &[Segment::data(0, &s.bad).ttl(1)])?;
        send_all(c, &[Segment::data(0, &s.good)])
    }),
    ("good ones with a wrong checksum, then bad ones", |c, s| {
        hidden(c, s, Segment::bad_checksum)
    }),
    ("good ones that acknowledge what was never sent", |c, s| {
        let ack = c.next().wrapping_add(0x0100_0000);
        hidden(c, s, |p| p.ack(ack))
    }),
    ("good ones that acknowledge what is long past", |c, s| {
        let ack = c.next().wrapping_sub(0x2000_0000);
        hidden(c, s, |p| p.ack(ack))
    }),
    ("good ones without acknowledgement", |c, s| {
        hidden(c, s, |p| p.flags(flags::PSH))
    }),
    ("good ones without any flag", |c, s| hidden(c, s, |p| p.flags(0))),
    (
        "good segments with a signature that was not negotiated",
        |c, s| {
            let mut md5 = vec![19, 18];
            md5.extend_from_slice(&[7; 16]);
            md5.extend_from_slice(&[1, 1]);
            hidden(c, s, |p| p.options(&md5))
        },
    ),
    ("good ones with an option of a wrong length", |c, s| {
        hidden(c, s, |p| p.options(&[2, 40, 0, 0]))
    }),
    ("good ones with all flags", |c, s| hidden(c, s, |p| p.flags(0x3f))),
    ("good ones with SYN", |c, s| {
        hidden(c, s, |p| p.flags(flags::ACK | flags::SYN))
    }),
    ("good ones that are urgent", |c, s| hidden(c, s, |p| p.urgent(1))),
    ("a byte more that is urgent", |c, s| {
        let at = s.from;
        let more = [&s.good[..at], b"#", &s.good[at..]].concat();
        send_all(c, &[Segment::data(0, &more).urgent(at as u16 + 1)])?;
        let urgent = Segment::data(at as i64, b"#").urgent(1);
        send_all(
            c,
            &[
                Segment::data(0, &s.good[..at]),
                urgent,
                Segment::data(at as i64 + 1, &s.good[at..]),
            ],
        )
    }),
    ("a bad end first, then a good whole", |c, s| {
        let at = s.from;
        send_all(
            c,
            &[
                Segment::data(at as i64, &s.bad[at..]),
                Segment::data(0, &s.good),
                Segment::data(0, &s.bad[..at]),
            ],
        )
    }),
    ("a good end first, then a bad whole", |c, s| {
        let at = s.from;
        send_all(
            c,
            &[
                Segment::data(at as i64, &s.good[at..]),
                Segment::data(0, &s.bad),
                Segment::data(at as i64, &s.bad[at..]),
                Segment::data(0, &s.good[..at]),
                Segment::data(at as i64, &s.bad[at..]),
            ],
        )
    }),
    ("pieces of both in turn", |c, s| {
        let mut all = Vec::new();
        for size in [1, 3, 17] {
            for (good, bad) in pieces(0, &s.good, size).into_iter().zip(pieces(0, &s.bad, size)) {
                all.extend([good.clone(), bad.clone(), good]);
            }
        }
        send_all(c, &all)
    }),
    ("bad pieces in the gaps of good ones", |c, s| {
        let mut all = Vec::new();
        for (n, good) in pieces(0, &s.good, 4).into_iter().enumerate().rev() {
            if n % 2 == 0 {
                all.push(good);
            }
        }
        all.push(Segment::data(0, &s.bad));
        all.extend(pieces(0, &s.bad, 4));
        send_all(c, &all)
    }),
    ("overlaps that reach over the edges", |c, s| {
        let (from, to) = (s.from, s.to);
        send_all(
            c,
            &[
                Segment::data(0, &s.good[..from]),
                Segment::data(to as i64, &s.good[to..]),
                Segment::data(from as i64 - 3, &s.bad[from - 3..to + 3]),
                Segment::data(0, &s.bad[..to]),
                Segment::data(from as i64, &s.bad[from..]),
            ],
        )
    }),
    ("a reset that dies on the way, then bad ones", |c, s| {
        let reset = Segment::data(0, b"").flags(flags::RST).ttl(1);
        send_all(c, &[reset.clone(), Segment::data(0, &s.bad)])?;
        send_all(
            c,
            &[reset.flags(flags::RST | flags::ACK), Segment::data(0, &s.bad)],
        )
    }),
    ("a reset beside the window, then bad ones", |c, s| {
        for at in [-5, 1, 5_000, 0x1000_0000] {
            send_all(
                c,
                &[Segment::data(at, b"").flags(flags::RST), Segment::data(0, &s.bad)],
            )?;
        }
        Ok(())
    }),
    ("an end that dies on the way, then bad ones", |c, s| {
        let end = Segment::data(0, b"").flags(flags::ACK | flags::FIN).ttl(1);
        send_all(c, &[end, Segment::data(0, &s.bad)])?;
        send_all(c, &[Segment::data(1, &s.bad)])
    }),
    ("another opening that dies on the way, then bad ones", |c, s| {
        for at in [-1, 500_000, -600_000] {
            send_all(
                c,
                &[
                    Segment::data(at, b"").flags(flags::SYN).ttl(1),
                    Segment::data(0, &s.bad),
                ],
            )?;
        }
        Ok(())
    }),
    ("another opening within the window, then bad ones", |c, s| {
        send_all(
            c,
            &[
                Segment::data(0, b"").flags(flags::SYN),
                Segment::data(0, &s.bad),
                Segment::data(1, &s.bad),
            ],
        )
    }),
    ("fragments: a good datagram, overlapped by a bad one", |c, s| {
        let good = Segment::data(0, &s.good).fragments(48);
        let bad = Segment::data(0, &s.bad).fragments(48);
        send_all(
            c,
            &[
                good.clone().ttl(1),
                bad.clone(),
                bad.clone().backwards(),
                good.backwards(),
                bad.fragments(24),
            ],
        )
    }),
    ("good ones, then bad ones behind them", |c, s| {
        let at = s.good.len() as i64;
        send_all(c, &[Segment::data(0, &s.good), Segment::data(at, &s.bad)])
    }),
    ("good and bad in one segment", |c, s| {
        send_all(c, &[Segment::data(0, &[&s.good[..], &s.bad].concat())])
    }),
    ("good ones, then bad ones at the same place", |c, s| {
        send_all(c, &[Segment::data(0, &s.good)])?;
        send_all(c, &[Segment::data(0, &s.bad)])?;
        let mut all = pieces(0, &s.bad, 10);
        all.reverse();
        send_all(c, &all)
    }),
    ("good ones that die on the way, then the bad rest late", |c, s| {
        send_all(
            c,
            &[
                Segment::data(0, &s.good[..s.from]),
                Segment::data(s.from as i64, &s.good[s.from..]).ttl(1),
            ],
        )?;
        c.listen(Duration::from_millis(700), RawTcp::is_reset)?;
        send_all(c, &[Segment::data(s.from as i64, &s.bad[s.from..])])?;
        c.listen(Duration::from_millis(700), RawTcp::is_reset)?;
        send_all(c, &[Segment::data(s.from as i64, &s.bad[s.from..])])
    }),
];

impl AttackPath<'_> {
    fn connect(&self) -> Result<RawTcp> {
        RawTcp::connect(self.ns, self.source, self.to)
    }

    /// Returns the bytes that the recorder received from a client, once the connection has ended.
    fn heard(&self, client: &RawTcp) -> Vec<u8> {
        self.recorder.bytes(client.local())
    }

    /// Sends one stream in one segmentation, and fails unless the good one arrives completely or nothing of the bad one
    /// does.
    fn cut(&self, mut client: RawTcp, good: bool, segments: &[Segment]) -> Result<()> {
        let bytes = self.streams.of(good);
        let outcome = client.deliver(segments, bytes.len() as i64, TIMEOUT)?;
        if good {
            ensure!(
                outcome == Delivered::Whole,
                "{outcome:?} after {}",
                client.acked()
            );
            self.recorder
                .wait(client.local(), "the server has it", TIMEOUT, |h| {
                    h.bytes.len() >= bytes.len()
                })?;
            ensure!(self.heard(&client) == bytes, "changed on the way");
        } else {
            client.listen(TIMEOUT, |c| c.is_reset() || c.is_finished())?;
            ensure!(
                client.is_reset() || client.is_finished(),
                "the connection stands: {outcome:?}"
            );
            let heard = self.heard(&client);
            let may = |allowed: &[u8]| allowed.starts_with(&heard);
            ensure!(
                may(&bytes[..self.streams.from]) || self.streams.also.iter().any(|also| may(also)),
                "the server has heard {}",
                String::from_utf8_lossy(&heard)
            );
            // A connection that was refused before the server accepted it does not exist for the recorder.
            wait_until("the server's end is closed", TIMEOUT, || {
                self.recorder
                    .from(client.local())
                    .is_none_or(|heard| heard.end != End::Open)
            })?;
        }
        // Resets the connection, which would otherwise stay until its timeout.
        client.send(&Segment::data(client.acked().max(0), b"").flags(flags::RST))?;
        Ok(())
    }

    /// Sends both streams in every segmentation. Returns the failures.
    pub fn cuts(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut note = |what: &str, good: bool, result: Result<()>| {
            if let Err(error) = result {
                failures.push(format!("{}, {what}, good: {good}: {error:#}", self.to));
            }
        };
        for good in [true, false] {
            let bytes = self.streams.of(good);
            for (what, cut) in CUTS {
                note(
                    what,
                    good,
                    self.connect().and_then(|c| self.cut(c, good, &cut(bytes))),
                );
            }
            note(
                "with timestamps, shuffled",
                good,
                RawTcp::connect_with_timestamps(self.ns, self.source, self.to)
                    .and_then(|c| self.cut(c, good, &shuffled(pieces(0, bytes, 9)))),
            );
            // The sequence numbers wrap within the stream.
            for before in [1_u32, 20, bytes.len() as u32] {
                let wrapped = || -> Result<RawTcp> {
                    let mut client = RawTcp::new(self.ns, self.source, self.to)?;
                    client.set_isn(0_u32.wrapping_sub(before));
                    client.open()?;
                    Ok(client)
                };
                note(
                    "wrapping",
                    good,
                    wrapped().and_then(|c| self.cut(c, good, &pieces(0, bytes, 13))),
                );
            }
        }
        failures
    }

    /// Sends both streams split in two at every byte, in order and reversed. Returns the failures.
    pub fn splits(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for good in [true, false] {
            let bytes = self.streams.of(good);
            for at in 1..bytes.len() {
                let mut parts = vec![
                    Segment::data(0, &bytes[..at]),
                    Segment::data(at as i64, &bytes[at..]),
                ];
                if at % 2 == 0 {
                    parts.reverse();
                }
                let result = self.connect().and_then(|c| self.cut(c, good, &parts));
                if let Err(error) = result {
                    failures.push(format!("{}, split at {at}, good: {good}: {error:#}", self.to));
                }
            }
        }
        failures
    }

    /// Sends every mixture of both streams. Returns the failures.
    pub fn mixes(&self) -> Vec<String> {
        let half = |timestamps: bool| -> Vec<String> {
            MIXES
                .iter()
                .filter_map(|(what, mix)| {
                    let error = self.mix(*mix, timestamps).err()?;
                    Some(format!(
                        "{}, {what}, timestamps: {timestamps}: {error:#}",
                        self.to
                    ))
                })
                .collect()
        };
        let mut failures = std::thread::scope(|scope| {
            let with = scope.spawn(|| half(true));
            let mut failures = half(false);
            failures.extend(
                with.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
            failures
        });
        if let Err(error) = self.old_timestamps() {
            failures.push(format!("{}, old timestamps: {error:#}", self.to));
        }
        if let Err(error) = self.data_in_syn() {
            failures.push(format!("{}, data in the SYN: {error:#}", self.to));
        }
        failures
    }

    fn mix(&self, mix: Mix, timestamps: bool) -> Result<()> {
        let mut client = if timestamps {
            RawTcp::connect_with_timestamps(self.ns, self.source, self.to)?
        } else {
            self.connect()?
        };
        mix(&mut client, self.streams)?;
        self.check(&mut client)
    }

    /// Fails if the server has received anything but a prefix of an allowed stream.
    fn check(&self, client: &mut RawTcp) -> Result<()> {
        client.listen(SHORT, |_| false)?;
        let heard = self.heard(client);
        ensure!(
            self.streams.may_hear(&heard, client),
            "the server has heard {:?}",
            String::from_utf8_lossy(&heard)
        );
        client.send(&Segment::data(client.acked().max(0), b"").flags(flags::RST))
    }

    /// A receiver discards segments with a timestamp older than the newest one that it has seen (RFC 7323, section 5).
    fn old_timestamps(&self) -> Result<()> {
        let mut client = RawTcp::connect_with_timestamps(self.ns, self.source, self.to)?;
        hidden(&mut client, self.streams, |p| p.timestamp(0x0fff_0000))?;
        self.check(&mut client)
    }

    /// Data in a SYN is not inspected, so it must not arrive. The connection may open.
    fn data_in_syn(&self) -> Result<()> {
        let mut client = RawTcp::new(self.ns, self.source, self.to)?;
        let mut syn = Segment::data(-1, &self.streams.bad).flags(flags::SYN);
        for options in [&[2, 4, 5, 0x78][..], &[34, 2, 1, 1]] {
            syn = syn.options(options);
            client.send(&syn)?;
            client.listen(SHORT, |_| false)?;
        }
        client.open().context("opened without data")?;
        client.send(&Segment::data(0, &self.streams.bad[self.streams.from..]))?;
        client.send(&Segment::data(0, &self.streams.good))?;
        self.check(&mut client)
    }
}
