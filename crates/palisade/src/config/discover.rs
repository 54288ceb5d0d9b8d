//! `[[discover]]`: workloads that are found.

use std::{collections::HashMap, path::PathBuf};

use palisade_discover::{InterfacePattern, LabelTemplate, Rule, Template, Wildcard, check_key, check_value};
use palisade_model::rule::Label;

use super::{
    labels::{label, namespace_labels, namespace_of},
    reader::Section,
};

/// Directory in which iproute2 mounts named network namespaces.
const NETNS_DIR: &str = "/run/netns";

/// `[[discover]]`: a source of workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Discover {
    /// Where the workloads are found.
    pub source: Source,
    /// How a workload becomes an endpoint.
    pub rule: Rule,
}

/// Where workloads are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Named network namespaces: the files of this directory.
    Netns(PathBuf),
}

/// Returns the sections. `reserved` are interfaces that no pattern may match, with what they are.
pub(super) fn read(
    sections: Vec<Section<'_, '_>>,
    namespaces: &HashMap<String, Vec<Label>>,
    reserved: &[(String, String)],
) -> Vec<Discover> {
    sections
        .into_iter()
        .filter_map(|section| discover(section, namespaces, reserved))
        .collect()
}

fn discover(
    section: Section<'_, '_>,
    namespaces: &HashMap<String, Vec<Label>>,
    reserved: &[(String, String)],
) -> Option<Discover> {
    #[derive(Clone, Copy)]
    enum Kind {
        Netns,
    }
    let given = section.required_string("kind", "\"netns\"").is_some();
    let kind = given
        .then(|| section.choice("kind", &[("netns", Kind::Netns)]))
        .flatten();
    let names = section.list("names", "a list of patterns: [\"web-*\"]", Wildcard::parse);
    if names.as_ref().is_none_or(Vec::is_empty) {
        section.error("[[discover]] needs names = [\"web-*\"]: the network namespaces that are workloads");
    }
    let names: Vec<Wildcard> = names.unwrap_or_default().into_iter().map(|at| at.value).collect();
    let stars = names.iter().map(Wildcard::stars).min().unwrap_or(0);
    let interfaces = interfaces(&section, reserved);
    let name = match section.string("name") {
        None => Template::parse("{name}", stars, false).ok(),
        Some(at) => Template::parse(&at.value, stars, false)
            .map_err(|message| section.error_at(at.offset, format!("discover.name: {message}")))
            .ok(),
    };
    let namespace = namespace_of(&section).unwrap_or_else(|| "default".to_owned());
    let labels = labels(&section, stars);
    let addresses = section.prefixes("addresses").unwrap_or_default();
    if addresses.is_empty() {
        // Root in a network namespace can give itself any address, and with it would take the identity of another one.
        section.error(
            "[[discover]] needs addresses = [\"10.0.1.0/24\"]: the prefixes from which its workloads have their addresses; \
             others do not count, because a workload can give itself any",
        );
    }
    let dir = section.absolute_path("dir");
    section.finish();
    let source = match kind? {
        Kind::Netns => Source::Netns(dir.unwrap_or_else(|| NETNS_DIR.into())),
    };
    Some(Discover {
        rule: Rule {
            kind: source.kind(),
            names,
            interfaces,
            name: name?,
            namespace_labels: namespace_labels(&namespace, namespaces),
            namespace,
            labels,
            container_labels: Vec::new(),
            addresses: addresses.into_iter().map(|at| at.value).collect(),
        },
        source,
    })
}

impl Source {
    /// Returns the kind as `kind` spells it.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Netns(_) => "netns",
        }
    }
}

fn interfaces(section: &Section<'_, '_>, reserved: &[(String, String)]) -> Vec<InterfacePattern> {
    let wanted = "a list of interface names or their beginnings: [\"veth*\"]";
    let list = section.list("interfaces", wanted, |text| {
        let pattern = InterfacePattern::parse(text)?;
        match reserved.iter().find(|(name, _)| pattern.matches(name)) {
            Some((name, what)) => Err(format!(
                "'{text}' matches {name}, {what}, and would close it; write a narrower pattern"
            )),
            None => Ok(pattern),
        }
    });
    let is_empty = list.as_ref().is_some_and(Vec::is_empty);
    if is_empty {
        section.error("discover.interfaces is empty: without a pattern no interface belongs to a workload");
    }
    let Some(list) = list else {
        let default = InterfacePattern::Prefix("veth".to_owned());
        if let Some((name, what)) = reserved.iter().find(|(name, _)| default.matches(name)) {
            section.error(format!(
                "the default interfaces = [\"{default}\"] matches {name}, {what}, and would close it; write a narrower \
                 pattern"
            ));
        }
        return vec![default];
    };
    list.into_iter().map(|at| at.value).collect()
}

fn labels(section: &Section<'_, '_>, stars: usize) -> Vec<LabelTemplate> {
    let mut list = Vec::new();
    for (name, value) in section.strings("labels") {
        let Some(label) = label(section, &name, &value) else {
            continue;
        };
        if let Err(message) = check_key(&label.key) {
            section.error_at(name.offset, message);
            continue;
        }
        // A placeholder is checked when it has its text.
        if !label.value.contains('{')
            && let Err(message) = check_value(&label.value)
        {
            section.error_at(value.offset, message);
        }
        match Template::parse(&label.value, stars, false) {
            Ok(template) => list.push(LabelTemplate {
                source: label.source,
                key: label.key,
                value: template,
            }),
            Err(message) => section.error_at(value.offset, message),
        }
    }
    list
}
