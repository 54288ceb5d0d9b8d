//! Failures of upstream connections: the kind that counters and the `x-palisade-error` header name, and the details in
//! words.

use std::io;

use palisade_abi::Reason;
use rustls::{AlertDescription, CertificateError, Error as TlsError, PeerIncompatible};

use crate::{chain, printable::printable};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Kind of a failure. Each kind has a counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum FailureKind {
            $($(#[$doc])* $name,)*
        }

        impl FailureKind {
            /// All kinds, in the order of their discriminants.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the text of the kind, for the `x-palisade-error` header, logs and counters.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

kinds! {
    /// The server did not answer the SYN in time.
    ConnectTimeout = "connect timeout";
    /// The server answered the SYN with a reset.
    Refused = "connection refused";
    /// A router or the node's routes say that the server cannot be reached.
    Unreachable = "server unreachable";
    /// An earlier connection with the same addresses and ports was not closed within the time for the connect.
    PortInUse = "client port still in use";
    /// The connection could not be opened for another reason, for example because no socket is left.
    ConnectFailed = "connect failed";
    /// The TLS handshake did not end in time.
    HandshakeTimeout = "TLS handshake timeout";
    /// The server reset the connection in the TLS handshake.
    HandshakeReset = "reset in the TLS handshake";
    /// The server closed the connection in the TLS handshake.
    HandshakeClosed = "closed in the TLS handshake";
    /// The server's bytes are not TLS, or violate the protocol.
    HandshakeInvalid = "invalid TLS handshake";
    /// No TLS version, cipher suite or application protocol that both ends support.
    NoSharedProtocol = "no shared protocol";
    /// The server sent a fatal alert.
    Alert = "alert received";
    /// The server's certificate has expired.
    CertificateExpired = "certificate expired";
    /// The server's certificate is not valid yet.
    CertificateNotYetValid = "certificate not yet valid";
    /// No trusted CA has issued the server's certificate.
    UnknownCa = "certificate of an unknown CA";
    /// The server's certificate is for other names.
    NameMismatch = "certificate for another name";
    /// The server's certificate is malformed, revoked, or not meant for servers.
    CertificateInvalid = "invalid certificate";
    /// The server reset the connection before the head of a response.
    ResponseReset = "reset before response";
    /// The server closed the connection before the head of a response.
    ResponseClosed = "closed before response";
    /// The server did not send the head of a response in time.
    ResponseTimeout = "response timeout";
    /// The server stopped within a response, and the connection was idle for too long.
    ResponseStalled = "stalled within response";
    /// A secret of the policy is missing or cannot be used.
    Secret = "secret not usable";
}

/// Failure of an upstream connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind.
    pub kind: FailureKind,
    /// Details in words; empty if the kind says everything.
    pub detail: String,
    /// Number of the alert that the server has sent.
    pub alert: Option<u8>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind.text())?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl From<FailureKind> for Failure {
    fn from(kind: FailureKind) -> Self {
        Self {
            kind,
            detail: String::new(),
            alert: None,
        }
    }
}

impl Failure {
    /// Returns the status of the answer, and its phrase. 504 tells the client that the server can have handled the request.
    pub(crate) const fn status(&self) -> (&'static str, &'static str) {
        match self.kind {
            FailureKind::ResponseTimeout => ("504", "Gateway Timeout"),
            _ => ("503", "Service Unavailable"),
        }
    }

    /// Returns the status of the answer to a gRPC request: DEADLINE_EXCEEDED or UNAVAILABLE. Clients may repeat a request
    /// after UNAVAILABLE without being asked to.
    pub(crate) const fn grpc_status(&self) -> &'static str {
        match self.kind {
            FailureKind::ResponseTimeout => "4",
            _ => "14",
        }
    }

    /// Returns the reason of the verdict.
    pub(crate) const fn reason(&self) -> Reason {
        match self.kind {
            FailureKind::Secret => Reason::SecretUnusable,
            _ => Reason::InterceptFailed,
        }
    }

    pub(crate) fn new(kind: FailureKind, detail: impl AsRef<str>) -> Self {
        Self {
            kind,
            detail: printable(detail.as_ref()),
            alert: None,
        }
    }

    /// Returns the failure of a `connect`.
    pub(crate) fn of_connect(error: &io::Error) -> Self {
        use io::ErrorKind as E;
        let kind = match error.kind() {
            E::ConnectionRefused => return FailureKind::Refused.into(),
            E::TimedOut => return FailureKind::ConnectTimeout.into(),
            E::HostUnreachable | E::NetworkUnreachable => FailureKind::Unreachable,
            _ => FailureKind::ConnectFailed,
        };
        Self::new(kind, error.to_string())
    }

    /// Returns the failure of a socket in the TLS handshake.
    pub(crate) fn of_handshake_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => FailureKind::HandshakeReset.into(),
            _ => Self::new(FailureKind::HandshakeInvalid, error.to_string()),
        }
    }

    /// Returns the failure that the TLS library reports in the handshake.
    pub(crate) fn of_tls(error: &TlsError) -> Self {
        match error {
            TlsError::AlertReceived(alert) => {
                let name = alert_name(*alert);
                let new = match *alert {
                    AlertDescription::NoApplicationProtocol | AlertDescription::ProtocolVersion => Self::new(
                        FailureKind::NoSharedProtocol,
                        format!("the server sent the alert {name}"),
                    ),
                    _ => Self::new(FailureKind::Alert, name),
                };
                Self {
                    alert: Some(u8::from(*alert)),
                    ..new
                }
            }
            TlsError::InvalidCertificate(error) => of_certificate(error),
            TlsError::NoApplicationProtocol => {
                Self::new(FailureKind::NoSharedProtocol, "application protocol")
            }
            TlsError::PeerIncompatible(
                what @ (PeerIncompatible::NoCipherSuitesInCommon
                | PeerIncompatible::NoKxGroupsInCommon
                | PeerIncompatible::NoSignatureSchemesInCommon
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled),
            ) => Self::new(FailureKind::NoSharedProtocol, words(&format!("{what:?}"))),
            other => Self::new(FailureKind::HandshakeInvalid, other.to_string()),
        }
    }
}

