use super::{HEADER_LEN, Refusal};

/// Cuts a TCP byte stream into DNS messages (RFC 1035, 4.2.2: each behind its length).
///
/// Holds at most one message. A message that arrives in one piece is handed out from where it lies.
#[derive(Clone, Debug)]
pub struct MessageReader {
    limit: usize,
    /// Length prefix and message as far as they have come.
    held: Vec<u8>,
    /// What is held has been handed out.
    spent: bool,
}

impl MessageReader {
    /// A reader of messages of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            held: Vec::new(),
            spent: false,
        }
    }

    /// Takes bytes off the front of `input`; returns the next message, or `None` when more bytes are needed (then
    /// `input` is empty).
    ///
    /// # Errors
    /// On a length that no message has: the stream cannot be read any further, and must be cut.
    pub fn next<'s, 'i: 's>(&'s mut self, input: &mut &'i [u8]) -> Result<Option<&'s [u8]>, Refusal> {
        if self.spent {
            self.held.clear();
            self.spent = false;
        }
        if self.held.is_empty()
            && let Some((prefix, rest)) = input.split_first_chunk()
            && let Some((message, rest)) = rest.split_at_checked(self.length(*prefix)?)
        {
            *input = rest;
            return Ok(Some(message));
        }
        self.fill(input, 2);
        let Some(&prefix) = self.held.first_chunk() else {
            return Ok(None);
        };
        let end = 2 + self.length(prefix)?;
        self.fill(input, end);
        if self.held.len() < end {
            return Ok(None);
        }
        self.spent = true;
        Ok(Some(&self.held[2..]))
    }

    /// Bytes held of a message that is not complete.
    #[must_use]
    pub fn pending(&self) -> usize {
        if self.spent { 0 } else { self.held.len() }
    }

    fn length(&self, prefix: [u8; 2]) -> Result<usize, Refusal> {
        let length = usize::from(u16::from_be_bytes(prefix));
        if length < HEADER_LEN {
            Err(Refusal::BadTcpLength)
        } else if length > self.limit {
            Err(Refusal::TooLong)
        } else {
            Ok(length)
        }
    }

    /// Moves bytes from `input` until `end` are held.
    fn fill(&mut self, input: &mut &[u8], end: usize) {
        let missing = end.saturating_sub(self.held.len()).min(input.len());
        let (taken, rest) = input.split_at(missing);
        self.held.extend_from_slice(taken);
        *input = rest;
    }
}
