//! Why a secret cannot be used.

use crate::problem::Problem;

/// Why a policy cannot use a secret. The traffic that needs it is denied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The folder has no such secret.
    #[error("secret {secret} is missing: expected {secret}/ or a Secret in YAML below the folder of secrets")]
    Missing {
        /// `namespace/name`.
        secret: String,
    },
    /// The secret is in the folder, but it is malformed, and no earlier content is known.
    #[error("{0}")]
    Broken(Problem),
    /// The secret has no such key.
    #[error("secret {secret} has no key {key:?}")]
    NoKey {
        /// `namespace/name`.
        secret: String,
        /// Name of the key.
        key: String,
    },
    /// The certificate of the interception CA may not sign others.
    #[error(
        "secret {secret} cannot be the interception CA: its certificate is not that of a CA (basicConstraints CA:TRUE)"
    )]
    NoCa {
        /// `namespace/name`.
        secret: String,
    },
    /// The content of the secret does not fit its use.
    #[error("{0}")]
    Unfit(Problem),
}
