//! The effective value of every option: that of the file, else its default. The names and defaults come from the
//! reference configuration `config/palisade.toml`; a documented value counts as the default only if the parser agrees.

use std::path::Path;

use serde::Serialize;
use toml::de::{DeTable, DeValue};

use super::Config;

/// The reference configuration.
const REFERENCE: &str = include_str!("../../../../config/palisade.toml");

/// An option with its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Setting {
    /// `section.option`; options of `[[...]]` sections have the number of the section: `interface[0].name`.
    pub name: String,
    /// Value in TOML; `None` if the option is not set and has no value by itself.
    pub value: Option<String>,
    /// Whether the file sets the option.
    pub set: bool,
}

/// Returns the options of a valid configuration: those of sections in the order of the reference, then the `[[...]]`
/// sections of the file.
pub(crate) fn settings(config: &Config) -> Vec<Setting> {
    let (table, _) = DeTable::parse_recoverable(&config.text);
    let table = table.get_ref();
    let mut found = Vec::new();
    for (section, key, documented) in documented() {
        let own = table
            .get(section)
            .and_then(|section| section.get_ref().as_table())
            .and_then(|section| section.get(key));
        let value = match own {
            Some(own) => config.text.get(own.span()).map(str::to_owned),
            None => is_default(section, key, documented).then(|| documented.to_owned()),
        };
        found.push(Setting {
            name: format!("{section}.{key}"),
            value,
            set: own.is_some(),
        });
    }
    for (name, value) in table.iter() {
        let DeValue::Array(sections) = value.get_ref() else {
            continue;
        };
        for (number, section) in sections.iter().enumerate() {
            for (key, value) in section
                .get_ref()
                .as_table()
                .into_iter()
                .flat_map(|table| table.iter())
            {
                found.push(Setting {
                    name: format!("{}[{number}].{}", name.get_ref(), key.get_ref()),
                    value: config.text.get(value.span()).map(str::to_owned),
                    set: true,
                });
            }
        }
    }
    found
}

/// Returns section, name and value of the options that the reference documents outside of `[[...]]` sections.
fn documented() -> Vec<(&'static str, &'static str, &'static str)> {
    let mut section = "";
    let mut found = Vec::new();
    for line in REFERENCE.lines() {
        let text = line.strip_prefix("# ").unwrap_or(line);
        if text.starts_with("[[") {
            section = "";
        } else if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name;
        } else if let Some((key, value)) = text.split_once(" = ") {
            let is_key = key
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
            if is_key && !section.is_empty() {
                found.push((section, key, value));
            }
        }
    }
    found
}

/// Returns whether an option has the same effect with this value as without.
fn is_default(section: &str, key: &str, value: &str) -> bool {
    let parse = |text: &str| {
        Config::parse(Path::new("/etc/palisade/palisade.toml"), text)
            .ok()
            .map(|mut config| {
                config.text = "".into();
                config
            })
    };
    let with = parse(&format!("[node]\nname = \"n\"\n[{section}]\n{key} = {value}\n"))
        .or_else(|| parse(&format!("[node]\nname = \"n\"\n{key} = {value}\n")));
    with.is_some() && with == parse("[node]\nname = \"n\"\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn of(text: &str) -> Vec<Setting> {
        settings(&Config::parse(Path::new("/x/palisade.toml"), text).unwrap())
    }

    fn find<'a>(settings: &'a [Setting], name: &str) -> &'a Setting {
        settings
            .iter()
            .find(|setting| setting.name == name)
            .unwrap_or_else(|| panic!("{name}"))
    }

    #[test]
    fn values_come_from_the_file_or_are_defaults() {
        let found = of("[policy]\naudit = true\n[[interface]]\nname = \"eth0\"\nrole = \"host\"\n");
        let shown = |name: &str| {
            let setting = find(&found, name);
            (setting.value.as_deref(), setting.set)
        };
        assert_eq!(shown("policy.audit"), (Some("true"), true));
        assert_eq!(shown("policy.enforcement"), (Some("\"default\""), false));
        assert_eq!(shown("limits.conntrack"), (Some("262144"), false));
        assert_eq!(shown("node.state_dir"), (Some("\"/var/lib/palisade\""), false));
        // The documented values of these are examples.
        assert_eq!(shown("metrics.listen"), (None, false));
        assert_eq!(shown("dns.servers"), (None, false));
        assert_eq!(shown("interface[0].name"), (Some("\"eth0\""), true));
    }

    #[test]
    fn every_option_outside_of_repeated_sections_is_listed() {
        let listed: BTreeSet<String> = of("").into_iter().map(|setting| setting.name).collect();
        let repeated = [
            "namespace.",
            "interface.",
            "endpoint.",
            "peer.",
            "export.",
            "discover.",
        ];
        for name in crate::config::option_names() {
            if !repeated.iter().any(|prefix| name.starts_with(prefix)) {
                assert!(listed.contains(&name), "{name}");
            }
        }
    }
}
