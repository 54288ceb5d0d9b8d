//! A filter with its rules, and frames in a readable form.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::{Direction, Inspector, PuntRequest, punt_flags};
use palisade_inspect::{
    HttpScratch, Rules,
    http2::{Buffers, ConnectionEnd, Context, Filter, Http2Limits, Http2Stats, LateAnswer, Output},
    record::{Record, What},
    stream::StreamContext,
};
use palisade_model::{
    rule::HttpRule,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::http2::{
    Decoder, ErrorCode, Fields, FrameHeader, Frames, PREFACE, Piece, encode, flags, fragment_of, headers_of,
    kind,
};

/// Number of the rule set.
pub(crate) const SET: u32 = 3;

/// Returns rules that allow GET and POST of paths below `/public/`, and CONNECT.
pub(crate) fn rules() -> Rules {
    let rule = |method: &str, path: Option<&str>| {
        Matcher::Http(HttpRule {
            method: Some(method.into()),
            path: path.map(Into::into),
            ..HttpRule::default()
        })
    };
    prepare(vec![
        rule("GET|HEAD", Some("/public/.*")),
        rule("POST", Some("/public/.*")),
        rule("CONNECT", None),
    ])
}

pub(crate) fn prepare(matchers: Vec<Matcher>) -> Rules {
    let alternatives = (100..)
        .zip(matchers)
        .map(|(rule, matcher)| Alternative { rule, matcher })
        .collect();
    let set = RuleSet {
        reads: Inspector::Http as u8,
        alternatives,
        ..RuleSet::default()
    };
    let rules = Rules::prepare(&BTreeMap::from([(SET, Arc::new(set))]), None);
    assert_eq!(rules.problems(), []);
    rules
}

/// A filter between two peers.
pub(crate) struct Link {
    pub(crate) filter: Filter,
    pub(crate) rules: Rules,
    pub(crate) stream: StreamContext,
    pub(crate) now: u64,
    pub(crate) stats: Http2Stats,
    pub(crate) records: Vec<Record>,
    /// Output that no test has taken.
    pub(crate) out: Output,
    scratch: HttpScratch,
    buffers: Buffers,
}

impl Link {
    /// Returns a link with the limits, before any byte of the peers.
    pub(crate) fn fresh(limits: &Http2Limits) -> Self {
        Self {
            filter: Filter::new(limits, true),
            rules: rules(),
            stream: StreamContext {
                request: PuntRequest {
                    rule: 9,
                    ruleset: SET,
                    remote_identity: 77,
                    endpoint: 5,
                    inspector: Inspector::Http as u8,
                    ..PuntRequest::default()
                },
                direction: Direction::Egress,
                client: "10.0.0.1:40000".parse().unwrap(),
                server: "10.0.0.2:443".parse().unwrap(),
                ifindex: 4,
            },
            now: 1_000,
            stats: Http2Stats::default(),
            records: Vec::new(),
            out: Output::default(),
            scratch: HttpScratch::default(),
            buffers: Buffers::default(),
        }
    }

    /// Returns a link whose peers have exchanged their first SETTINGS.
    pub(crate) fn new() -> Self {
        Self::with(&Http2Limits::default())
    }

    pub(crate) fn with(limits: &Http2Limits) -> Self {
        let mut link = Self::fresh(limits);
        link.open();
        link
    }

    /// Exchanges the first SETTINGS of both peers.
    pub(crate) fn open(&mut self) {
        let preface = [PREFACE, &settings(&[])].concat();
        self.client(&preface).unwrap();
        self.server(&[settings(&[]), settings_ack()].concat()).unwrap();
        self.client(&settings_ack()).unwrap();
        self.out = Output::default();
    }

    pub(crate) fn audit(mut self) -> Self {
        self.stream.request.flags |= punt_flags::AUDIT;
        self
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut Filter, &mut Context<'_>, &mut Output) -> T) -> T {
        let records = &mut self.records;
        let mut cx = Context {
            now: self.now,
            rules: &self.rules,
            stream: &self.stream,
            scratch: &mut self.scratch,
            buffers: &mut self.buffers,
            stats: &mut self.stats,
            record: &mut |record| records.push(*record),
        };
        call(&mut self.filter, &mut cx, &mut self.out)
    }

    pub(crate) fn client(&mut self, bytes: &[u8]) -> Result<(), ConnectionEnd> {
        self.call(|filter, cx, out| filter.client(bytes, cx, out))
    }

    pub(crate) fn server(&mut self, bytes: &[u8]) -> Result<(), ConnectionEnd> {
        self.call(|filter, cx, out| filter.server(bytes, cx, out))
    }

    /// Answers the requests that have waited since `time`.
    pub(crate) fn answer_overdue(&mut self, time: u64) -> usize {
        let answer = LateAnswer {
            status: "504",
            grpc_status: "4",
            error: "response timeout",
            body: "late",
        };
        self.filter
            .answer_overdue(time, &answer, &mut self.buffers, &mut self.out)
    }

    pub(crate) fn recheck(&mut self) {
        self.call(Filter::recheck);
    }

    /// Returns the frames for the server since the last call.
    pub(crate) fn server_gets(&mut self) -> Vec<String> {
        show(&std::mem::take(&mut self.out.to_server))
    }

    /// Returns the frames for the client since the last call.
    pub(crate) fn client_gets(&mut self) -> Vec<String> {
        show(&std::mem::take(&mut self.out.to_client))
    }

    /// Returns the records since the last call, in a readable form.
    pub(crate) fn records(&mut self) -> Vec<String> {
        self.records.drain(..).map(|record| describe(&record)).collect()
    }
}

pub(crate) fn describe(record: &Record) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let what = match &record.what {
        What::HttpRequest {
            method,
            version,
            url,
            headers,
            ..
        } => format!(
            "request {version} {} {} {}",
            text(method.bytes()),
            text(url.bytes()),
            text(headers.bytes()).replace('\n', ";")
        ),
        What::HttpResponse {
            method,
            url,
            version,
            status,
            length,
            headers,
        } => format!(
            "response {version} {status} {} {} {length:?} {}",
            text(method.bytes()),
            text(url.bytes()),
            text(headers.bytes()).replace('\n', ";")
        ),
        What::Unreadable { detail } => format!("unreadable {detail}"),
        other => format!("{other:?}"),
    };
    let latency = record
        .latency
        .map_or(String::new(), |latency| format!(" {latency}ms"));
    format!(
        "{:?} {:?} {} {}{latency}",
        record.verdict,
        record.reason,
        record.rule,
        what.trim_end()
    )
}

