//! Tests of the hand-over of HTTP connections at a planned restart.

use super::*;
use crate::handover::{HandedOver, VERSION};

impl Talk {
    /// Hands the connection over to another engine. Each end then repeats what has not reached the other one, as TCP
    /// does.
    fn hand_over(&mut self) -> HandedOver {
        self.hand_over_to(engine(&Limits::default()))
    }

    /// The same, to this engine.
    fn hand_over_to(&mut self, engine: Engine<Vec<u8>>) -> HandedOver {
        let handed_over = self.engine.hand_over(&mut self.out);
        self.engine = engine;
        let taken = self.engine.take_over(self.now, &handed_over.state);
        assert_eq!(taken.connections, handed_over.account.connections);
        assert_eq!(taken.cut, 0);
        self.deliver();
        handed_over
    }

    /// Sends bytes of a stream again from a position on.
    fn repeat(&mut self, side: Side, from: usize, stream: &[u8]) {
        let end = self.sent[side as usize];
        self.sent[side as usize] = 1 + from as u32;
        self.put(side, ACK, stream);
        self.sent[side as usize] = end;
    }
}

/// A step of a conversation.
#[derive(Clone, Debug)]
enum Step {
    /// A side sends.
    Send(Side, Vec<u8>),
    /// Time passes, ms.
    Wait(Millis),
}

/// What the ends of a conversation have seen.
#[derive(PartialEq, Eq, Debug)]
struct Seen {
    at_server: String,
    at_client: String,
    closed: [bool; 2],
    reset: bool,
}

/// Runs a conversation with hand-overs before some of its steps. Returns what the ends have seen, and whether a
/// connection could not be handed over.
fn converse(steps: &[Step], is_handed_over: impl Fn(usize) -> bool) -> (Seen, bool) {
    let mut talk = Talk::new();
    let mut streams = [Vec::new(), Vec::new()];
    let mut is_cut = false;
    for (index, step) in steps.iter().enumerate() {
        if talk.reset || talk.closed != [false; 2] {
            break;
        }
        if is_handed_over(index) {
            is_cut |= talk.hand_over().account.cut > 0;
            for side in Side::BOTH {
                let got = talk.got[side as usize].len();
                let stream: &Vec<u8> = &streams[side as usize];
                if got < stream.len() {
                    talk.repeat(side, got, &stream[got..]);
                }
            }
        }
        match step {
            Step::Send(side, bytes) => {
                streams[*side as usize].extend_from_slice(bytes);
                talk.put(*side, ACK, bytes);
                talk.put(side.other(), ACK, b"");
            }
            Step::Wait(time) => talk.tick(talk.now + time),
        }
    }
    let seen = Seen {
        at_server: talk.at_server().to_owned(),
        at_client: talk.at_client().to_owned(),
        closed: talk.closed,
        reset: talk.reset,
    };
    (seen, is_cut)
}

const BODY: &str = "GET /secret HTTP/1.1\r\nHost: a.test\r\n\r\n";

fn request(kind: u8) -> String {
    match kind {
        0 => get("/public/a"),
        1 => "HEAD /public/a HTTP/1.1\r\nHost: a.test\r\n\r\n".into(),
        2 => format!(
            "POST /public/a HTTP/1.1\r\nHost: a.test\r\nContent-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        ),
        _ => format!(
            "POST /public/a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{BODY}\r\n0\r\n\r\n",
            BODY.len()
        ),
    }
}

fn response(kind: u8) -> &'static str {
    match kind {
        1 => "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        2 => "HTTP/1.1 204 No Content\r\n\r\n",
        3 => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        _ => OK,
    }
}

/// Splits a message at some places into the segments of its sender, with pauses.
fn segments(side: Side, bytes: &[u8], cuts: &[u8], steps: &mut Vec<Step>) {
    let mut rest = bytes;
    for cut in cuts {
        let (first, more) = rest.split_at(usize::from(*cut) % (rest.len() + 1));
        rest = more;
        if !first.is_empty() {
            steps.push(Step::Send(side, first.to_vec()));
        }
        if cut % 3 == 0 {
            steps.push(Step::Wait(20));
        }
    }
    if !rest.is_empty() {
        steps.push(Step::Send(side, rest.to_vec()));
    }
}

fn steps(rounds: &[(u8, Vec<u8>, Vec<u8>)], is_denied: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    for (kind, of_request, of_response) in rounds {
        segments(Side::Client, request(*kind).as_bytes(), of_request, &mut steps);
        segments(Side::Server, response(*kind).as_bytes(), of_response, &mut steps);
    }
    if is_denied {
        segments(Side::Client, get("/secret").as_bytes(), &[7, 12], &mut steps);
    }
    steps
}

