//! The TLS towards one peer without a socket, for the fuzz target `tls_records`: the ClientHello as a connection reads it,
//! the TLS configurations of the proxy, and the buffers of an end. Start at [`Proxied`].

use std::{io, sync::Arc};

use rustls::sign::CertifiedKey;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    connection::{HelloError, HelloReader, agreed_name},
    end::{End, EndError, Ending},
    failure::Failure,
    secrets::Trust,
    tls::{Contexts, PeerName},
};

/// The TLS configurations of a proxy.
pub struct Configurations(Contexts);

impl Default for Configurations {
    fn default() -> Self {
        Self(Contexts::new())
    }
}

/// What the proxy has towards one peer.
pub struct Proxied<'a> {
    contexts: &'a Contexts,
    end: End,
    /// Set until the ClientHello of a client is complete: its parsers, and the certificate for the client.
    hello: Option<(HelloReader, Arc<CertifiedKey>)>,
    received: Vec<u8>,
}

impl<'a> Proxied<'a> {
    /// Returns the side towards a client, which gets this certificate.
    ///
    /// # Errors
    /// The system has no socket.
    pub fn towards_client(
        configurations: &'a Configurations,
        certificate: Arc<CertifiedKey>,
    ) -> io::Result<Self> {
        Ok(Self {
            contexts: &configurations.0,
            end: unconnected()?,
            hello: Some((HelloReader::default(), certificate)),
            received: Vec::new(),
        })
    }

    /// Returns the side towards a server with a name, whose certificate is checked by `trust`.
    ///
    /// # Errors
    /// What is wrong with the name or `trust`, or the system has no socket.
    pub fn towards_server(
        configurations: &'a Configurations,
        trust: &Trust,
        name: &str,
    ) -> Result<Self, String> {
        let mut end = unconnected().map_err(|error| error.to_string())?;
        let protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let tls = configurations
            .0
            .client(trust, &PeerName::Dns(name.into()), protocols)?;
        end.tls = Some(Box::new(tls.into()));
        Ok(Self {
            contexts: &configurations.0,
            end,
            hello: None,
            received: Vec::new(),
        })
    }

    /// Handles bytes of the peer.
    ///
    /// # Errors
    /// Why the connection fails.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.end.feed(bytes, None).map_err(words)?;
        let Some((reader, certificate)) = &mut self.hello else {
            self.received.extend_from_slice(self.end.input.bytes());
            self.end.input.clear();
            return Ok(());
        };
        let (hello, accepted) = match reader.read(&mut self.end.input) {
            Ok(None) => return Ok(()),
            Ok(Some(both)) => both,
            Err(HelloError::Malformed(detail)) => return Err(detail.to_owned()),
            Err(HelloError::Tls(error, _)) => return Err(error.to_string()),
            Err(HelloError::Full) => return Err("too many bytes".to_owned()),
        };
        let name = agreed_name(&hello, &accepted).map_err(|_| "ambiguous server name")?;
        let name = PeerName::Dns(name.unwrap_or_default().into());
        let config = self.contexts.server(certificate, false, &name, None)?;
        self.hello = None;
        let tls = accepted
            .into_connection(config)
            .map_err(|(error, _)| error.to_string())?;
        self.end.accept_tls(tls).map_err(words)?;
        self.feed(&[])
    }

    /// Returns the bytes for the peer, which count as written.
    pub fn take_output(&mut self) -> Vec<u8> {
        // Without TLS nothing is queued, and with TLS writing to memory cannot fail.
        let _ = self.end.pending();
        self.end.take_pending()
    }

    /// Queues bytes for the peer. TLS must have begun.
    pub fn send(&mut self, bytes: &[u8]) {
        if self.end.tls.is_some() {
            let _ = self.end.send(bytes);
        }
    }

    /// Ends the stream to the peer.
    pub fn finish(&mut self) {
        self.end.finish(Ending::Clean);
    }

    /// Returns the bytes that the peer has sent, decrypted.
    #[must_use]
    pub fn received(&self) -> &[u8] {
        &self.received
    }

    /// Returns whether the peer has ended its stream with a close_notify.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.end.eof == Some(Ending::Clean)
    }

    /// Returns whether the handshake is complete.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.end.tls.as_ref().is_some_and(|tls| !tls.is_handshaking())
    }
}

/// Returns an end whose socket is not connected.
fn unconnected() -> io::Result<End> {
    let socket = Socket::new(
        Domain::IPV4,
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    Ok(End::new(mio::net::TcpStream::from_std(socket.into())))
}

fn words(error: EndError) -> String {
    match error {
        EndError::Io(error) => error.to_string(),
        EndError::Tls(error) => Failure::of_tls(&error).to_string(),
    }
}