/// Returns frames in a readable form, with decoded header blocks.
pub(crate) fn show(bytes: &[u8]) -> Vec<String> {
    let mut frames = Frames::new(1 << 20);
    frames.raise_limit(1 << 20);
    let mut shown = Vec::new();
    let mut decoder = Decoder::lenient();
    let (mut block, mut begin) = (Vec::new(), String::new());
    let mut input = bytes;
    while let Some(piece) = frames.next(&mut input).unwrap() {
        match piece {
            Piece::Data {
                header,
                padding,
                rest,
            } => {
                let end = if header.has(flags::END_STREAM) { " end" } else { "" };
                let padding = padding.map_or(String::new(), |length| format!(" padding {length}"));
                shown.push(format!("DATA {}{end}{padding} {rest}", header.stream));
            }
            Piece::Content { .. } => {}
            Piece::Unknown(header) => shown.push(format!("UNKNOWN {}", header.kind)),
            Piece::Frame(header, payload) => {
                let number = |at: usize| {
                    let bytes = payload.get(at..at + 4).unwrap_or(&[0; 4]);
                    u32::from_be_bytes(bytes.try_into().unwrap())
                };
                let id = header.stream;
                shown.push(match header.kind {
                    kind::HEADERS | kind::CONTINUATION => {
                        if header.kind == kind::HEADERS {
                            let (priority, fragment) = fragment_of(header, payload).unwrap();
                            block = fragment.to_vec();
                            let end = if header.has(flags::END_STREAM) { " end" } else { "" };
                            let priority = priority.map_or(String::new(), |bytes| format!(" {bytes:?}"));
                            begin = format!("HEADERS {id}{end}{priority}");
                        } else {
                            block.extend_from_slice(payload);
                        }
                        if !header.has(flags::END_HEADERS) {
                            continue;
                        }
                        let mut fields = Fields::default();
                        let updates = decoder.decode(&block, 1 << 20, &mut fields).unwrap();
                        let mut text = begin.clone();
                        if let Some(last) = updates.last {
                            text += &format!(" table {}..{last}", updates.least.unwrap());
                        }
                        for (name, value, sensitive) in fields.iter() {
                            let text_of = |bytes| String::from_utf8_lossy(bytes).into_owned();
                            let mark = if sensitive { "!" } else { "" };
                            text += &format!(" {mark}{}={}", text_of(name), text_of(value));
                        }
                        text
                    }
                    kind::SETTINGS if header.has(flags::ACK) => "SETTINGS ack".into(),
                    kind::SETTINGS => {
                        let list: Vec<String> = payload
                            .chunks(6)
                            .map(|s| {
                                let id = u16::from_be_bytes([s[0], s[1]]);
                                format!("{id}={}", u32::from_be_bytes(s[2..].try_into().unwrap()))
                            })
                            .collect();
                        format!("SETTINGS {}", list.join(" "))
                    }
                    kind::RST_STREAM => format!("RST_STREAM {id} {}", number(0)),
                    kind::WINDOW_UPDATE => format!("WINDOW_UPDATE {id} {}", number(0)),
                    kind::GOAWAY => format!("GOAWAY {} {}", number(0), number(4)),
                    kind::PING if header.has(flags::ACK) => "PING ack".into(),
                    kind::PING => "PING".into(),
                    kind::PRIORITY => format!("PRIORITY {id} {payload:?}"),
                    other => format!("FRAME {other} {id} {}", payload.len()),
                });
            }
        }
    }
    assert!(input.is_empty());
    shown
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let header = FrameHeader {
        length: 0,
        kind,
        flags,
        stream,
    };
    header.write_with(payload, &mut out);
    out
}

