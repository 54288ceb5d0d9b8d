//! Files of secrets: Secrets in YAML, PEM texts, certificates and keys. No input panics.

/// Reads one file.
pub fn run(input: &[u8]) {
    palisade_secrets::fuzz(input);
}
