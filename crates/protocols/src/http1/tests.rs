//! Tests of heads, bodies, paths and refused streams.

use proptest::prelude::*;

use super::*;

fn find(stream: &[u8]) -> Result<Option<usize>, ParseError> {
    Head::default().find(stream, &Limits::default())
}

/// Returns a buffer that lives until the end of the test process.
fn room<'a>() -> &'a mut HeaderBuffer<'a> {
    Box::leak(Box::default())
}

/// Finds and parses a request that is all of `text`.
fn request(text: &str) -> Result<Request<'_>, ParseError> {
    match find(text.as_bytes())? {
        Some(length) if length == text.len() => Request::parse(text.as_bytes(), room()),
        other => panic!("head ends at {other:?} of {}", text.len()),
    }
}

fn refused(text: &str) -> ParseError {
    match request(text) {
        Err(refusal) => refusal,
        Ok(request) => panic!("{text:?} was taken: {request:?}"),
    }
}

fn response<'a>(text: &'a str, method: &str) -> Result<Response<'a>, ParseError> {
    assert_eq!(find(text.as_bytes())?, Some(text.len()));
    Response::parse(text.as_bytes(), method, room())
}

#[test]
fn a_request_yields_method_host_path_and_headers() {
    let get =
        request("GET /a/b?c=d HTTP/1.1\r\nHost: Example.com:8080\r\nX-A: 1\r\nx-a:  2 \r\n\r\n").unwrap();
    assert_eq!(
        (get.method, get.path, get.host),
        ("GET", "/a/b?c=d", "Example.com:8080")
    );
    assert_eq!((get.form, get.version, get.body), (Target::Origin, 1, Body::None));
    let values: Vec<&[u8]> = get.headers.values("X-a").collect();
    assert_eq!(values, [&b"1"[..], b"2"]);
    assert!(get.keeps_alive() && !get.may_upgrade());

    let old = request("GET / HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!((old.host, old.version, old.keeps_alive()), ("", 0, false));
    let kept = request("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").unwrap();
    assert!(kept.keeps_alive());
    let closed = request("GET / HTTP/1.1\r\nHost: a\r\nConnection: foo, Close\r\n\r\n").unwrap();
    assert!(!closed.keeps_alive());

    let proxied = request("GET http://A.example/x?y HTTP/1.1\r\nHost: a.EXAMPLE:80\r\n\r\n").unwrap();
    assert_eq!(
        (proxied.form, proxied.host, proxied.path),
        (Target::Absolute, "A.example", "/x?y")
    );
    let bare = request("GET http://a.example HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
    assert_eq!(bare.path, "/");
    let connect = request("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n").unwrap();
    assert_eq!((connect.form, connect.host), (Target::Authority, "a.example:443"));
    let options = request("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!((options.form, options.path), (Target::Asterisk, "*"));
    let socket =
        "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let upgrades: Vec<&[u8]> = request(socket).unwrap().upgrades().collect();
    assert_eq!(upgrades, [b"websocket"]);
}

#[test]
fn bodies_are_framed_by_unambiguous_fields() {
    let body = |fields: &str| request(&format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).map(|r| r.body);
    assert_eq!(body(""), Ok(Body::None));
    assert_eq!(body("Content-Length: 42\r\n"), Ok(Body::Length(42)));
    assert_eq!(body("Transfer-Encoding: Chunked\r\n"), Ok(Body::Chunked));
    for length in ["", "+1", "-1", "1,1", "0x1", "1 1", "99999999999999999999999"] {
        assert_eq!(
            body(&format!("Content-Length: {length}\r\n")),
            Err(ParseError::BadLength),
            "{length}"
        );
    }
    assert_eq!(
        body("Content-Length: 1\r\nContent-Length: 1\r\n"),
        Err(ParseError::BadLength)
    );
    assert_eq!(
        body("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
        Err(ParseError::LengthAndEncoding)
    );
    for encoding in [
        "gzip",
        "gzip, chunked",
        "chunked, chunked",
        "xchunked",
        "",
        "identity",
    ] {
        assert_eq!(
            body(&format!("Transfer-Encoding: {encoding}\r\n")),
            Err(ParseError::BadEncoding),
            "{encoding}"
        );
    }
    assert_eq!(
        body("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
        Err(ParseError::BadEncoding)
    );
    assert_eq!(
        refused("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ParseError::BadEncoding
    );
}

#[test]
fn ambiguous_requests_are_refused() {
    for (text, refusal) in [
        ("GET / HTTP/1.1\nHost: a\r\n\r\n", ParseError::BareLineEnd),
        ("GET / HTTP/1.1\r\nHost: a\n\r\n", ParseError::BareLineEnd),
        ("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", ParseError::BareLineEnd),
        ("GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", ParseError::Folding),
        ("GET / HTTP/1.1\r\nHost: a\r\n\tb\r\n\r\n", ParseError::Folding),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", ParseError::BadName),
        ("GET / HTTP/1.1\r\nHost: a\r\nX Y: b\r\n\r\n", ParseError::BadName),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nnothing\r\n\r\n",
            ParseError::BadName,
        ),
        ("GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", ParseError::BadName),
        (
            "GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
            ParseError::ControlCharacter,
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX: \x0b\r\n\r\n",
            ParseError::ControlCharacter,
        ),
        ("GET / HTTP/1.1\r\n\r\n", ParseError::NoHost),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            ParseError::SeveralHosts,
        ),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", ParseError::BadHost),
        ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", ParseError::BadHost),
        ("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", ParseError::BadHost),
        (
            "GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n",
            ParseError::HostDiffers,
        ),
        (
            "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            ParseError::BadTarget,
        ),
        (
            "GET http://a?x HTTP/1.1\r\nHost: a\r\n\r\n",
            ParseError::BadTarget,
        ),
        ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadTarget),
        ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadTarget),
        ("GET /#x HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadTarget),
        ("CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadTarget),
        ("CONNECT a:1x HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadTarget),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadStartLine),
        ("GET /  HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadStartLine),
        ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", ParseError::BadStartLine),
        ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", ParseError::BadStartLine),
        ("GET /\r\nHost: a\r\n\r\n", ParseError::BadStartLine),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", ParseError::Version),
        ("GET / HTTP/1.10\r\nHost: a\r\n\r\n", ParseError::BadStartLine),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ParseError::Http2),
        ("\x16\x03\x01\x02\x00", ParseError::NotHttp),
        (" GET / HTTP/1.1\r\n", ParseError::NotHttp),
        ("\r\n\r\n\r\n\r\n\r\nGET", ParseError::NotHttp),
    ] {
        assert_eq!(refused(text), refusal, "{text:?}");
    }
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
        "X: y\r\n".repeat(MAX_HEADERS)
    );
    assert_eq!(refused(&many), ParseError::TooManyHeaders);
    let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(Limits::default().line));
    assert_eq!(find(long.as_bytes()), Err(ParseError::StartLineTooLong));
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n", "a".repeat(Limits::default().line));
    assert_eq!(find(long.as_bytes()), Err(ParseError::LineTooLong));
    let endless = format!("GET / HTTP/1.1\r\n{}", "X: y\r\n".repeat(11_000));
    assert_eq!(find(endless.as_bytes()), Err(ParseError::HeadTooLong));
}

#[test]
fn empty_lines_before_a_request_are_skipped() {
    let text = "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(request(text).unwrap().path, "/");
    let mut head = Head::default();
    head.find(text.as_bytes(), &Limits::default()).unwrap();
    assert_eq!(head.skipped(), 2);
}

#[test]
fn responses_are_framed_by_status_and_method() {
    let length = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
    assert_eq!(response(length, "GET").unwrap().body, Body::Length(5));
    assert_eq!(response(length, "HEAD").unwrap().body, Body::None);
    assert_eq!(response(length, "CONNECT").unwrap().body, Body::Tunnel);
    let body = |text: &str| response(text, "GET").unwrap().body;
    assert_eq!(body("HTTP/1.1 304 x\r\nContent-Length: 5\r\n\r\n"), Body::None);
    assert_eq!(body("HTTP/1.1 204 x\r\n\r\n"), Body::None);
    assert_eq!(body("HTTP/1.1 101 x\r\n\r\n"), Body::Tunnel);
    assert_eq!(body("HTTP/1.1 200 \r\n\r\n"), Body::UntilClose);
    assert_eq!(
        body("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        Body::Chunked
    );
    assert!(
        response("HTTP/1.1 100 Continue\r\n\r\n", "GET")
            .unwrap()
            .is_interim()
    );
    assert!(!response("HTTP/1.1 101 x\r\n\r\n", "GET").unwrap().is_interim());
    assert!(!response("HTTP/1.1 200 OK\r\n\r\n", "GET").unwrap().keeps_alive());
    assert!(response(length, "GET").unwrap().keeps_alive());
    let both = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(response(both, "GET").unwrap_err(), ParseError::LengthAndEncoding);
    assert_eq!(
        response("HTTP/1.1 2000 OK\r\n\r\n", "GET").unwrap_err(),
        ParseError::BadStartLine
    );
}

#[test]
fn paths_are_resolved_as_servers_resolve_them() {
    let mut out = Vec::new();
    for (path, expected) in [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b/"),
        ("/allowed/../denied", "/denied"),
        ("/allowed/%2e%2e/denied", "/denied"),
        ("/allowed/%2E./denied?x=/../y", "/denied?x=/../y"),
        ("/allowed%2f..%2Fdenied", "/denied"),
        ("/allowed\\..\\denied", "/denied"),
        ("/allowed%5c..%5Cdenied", "/denied"),
        ("/allowed/..;/denied", "/denied"),
        ("/allowed/..;a=b/denied", "/denied"),
        ("/allowed/%252e%252e/denied", "/denied"),
        ("//a///b", "/a/b"),
        ("/a/./b/.", "/a/b/"),
        ("/a/b/..", "/a/"),
        ("/../../a", "/a"),
        ("/..", "/"),
        ("/%61", "/a"),
        ("/100%25", "/100%"),
        ("/a;x=1/b", "/a;x=1/b"),
        ("/...", "/..."),
        ("*", "*"),
        ("", ""),
    ] {
        resolved(path, &mut out).unwrap();
        assert_eq!(str::from_utf8(&out).unwrap(), expected, "{path}");
    }
    for (path, error) in [
        ("/a%00b", PathError::Nul),
        ("/a%2500b", PathError::Nul),
        ("/a%", PathError::BadEscape),
        ("/a%4", PathError::BadEscape),
        ("/a%zz", PathError::BadEscape),
        ("/%2525252e", PathError::EncodedTooOften),
    ] {
        assert_eq!(resolved(path, &mut out), Err(error), "{path}");
    }
}

/// Returns the content of a chunked body, and the length of the body if it is complete.
fn unchunk(stream: &[u8], cut: usize) -> Result<(Vec<u8>, Option<usize>), ParseError> {
    unchunk_by(Chunks::default(), stream, cut)
}

fn unchunk_by(mut chunks: Chunks, stream: &[u8], cut: usize) -> Result<(Vec<u8>, Option<usize>), ParseError> {
    let mut content = Vec::new();
    let mut left = 0_u64;
    let mut at = 0;
    for part in stream.chunks(cut.max(1)) {
        let mut input = part;
        loop {
            if left > 0 {
                let taken = (left as usize).min(input.len());
                content.extend_from_slice(&input[..taken]);
                input = &input[taken..];
                left -= taken as u64;
                if left > 0 {
                    break;
                }
            }
            match chunks.next(&mut input)? {
                Piece::More => break,
                Piece::Content(size) => left = size,
                Piece::End => return Ok((content, Some(at + part.len() - input.len()))),
            }
        }
        at += part.len();
    }
    Ok((content, None))
}

#[test]
fn chunk_extensions_pass_if_their_end_is_unambiguous() {
    for text in [
        &b"1;a\r\nx\r\n0;b=c;d=\"e;\\\" f\"\r\n\r\n"[..],
        b"1;chunk-signature=0123456789abcdef\r\nx\r\n0;chunk-signature=00\r\n\r\n",
    ] {
        for cut in [1, 2, 5, 100] {
            assert_eq!(unchunk(text, cut), Ok((b"x".to_vec(), Some(text.len()))));
            assert_eq!(
                unchunk_by(Chunks::of_answer(), text, cut),
                Ok((b"x".to_vec(), Some(text.len())))
            );
        }
    }
    let long = |n: usize| [b"1;".to_vec(), vec![b'a'; n], b"\r\nx\r\n0\r\n\r\n".to_vec()].concat();
    assert!(unchunk(&long(1_000), 7).is_ok());
    assert_eq!(unchunk(&long(1_100), 7), Err(ParseError::BadChunk));
    // A server may send any bytes except those that end a line.
    for line in [
        "1 \r\n",
        "1 ; a = b\r\n",
        "1;\r\n",
        "1;=\r\n",
        "1;\u{e9}\r\n",
        "00001\t\r\n",
    ] {
        let text = format!("{line}x\r\n0\r\n\r\n");
        let found = unchunk_by(Chunks::of_answer(), text.as_bytes(), 1);
        assert_eq!(found, Ok((b"x".to_vec(), Some(text.len()))), "{line:?}");
    }
    for line in ["1;\n", "1;\0\r\n", "1;\rx\r\n", ";a\r\n", " 1\r\n", "1x\r\n"] {
        let found = unchunk_by(Chunks::of_answer(), line.as_bytes(), 1);
        assert_eq!(found, Err(ParseError::BadChunk), "{line:?}");
    }
}

#[test]
fn names_that_some_servers_read_as_framing_fields_are_refused() {
    let with = |field: &str| {
        request(&format!("POST / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n")).map(|request| request.body)
    };
    for name in [
        "Transfer_Encoding",
        "transfer.encoding",
        "TRANSFER_ENCODING",
        "Transfer--Encoding",
        "TransferEncoding",
        "_Transfer-Encoding",
        "Transfer-Encoding_",
        "Transfer!Encoding",
        "Content_Length",
        "Content~Length",
        "'Content-Length'",
        "Host_",
        "Up-grade",
        "Connection.",
        "Ex_pect",
        "T-E",
        "HTTP2_Settings",
    ] {
        assert_eq!(
            with(&format!("{name}: x")).unwrap_err(),
            ParseError::DisguisedName,
            "{name}"
        );
    }
    for name in [
        "Transfer-Encoding\t",
        "Transfer Encoding",
        "Transfer\u{2010}Encoding",
        "\u{7f}Host",
    ] {
        assert!(with(&format!("{name}: chunked")).is_err(), "{name}");
    }
    for name in [
        "\x0bTransfer-Encoding",
        "\0Content-Length",
        "\x1fHost",
        " Transfer-Encoding",
    ] {
        assert!(
            find(format!("POST / HTTP/1.1\r\n{name}: 1\r\n\r\n").as_bytes()).is_err(),
            "{name:?}"
        );
    }
    for name in [
        "X-Content-Length",
        "Content-Length-Hint",
        "X-Forwarded-Host",
        "Proxy-Connection",
        "Upgrade-Insecure-Requests",
        "A-Name-That-Is-Longer-Than-All-That-Are-Looked-For",
        "x_y",
    ] {
        assert!(with(&format!("{name}: x")).is_ok(), "{name}");
    }
    // A proxy removes the fields that Connection names.
    for name in ["Content-Length", "close, transfer-encoding", "Host", "expect"] {
        assert_eq!(
            with(&format!("Connection: {name}")).unwrap_err(),
            ParseError::BadConnection,
            "{name}"
        );
    }
    let answer = "HTTP/1.1 200 OK\r\nTransfer_Encoding: chunked\r\nContent-Length: 5\r\n\r\n";
    assert_eq!(response(answer, "GET").unwrap_err(), ParseError::DisguisedName);
    let akamai = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: Transfer-Encoding\r\n\r\n";
    assert_eq!(response(akamai, "GET").unwrap().body, Body::Chunked);
}

#[test]
fn ambiguous_expect_and_host_fields_are_refused() {
    let with = |fields: &str| {
        request(&format!("POST / HTTP/1.1\r\n{fields}\r\n"))
            .map(|request| (request.host.to_owned(), request.expects_continue()))
    };
    for expect in ["y 100-continue", "100-continue, x", "", "200-ok"] {
        assert_eq!(
            with(&format!("Host: a\r\nExpect: {expect}\r\n")).unwrap_err(),
            ParseError::BadExpect
        );
    }
    let twice = "Host: a\r\nExpect: 100-continue\r\nExpect: 100-continue\r\n";
    assert_eq!(with(twice).unwrap_err(), ParseError::BadExpect);
    assert!(with("Host: a\r\nExpect: 100-Continue\r\n").unwrap().1);
    for host in [
        "a:80:b", "a:b", "[::1", "::1]", "[::1]x", "[]", "[::1]:b", ":80", "a]", "[a]b:80",
    ] {
        assert_eq!(
            with(&format!("Host: {host}\r\n")).unwrap_err(),
            ParseError::BadHost,
            "{host}"
        );
    }
    for host in [
        "",
        "a",
        "a:",
        "a.b:80",
        "[::1]",
        "[2001:db8::1]:8080",
        "2001:db8::1",
        "192.0.2.1",
        "a_b",
    ] {
        assert_eq!(with(&format!("Host: {host}\r\n")).unwrap().0, host);
    }
    let target = |target: &str, host: &str| {
        request(&format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .map(|request| request.host.to_owned())
    };
    assert_eq!(target("http://a:80/", "A"), Ok("a:80".into()));
    assert_eq!(target("HTTPS://a/", "a:443"), Ok("a".into()));
    for (uri, host) in [
        ("http://a:80/", "a:443"),
        ("http://a/", "a:443"),
        ("https://a/", "a:80"),
        ("http://a/", ""),
    ] {
        assert_eq!(target(uri, host), Err(ParseError::HostDiffers), "{uri} {host}");
    }
    for method in ["head", "Connect"] {
        assert_eq!(
            refused(&format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n")),
            ParseError::BadStartLine
        );
    }
}

#[test]
fn bodies_of_methods_without_a_body_are_unexpected() {
    let has = |method: &str, field: &str| {
        request(&format!("{method} /a HTTP/1.1\r\nHost: a\r\n{field}\r\n"))
            .unwrap()
            .has_unexpected_body()
    };
    for method in ["GET", "get", "HEAD", "DELETE", "TRACE", "OPTIONS"] {
        assert!(has(method, "Content-Length: 1\r\n"), "{method}");
        assert!(has(method, "Transfer-Encoding: chunked\r\n"), "{method}");
        assert!(
            !has(method, "Content-Length: 0\r\n") && !has(method, ""),
            "{method}"
        );
    }
    for method in ["POST", "PUT", "PATCH", "PROPFIND"] {
        assert!(!has(method, "Content-Length: 1\r\n"), "{method}");
    }
}

#[test]
fn chunks_are_parsed_up_to_the_end_of_the_body() {
    let body = b"4\r\nWiki\r\n6\r\npedia \r\nE\r\nin \r\n\r\nchunks.\r\n0\r\n\r\nGET";
    for cut in [1, 2, 3, 7, 1000] {
        let (content, end) = unchunk(body, cut).unwrap();
        assert_eq!(content, b"Wikipedia in \r\n\r\nchunks.");
        assert_eq!(end, Some(body.len() - 3));
    }
    let (content, end) = unchunk(b"1\r\na\r\n0\r\nX-Sum: 1\r\nExpires: x\r\n\r\n", 1).unwrap();
    assert_eq!((content, end), (b"a".to_vec(), Some(33)));
    assert_eq!(
        unchunk(b"00000000000001\r\na\r\n", 1).unwrap(),
        (b"a".to_vec(), None)
    );
    for (bad, refusal) in [
        (&b"\r\n"[..], ParseError::BadChunk),
        (b"g\r\n", ParseError::BadChunk),
        (b" 1\r\n", ParseError::BadChunk),
        (b"1 \r\n", ParseError::BadChunk),
        (b"0x1\r\n", ParseError::BadChunk),
        (b"+1\r\n", ParseError::BadChunk),
        (b"1 ;a=b\r\n", ParseError::BadChunk),
        (b"1;\r\n", ParseError::BadChunk),
        (b"1; a=b\r\n", ParseError::BadChunk),
        (b"1;a=\r\n", ParseError::BadChunk),
        (b"1;a =b\r\n", ParseError::BadChunk),
        (b"1;a=b \r\n", ParseError::BadChunk),
        (b"1;a=b\n", ParseError::BadChunk),
        (b"1;a\nx\r\n", ParseError::BadChunk),
        (b"1;a=\"\r\n\"\r\n", ParseError::BadChunk),
        (b"1;a=\"b\"c\r\n", ParseError::BadChunk),
        (b"1;a=\"\0\"\r\n", ParseError::BadChunk),
        (b"1;a=\"\xff\"\r\n", ParseError::BadChunk),
        (b";a\r\n", ParseError::BadChunk),
        (b"0\r\nTransfer_Encoding: chunked\r\n\r\n", ParseError::BadTrailer),
        (b"0\r\nExpect: 100-continue\r\n\r\n", ParseError::BadTrailer),
        (b"1\nab", ParseError::BadChunk),
        (b"1\r\nab\r\n", ParseError::BadChunk),
        (b"1\r\na\n", ParseError::BadChunk),
        (b"ffffffffffffffff\r\n", ParseError::BadChunk),
        (b"00000000000000001\r\n", ParseError::BadChunk),
        (b"0\r\nContent-Length: 1\r\n\r\n", ParseError::BadTrailer),
        (b"0\r\nhOST: a\r\n\r\n", ParseError::BadTrailer),
        (b"0\r\n: a\r\n\r\n", ParseError::BadTrailer),
        (b"0\r\n folded\r\n\r\n", ParseError::BadTrailer),
        (b"0\r\nX: \0\r\n", ParseError::BadTrailer),
    ] {
        assert_eq!(
            unchunk(bad, 1),
            Err(refusal),
            "{:?}",
            String::from_utf8_lossy(bad)
        );
    }
    let endless = [b"0\r\n".to_vec(), b"X: y\r\n".repeat(2_000)].concat();
    assert_eq!(unchunk(&endless, 1), Err(ParseError::HeadTooLong));
}

#[test]
fn trailers_do_not_repeat_names_that_rules_read() {
    let long = "x-forwarded-client-certificate-chain";
    let names = TrailerNames::new(["x-role", long].into_iter());
    for (name, passes) in [
        ("X-Role", false),
        ("x_role", false),
        ("xrole", false),
        ("x-roles", true),
        ("x-rol", true),
        ("X_Forwarded-Client-Certificate-Chain", false),
        ("x-forwarded-client-certificate-chains", true),
    ] {
        for cut in [1, 100] {
            let stream = format!("0\r\nx-other: a\r\n{name}: a\r\n\r\n");
            let found = unchunk_by(Chunks::of_request(names.clone()), stream.as_bytes(), cut);
            let expected = if passes {
                Ok((Vec::new(), Some(stream.len())))
            } else {
                Err(ParseError::BadTrailer)
            };
            assert_eq!(found, expected, "{name}");
        }
    }
}

proptest! {
    #[test]
    fn a_head_ends_at_the_same_byte_however_the_stream_is_segmented(
        path in "/[a-z%./]{0,40}",
        fields in prop::collection::vec(("[A-Za-z-]{1,10}", "[ -~]{0,30}"), 0..10),
        noise in prop::option::of((0_usize..300, any::<u8>())),
        tail in "[ -~]{0,20}",
    ) {
        let fields: String = fields.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        let mut stream = format!("GET {path} HTTP/1.1\r\nHost: a\r\n{fields}\r\n{tail}").into_bytes();
        if let Some((at, byte)) = noise {
            let at = at % stream.len();
            stream[at] = byte;
        }
        let limits = Limits::default();
        let mut head = Head::default();
        let mut grown = Ok(None);
        for end in 0..=stream.len() {
            grown = head.find(&stream[..end], &limits);
            if grown != Ok(None) { break; }
        }
        prop_assert_eq!(grown, find(&stream));
        if let Ok(Some(length)) = grown {
            let _ = Request::parse(&stream[..length], &mut HeaderBuffer::new());
        }
    }

    #[test]
    fn the_content_of_a_chunked_body_is_unchanged(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..10),
        cut in 1_usize..20,
    ) {
        let mut stream = Vec::new();
        for part in &parts {
            stream.extend(format!("{:x}\r\n", part.len()).bytes());
            stream.extend(part);
            stream.extend(b"\r\n");
        }
        stream.extend(b"0\r\n\r\n");
        let length = stream.len();
        stream.extend(b"behind");
        prop_assert_eq!(unchunk(&stream, cut), Ok((parts.concat(), Some(length))));
    }

    #[test]
    fn a_resolved_path_has_no_dot_segments_and_resolves_to_itself(path in "/[a-z./%2eEfF5cC;\\\\]{0,30}") {
        let mut once = Vec::new();
        if resolved(&path, &mut once).is_ok() && once.is_ascii() && !once.contains(&b'%') {
            let mut segments = once.split(|byte| *byte == b'/');
            prop_assert!(segments.all(|segment| {
                let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
                name != b"." && name != b".."
            }), "{:?}", String::from_utf8_lossy(&once));
            let mut twice = Vec::new();
            prop_assert_eq!(resolved(str::from_utf8(&once).unwrap(), &mut twice), Ok(()));
            prop_assert_eq!(once, twice);
        }
    }

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = find(&bytes);
        let _ = Request::parse(&bytes, &mut HeaderBuffer::new());
        let _ = Response::parse(&bytes, "GET", &mut HeaderBuffer::new());
        let _ = unchunk(&bytes, 3);
        let _ = resolved(&String::from_utf8_lossy(&bytes), &mut Vec::new());
    }
}
