//! Values that no log, record or dump may contain.

use std::{fmt, sync::Arc};

use zeroize::Zeroizing;

/// Bytes of a secret. The memory is overwritten when the last copy is dropped, and `Debug` prints no content.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue(Arc<Zeroizing<Vec<u8>>>);

impl SecretValue {
    /// Takes over the bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    /// Returns the bytes. The caller must not copy them into texts that leave the process.
    #[must_use]
    pub fn reveal(&self) -> &[u8] {
        &self.0
    }

    /// Returns whether the bytes are equal. The time depends on the lengths only, so that a client that measures
    /// responses cannot guess the value byte by byte.
    #[must_use]
    pub fn is(&self, bytes: &[u8]) -> bool {
        let own = self.reveal();
        let differing = own
            .iter()
            .zip(bytes)
            .fold(0, |differing, (a, b)| std::hint::black_box(differing | (a ^ b)));
        own.len() == bytes.len() && differing == 0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_prints_no_content() {
        let value = SecretValue::new(b"hunter2".to_vec());
        assert_eq!(format!("{value:?}"), "SecretValue(..)");
        assert_eq!(value.reveal(), b"hunter2");
    }

    #[test]
    fn values_are_compared_as_a_whole() {
        let value = SecretValue::new(b"hunter2".to_vec());
        assert!(value.is(b"hunter2"));
        for other in [&b"hunter"[..], b"hunter22", b"hunter3", b""] {
            assert!(!value.is(other));
        }
        assert!(SecretValue::new(Vec::new()).is(b""));
    }
}
