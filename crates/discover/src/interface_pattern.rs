//! Patterns of interface names. nftables compares a prefix of an interface name in one expression, so a pattern is a
//! name, or a prefix with `*` behind it.

/// A name of an interface, or the beginning of names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InterfacePattern {
    /// This name.
    Name(String),
    /// Every name with this beginning.
    Prefix(String),
}

impl InterfacePattern {
    /// Parses `veth-web` or `veth*`.
    ///
    /// # Errors
    /// The pattern is neither, or would match the loopback interface.
    pub fn parse(text: &str) -> Result<Self, String> {
        /// `IFNAMSIZ` without the zero byte.
        const LONGEST: usize = 15;
        let (name, is_prefix) = text.strip_suffix('*').map_or((text, false), |name| (name, true));
        if name.is_empty()
            || name.len() > LONGEST
            || name
                .chars()
                .any(|c| matches!(c, '/' | ':' | '*') || c.is_whitespace() || c.is_control())
        {
            return Err(format!(
                "'{text}' cannot be a pattern of interface names: a name, or the beginning of names and one '*', for \
                 example \"veth*\""
            ));
        }
        let pattern = if is_prefix {
            Self::Prefix(name.to_owned())
        } else {
            Self::Name(name.to_owned())
        };
        if pattern.matches("lo") {
            return Err(format!(
                "'{text}' matches the loopback interface lo, which must stay open"
            ));
        }
        Ok(pattern)
    }

    /// Returns whether an interface of this name is one of the pattern.
    #[must_use]
    pub fn matches(&self, interface: &str) -> bool {
        match self {
            Self::Name(name) => name == interface,
            Self::Prefix(prefix) => interface.starts_with(prefix.as_str()),
        }
    }
}

impl std::fmt::Display for InterfacePattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_a_name_or_a_prefix() {
        let veths = InterfacePattern::parse("veth*").unwrap();
        assert!(veths.matches("veth1") && veths.matches("veth") && !veths.matches("xveth"));
        assert_eq!(veths.to_string(), "veth*");
        assert!(!InterfacePattern::parse("v0").unwrap().matches("v01"));
        for wrong in ["", "*", "a*b", "*a", "a b", "a/b", "0123456789abcdef"] {
            assert!(InterfacePattern::parse(wrong).is_err(), "{wrong}");
        }
        for closes_lo in ["lo", "l*", "lo*"] {
            assert!(
                InterfacePattern::parse(closes_lo)
                    .unwrap_err()
                    .contains("loopback"),
                "{closes_lo}"
            );
        }
    }
}
