//! The files and commands of a document for operators, and the comparison of real output with the printed one.
//!
//! A block marked `console` has command lines, `PLACE# COMMAND` for root and `PLACE$ COMMAND` for others, each followed by
//! output. A block marked `toml`, `yaml` or `nft` after a line that ends in "`/absolute/path`:" is the content of that
//! file. Blocks with other marks are not for a shell.
//!
//! Pure: depends on nothing. Start at [`steps`].

use std::fmt;

/// Something that the reader of a document does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes a file.
    Write {
        /// Line of the document, from 1.
        line: usize,
        /// Absolute path.
        path: String,
        /// Whole content.
        content: String,
    },
    /// Runs a command.
    Run {
        /// Line of the document, from 1.
        line: usize,
        /// Name of the machine in the prompt.
        place: String,
        /// Command for a shell.
        command: String,
        /// Printed lines of its output, without empty ones.
        output: Vec<String>,
    },
}

/// A document that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Line of the document, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: &'static str,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

impl std::error::Error for Unreadable {}

/// Returns the steps of a document in Markdown, in their order.
///
/// # Errors
/// A block without end; a `console` block that does not begin with a command.
pub fn steps(document: &str) -> Result<Vec<Step>, Unreadable> {
    let mut steps = Vec::new();
    let mut lines = document.lines().enumerate();
    let mut before = "";
    while let Some((number, text)) = lines.next() {
        let Some(language) = text.trim_start().strip_prefix("```") else {
            if !text.trim().is_empty() {
                before = text;
            }
            continue;
        };
        let indent = text.len() - text.trim_start().len();
        let line = number + 1;
        let mut block = Vec::new();
        let mut closed = false;
        for (number, text) in lines.by_ref() {
            if text.trim() == "```" {
                closed = true;
                break;
            }
            block.push((number + 1, text.get(indent..).unwrap_or_default()));
        }
        if !closed {
            let problem = "the block has no end";
            return Err(Unreadable { line, problem });
        }
        match language.trim() {
            "console" => commands(&block, &mut steps)?,
            "toml" | "yaml" | "nft" => {
                if let Some(path) = file_name(before) {
                    let content = block.iter().flat_map(|(_, text)| [*text, "\n"]).collect();
                    let path = path.to_owned();
                    steps.push(Step::Write { line, path, content });
                }
            }
            _ => {}
        }
        before = "";
    }
    Ok(steps)
}

/// Returns the absolute path in backquotes before the colon at the end of a line.
fn file_name(line: &str) -> Option<&str> {
    let (_, path) = line.trim_end().strip_suffix("`:")?.rsplit_once('`')?;
    path.starts_with('/').then_some(path)
}

/// Appends the commands of a block with their outputs. A line that ends in `\` continues on the next one.
fn commands(block: &[(usize, &str)], steps: &mut Vec<Step>) -> Result<(), Unreadable> {
    let mut open = false;
    let mut begun = false;
    for &(line, text) in block {
        let Some(Step::Run { command, output, .. }) = steps.last_mut().filter(|_| begun) else {
            let problem = "a console block begins with a command after PLACE# or PLACE$";
            let (place, text) = prompt(text).ok_or(Unreadable { line, problem })?;
            open = text.ends_with('\\');
            steps.push(run(line, place, text));
            begun = true;
            continue;
        };
        if open {
            command.push('\n');
            command.push_str(text);
            open = text.ends_with('\\');
        } else if let Some((place, text)) = prompt(text) {
            open = text.ends_with('\\');
            steps.push(run(line, place, text));
        } else if !text.trim().is_empty() {
            output.push(text.trim().to_owned());
        }
    }
    Ok(())
}

fn run(line: usize, place: &str, command: &str) -> Step {
    let (place, command) = (place.to_owned(), command.to_owned());
    Step::Run {
        line,
        place,
        command,
        output: Vec::new(),
    }
}

/// Returns the place and the command of a line with a prompt.
fn prompt(line: &str) -> Option<(&str, &str)> {
    let (place, command) = line.split_once("# ").or_else(|| line.split_once("$ "))?;
    let name = place.split_once("$ ").map_or(place, |(name, _)| name);
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    if name.len() < place.len() {
        return is_name.then(|| (name, &line[name.len() + 2..]));
    }
    is_name.then_some((place, command))
}

/// Returns the first printed line that the output does not have, in this order. Digits stand for any digits, white space
/// for any white space, and `...` for any text.
#[must_use]
pub fn missing<'a>(printed: &'a [String], output: &str) -> Option<&'a str> {
    let mut lines = output.lines();
    printed
        .iter()
        .find(|wanted| wanted.as_str() != "..." && !lines.by_ref().any(|line| matches(wanted, line)))
        .map(String::as_str)
}

/// Returns whether a line of output is like a printed one.
fn matches(wanted: &str, line: &str) -> bool {
    let (wanted, line) = (folded(wanted), folded(line));
    let mut parts = wanted.split("...");
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Returns a line with each run of digits as one `0` and each run of white space as one space.
fn folded(line: &str) -> String {
    let mut folded = String::with_capacity(line.len());
    for character in line.trim().chars() {
        let character = match character {
            '0'..='9' => '0',
            space if space.is_whitespace() => ' ',
            other => other,
        };
        if !(matches!(character, '0' | ' ') && folded.ends_with(character)) {
            folded.push(character);
        }
    }
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
Write `/etc/x.toml`:

```toml
[node]
```

1. Then:

   ```console
   node# palisade status \\
     --wait 10s
   READY
   client$ echo 'a # b'
   a # b
   ```

```text
node# not run
```
";

    #[test]
    fn files_and_commands_are_in_the_order_of_the_document() {
        let run = |line, place: &str, command: &str, output: &str| Step::Run {
            line,
            place: place.into(),
            command: command.into(),
            output: vec![output.into()],
        };
        let write = Step::Write {
            line: 3,
            path: "/etc/x.toml".into(),
            content: "[node]\n".into(),
        };
        assert_eq!(
            steps(DOCUMENT).unwrap(),
            [
                write,
                run(10, "node", "palisade status \\\n  --wait 10s", "READY"),
                run(13, "client", "echo 'a # b'", "a # b"),
            ]
        );
    }

    #[test]
    fn a_block_without_command_or_end_is_an_error() {
        assert_eq!(steps("```console\nREADY\n```\n").unwrap_err().line, 2);
        assert_eq!(steps("a\n```yaml\nx: 1\n").unwrap_err().line, 2);
    }

    #[test]
    fn numbers_spaces_and_dots_stand_for_others() {
        let printed = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>();
        assert_eq!(missing(&printed(&["a 12  b", "..."]), "x\na 7 b\n"), None);
        assert_eq!(missing(&printed(&["a ... c ... e"]), "a b c d e\n"), None);
        assert_eq!(missing(&printed(&["a ... c"]), "a b\n"), Some("a ... c"));
        assert_eq!(missing(&printed(&["b", "a"]), "a\nb\n"), Some("a"));
        assert_eq!(missing(&printed(&["a"]), "ab\n"), Some("a"));
    }
}
