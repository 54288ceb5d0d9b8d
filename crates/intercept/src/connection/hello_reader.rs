//! The two parsers that read a ClientHello: that of the rules and that of the TLS library.

use palisade_protocols::tls::{ClientHello, ClientReader, ClientStep};
use rustls::server::{Accepted, Acceptor};

use crate::end::Buffer;

/// Why a ClientHello is refused.
pub(crate) enum HelloError {
    /// The parser of the rules refuses the bytes, with this detail.
    Malformed(&'static str),
    /// The TLS library refuses the hello, and has this alert for the client.
    Tls(rustls::Error, Vec<u8>),
    /// The TLS library takes no more bytes.
    Full,
}

/// State of the two parsers.
#[derive(Default)]
pub(crate) struct HelloReader {
    reader: ClientReader,
    /// Number of bytes of the client's input that `reader` has taken.
    fed: usize,
    hello: Option<Box<ClientHello>>,
    acceptor: Acceptor,
}

impl HelloReader {
    /// Returns whether the parser of the rules has the complete hello.
    pub(crate) const fn has_hello(&self) -> bool {
        self.hello.is_some()
    }

    /// Reads the bytes that have arrived, and takes those of the hello once the hello is complete. Returns `None` while
    /// it is incomplete.
    ///
    /// # Errors
    /// [`HelloError`] if one of the parsers refuses the hello.
    pub(crate) fn read(
        &mut self,
        input: &mut Buffer,
    ) -> Result<Option<(Box<ClientHello>, Accepted)>, HelloError> {
        if self.hello.is_none() {
            let bytes = input.bytes();
            let mut rest = bytes.get(self.fed..).unwrap_or_default();
            match self.reader.next(&mut rest) {
                Ok(ClientStep::Hello(hello)) => self.hello = Some(hello),
                Ok(ClientStep::More | ClientStep::Other) => {
                    self.fed = bytes.len() - rest.len();
                    return Ok(None);
                }
                Err(error) => return Err(HelloError::Malformed(error.text())),
            }
        }
        loop {
            let mut bytes = input.bytes();
            let all = bytes.len();
            let read = self.acceptor.read_tls(&mut bytes).map_err(|_| HelloError::Full)?;
            let taken = all - bytes.len();
            input.consume(taken);
            match self.acceptor.accept() {
                Ok(Some(accepted)) => return Ok(self.hello.take().map(|hello| (hello, accepted))),
                Ok(None) if read == 0 => return Ok(None),
                Ok(None) => {}
                Err((error, mut alert)) => {
                    let mut bytes = Vec::new();
                    let _ = alert.write_all(&mut bytes);
                    return Err(HelloError::Tls(error, bytes));
                }
            }
        }
    }
}