proptest! {
    #[test]
    fn a_hand_over_changes_no_verdict(
        rounds in prop::collection::vec(
            (0_u8..4, prop::collection::vec(any::<u8>(), 0..3), prop::collection::vec(any::<u8>(), 0..3)),
            0..4,
        ),
        is_denied in any::<bool>(),
        moments in any::<u32>(),
    ) {
        let steps = steps(&rounds, is_denied);
        let (expected, _) = converse(&steps, |_| false);
        let (seen, is_cut) = converse(&steps, |index| moments >> (index % 32) & 1 == 1);
        prop_assert!(!seen.at_server.replace(BODY, "").contains("/secret"));
        if is_cut {
            return Ok(());
        }
        prop_assert_eq!(seen, expected);
    }
}

#[test]
fn a_hand_over_at_each_position_changes_no_verdict() {
    let rounds: Vec<_> = (0..4).map(|kind| (kind, vec![], vec![])).collect();
    let whole = steps(&rounds, true);
    let (expected, _) = converse(&whole, |_| false);
    assert!(expected.at_client.contains("403 Forbidden"));
    for (index, step) in whole.iter().enumerate() {
        let Step::Send(side, bytes) = step else { continue };
        for at in 1..bytes.len() {
            let (first, second) = bytes.split_at(at);
            for pause in [0, 20] {
                let mut cut = whole.clone();
                let parts = [
                    Step::Send(*side, first.to_vec()),
                    Step::Wait(pause),
                    Step::Send(*side, second.to_vec()),
                ];
                cut.splice(index..=index, parts);
                let (seen, is_cut) = converse(&cut, |step| step == index + 2);
                // Within the framing of a chunk, and while a refusal waits, a connection is cut.
                if is_cut {
                    let text = String::from_utf8_lossy(bytes);
                    assert!(text.contains("chunked"), "{text} at {at}");
                    assert!(expected.at_server.starts_with(&seen.at_server));
                } else {
                    assert_eq!(seen, expected, "{step:?} at {at}, {pause}");
                }
            }
        }
    }
}

#[test]
fn a_repeated_byte_with_another_value_is_dropped_after_a_hand_over() {
    let mut talk = Talk::new();
    let whole = get("/public/a");
    // The request is forwarded, but the server does not acknowledge it.
    talk.client(whole.as_bytes());
    talk.hand_over();
    talk.take();
    talk.repeat(Side::Client, 0, get("/public/b").as_bytes());
    assert_eq!(talk.out.discarded, [Reason::TcpOverlap]);
    talk.take();
    talk.repeat(Side::Client, 0, whole.as_bytes());
    assert_eq!(talk.out.discarded, []);
}

/// Trailers must not repeat a header that the verdict on the request was about, whichever rules are in force then.
#[test]
fn a_trailer_does_not_repeat_a_matched_header_after_a_hand_over() {
    let of = |headers: &[&str]| {
        let headers = headers.iter();
        set(vec![Matcher::Http(HttpRule {
            headers: headers
                .map(|name| ((*name).into(), Some("reader".into())))
                .collect(),
            ..HttpRule::default()
        })])
    };
    let head = "POST / HTTP/1.1\r\nHost: a\r\nX-Role: reader\r\nX-Unit: reader\r\nTransfer-Encoding: chunked\r\n\r\n";
    // At a size line, directly behind content, within content, and twice.
    for sent in ["", "1\r\na\r\n", "1\r\na", "2\r\na"] {
        for (trailer, passes) in [
            ("X-Sum: 1", true),
            ("X-Role: admin", false),
            ("x_role: admin", false),
            ("X-Unit: admin", false),
        ] {
            for after in [&["X-Role", "X-Unit"][..], &["X-Role"], &[]] {
                let rules = |names| Arc::new(Rules::prepare(&BTreeMap::from([(RULESET, of(names))]), None));
                let mut talk = Talk::new();
                talk.engine.set_rules(rules(&["X-Role", "X-Unit"]));
                talk.client(format!("{head}{sent}").as_bytes());
                for _ in 0..2 {
                    talk.put(Side::Server, ACK, b"");
                    let mut next = engine(&Limits::default());
                    next.set_rules(rules(after));
                    assert_eq!(talk.hand_over_to(next).account.connections, 1, "{sent:?}");
                }
                let body = "2\r\nab\r\n0\r\n";
                let rest = if sent.ends_with('\n') || sent.is_empty() {
                    body
                } else {
                    if sent.starts_with("1") {
                        "\r\n0\r\n"
                    } else {
                        "b\r\n0\r\n"
                    }
                };
                talk.client(format!("{rest}{trailer}\r\n\r\n").as_bytes());
                assert_eq!(
                    talk.at_server().contains(trailer),
                    passes,
                    "{sent:?} {trailer} {after:?}"
                );
            }
        }
    }
}

