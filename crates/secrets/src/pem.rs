//! PEM texts (RFC 7468).

use base64::{Engine as _, alphabet, engine};
use zeroize::Zeroizing;

/// Largest number of sections of a text. The largest bundles of public CAs have about 150.
const MAX_SECTIONS: usize = 1000;

/// Padding is optional and trailing bits are ignored, as in OpenSSL.
const BASE64: engine::GeneralPurpose = engine::GeneralPurpose::new(
    &alphabet::STANDARD,
    engine::GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(engine::DecodePaddingMode::Indifferent),
);

/// One `-----BEGIN LABEL-----` section.
pub(crate) struct Section {
    pub label: String,
    /// Line of the first boundary, from 1.
    pub line: u32,
    pub der: Zeroizing<Vec<u8>>,
}

impl Section {
    pub(crate) fn is_certificate(&self) -> bool {
        matches!(self.label.as_str(), "CERTIFICATE" | "X509 CERTIFICATE")
    }

    pub(crate) fn is_private_key(&self) -> bool {
        self.label.ends_with("PRIVATE KEY")
    }
}

/// An error of a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PemError {
    /// Line from 1.
    pub line: u32,
    pub text: String,
}

/// Returns whether a value claims to be PEM. Other values, such as tokens, are not parsed.
pub(crate) fn is_pem(bytes: &[u8]) -> bool {
    bytes.windows(11).any(|window| window == b"-----BEGIN ")
}

/// Returns the sections of a text. Text between sections is a comment (RFC 7468, section 2).
///
/// # Errors
/// An error if a section has no end or no valid base64, or if a private key is encrypted.
pub(crate) fn sections(bytes: &[u8]) -> Result<Vec<Section>, PemError> {
    let mut sections = Vec::new();
    let mut open: Option<(String, u32, Zeroizing<Vec<u8>>)> = None;
    let mut number = 0_u32;
    for line in bytes.split(|byte| *byte == b'\n') {
        number = number.saturating_add(1);
        let error = |text: String| PemError { line: number, text };
        let line = line.trim_ascii();
        match (
            &mut open,
            boundary(line, b"-----BEGIN "),
            boundary(line, b"-----END "),
        ) {
            (None, Some(label), _) => {
                if sections.len() == MAX_SECTIONS {
                    return Err(error(format!("more than {MAX_SECTIONS} sections")));
                }
                // One allocation, because a growing vector would leave copies of a key in freed memory.
                open = Some((label, number, Zeroizing::new(Vec::with_capacity(bytes.len()))));
            }
            (None, None, _) => {}
            (Some((label, ..)), Some(_), _) => {
                return Err(error(format!("BEGIN before the END of the {label}")));
            }
            (Some((label, start, text)), None, Some(end)) => {
                if *label != end {
                    return Err(error(format!("END of a {end} in a {label}")));
                }
                if label == "ENCRYPTED PRIVATE KEY" {
                    return Err(encrypted(*start));
                }
                let mut der = Zeroizing::new(Vec::with_capacity(text.len()));
                BASE64
                    .decode_vec(&**text, &mut der)
                    .map_err(|_| error(format!("the {label} is no valid base64")))?;
                sections.push(Section {
                    label: std::mem::take(label),
                    line: *start,
                    der,
                });
                open = None;
            }
            (Some((label, start, text)), None, None) => {
                // Encapsulated headers (RFC 1421) occur only in encrypted keys of the old form of OpenSSL.
                if line.contains(&b':') {
                    return Err(if label.ends_with("PRIVATE KEY") {
                        encrypted(*start)
                    } else {
                        error(format!("the {label} is no valid base64"))
                    });
                }
                text.extend_from_slice(line);
            }
        }
    }
    match open {
        None => Ok(sections),
        Some((label, line, _)) => Err(PemError {
            line,
            text: format!("the {label} has no END: the file is truncated"),
        }),
    }
}

fn encrypted(line: u32) -> PemError {
    PemError {
        line,
        text: "the private key is encrypted; `openssl pkey` removes the passphrase".into(),
    }
}

/// Returns the label of a boundary line.
fn boundary(line: &[u8], start: &[u8]) -> Option<String> {
    let label = line.strip_prefix(start)?.strip_suffix(b"-----")?;
    let known = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b' ';
    if label.len() > 40 || !label.iter().all(known) {
        return None;
    }
    String::from_utf8(label.to_vec()).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str) -> (u32, String) {
        let error = sections(text.as_bytes()).err().unwrap();
        (error.line, error.text)
    }

    #[test]
    fn sections_have_lines_and_comments_between_them() {
        let text = "subject=x\n-----BEGIN CERTIFICATE-----\nAAEC\nAw==\n-----END CERTIFICATE-----\r\n\n  -----BEGIN RSA PRIVATE KEY-----\n/w==\n-----END RSA PRIVATE KEY-----";
        let found = sections(text.as_bytes()).unwrap();
        assert_eq!((found[0].line, &**found[0].der), (2, &[0, 1, 2, 3][..]));
        assert!(found[0].is_certificate() && found[1].is_private_key());
        assert_eq!((found[1].line, &**found[1].der), (7, &[255][..]));
    }

    #[test]
    fn malformed_texts_name_their_line() {
        assert_eq!(
            refused("\n-----BEGIN CERTIFICATE-----\nAAEC\n"),
            (2, "the CERTIFICATE has no END: the file is truncated".into())
        );
        assert_eq!(
            refused("-----BEGIN CERTIFICATE-----\nA?EC\n-----END CERTIFICATE-----").0,
            3
        );
        assert_eq!(
            refused("-----BEGIN CERTIFICATE-----\n-----BEGIN CERTIFICATE-----").0,
            2
        );
        assert_eq!(
            refused("-----BEGIN CERTIFICATE-----\n-----END PRIVATE KEY-----").0,
            2
        );
        for text in [
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAEC\n-----END ENCRYPTED PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\nAAEC\n-----END RSA PRIVATE KEY-----",
        ] {
            assert!(refused(text).1.contains("encrypted"), "{text}");
        }
    }

    #[test]
    fn the_number_of_sections_is_bounded() {
        let one = "-----BEGIN X-----\nAAEC\n-----END X-----\n";
        assert!(refused(&one.repeat(MAX_SECTIONS + 1)).1.contains("more than"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(-----(BEGIN|END) [A-Z ]{0,12}-----\n|[A-Za-z0-9+/=:]{0,8}\n){0,12}") {
            let _ = sections(text.as_bytes());
        }
    }
}
