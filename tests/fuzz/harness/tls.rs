//! Both sides of a TLS connection: however the streams are cut, the same is read in them.
//!
//! The first byte of the input says how the stream is cut.

use palisade_protocols::tls::{
    ClientHello, ClientReader, ClientStep, ParseError, ServerName, ServerReader, ServerStep,
};

/// Runs one stream.
pub fn run(input: &[u8]) {
    let Some((&cut, stream)) = input.split_first() else {
        return;
    };
    let step = usize::from(cut % 32) + 1;
    let whole = client(stream, stream.len());
    assert_eq!(client(stream, step), whole);
    assert_eq!(server(stream, step), server(stream, stream.len()));
    for (_, hello) in &whole.0 {
        if let ServerName::Name(name) = &hello.server_name {
            let name = name.to_string();
            assert!(!name.is_empty() && name.len() <= 255, "{name}");
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b)),
                "{name}"
            );
        }
    }
}

/// The hellos with where they end, and why the stream was refused.
fn client(stream: &[u8], step: usize) -> (Vec<(usize, ClientHello)>, Option<ParseError>) {
    let mut reader = ClientReader::default();
    let (mut hellos, mut at) = (Vec::new(), 0);
    for piece in stream.chunks(step.max(1)) {
        let mut input = piece;
        loop {
            match reader.next(&mut input) {
                Ok(ClientStep::More) => {
                    assert!(input.is_empty());
                    break;
                }
                Ok(ClientStep::Other) => {}
                Ok(ClientStep::Hello(hello)) => {
                    hellos.push((at + piece.len() - input.len(), *hello));
                    assert_eq!(reader.held(), 0);
                }
                Err(refusal) => return (hellos, Some(refusal)),
            }
        }
        at += piece.len();
    }
    (hellos, None)
}

/// What the server's side came to, with where.
fn server(stream: &[u8], step: usize) -> (Vec<(usize, ServerStep)>, Option<ParseError>) {
    let mut reader = ServerReader::default();
    let (mut steps, mut at) = (Vec::new(), 0);
    for piece in stream.chunks(step.max(1)) {
        let mut input = piece;
        loop {
            match reader.next(&mut input) {
                Ok(ServerStep::More) => break,
                Ok(step @ ServerStep::Again) => steps.push((at + piece.len() - input.len(), step)),
                Ok(step) => {
                    // where in its record an alert ends makes no difference
                    steps.push((0, step));
                    return (steps, None);
                }
                Err(refusal) => return (steps, Some(refusal)),
            }
        }
        at += piece.len();
    }
    (steps, None)
}
