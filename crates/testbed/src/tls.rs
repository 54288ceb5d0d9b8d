//! TLS: hellos as bytes, certificates, and the output of `openssl s_client`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::process::output;

/// A ClientHello with any contents.
#[derive(Clone, Debug)]
pub struct Hello {
    /// The server name as bytes; `None` for a hello without the extension.
    pub name: Option<Vec<u8>>,
    /// Whether the hello offers TLS 1.3 as well as 1.2.
    pub tls13: bool,
    /// Types and contents of further extensions.
    pub extensions: Vec<(u16, Vec<u8>)>,
    /// Maximum length of a record, bytes.
    pub record: usize,
}

impl Hello {
    /// Creates a usual hello with a server name.
    #[must_use]
    pub fn to(name: &str) -> Self {
        Self {
            name: Some(name.into()),
            tls13: true,
            extensions: vec![],
            record: 1 << 14,
        }
    }

    /// Creates a hello without a server name.
    #[must_use]
    pub fn nameless() -> Self {
        Self {
            name: None,
            ..Self::to("")
        }
    }

    /// Adds an extension.
    #[must_use]
    pub fn with(mut self, kind: u16, contents: &[u8]) -> Self {
        self.extensions.push((kind, contents.into()));
        self
    }

    /// Adds `bytes` bytes of padding (RFC 7685).
    #[must_use]
    pub fn padded(self, bytes: usize) -> Self {
        self.with(21, &vec![0; bytes])
    }

    /// Sets the maximum length of a record, bytes.
    #[must_use]
    pub fn in_records(mut self, bytes: usize) -> Self {
        self.record = bytes;
        self
    }

    /// Returns the handshake message.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut add = |kind: u16, contents: &[u8]| {
            extensions.extend_from_slice(&kind.to_be_bytes());
            extensions.extend_from_slice(&(contents.len() as u16).to_be_bytes());
            extensions.extend_from_slice(contents);
        };
        if let Some(name) = &self.name {
            let mut list = ((name.len() + 3) as u16).to_be_bytes().to_vec();
            list.push(0);
            list.extend_from_slice(&(name.len() as u16).to_be_bytes());
            list.extend_from_slice(name);
            add(0, &list);
        }
        if self.tls13 {
            add(43, &[4, 3, 4, 3, 3]);
        }
        for (kind, contents) in &self.extensions {
            add(*kind, contents);
        }
        let mut body = vec![3, 3];
        body.extend_from_slice(&[0x55; 32]);
        body.extend_from_slice(&[0, 0, 4, 0x13, 1, 0xc0, 0x2b, 1, 0]);
        body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
        body.extend_from_slice(&extensions);
        let mut message = vec![1, 0];
        message.extend_from_slice(&(body.len() as u16).to_be_bytes());
        message.extend_from_slice(&body);
        message
    }

    /// Returns the records.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        records(&self.message(), self.record)
    }
}

/// Splits a handshake message into records of at most `size` bytes.
#[must_use]
pub fn records(message: &[u8], size: usize) -> Vec<u8> {
    let mut records = Vec::new();
    for part in message.chunks(size) {
        records.extend_from_slice(&[22, 3, 1]);
        records.extend_from_slice(&(part.len() as u16).to_be_bytes());
        records.extend_from_slice(part);
    }
    records
}

/// Returns a ServerHello of TLS 1.3 that is not a HelloRetryRequest, so no second ClientHello can follow.
#[must_use]
pub fn server_hello() -> Vec<u8> {
    hello_of_server([0x77; 32])
}

/// Returns a HelloRetryRequest: a ServerHello with a special random (RFC 8446, section 4.1.3).
#[must_use]
pub fn retry_request() -> Vec<u8> {
    hello_of_server([
        0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
        0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
    ])
}

fn hello_of_server(random: [u8; 32]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend_from_slice(&random);
    body.extend_from_slice(&[0, 0x13, 1, 0, 0, 6, 0, 43, 0, 2, 3, 4]);
    let mut message = vec![2, 0, 0, body.len() as u8];
    message.extend_from_slice(&body);
    records(&message, 1 << 14)
}

/// A self-signed certificate and its key.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// PEM file of the certificate.
    pub cert: PathBuf,
    /// PEM file of the key.
    pub key: PathBuf,
}

/// Makes a certificate with `openssl`. The names can be wildcards such as `*.x`.
pub fn certificate(dir: &Path, names: &[&str]) -> Result<Certificate> {
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let names: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
    let mut command = Command::new("openssl");
    command
        .args(["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=testbed"])
        .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-addext", &format!("subjectAltName={}", names.join(","))])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert);
    let out = output(&mut command, Duration::from_secs(20))?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // Some servers run as another user, which must be able to read the files.
    for file in [&cert, &key] {
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        fs::set_permissions(file, readable).with_context(|| file.display().to_string())?;
    }
    Ok(Certificate { cert, key })
}

/// The result of `openssl s_client`.
#[derive(Clone, Debug)]
pub struct Handshake {
    /// The negotiated version, such as `TLSv1.3`; empty if the handshake failed.
    pub version: String,
    /// The complete output.
    pub text: String,
}

impl Handshake {
    /// Parses the output.
    #[must_use]
    pub fn of(out: &Output) -> Self {
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        let version = text
            .lines()
            .find_map(|line| line.strip_prefix("New, "))
            .and_then(|rest| rest.split(',').next())
            .filter(|version| version.starts_with("TLS"))
            .unwrap_or_default();
        Self {
            version: version.into(),
            text,
        }
    }
}