fn of_certificate(error: &CertificateError) -> Failure {
    let kind = match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            FailureKind::CertificateExpired
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            FailureKind::CertificateNotYetValid
        }
        CertificateError::UnknownIssuer => FailureKind::UnknownCa,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            FailureKind::NameMismatch
        }
        _ => FailureKind::CertificateInvalid,
    };
    let detail = match error {
        CertificateError::NotValidForNameContext { expected, presented } => {
            // A certificate can have thousands of names.
            let shown: Vec<&str> = presented.iter().take(8).map(String::as_str).collect();
            let more = if presented.len() > shown.len() {
                ", …"
            } else {
                ""
            };
            let names = match shown.is_empty() {
                true => "it has no names".to_owned(),
                false => format!("it is for {}{more}", shown.join(", ")),
            };
            format!("not for {}; {names}", expected.to_str())
        }
        CertificateError::UnknownIssuer => chain::take_detail().unwrap_or_default(),
        CertificateError::Expired | CertificateError::NotValidYet => String::new(),
        CertificateError::Other(other) => match words(&other.to_string()) {
            text if text == "ca used as end entity" => {
                "it is the certificate of a CA, perhaps self-signed".to_owned()
            }
            text => text,
        },
        other => other.to_string(),
    };
    Failure::new(kind, detail)
}

/// Returns the name of an alert as RFC 8446, section 6, spells it.
pub(crate) fn alert_name(alert: AlertDescription) -> String {
    let number = u8::from(alert);
    let name = match number {
        0 => "close_notify",
        10 => "unexpected_message",
        20 => "bad_record_mac",
        22 => "record_overflow",
        40 => "handshake_failure",
        42 => "bad_certificate",
        43 => "unsupported_certificate",
        44 => "certificate_revoked",
        45 => "certificate_expired",
        46 => "certificate_unknown",
        47 => "illegal_parameter",
        48 => "unknown_ca",
        49 => "access_denied",
        50 => "decode_error",
        51 => "decrypt_error",
        70 => "protocol_version",
        71 => "insufficient_security",
        80 => "internal_error",
        86 => "inappropriate_fallback",
        90 => "user_canceled",
        100 => "no_renegotiation",
        109 => "missing_extension",
        110 => "unsupported_extension",
        112 => "unrecognized_name",
        113 => "bad_certificate_status_response",
        115 => "unknown_psk_identity",
        116 => "certificate_required",
        120 => "no_application_protocol",
        _ => return format!("number {number}"),
    };
    name.to_owned()
}

/// Returns a fatal alert in plain text, which is valid before a ServerHello.
pub(crate) const fn plain_alert(number: u8) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, number]
}

/// Returns a name in camel case as words in lower case.
fn words(camel: &str) -> String {
    let mut out = String::new();
    let mut after_lower = false;
    for letter in camel.chars() {
        if letter.is_ascii_uppercase() && after_lower {
            out.push(' ');
        }
        after_lower = !letter.is_ascii_uppercase();
        out.push(letter.to_ascii_lowercase());
    }
    out
}
