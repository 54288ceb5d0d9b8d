//! `palisade completion`, and the hidden `palisade manual`, by which `scripts/package` makes the manual pages. Commands
//! and options are described only in `cli`, the configuration only in `config/palisade.toml`. Start at [`write()`].

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;
use clap_mangen::Man;

use super::output::EXIT_OK;
use crate::cli::Cli;

/// The configuration file with each option, its default and its description.
const CONFIGURATION: &str = include_str!("../../../../config/palisade.toml");
const MANUAL: &str = "Palisade";

/// Runs `palisade completion`.
pub(super) fn completion(shell: Shell) -> anyhow::Result<u8> {
    // The generator panics if it cannot write, so it writes to memory.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "palisade", &mut script);
    io::stdout().write_all(&script)?;
    Ok(EXIT_OK)
}

/// Runs `palisade manual`: writes `palisade.8`, a page for each subcommand, and `palisade.toml.5`.
pub(super) fn write(dir: &Path, date: &str) -> anyhow::Result<u8> {
    let mut pages = vec![(
        "palisade.toml.5".to_owned(),
        configuration_page(CONFIGURATION, date),
    )];
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    command_pages(&root, date, &mut pages)?;
    for (name, text) in pages {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    Ok(EXIT_OK)
}

/// Appends the page of a command and those of its subcommands: name of the file and text.
fn command_pages(
    command: &clap::Command,
    date: &str,
    pages: &mut Vec<(String, String)>,
) -> anyhow::Result<()> {
    let name = command.get_display_name().unwrap_or("palisade").to_owned();
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .section("8")
        .date(date)
        .source(format!("palisade {}", env!("CARGO_PKG_VERSION")))
        .manual(MANUAL);
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    // clap_mangen puts breaks around empty lines, which break by themselves.
    let mut text = String::from_utf8(text)?.replace(".br\n\n.br\n", ".sp\n");
    let subcommands: Vec<&clap::Command> = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .collect();
    if !subcommands.is_empty() {
        text.push_str(".SH COMMANDS\n");
    }
    for subcommand in &subcommands {
        let about = subcommand
            .get_about()
            .map(ToString::to_string)
            .unwrap_or_default();
        let page = subcommand.get_display_name().unwrap_or_default();
        text.push_str(&format!(".TP\n\\fB{}\\fR(8)\n{}\n", escape(page), line(&about)));
    }
    if let Some(help) = command.get_after_help() {
        push_help(&mut text, &help.to_string());
    }
    push_see_also(&mut text, &name);
    pages.push((format!("{name}.8"), text));
    for subcommand in subcommands {
        command_pages(subcommand, date, pages)?;
    }
    Ok(())
}

/// Appends the text that `--help` prints last: examples and exit codes are sections of their own, other paragraphs notes.
/// Lines stay as they are.
fn push_help(text: &mut String, help: &str) {
    let mut section = "";
    for paragraph in help.split("\n\n").filter(|paragraph| !paragraph.is_empty()) {
        let (heading, rest) = if let Some(rest) = paragraph.strip_prefix("Examples:\n") {
            ("EXAMPLES", rest)
        } else if let Some(rest) = paragraph.strip_prefix("Exit codes:\n") {
            ("EXIT STATUS", rest)
        // An example can have empty lines.
        } else if section == "EXAMPLES" && paragraph.starts_with(' ') {
            ("EXAMPLES", paragraph)
        } else {
            ("NOTES", paragraph)
        };
        if heading == section {
            text.push_str(".PP\n");
        } else {
            section = heading;
            text.push_str(&format!(".SH {heading}\n"));
        }
        let as_is = heading != "NOTES" || paragraph.lines().any(|line| line.starts_with(' '));
        if as_is {
            text.push_str(".nf\n");
        }
        for one in rest.lines() {
            text.push_str(&line(one));
            text.push('\n');
        }
        if as_is {
            text.push_str(".fi\n");
        }
    }
}

fn push_see_also(text: &mut String, name: &str) {
    let mut pages = Vec::new();
    if name != "palisade" {
        pages.push("\\fBpalisade\\fR(8)");
    }
    pages.extend(["\\fBpalisade.toml\\fR(5)", "\\fBpolicies\\fR(7)"]);
    text.push_str(&format!(
        ".SH SEE ALSO\n{}\n.PP\nFurther documentation: /usr/share/doc/palisade\n",
        pages.join(", ")
    ));
}

/// Options that one comment describes, and the comment.
#[derive(Default)]
struct Item {
    /// Names and values.
    options: Vec<(String, String)>,
    text: Vec<String>,
}

/// Returns palisade.toml(5). In the file, a comment stands before the option, the options or the section that it
/// describes, or after the value; an empty line ends it.
fn configuration_page(file: &str, date: &str) -> String {
    let mut page = format!(
        ".TH PALISADE.TOML 5 \"{date}\" \"palisade {}\" \"{MANUAL}\"\n\
         .SH NAME\npalisade.toml \\- configuration of palisade(8)\n\
         .SH SYNOPSIS\n/etc/palisade/palisade.toml\n\
         .SH DESCRIPTION\nThe file is TOML. Each option is shown with its default, or with an example if it has none. \
         \\fBpalisade run \\-\\-check\\-config\\fR prints the errors of a file, \\fBpalisade reload\\fR makes the daemon \
         read it again.\n.SH OPTIONS\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut pending: Vec<String> = Vec::new();
    let mut item = Item::default();
    let mut in_section = false;
    for raw in file.lines() {
        let content = raw.strip_prefix("# ").unwrap_or(raw).trim_end();
        if content.is_empty() || content == "#" {
            push_item(&mut page, &mut item);
            if in_section {
                push_paragraph(&mut page, &mut pending);
            }
            pending.clear();
        } else if content.starts_with('[') && content.ends_with(']') {
            push_item(&mut page, &mut item);
            page.push_str(&format!(".SS {}\n", escape(content)));
            push_paragraph(&mut page, &mut pending);
            in_section = true;
        } else if let Some((name, value, comment)) = option(content) {
            if !pending.is_empty() || !comment.is_empty() || !item.text.is_empty() && item.options.is_empty()
            {
                push_item(&mut page, &mut item);
                item.text = std::mem::take(&mut pending);
                item.text
                    .extend((!comment.is_empty()).then(|| comment.to_owned()));
            } else if item.options.last().is_some_and(|(last, _)| last == name) {
                push_item(&mut page, &mut item);
            }
            item.options.push((name.to_owned(), value.to_owned()));
        } else {
            push_item(&mut page, &mut item);
            pending.push(content.to_owned());
        }
    }
    push_item(&mut page, &mut item);
    push_paragraph(&mut page, &mut pending);
    page.push_str(
        ".SH FILES\n.TP\n/etc/palisade/palisade.toml\nThis file.\n.TP\n/etc/palisade/policies.d\nPolicies, policies(7).\n\
         .SH SEE ALSO\n\\fBpalisade\\fR(8), \\fBpolicies\\fR(7)\n",
    );
    page
}

/// Returns name, value and comment of a line `name = value  # comment`.
fn option(line: &str) -> Option<(&str, &str, &str)> {
    let (name, rest) = line.split_once(" = ")?;
    let is_name = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let (value, comment) = rest.split_once("  #").unwrap_or((rest, ""));
    is_name.then_some((name, value.trim(), comment.trim()))
}

fn push_item(page: &mut String, item: &mut Item) {
    for (index, (name, value)) in item.options.iter().enumerate() {
        let request = if index == 0 { ".TP" } else { ".TQ" };
        page.push_str(&format!(
            "{request}\n\\fB{}\\fR = {}\n",
            escape(name),
            escape(value)
        ));
    }
    if !item.options.is_empty() && item.text.is_empty() {
        page.push_str("\\&\n");
    }
    push_lines(page, &item.text);
    *item = Item::default();
}

fn push_paragraph(page: &mut String, lines: &mut Vec<String>) {
    if !lines.is_empty() {
        // A heading begins a paragraph itself.
        let after_heading = page
            .lines()
            .next_back()
            .is_some_and(|last| last.starts_with(".SS "));
        if !after_heading {
            page.push_str(".PP\n");
        }
        push_lines(page, lines);
        lines.clear();
    }
}

/// Appends lines that are filled, except that the description of a value (`open: ...`) begins a line.
fn push_lines(page: &mut String, lines: &[String]) {
    for (index, text) in lines.iter().enumerate() {
        let describes_value = text.split_once(": ").is_some_and(|(value, _)| {
            !value.is_empty() && value.chars().all(|c| c.is_ascii_lowercase() || c == '-')
        });
        if describes_value && index > 0 {
            page.push_str(".br\n");
        }
        page.push_str(&line(text));
        page.push('\n');
    }
}

/// Returns text without characters that roff(7) interprets.
fn escape(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq")
        .replace('`', "\\(ga")
        .replace('^', "\\(ha")
        .replace('~', "\\(ti")
}

/// Returns a text line, also if it would otherwise be a request.
fn line(text: &str) -> String {
    let escaped = escape(text);
    if escaped.starts_with('.') {
        format!("\\&{escaped}")
    } else {
        escaped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_with_its_examples() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "2026-01-01").unwrap();
        fn leaves(command: &clap::Command, name: &str, dir: &Path) {
            let page = fs::read_to_string(dir.join(format!("{name}.8"))).unwrap();
            assert!(page.contains(".SH SYNOPSIS"), "{name}");
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert_eq!(
                help.contains("Examples:\n"),
                page.contains(".SH EXAMPLES"),
                "{name}"
            );
            for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
                leaves(sub, &format!("{name}-{}", sub.get_name()), dir);
            }
        }
        leaves(&Cli::command(), "palisade", dir.path());
        assert!(!dir.path().join("palisade-manual.8").exists());
    }

    #[test]
    fn no_option_of_the_configuration_is_missing_in_its_page() {
        let page = configuration_page(CONFIGURATION, "");
        let mut options = 0;
        for text in CONFIGURATION.lines() {
            let text = text.trim_start_matches("# ");
            if let Some((name, value, _)) = option(text) {
                options += 1;
                let tag = format!("\n\\fB{name}\\fR = {}\n", escape(value));
                assert!(page.contains(&tag), "{tag}");
            } else if text.starts_with('[') && text.ends_with(']') {
                assert!(page.contains(&format!(".SS {text}\n")), "{text}");
            }
        }
        assert!(options > 80, "{options}");
    }

    #[test]
    fn a_comment_describes_the_options_after_it() {
        let file = "# Head.\n\n[a]\n# What x and y are.\n# one: first\n# x = 1\n# y = \"-\"\n\n# z = 2  # z's text\n# Rest.\n";
        let page = configuration_page(file, "");
        let (_, options) = page.split_once(".SH OPTIONS\n").unwrap();
        assert_eq!(
            options.split(".SH FILES").next().unwrap(),
            ".SS [a]\n.TP\n\\fBx\\fR = 1\n.TQ\n\\fBy\\fR = \"\\-\"\nWhat x and y are.\n.br\none: first\n\
             .TP\n\\fBz\\fR = 2\nz\\(aqs text\n.PP\nRest.\n"
        );
    }

    #[test]
    fn a_line_is_never_a_request() {
        assert_eq!(line(".so /etc/passwd"), "\\&.so /etc/passwd");
        assert_eq!(line("'x\\n"), "\\(aqx\\en");
    }
}
