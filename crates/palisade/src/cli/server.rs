//! Options that name a server of the flow API. Their names are those of Hubble's command line.

use std::path::PathBuf;

/// Heading of the options in `--help`.
const HEADING: &str = "Server";

/// A server of the flow API, and how it is reached.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ServerArgs {
    /// Ask a server of the flow API in place of the daemon: HOST:PORT, tls://HOST:PORT or unix:///PATH, a node of Palisade
    /// or Cilium, or a relay.
    #[arg(long, value_name = "ADDRESS", help_heading = HEADING)]
    pub server: Option<String>,
    /// Use TLS, as with tls://.
    #[arg(long, requires = "server", help_heading = HEADING)]
    pub tls: bool,
    /// Files of certificates of the CAs that the server's certificate may be of.
    #[arg(long, value_name = "FILE", value_delimiter = ',', requires = "server", help_heading = HEADING)]
    pub tls_ca_cert_files: Vec<PathBuf>,
    /// File of the certificate that is shown to the server.
    #[arg(
        long,
        value_name = "FILE",
        requires = "server",
        requires = "tls_client_key_file",
        help_heading = HEADING
    )]
    pub tls_client_cert_file: Option<PathBuf>,
    /// File of the key of that certificate.
    #[arg(
        long,
        value_name = "FILE",
        requires = "server",
        requires = "tls_client_cert_file",
        help_heading = HEADING
    )]
    pub tls_client_key_file: Option<PathBuf>,
    /// Name that the server's certificate must have; by default that of the address.
    #[arg(long, value_name = "NAME", requires = "server", help_heading = HEADING)]
    pub tls_server_name: Option<String>,
}

impl ServerArgs {
    /// Returns whether the options ask for TLS.
    pub(crate) const fn wants_tls(&self) -> bool {
        self.tls
            || !self.tls_ca_cert_files.is_empty()
            || self.tls_client_cert_file.is_some()
            || self.tls_server_name.is_some()
    }
}
