//! Tests of the redaction of URLs and header fields.

use super::*;

fn url_of(path: &str) -> String {
    let mut text = Text::default();
    url("http", "h.example:8080", path, &mut text);
    let text = String::from_utf8(text.bytes().to_vec()).unwrap();
    text.strip_prefix("http://h.example:8080").unwrap().to_owned()
}

fn fields_of(fields: &[(&str, &[u8])], chosen: &[&str]) -> String {
    let chosen: Vec<String> = chosen.iter().map(ToString::to_string).collect();
    let mut text = Text::default();
    headers(fields.iter().copied(), &chosen, &mut text);
    String::from_utf8(text.bytes().to_vec()).unwrap()
}

#[test]
fn texts_without_secrets_are_unchanged() {
    for path in [
        "",
        "*",
        "/",
        "/a/b.html?x=1&y=%20&z",
        "/monkey?monkey=1&keyboard=2&postcode=3&encode=4&design=5&author=6&spin=7&passage=8",
        "/token=1/secret",
        "/?=1&&a==b",
        "/%7Euser/%",
        "/a;v=1/b",
    ] {
        assert_eq!(url_of(path), path);
    }
}

#[test]
fn values_of_secret_parameters_are_redacted() {
    for name in [
        "token",
        "TOKEN",
        "access_token",
        "accessToken",
        "AccessTokens",
        "key",
        "api_key",
        "api-key",
        "apiKey",
        "APIKey",
        "apikey",
        "keys",
        "AWSAccessKeyId",
        "key2",
        "auth[0]",
        "oauth2",
        "client_secret",
        "clientsecret",
        "password",
        "passWord",
        "passwd",
        "pwd",
        "X-Amz-Signature",
        "sig",
        "session",
        "PHPSESSID",
        "code",
        "credentials",
        "x.jwt",
        "to%6Ben",
        "%74oken",
        "a%20key",
        "averyveryveryverylongnamewithpasswordinit",
    ] {
        assert_eq!(
            url_of(&format!("/p?a=1&{name}=s3cr3t&b=2")),
            format!("/p?a=1&{name}=[redacted]&b=2"),
            "{name}"
        );
        assert_eq!(
            url_of(&format!("/p?{name}=s3cr3t")),
            format!("/p?{name}=[redacted]")
        );
    }
    assert_eq!(url_of("/p?token="), "/p?token=[redacted]");
    assert_eq!(url_of("/p?token&a=1"), "/p?token&a=1");
}

#[test]
fn a_secret_ends_where_every_parser_ends_it() {
    assert_eq!(url_of("/p?token=ab;cd=e?f/g#h&x=1"), "/p?token=[redacted]&x=1");
    assert_eq!(url_of("/p?a=1;token=ab&x=1"), "/p?a=1;token=[redacted]&x=1");
    assert_eq!(url_of("/p?token=a%26b=c&x=1"), "/p?token=[redacted]&x=1");
    assert_eq!(
        url_of("/p;jsessionid=AB/c;k=1?x=1"),
        "/p;jsessionid=[redacted]/c;k=1?x=1"
    );
    assert_eq!(url_of("/p;sid=AB?sid=2"), "/p;sid=[redacted]?sid=[redacted]");
}

#[test]
fn urls_in_parameters() {
    assert_eq!(
        url_of("/go?to=http%3A%2F%2Fo%2F%3Fa%3D1%26token%3Dabc%26c%3D2&x=1"),
        "/go?to=http%3A%2F%2Fo%2F%3Fa%3D1%26token%3D[redacted]&x=1"
    );
    assert_eq!(
        url_of("/go?to=http://o/?token=abc"),
        "/go?to=http://o/?token=[redacted]"
    );
    assert_eq!(
        url_of("/go?to=http://me:pw@o/@x"),
        "/go?to=http://[redacted]@o/@x"
    );
}

#[test]
fn only_visible_ascii_is_written() {
    assert_eq!(url_of("/\x1b[2J\r\n\u{9b}é x"), "/%1B[2J%0D%0A%C2%9B%C3%A9%20x");
    let fields: &[(&str, &[u8])] = &[("a", b"\x1b[2J\t\\x\xff\xc2\x9b\r\nb: c")];
    assert_eq!(
        fields_of(fields, &["a"]),
        "a: \\x1b[2J\\x09\\x5cx\\xff\\xc2\\x9b\\x0d\\x0ab: c\n"
    );
}

#[test]
fn chosen_fields() {
    let fields: &[(&str, &[u8])] = &[
        ("Host", b"h"),
        ("USER-AGENT", b"curl/8"),
        ("Authorization", b"Basic abc"),
        ("X-Api-Key", b"abc"),
        ("x-auth-token", b"abc"),
        ("Set-Cookie", b"a=b"),
        ("Set-Cookie", b"c=d"),
        ("Referer", b"https://me:pw@o.example/?a=1&key=2"),
        ("Link", b"</a>; rel=next, token=abc"),
        ("ETag", b"\"ab==\""),
        ("Empty", b""),
    ];
    assert_eq!(fields_of(fields, &[]), "");
    assert_eq!(fields_of(fields, &["accept"]), "");
    assert_eq!(
        fields_of(
            fields,
            &[
                "User-Agent",
                "authorization",
                "proxy-authorization",
                "x-api-key",
                "x-auth-token",
                "set-cookie",
                "referer",
                "link",
                "etag",
                "empty",
            ]
        ),
        "User-Agent: curl/8\n\
         authorization: [redacted]\n\
         x-api-key: [redacted]\n\
         x-auth-token: [redacted]\n\
         set-cookie: [redacted]\n\
         set-cookie: [redacted]\n\
         referer: https://[redacted]@o.example/?a=1&key=[redacted]\n\
         link: </a>; rel=next, token=[redacted]\n\
         etag: \"ab==\"\n\
         empty: \n"
    );
}

#[test]
fn long_texts_are_truncated() {
    let mut text = Text::default();
    url(
        "http",
        "h",
        &format!("/?token={}&a={}", "s".repeat(9_000), "b".repeat(9_000)),
        &mut text,
    );
    let expected = "http://h/?token=[redacted]&a=bbb";
    assert_eq!(&text.bytes()[..expected.len()], expected.as_bytes());
    assert_eq!(text.bytes().len(), TEXT);
    headers([("a", &b"b"[..])].into_iter(), &["a".to_owned()], &mut text);
    assert_eq!(text.bytes().len(), TEXT);
}
