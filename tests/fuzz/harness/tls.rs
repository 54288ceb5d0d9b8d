//! Both sides of a TLS connection: the parser finds the same in a stream wherever it is cut.
//!
//! The first byte of the input selects the cuts.

use palisade_protocols::tls::{
    ClientHello, ClientReader, ClientStep, ParseError, ServerName, ServerReader, ServerStep,
};

/// Parses one stream.
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

/// Returns the hellos with their ends, and why the stream was refused.
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

/// Returns the steps of the server's side with their ends.
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
                    // The place of an alert within its record makes no difference.
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
