//! Changes the fields of a request's head.

use std::borrow::Cow;

use crate::rules::HeaderEdit;

/// Returns a head with changed fields. `head` is a complete, well-formed head with its empty line.
pub(crate) fn edited(head: &[u8], edits: &[HeaderEdit]) -> Vec<u8> {
    let mut lines: Vec<Cow<'_, [u8]>> = head
        .split_inclusive(|byte| *byte == b'\n')
        .map(Cow::from)
        .collect();
    let end = lines.pop().unwrap_or_default();
    for edit in edits {
        match edit {
            HeaderEdit::Remove(name) | HeaderEdit::Set(name, _) => remove(&mut lines, name),
            HeaderEdit::Add(..) => {}
        }
        if let HeaderEdit::Add(name, value) | HeaderEdit::Set(name, value) = edit {
            lines.push([name.as_bytes(), b": ", value.reveal(), b"\r\n"].concat().into());
        }
    }
    lines.push(end);
    lines.concat()
}

/// Removes all fields of a name. The request line has a colon only after a space, which no name has.
fn remove(lines: &mut Vec<Cow<'_, [u8]>>, name: &str) {
    lines.retain(|line| {
        let of_line = line.split(|byte| *byte == b':').next().unwrap_or_default();
        !of_line.eq_ignore_ascii_case(name.as_bytes())
    });
}

#[cfg(test)]
mod tests {
    use palisade_model::secret_value::SecretValue;

    use super::*;

    #[test]
    fn fields_are_added_removed_and_replaced_in_order() {
        let value = |text: &str| SecretValue::new(text.into());
        let head = b"GET /a:b HTTP/1.1\r\nHost: a\r\nX-A: 1\r\nx-b: 2\r\nX-a: 3\r\n\r\n";
        let edits = [
            HeaderEdit::Set("x-a".into(), value("new")),
            HeaderEdit::Remove("x-b".into()),
            HeaderEdit::Add("host".into(), value("b")),
        ];
        let text = String::from_utf8(edited(head, &edits)).expect("ASCII");
        assert_eq!(
            text,
            "GET /a:b HTTP/1.1\r\nHost: a\r\nx-a: new\r\nhost: b\r\n\r\n"
        );
        assert_eq!(edited(head, &[]), head);
    }
}
