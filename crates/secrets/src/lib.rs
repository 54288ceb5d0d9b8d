//! The folder of secrets that policies name: certificates with private keys, trusted CAs, and header values.
//!
//! ```text
//! DIR/*.yaml                 Kubernetes Secrets ─ kubernetes ─┐
//!                                                             ├─ store ─ secret ─┬─ identity ─ rustls
//! DIR/NAMESPACE/NAME/KEY     one value per file ─ folder ─────┘                  └─ certificate ─ texts for people
//! ```
//!
//! Start at [`Store::load`]. A path is read only if no user other than root and the user of this process can change it.
//! A secret that becomes malformed keeps its last good content until the process ends; a secret that is removed is gone.
//!
//! Memory with keys is overwritten when it is dropped, as far as this crate holds it. The YAML parser keeps copies
//! that it does not overwrite; aws-lc overwrites its own.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice
)]
#![warn(unreachable_pub)]

mod certificate;
mod error;
mod folder;
mod identity;
mod kubernetes;
mod pem;
mod policies;
mod problem;
mod raw;
mod secret;
mod store;

use std::{path::Path, sync::Arc};

pub use certificate::{Certificate, Expiry, Validity, expires_within, expiry};
pub use error::SecretError;
pub use identity::{Identity, Trust};
pub use palisade_model::secret_value::SecretValue;
pub use policies::{check_policies, check_rule_set};
pub use problem::Problem;
pub use store::Store;

/// Reads bytes as a file of Secrets, and as certificate and key of a secret, for the fuzz target `secrets`.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let file: Arc<Path> = Arc::from(Path::new("f"));
    let mut found = kubernetes::read(&file, bytes);
    let item = raw::Item {
        bytes: bytes.to_vec().into(),
        file: Arc::clone(&file),
        line: 1,
        whole_file: true,
    };
    found.secrets.push(raw::Raw {
        name: "a/b".into(),
        source: file,
        items: ["tls.crt", "tls.key", "ca.crt"]
            .map(|key| (key.into(), item.clone()))
            .into(),
    });
    for raw in found.secrets {
        if let Ok(secret) = secret::Secret::new(raw) {
            let _ = secret.check(0);
            let _ = secret.certificates();
            let _ = secret.trust("ca.crt", "", "");
            let _ = secret.value();
        }
    }
}