#[test]
fn a_connection_is_recognised_by_its_serial_only() {
    let mut talk = Talk::new();
    talk.client(get("/public/a").as_bytes());
    talk.server(OK.as_bytes());
    talk.hand_over();
    talk.take();
    let slot = PuntRequest {
        inspector: Inspector::Http as u8,
        ruleset: RULESET,
        serial: 100,
        ..PuntRequest::default()
    };
    let [client, server] = [0, 1].map(|side| talk.sent[side]);
    let seg = Seg::new(Side::Client, ACK, client, server, get("/public/a").as_bytes());
    let (engine, out, now) = (&mut talk.engine, &mut talk.out, talk.now);
    seg.view(slot, |view, frame| engine.packet(now, view, frame, out));
    assert_eq!(talk.out.discarded, [Reason::TcpMidstream]);
}

impl Talk {
    /// Returns a connection whose handshake is complete up to this segment.
    fn half_open(segments: usize) -> Self {
        let mut talk = Self::before_handshake(&Limits::default());
        talk.now = 5;
        for (side, flags) in [(Side::Client, SYN), (Side::Server, SYN | ACK)]
            .into_iter()
            .take(segments)
        {
            talk.put(side, flags, b"");
        }
        talk
    }
}

/// The client has the answer to its SYN, but its acknowledgement arrives while no worker runs.
#[test]
fn a_connection_whose_syn_was_answered_goes_on_after_a_hand_over() {
    for is_repeated in [false, true] {
        let mut talk = Talk::half_open(2);
        assert_eq!(talk.hand_over().account.connections, 1);
        assert_eq!(talk.engine.stats().http.tcp.half_open, 1);
        if is_repeated {
            // The server repeats its answer.
            talk.sent[1] = 0;
            talk.put(Side::Server, SYN | ACK, b"");
        }
        assert_eq!(
            talk.take().commands.len(),
            0,
            "the client has acknowledged nothing"
        );
        talk.client(get("/public/a").as_bytes());
        assert_eq!(talk.engine.stats().http.tcp.half_open, 0);
        assert_eq!(talk.take().commands.len(), 1);
        talk.server(OK.as_bytes());
        talk.client(get("/secret").as_bytes());
        assert_eq!((talk.at_server(), talk.reset), (&*get("/public/a"), false));
        assert!(talk.at_client().contains("403"));
    }
    let account = Talk::half_open(1).hand_over().account;
    assert_eq!(
        (account.connections, account.cut),
        (0, 0),
        "the client repeats its SYN"
    );
}

#[test]
fn half_open_connections_beyond_the_limit_are_not_taken_over() {
    let state = Talk::half_open(2).hand_over().state;
    let mut limits = Limits::default();
    limits.http.tcp.half_open = 0;
    let taken = Engine::<Vec<u8>>::new(&limits).take_over(5, &state);
    assert_eq!((taken.connections, taken.cut), (0, 1));
}

#[test]
fn a_reset_that_its_receiver_has_refused_does_not_keep_a_connection_from_being_handed_over() {
    let (head, body, _) = upload(1_000_000);
    let mut talk = Talk::new();
    talk.client(head.as_bytes());
    talk.client(&body[..1000]);
    talk.put(Side::Client, RST, b"");
    assert!(std::mem::take(&mut talk.reset), "its receiver decides");
    let account = talk.hand_over().account;
    assert_eq!((account.connections, account.cut), (1, 0));
    // The challenge ACK.
    talk.put(Side::Server, ACK, b"");
    for part in body[1000..].chunks(50_000) {
        talk.client(part);
        talk.put(Side::Server, ACK, b"");
    }
    talk.server(OK.as_bytes());
    assert_eq!(talk.got[0], [head.as_bytes(), &body].concat());
    assert_eq!((talk.at_client(), talk.reset), (OK, false));
}

#[test]
fn connections_beyond_the_limits_are_not_taken_over() {
    let mut talk = Talk::new();
    talk.client(get("/public/a").as_bytes());
    let state = talk.engine.hand_over(&mut talk.out).state;
    let mut limits = Limits::default();
    limits.http.tcp.connections = 0;
    let taken = Engine::<Vec<u8>>::new(&limits).take_over(0, &state);
    assert_eq!((taken.connections, taken.cut), (0, 1));
    limits.http.tcp.connections = 5;
    limits.http.tcp.bytes_per_direction = 8;
    let mut engine = Engine::<Vec<u8>>::new(&limits);
    assert_eq!(engine.take_over(0, &state).cut, 1);
    assert_eq!(engine.stats().http.tcp.bytes, 0);
    // Twice the same connection.
    let mut engine = Engine::<Vec<u8>>::new(&Limits::default());
    let taken = engine.take_over(0, &[&state[..], &state[..]].concat());
    assert_eq!((taken.connections, taken.cut), (1, 1));
}

/// An example must keep its bytes: with others, `VERSION` must be raised.
#[test]
fn the_encoding_belongs_to_its_version() {
    let mut talk = Talk::new();
    talk.client(get("/public/a").as_bytes());
    talk.client(b"POST /public/a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\n12");
    talk.server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello");
    let state = talk.hand_over().state;
    let sum = state.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    assert_eq!((VERSION, state.len(), sum), (5, 805, 585_688_291_686_639_987));
}
