//! Identifiers of flows: UUIDs of version 8 (RFC 9562, section 5.8), made of a random key of the ring and the number of
//! the flow in the ring. So the ring finds the flow of an identifier without a search, and no flow costs a random
//! number.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bits of a UUID that hold the number of the flow. The other 64 bits that RFC 9562 leaves free hold the key.
const NUMBER_BITS: u32 = 58;
const NUMBER_MASK: u128 = (1 << NUMBER_BITS) - 1;

/// Identifier of a flow.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Uuid {
    /// No identifier: the flow was never in a ring.
    #[default]
    None,
    /// A UUID, as a number in network byte order.
    Number(u128),
    /// Identifier of another format, from a file that another program wrote.
    Text(Arc<str>),
}

impl Uuid {
    /// Returns the UUID of the flow with this number in the ring with this key.
    #[must_use]
    pub const fn new(key: u64, number: u64) -> Self {
        let key = key as u128;
        let (high, middle, low) = (key >> 16, key >> 4 & 0xfff, key & 0xf);
        let version = 0x8 << 76;
        let variant = 0b10 << 62;
        Self::Number(
            high << 80
                | version
                | middle << 64
                | variant
                | low << NUMBER_BITS
                | (number as u128 & NUMBER_MASK),
        )
    }

    /// Parses a UUID: 32 hexadecimal digits in groups of 8, 4, 4, 4 and 12.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 36 {
            return None;
        }
        let mut number: u128 = 0;
        for (at, byte) in text.bytes().enumerate() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if byte != b'-' {
                    return None;
                }
            } else {
                number = number << 4 | u128::from(char::from(byte).to_digit(16)?);
            }
        }
        Some(Self::Number(number))
    }

    /// Returns the number of the flow, if this is the UUID of a flow of the ring with this key.
    pub(crate) fn number_of(&self, key: u64) -> Option<u64> {
        let Self::Number(uuid) = self else { return None };
        // No truncation: the mask leaves 58 bits.
        let number = (uuid & NUMBER_MASK) as u64;
        (Self::new(key, number) == *self).then_some(number)
    }

    /// Returns the number of the flow in its ring, if this is a UUID that a ring made.
    #[must_use]
    pub const fn number(&self) -> Option<u64> {
        match self {
            // No truncation: the mask leaves 58 bits.
            Self::Number(uuid) if *uuid >> 76 & 0xf == 8 => Some((*uuid & NUMBER_MASK) as u64),
            _ => None,
        }
    }

    /// Returns whether both are UUIDs of flows of one ring.
    #[must_use]
    pub fn same_ring(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => {
                self.number().is_some() && a & !NUMBER_MASK == b & !NUMBER_MASK
            }
            _ => false,
        }
    }

    /// Returns whether there is no identifier.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

impl From<&str> for Uuid {
    fn from(text: &str) -> Self {
        match text {
            "" => Self::None,
            text => Self::parse(text).unwrap_or_else(|| Self::Text(text.into())),
        }
    }
}

/// Writes the UUID in lower case, or an empty text if there is none.
impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Number(n) => write!(
                f,
                "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
                n >> 96,
                n >> 80 & 0xffff,
                n >> 64 & 0xffff,
                n >> 48 & 0xffff,
                n & 0xffff_ffff_ffff
            ),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl Serialize for Uuid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::from(&*std::borrow::Cow::<'de, str>::deserialize(
            deserializer,
        )?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn version_and_variant_are_those_of_rfc_9562() {
        let uuid = Uuid::new(u64::MAX, 1).to_string();
        assert_eq!(uuid, "ffffffff-ffff-8fff-bc00-000000000001");
        assert_eq!(
            Uuid::new(0, 0).to_string(),
            "00000000-0000-8000-8000-000000000000"
        );
    }

    #[test]
    fn other_identifiers_keep_their_text() {
        for text in [
            "",
            "x",
            "ffffffff-ffff-8fff-bc00-00000000000g",
            "ffffffff_ffff-8fff-bc00-000000000001",
        ] {
            assert_eq!(Uuid::from(text).to_string(), text);
            assert_eq!(Uuid::from(text).number_of(0), None);
        }
    }

    proptest! {
        #[test]
        fn text_and_number_are_inverse(key: u64, number in 0..1_u64 << NUMBER_BITS, other: u64) {
            let uuid = Uuid::new(key, number);
            prop_assert_eq!(Uuid::from(&*uuid.to_string()), uuid.clone());
            prop_assert_eq!(uuid.number_of(key), Some(number));
            prop_assert!(key == other || uuid.number_of(other).is_none());
            prop_assert_eq!(uuid.number(), Some(number));
            prop_assert_eq!(uuid.same_ring(&Uuid::new(other, 3)), key == other);
        }
    }
}