pub(crate) fn settings(list: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (id, value) in list {
        payload.extend_from_slice(&id.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    frame(kind::SETTINGS, 0, 0, &payload)
}

pub(crate) fn settings_ack() -> Vec<u8> {
    frame(kind::SETTINGS, flags::ACK, 0, &[])
}

pub(crate) fn data(stream: u32, length: usize, end: bool) -> Vec<u8> {
    let flags = if end { flags::END_STREAM } else { 0 };
    frame(kind::DATA, flags, stream, &vec![b'd'; length])
}

pub(crate) fn reset(stream: u32, code: ErrorCode) -> Vec<u8> {
    frame(kind::RST_STREAM, 0, stream, &(code as u32).to_be_bytes())
}

pub(crate) fn window(stream: u32, increment: u32) -> Vec<u8> {
    frame(kind::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
    }
    block
}

pub(crate) fn headers(stream: u32, end: bool, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    headers_of(stream, end, None, &block(fields), 16_384, &mut out);
    out
}

/// Returns a request with further fields.
pub(crate) fn request(stream: u32, end: bool, method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut fields = vec![
        (":method", method),
        (":scheme", "https"),
        (":path", path),
        (":authority", "a.test"),
    ];
    fields.extend_from_slice(more);
    headers(stream, end, &fields)
}

pub(crate) fn get(stream: u32, path: &str) -> Vec<u8> {
    request(stream, true, "GET", path, &[])
}
